"""What a run ran on."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

PACKAGES = ("sculpt-ops", "torch", "triton", "transformers", "accelerate", "numpy")


def versions(device: torch.device) -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on, and the device."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["device"] = describe(device)
    return found


def describe(device: torch.device) -> str:
    """A device in words: the GPU's name, or the CPU's architecture and the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
