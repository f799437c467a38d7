"""A thin continual trainer on Hugging Face transformers: tasks, trainer, metrics, report."""

from .config import TrainConfig
from .report import write_report
from .result import Prediction, RunResult
from .tasks import Example, Task, load_tasks, read_jsonl_task, read_task
from .trainer import train

__all__ = [
    "Example",
    "Prediction",
    "RunResult",
    "Task",
    "TrainConfig",
    "load_tasks",
    "read_jsonl_task",
    "read_task",
    "train",
    "write_report",
]
