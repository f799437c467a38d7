"""The op families: schemas in C++ (csrc/ops.cpp), CPU kernels in C++, on CUDA library products, Triton or CUDA C++."""

from . import adam as _adam  # noqa: F401  (registers the fake, Autograd and CUDA kernels)
from . import cuda as _cuda  # noqa: F401  (registers the CUDA kernels)
from . import jacobi as _jacobi  # noqa: F401  (registers the fake, Autograd and CUDA kernels)
from . import products as _products  # noqa: F401  (registers the fakes, gradients and CUDA kernels)
from . import rounding as _rounding  # noqa: F401  (registers the fakes, Autograd and CUDA kernels)
from .orthonormalize import orthonormalize
from .project import foreach_project_, project, project_
from .restore import restore_
from .rsvd import rsvd
from .sketch import sketch, test_matrix

__all__ = [
    "foreach_project_",
    "orthonormalize",
    "project",
    "project_",
    "restore_",
    "rsvd",
    "sketch",
    "test_matrix",
]
