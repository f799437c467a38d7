"""A run in progress: what every part of it works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..remember import Carried
from ..subspaces import Subspaces
from .checkpoint import Checkpoints, Saved, write_state
from .config import TrainConfig
from .distributed import World
from .encoding import Collator, Encoded, EncodedTask
from .methods import Method, TaskContext
from .progress import Progress
from .result import RunResult
from .tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Run:
    """weights, rows: hashes of the first weights, and of every task's rows. saved: the state that the run goes on from.
    previous: of the last task's subspaces, what the next task's are derived from. last: those of the last task of all,
    if one more task would need them. text: of config.remember_text; a generated one from the first task on."""

    config: TrainConfig
    world: World
    progress: Progress
    tasks: Sequence[Task]
    encoded: Sequence[EncodedTask]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: Method
    result: RunResult
    weights: str
    rows: Mapping[str, str]
    saved: Saved | None = None
    previous: Carried | None = None
    last: Subspaces | None = None
    text: Sequence[Encoded] = ()

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(Path(self.config.output), self.world)

    @property
    def keeps(self) -> bool:
        """Whether the state is kept on disk."""
        return self.config.save_every is not None

    def context(self, index: int) -> TaskContext:
        """What the method is told at the `index`-th task."""
        collate = Collator(self.model, self.tokenizer)
        return TaskContext(index, self.encoded, self.model, collate, self.config, self.previous, self.text)

    def write(self) -> None:
        """The results so far."""

        def write() -> None:
            self.result.save()
            write_state(self.result, self.weights, self.rows)

        self.world.on_first("writing the results", write)
