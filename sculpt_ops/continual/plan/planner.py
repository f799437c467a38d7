"""The rows of a plan: every way to train a model, each with its memory and least time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...layer import LayerSubspace, Sides, check_sides
from ...names import canonical_parameters
from ...optim.options import Options
from ...optim.precision import Master
from ...ranks import Fraction, SizePolicy
from ...targets import resolve_targets
from ..config import STATES, Protect, format_protect
from ..modeling import longest_input
from .gpus import H100, Gpu, Work, projection_work, update_work
from .models import fake_model, open_config
from .peers import OsfLinear, OsftLinear, factorise
from .result import Plan, Row, Setting
from .storage import footprint, protected_layer
from .trace import Trace, trace_pass

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["make_plan"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Where positions are relative: 512 tokens to read and as many to write, what T5 was trained with.
LONGEST_ROW = 1024
# Which of our masters go with which weights: bfloat16 ones without lose small steps.
MASTERS_OF: dict[str, tuple[Master, ...]] = {
    "float32": ("none",),
    "bfloat16": ("split", "stochastic"),
}


def make_plan(
    model: str | Path,
    *,
    protect: Sequence[Protect] = (0.5,),
    sides: str = "both",
    targets: str | Sequence[str] | None = None,
    others: str = "train",
    dtypes: Sequence[str] = tuple(DTYPES),
    bf16: bool = True,
    tokens: int = 4096,
    batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    gpu: Gpu | None = None,
    moment_dtype: str | None = None,
    peers: bool = True,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan for `model`, of which no weights are needed; see `models.open_config` for what it may be.

    protect: shares to compare, each as in `Subspaces.from_model`, of a kind that needs neither weights nor data; none
        for AdamW alone.
    sides, targets, others: as in `Subspaces.from_model`.
    dtypes: of the weights. bf16: bfloat16 autocast over float32 weights.
    tokens: of one forward pass, in `batch_size` rows; None is as few rows as the model has positions for.
    gpu: that has to hold it; None names none, and times are those of an H100.
    moment_dtype: of ours, as in `AdamW`. peers: compare with PEFT and mini_trainer too, for twice the time.

    Raises ValueError for what is not there, unknown, or does not fit together.
    """
    for name, given, known in (
        ("others", [others], ("train", "freeze")),
        ("dtype", dtypes, tuple(DTYPES)),
        ("moment_dtype", [moment_dtype], (None, *DTYPES)),
    ):
        if unknown := [value for value in given if value not in known]:
            raise ValueError(f"{name}: got {unknown[0]!r}, wanted one of {', '.join(map(str, known))}")
    policies = {format_protect(share): _size_policy(share) for share in protect}
    config = open_config(model, trust_remote_code)
    with FakeTensorMode():
        first = fake_model(config, torch.float32)
        # Where nothing is protected an architecture without known targets has its plan too.
        found = resolve_targets(first, targets) if policies else {}
        rows, length = _batch_shape(first, tokens, batch_size)
        planner = _Planner(
            config=config,
            ranks={n: {name: p.rank_of(min(w.shape)) for name, w in found.items()} for n, p in policies.items()},
            sides=check_sides(sides),
            others=others,
            rows=rows,
            length=length,
            gradient_checkpointing=gradient_checkpointing,
            moment_dtype=None if moment_dtype is None else DTYPES[moment_dtype],
            gpu=gpu or H100,
            peers=peers,
        )
        settings = [row for dtype in dtypes for row in planner.rows_of(dtype, bf16 and dtype == "float32")]
    return Plan(
        model=str(model),
        parameters=sum(parameter.numel() for parameter in first.parameters()),
        matrices=len(found),
        protected=sum(parameter.numel() for parameter in found.values()),
        rows=rows,
        length=length,
        sides=sides,
        gradient_checkpointing=gradient_checkpointing,
        gpu=gpu or H100,
        gpu_given=gpu is not None,
        settings=tuple(settings),
    )


