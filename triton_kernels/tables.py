"""Tables that stay on a device from call to call, and under the CUDA graphs that have captured them; without triton."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["held", "is_capturing", "upload"]

T = TypeVar("T")

# Two for a list whose addresses are known. AdamW's step of LLaMA-2 7B has dozens of lists: with room for 32 tables in
# all each was checked and sorted anew at every step.
TABLES = 512
_tables: OrderedDict[Hashable, Any] = OrderedDict()
_captured: dict[int, Any] = {}


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of `device`."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def held(key: Hashable, make: Callable[[], T], device: torch.device) -> T:
    """make(), or what it returned for this key earlier. What a graph captures is kept for good, and what is first made
    while capturing is no use to others: its copy to the device runs in the graph's replays alone."""
    capturing = is_capturing(device)
    # The copy to the device is ordered on its stream alone.
    key = (key, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    # Taken out and put in again, as the latest: comparing the key of a model's list takes longer than all else here.
    value: T | None = _tables.pop(key, None)
    made = value is None
    if value is None:
        value = make()
    if not (made and capturing):
        _tables[key] = value
        while len(_tables) > TABLES:
            _tables.popitem(last=False)
    if capturing:
        _captured[id(value)] = value
    return value


def upload(array: NDArray[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """On the device, and the pinned memory it is copied from, without waiting for the copy."""
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host, host
    host = host.pin_memory()
    return host.to(device, non_blocking=True), host
