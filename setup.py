"""Builds the CPU ops (stable ABI, no Python in them) and the small pybind11 host module.

``triton_kernels/`` is installed as ``sculpt_ops.triton_kernels``: another distribution owns the top-level import name.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

CSRC = Path("csrc")
# torch >= 2.10 is enough for every stable-ABI call in csrc; the package itself asks for 2.11.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# -fno-math-errno: a square root that sets errno is a call, and the loop around it is not vectorised.
# No -march: panel_*.cpp choose their instruction set by pragma and csrc/cpu/kernels.cpp picks one at run time.
FLAGS = [
    *("-O3", "-fno-math-errno", "-std=c++17", "-fvisibility=hidden"),
    *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"),
]


def sources(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.cpp"))


def headers() -> list[str]:
    return sorted(str(path) for path in CSRC.rglob("*.h"))


def cuda_extensions() -> list[CUDAExtension]:
    """The CUDA C++ kernels, where torch is a CUDA build and nvcc is there. SCULPT_NO_CUDA=1 leaves them out: the CUDA
    path then uses Triton, library products and torch's AdamW."""
    if torch.version.cuda is None or CUDA_HOME is None or os.environ.get("SCULPT_NO_CUDA") == "1":
        return []
    # The one-pass kernels, files with a suffix, are for Hopper; the others compile for 8.0 to 10.0 as well.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
    return [
        CUDAExtension(
            "sculpt_ops._cuda",
            [*sources(CSRC / "cuda"), *sorted(str(path) for path in (CSRC / "cuda").glob("*.cu"))],
            include_dirs=[str(CSRC.resolve())],
            depends=headers(),
            extra_compile_args={
                "cxx": [*FLAGS, *STABLE_ABI, "-DUSE_CUDA"],
                "nvcc": ["-O3", "-std=c++17", *STABLE_ABI, "-DUSE_CUDA"],
            },
            py_limited_api=True,
        )
    ]


CUDA = cuda_extensions()
print(f"sculpt-ops: building the CPU ops{' and the CUDA kernels' if CUDA else ''}")
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(
    packages=[
        "sculpt_ops",
        "sculpt_ops.bench",
        "sculpt_ops.ops",
        "sculpt_ops.optim",
        "sculpt_ops.continual",
        "sculpt_ops.distributed",
        "sculpt_ops.continual.methods",
        "sculpt_ops.continual.plan",
        "sculpt_ops.triton_kernels",
    ],
    package_dir={"sculpt_ops": "sculpt_ops", "sculpt_ops.triton_kernels": "triton_kernels"},
    package_data={"sculpt_ops": ["py.typed"]},
    include_package_data=False,
    ext_modules=[
        CppExtension(
            "sculpt_ops._C",
            ["csrc/ops.cpp", "csrc/layout.cpp", *sources(CSRC / "cpu"), *sources(CSRC / "linalg")],
            include_dirs=[str(CSRC.resolve())],
            depends=headers(),
            extra_compile_args=[*FLAGS, *STABLE_ABI],
            py_limited_api=True,
        ),
        CppExtension(
            "sculpt_ops._host",
            ["csrc/host.cpp"],
            include_dirs=[str(CSRC.resolve())],
            depends=headers(),
            extra_compile_args=FLAGS,
        ),
        *CUDA,
    ],
    cmdclass={"build_ext": BuildExtension},
)
