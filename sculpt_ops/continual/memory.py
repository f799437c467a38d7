"""Peak memory of a stretch of work."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Peak since the last `reset`: allocated bytes on a GPU, resident bytes of the process on a CPU.

    Where the system keeps no resettable peak (it does on Linux), the CPU figure is that of the process's whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
