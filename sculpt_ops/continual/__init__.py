"""A thin continual trainer on Hugging Face transformers: tasks, trainer, metrics, report."""

from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .report import write_report
from .result import Prediction, RunResult
from .tasks import Example, Task, load_tasks, read_jsonl_task, read_task
from .trainer import train

if TYPE_CHECKING:
    from .callback import LeakCallback, optimizer_for_trainer

__all__ = [
    "Example",
    "LeakCallback",
    "Prediction",
    "RunResult",
    "Task",
    "TrainConfig",
    "load_tasks",
    "optimizer_for_trainer",
    "read_jsonl_task",
    "read_task",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # These import transformers, which takes seconds.
    if name in ("LeakCallback", "optimizer_for_trainer"):
        from . import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
