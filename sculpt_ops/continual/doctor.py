"""What `sculpt doctor` prints: versions, which kernels are there, and what to do about what is not."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .environment import describe

OPS = ("project", "project_", "foreach_project_", "restore_")
TRAINER_PACKAGES = ("transformers", "accelerate", "safetensors", "matplotlib", "rich", "typer")


@dataclass(frozen=True)
class Finding:
    """One line of the examination. advice: what to do; None where all is well."""

    what: str
    found: str
    advice: str | None = None


def examine() -> list[Finding]:
    """Look at the installation; never raises."""
    return [*_versions(), *_devices(), *_kernels(), *_trainer()]


def _versions() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    yield Finding("sculpt-ops", _version("sculpt-ops") or "not installed, imported from a checkout")
    yield Finding("torch", torch.__version__)
    triton = _version("triton")
    yield Finding("triton", triton or "none", None if triton else "pip install triton, for the Triton kernels on a GPU")


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield Finding(f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    elif torch.backends.cuda.is_built():
        yield Finding("GPU", "none visible", "check nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES")
    else:
        found = f"this torch is a CPU build ({describe(torch.device('cpu'))})"
        yield Finding("GPU", found, "install a CUDA build of torch to use a GPU")


def _kernels() -> Iterator[Finding]:
    """Which of the ops have a kernel of ours under a dispatch key; without one the plain torch formulas run."""
    try:
        importlib.import_module("sculpt_ops")
    except Exception as error:
        yield Finding("ops", f"import sculpt_ops fails: {error}", "build it anew: pip install --no-build-isolation .")
        return
    build = importlib.import_module("sculpt_ops._host")
    yield Finding("built", f"against torch {build.torch_version} by compiler {build.compiler}")
    keys = ["CPU", "CUDA"] if torch.cuda.is_available() else ["CPU"]
    for key in keys:
        there = [op for op in OPS if _has_kernel(op, key)]
        found = "all" if len(there) == len(OPS) else ", ".join(there) or "none"
        advice = None if len(there) == len(OPS) else "build it anew: pip install --no-build-isolation ."
        yield Finding(f"ops on {key}", found, advice)
    heuristics = importlib.import_module("sculpt_ops.ops.heuristics")
    missing = importlib.import_module("sculpt_ops.ops.variants").cuda_missing()
    reach = "built; chosen where they were faster, on GPUs of capability 9.0"
    yield Finding("CUDA C++ kernels", f"none: {missing}" if missing else reach)
    try:
        yield Finding("backend", heuristics.forced_backend() or "chosen by shape and device")
    except ValueError as error:
        yield Finding("backend", str(error), "unset SCULPT_BACKEND")


def _has_kernel(op: str, key: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"sculpt::{op}", key))
    except RuntimeError:
        return False


def _trainer() -> Iterator[Finding]:
    for package in TRAINER_PACKAGES:
        version = _version(package)
        yield Finding(package, version or "none", None if version else "pip install sculpt-ops[train]")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