@dataclass(frozen=True)
class _Planner:
    """ranks: by what is protected, of every matrix that gets a basis. For use under a FakeTensorMode."""

    config: PretrainedConfig
    ranks: Mapping[str, Mapping[str, int]]
    sides: Sides
    others: str
    rows: int
    length: int
    gradient_checkpointing: bool
    moment_dtype: torch.dtype | None
    gpu: Gpu
    peers: bool

    def rows_of(self, dtype: str, autocast: bool) -> Iterator[Row]:
        model = self._model(dtype)
        trace = self._trace(model, autocast)
        yield self._row(Setting("AdamW", dtype, autocast), model, trace)
        if self.others == "freeze" and self.ranks:
            targets = next(iter(self.ranks.values()))
            for name, parameter in canonical_parameters(model)[0].items():
                parameter.requires_grad_(name in targets)
            trace = self._trace(model, autocast)
        for protect, ranks in self.ranks.items():
            yield from self._ours(Setting("sculpt", dtype, autocast, protect), model, trace, ranks)
            if self.peers:
                yield self._peer(Setting("PEFT OSF", dtype, autocast, protect), ranks, OsfLinear, "freeze")
                yield self._peer(Setting("mini_trainer OSFT", dtype, autocast, protect), ranks, OsftLinear, "train")

    def _ours(self, setting: Setting, model: PreTrainedModel, trace: Trace, ranks: Mapping[str, int]) -> Iterator[Row]:
        shapes = {name: p.shape for name, p in canonical_parameters(model)[0].items() if name in ranks}
        for state in STATES[:1] if self.sides == "block" else STATES:
            for basis in (None, "bfloat16"):
                kind = None if basis is None else DTYPES[basis]
                layers = {
                    name: protected_layer((m, n), ranks[name], self.sides, kind, coordinates=state == "subspace")
                    for name, (m, n) in shapes.items()
                }
                for master in MASTERS_OF[setting.dtype]:
                    chosen = replace(setting, state=state, master=master, basis_dtype=basis)
                    options = Options(state=state, master=master, moment_dtype=self.moment_dtype)
                    yield self._row(chosen, model, trace, layers, options)

    def _peer(
        self,
        setting: Setting,
        ranks: Mapping[str, int],
        kind: type[OsfLinear] | type[OsftLinear],
        others: Literal["train", "freeze"],
    ) -> Row:
        model = self._model(setting.dtype)
        try:
            factorise(model, ranks, kind, others)
            trace = self._trace(model, setting.autocast)
        except (ValueError, AttributeError) as error:
            # OSFT takes the weight away, which T5's code looks at.
            return Row(setting, note=f"cannot be used on this model: {error}")
        made = [layer for layer in model.modules() if isinstance(layer, kind)]
        work = [work for layer in made for work in layer.projections()]
        return self._row(setting, model, trace, work=work, frozen_bases=sum(layer.bases() for layer in made))

    def _row(
        self,
        setting: Setting,
        model: PreTrainedModel,
        trace: Trace,
        layers: Mapping[str, LayerSubspace] | None = None,
        options: Options | None = None,
        *,
        work: Sequence[Work] = (),
        frozen_bases: int = 0,
    ) -> Row:
        """options, layers: of ours. work, frozen_bases: what another method adds to the step and keeps."""
        layers = layers or {}
        parameters = canonical_parameters(model)[0]
        memory = footprint(parameters, layers, trace, options, frozen_bases)
        if setting.dtype == "float32" and not setting.autocast:
            return Row(setting, memory)
        options = options or Options()
        work = [Work(0, trace.operations), *work]
        work += [update_work(p, layers.get(name), options) for name, p in parameters.items() if p.requires_grad]
        work += [w for name, layer in layers.items() for w in projection_work(parameters[name], layer, options)]
        return Row(setting, memory, self.gpu.seconds(work))

    def _trace(self, model: PreTrainedModel, autocast: bool) -> Trace:
        return trace_pass(model, self.rows, self.length, autocast=autocast)

    def _model(self, dtype: str) -> PreTrainedModel:
        return fake_model(self.config, DTYPES[dtype], self.gradient_checkpointing)


def _size_policy(protect: Protect) -> SizePolicy:
    policy = Fraction(protect) if isinstance(protect, float) else protect
    if not isinstance(policy, SizePolicy):
        raise ValueError(f"protect: got {format_protect(protect)}, wanted a share as 0.5, or rank:64, or schedule:2:5")
    return policy


def _batch_shape(model: PreTrainedModel, tokens: int, rows: int | None) -> tuple[int, int]:
    """Rows and their length."""
    if tokens < 1 or (rows is not None and rows < 1):
        raise ValueError(f"tokens and batch_size: got {tokens} and {rows}, wanted 1 or more")
    positions = longest_input(model) or LONGEST_ROW
    if rows is None:
        rows = next((r for r in range(1, tokens + 1) if tokens % r == 0 and tokens // r <= positions), 1)
    if tokens % rows:
        raise ValueError(f"tokens: got {tokens}, wanted a multiple of batch_size {rows}")
    if tokens // rows > positions and longest_input(model) is not None:
        raise ValueError(f"batch_size: got {rows}, {tokens // rows} tokens a row; the model has {positions} positions")
    return rows, tokens // rows
