"""Builds the CPU ops (stable ABI, no Python in them) and the small pybind11 host module.

``triton_kernels/`` is installed as ``sculpt_ops.triton_kernels``: another distribution owns the top-level import name.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = Path("csrc")
# torch >= 2.10 is enough for every stable-ABI call in csrc; the package itself asks for 2.11.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# -fno-math-errno: a square root that sets errno is a call, and the loop around it is not vectorised.
# No -march: panel_*.cpp choose their instruction set by pragma and cpu.cpp picks one at run time.
FLAGS = [
    *("-O3", "-fno-math-errno", "-std=c++17", "-fvisibility=hidden"),
    *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"),
]


def sources(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.cpp"))


def headers() -> list[str]:
    return sorted(str(path) for path in CSRC.rglob("*.h"))


print("sculpt-ops: building the CPU ops; the CUDA path uses Triton and library products, no nvcc needed")
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
            ["csrc/ops.cpp", *sources(CSRC / "cpu"), *sources(CSRC / "linalg")],
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
    ],
    cmdclass={"build_ext": BuildExtension},
)
