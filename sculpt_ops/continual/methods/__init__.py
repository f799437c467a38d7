"""Methods of continual learning that run in the same harness."""

from __future__ import annotations

from ..config import TrainConfig
from .adapters import Lora, OLora, PeftOsf, check_peft
from .base import Method, TaskContext
from .ewc import Ewc
from .rows import MultiTask, Replay
from .sculpt import First, Random, Sculpt
from .weights import Interpolate, PerTask

__all__ = ["Method", "TaskContext", "make_method"]

_METHODS: dict[str, type[Method]] = {
    "sculpt": Sculpt,
    "random": Random,
    "first": First,
    "plain": Method,
    "interpolate": Interpolate,
    "lora": Lora,
    "o-lora": OLora,
    "peft-osf": PeftOsf,
    "replay": Replay,
    "ewc": Ewc,
    "multitask": MultiTask,
    "per-task": PerTask,
}
# That work on weights which are spread over processes, or whole on each.
_PARALLEL = ("sculpt", "plain", "replay", "multitask")


def make_method(config: TrainConfig, *, parallel: bool = False) -> Method:
    """ValueError for one that does not run in several processes, if it has to, or lacks its package."""
    kind = _METHODS[config.method]
    if parallel and config.method not in _PARALLEL:
        raise ValueError(f"method: got {config.method!r} in several processes, wanted one of {', '.join(_PARALLEL)}")
    if issubclass(kind, Lora | PeftOsf):
        check_peft()
    return kind()
