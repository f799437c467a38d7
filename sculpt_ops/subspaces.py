"""Protected subspaces of a model's weights (arXiv 2504.07097): made, applied to gradients, guarded, measured, saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .basis import BASIS_DTYPES
from .binding import WeakTensors, check_fits
from .decompose import Choice
from .derive import (
    derive_layers,
    progress_bar,
    protected_shares,
    remember_tasks,
    search_starts,
    sketch_sides,
    sketched_shares,
)
from .dtensor import is_dtensor, is_fsdp, stored_bytes
from .guard import Guard, guard_optimizer
from .importance import layer_importance
from .layer import LayerSubspace, Sides, check_sides, project_each_
from .leak import LayerLeak, check_start_weights, measure_exact, measure_sketched
from .names import canonical_parameters, group_names, list_names
from .ranks import Energy, Importance, RankPolicy, SizePolicy, as_policy
from .remember import Carried, Memory, Remember, Remembered, RememberInputs, as_remember, memory_of
from .targets import resolve_targets

if TYPE_CHECKING:
    from .distributed.agreement import Ranks

__all__ = ["Parts", "Subspaces", "Unprotected"]


@dataclass(frozen=True)
class Unprotected:
    """Parameters without a basis whose names differ only in numbers: "model.layers.*.input_layernorm.weight"."""

    pattern: str
    parameters: int
    elements: int
    trained: bool


class Parts(NamedTuple):
    """What a `Subspaces` is made of."""

    layers: Mapping[str, LayerSubspace]
    sketches: Mapping[str, Tensor]
    unprotected: Sequence[Unprotected] = ()
    importance: Mapping[str, float] | None = None
    memory_of_tasks: Memory | None = None
    remembered_shares: Mapping[str, list[float]] | None = None


class Subspaces(Mapping[str, LayerSubspace]):
    """The protected subspace of every target matrix, by canonical parameter name. Made by `from_model` or `load`.

    Parameters are held by weak reference: keeping subspaces does not keep a model alive. A deep copy is bound to the
    copy of the model that the same call made, if there is one; unpickled subspaces are bound to none.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerSubspace],
        sketches: Mapping[str, Tensor],
        unprotected: Sequence[Unprotected] = (),
        importance: Mapping[str, float] | None = None,
        memory_of_tasks: Memory | None = None,
        remembered_shares: Mapping[str, list[float]] | None = None,
    ) -> None:
        """What `from_model` and `load` build on; `sketches` are those of `leak.sketch_weight` at the start.

        importance: what `Importance` chose the ranks by; None for any other policy.
        memory_of_tasks: for the subspaces of the next task, if tasks are remembered.
        remembered_shares: see the method of that name.
        """
        self._layers = dict(layers)
        self._sketches = dict(sketches)
        self.unprotected = tuple(unprotected)
        self.importance = dict(importance or {})
        self.memory_of_tasks = memory_of_tasks
        self._remembered_shares = dict(remembered_shares or {})
        self._parameters = WeakTensors()
        # Of sharded parameters that are projected where they lie: the layers with bases sharded likewise.
        self._in_place: dict[str, LayerSubspace] = {}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        protect: float | RankPolicy | Importance | None = None,
        *,
        sides: Sides = "both",
        targets: str | Sequence[str] | None = None,
        others: Literal["train", "freeze"] = "train",
        unfreeze_rank_ratio: float | None = None,
        batches: Iterable[Mapping[str, Any] | Tensor] | None = None,
        previous: Mapping[str, LayerSubspace] | None = None,
        remember: Remember | RememberInputs | Sequence[Remember | RememberInputs] | None = None,
        basis_dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> Subspaces:
        """Protect the top singular directions of a model's matrices as they stand, layer by layer.

        protect: the PROTECTED share of min(m, n), a float from 0.0 to 1.0, rounded down; or `Rank(64)`,
            `Energy(0.9)`, `Importance(mrr=0.1, trr=0.8)`, `Schedule(task=2, n_tasks=5)`, or a `RankPolicy` of one's
            own. Default 0.5. 0.0 protects nothing.
        unfreeze_rank_ratio: the same as the FREE share, in place of `protect`.
        sides: of a parameter W (m, n) AS STORED, "left" protects span(U) (its columns live in R^m), "right" span(V),
            "both" the two, "block" only the product of the two. A `torch.nn.Linear` stores (out, in): left is the
            output side. GPT-2's `Conv1D` stores (in, out): left is the input side.
        targets: glob patterns on parameter names; None takes every attention and feed-forward matrix of a known
            architecture. See `sculpt_ops.targets.resolve_targets`.
        others: "freeze" sets requires_grad to False on every parameter without a basis, once all else has succeeded;
            "train" leaves them as they are, unprotected.
        batches: model inputs (mappings of keyword arguments, or tensors) that `Importance` measures the layers on; see
            `importance.layer_importance`. No other policy looks at them. `RememberInputs` does, if there is a
            `previous`: they are then rows of the task just learned.
        previous: the subspaces of these weights before their last training, or what their `carry` returned. A matrix of
            1024 or more either way (on a GPU 8192), with at most a quarter of its directions protected, is searched
            from there on: up to 5 times faster, with at least 0.999 of the energy that can be held, as without. No
            other matrix takes notice of it.
        remember: protect besides, on the sides that are protected, what the tasks before taught: `Remember(0.12)`,
            `RememberInputs(0.95)` or a list of one each. `protect=0.0` protects that alone. previous has then to be of
            subspaces that were made with the same; without it there is nothing to remember yet. `Remember` keeps a copy
            of the weights on the CPU for the next task, and is not for sharded models. What is remembered of the inputs
            every rank keeps whole, on the CPU.
        basis_dtype: torch.float16 or torch.bfloat16 stores bases in 16 bit. What is protected is then exactly the span
            of the rounded ones, 3e-4 or 2e-3 away from the singular vectors', for half the memory and k² more 16-bit
            numbers a side; a basis is made float32 where it is used, which takes 4 d k² operations and a Cholesky QR
            (see docs/optimizers.md). None is float32 (float64 for a float64 parameter).
        progress: show a bar, if rich is installed.

        Needs a few matrices of extra memory at a time, on the parameter's device. Raises ValueError or TypeError for an
        argument it cannot use or a parameter it cannot protect, torch.linalg.LinAlgError for one that holds NaN or Inf;
        the model is then unchanged.
        """
        policy = as_policy(protect, unfreeze_rank_ratio)
        check_sides(sides)
        if others not in ("train", "freeze"):
            raise ValueError(f"others must be 'train' or 'freeze', got {others!r}")
        if basis_dtype not in (None, *BASIS_DTYPES):
            raise ValueError(f"basis_dtype must be one of {', '.join(map(str, BASIS_DTYPES))}, got {basis_dtype}")
        if not isinstance(previous, Mapping | None):
            raise TypeError(f"previous must be Subspaces or what carry() returned, got {type(previous).__name__}")
        found = resolve_targets(model, targets)
        double = [name for name, parameter in found.items() if parameter.dtype is torch.float64]
        if double and basis_dtype is not None:
            raise ValueError(
                f"basis_dtype: got {basis_dtype}, wanted None for float64 parameters: {list_names(double)}"
            )
        changes, inputs = as_remember(remember, sides)
        sharded = _is_sharded(model, found)
        memory: Memory | None = None
        shares: dict[str, list[float]] = {}
        if changes is not None or inputs is not None:
            if changes is not None and sharded:
                raise ValueError(
                    "remember: Remember: given with a sharded model, wanted RememberInputs or None: a change is the "
                    "difference of whole weights, which no rank has"
                )
            batches = None if batches is None else list(batches) if isinstance(policy, Importance) else batches
            earlier = memory_of(previous) or Memory()
            memory = None if previous is None else earlier
            memory = remember_tasks(model, found, sides, changes, inputs, memory, batches, _groups(model, found))
        importance: dict[str, float] = {}
        wanted: Mapping[str, Choice] | float
        if isinstance(policy, Importance):
            importance = layer_importance(model, found, batches, _groups(model, found))
            wanted = {name: policy.rank_of(min(found[name].shape), share) for name, share in importance.items()}
        elif isinstance(policy, SizePolicy):
            sizes = {name: min(matrix.shape) for name, matrix in found.items()}
            wanted = {name: min(max(policy.rank_of(size), 0), size) for name, size in sizes.items()}
        elif isinstance(policy, Energy) and policy.share > 0:
            wanted = float(policy.share)
        else:
            wanted = dict.fromkeys(found, policy.choose)
        with progress_bar(len(found), progress) as advance:
            remembered = None if memory is None else memory.remembered
            layers, sketches = _derive(model, found, wanted, sides, previous or {}, advance, basis_dtype, remembered)
        if changes is not None and memory is not None:
            shares = protected_shares(layers, found, earlier.start_weights) if earlier.start_weights else {}
            memory = memory.from_here(found)
        elif memory is not None and not sharded:
            sketches_of_starts = sketch_sides(found, memory.remembered)
            if before := earlier.start_sketches:
                sketches_of_starts = {n: torch.cat([before[n], now], dim=1) for n, now in sketches_of_starts.items()}
                shares = sketched_shares(layers, memory.remembered, sketches_of_starts)
            memory = replace(memory, start_sketches=sketches_of_starts)
        rest = {name: parameter for name, parameter in canonical_parameters(model)[0].items() if name not in found}
        trained = {name for name, parameter in rest.items() if parameter.requires_grad and others == "train"}
        subspaces = cls(layers, sketches, _unprotected(rest, trained), importance, memory, shares)
        subspaces._parameters = WeakTensors.of(found)
        subspaces._spread()
        if others == "freeze":
            for parameter in rest.values():
                parameter.requires_grad_(False)
        return subspaces

    def __getitem__(self, name: str) -> LayerSubspace:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Subspaces({len(self)} matrices, {self.memory() / 2**20:.1f} MiB)"

    def bind(self, model: nn.Module) -> Subspaces:
        """Use the parameters of `model` that have the same canonical names from here on; returns self.

        Needed after `load` and after anything that replaces parameter objects. Raises ValueError if one is missing or
        of another shape.
        """
        parameters, aliases = canonical_parameters(model)
        parameters |= {alias: parameters[name] for alias, name in aliases.items()}
        if missing := [name for name in self if name not in parameters]:
            raise ValueError(f"the model lacks parameters that have a basis: {list_names(missing)}")
        for name, layer in self.items():
            if tuple(parameters[name].shape) != layer.shape:
                given = tuple(parameters[name].shape)
                raise ValueError(f"the basis of {name} is for shape {layer.shape}, the model's parameter has {given}")
        first: dict[int, str] = {}
        for name in self:
            if (other := first.setdefault(id(parameters[name]), name)) != name:
                raise ValueError(f"{other} and {name} have a basis each, and are one parameter of this model")
        self._parameters = WeakTensors.of({name: parameters[name] for name in self})
        if any(is_dtensor(parameter) for _, parameter in self._bound()):
            from .distributed.layers import share_out

            self._layers, self._sketches = share_out(self, self._sketches, dict(self._bound()))
        self._spread()
        return self

    def parameter(self, name: str) -> Tensor | None:
        """The parameter that basis `name` is bound to, None if there is none or it is gone."""
        reference = self._parameters.get(name)
        return None if reference is None else reference()

    def in_place(self, name: str) -> LayerSubspace:
        """The subspace of `name` as its gradient is projected: for a sharded parameter that is not worth a way to its
        owner and back, with bases that are DTensors; otherwise as stored."""
        return self._in_place.get(name, self._layers[name])

    def to(self, device: torch.device | str) -> Subspaces:
        """Move every stored tensor to `device`, as after `model.to(device)`; returns self."""
        self._layers = {name: layer.to(device) for name, layer in self._layers.items()}
        self._sketches = {n: sketch if sketch.is_meta else sketch.to(device) for n, sketch in self._sketches.items()}
        self._in_place = {name: layer.to(device) for name, layer in self._in_place.items()}
        return self

    def use_reflectors(self) -> None:
        """Store protected bases as reflectors from here on (`Basis.form`), as free-space coordinates need them. They
        span the same spaces, to rounding."""
        with torch.no_grad():
            self._layers = {name: layer.with_reflectors() for name, layer in self._layers.items()}
        self._in_place = {}

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project `.grad` of every bound parameter in place; a parameter without one is passed over.

        Idempotent to rounding. Gradient clipping belongs after it: before, it counts gradient that is then removed. An
        adaptive optimizer still leaks afterwards (with Adam 38 % of the change in examples/demo), which
        `sculpt_ops.AdamW` and `guard` prevent.
        """
        pairs: list[tuple[Tensor, LayerSubspace]] = []
        away: list[tuple[Tensor, LayerSubspace]] = []
        for name, parameter in self._bound():
            if parameter.grad is not None and self[name].protects:
                if parameter.grad.is_sparse:
                    raise RuntimeError(f"{name} has a sparse gradient, which cannot be projected")
                stored = self[name].left_basis or self[name].right_basis
                if stored is None or torch.float64 in (parameter.dtype, stored.columns.dtype):
                    # Others would be projected before this one is refused. Asking each takes 2.8 us.
                    check_fits(name, self[name], parameter)
                layer = self.in_place(name)
                (pairs if layer.owner is None else away).append((parameter.grad, layer))
        project_each_(pairs)
        if away:
            from .distributed.layers import project_sharded_

            project_sharded_(away)

    def guard(
        self, optimizer: Any, *, start: Mapping[str, Tensor] | str | Path | None = None, offload: bool = False
    ) -> Guard:
        """After every step of `optimizer`, put the protected part of each weight back to what it was at the start.

        For any torch optimizer and whatever it does inside. Of a wrapper that keeps one as `.optimizer` it is that
        one's step, not what the wrapper itself does to weights afterwards (Lookahead). In fp32 the leak stays at a few
        2^-24 ||W|| (4.9 on SmolLM2-135M) however many steps are taken, in half precision at one rounding of the
        weights. There a step of less than half a unit in the last place is lost, as without a guard, and so is most of
        what stochastic rounding would have saved of it: 26 % of the change at lr 1e-4, all of it at 1e-5 (256 x 256,
        bfloat16, 200 steps). Guard fp32 weights under autocast, or use AdamW(master="split"), which needs no guard and
        is refused.

        Stores for a matrix what is smaller: images in fp32, k (m + n) numbers, or a copy in the weight's dtype; a copy
        too where the stored basis is that of the free space.

        start: None, the weights as they are now; or the weights that the bases were made from, by name or as the
            `Guard.save` of an earlier guard wrote them, for a run that is resumed.
        offload: keep what is stored on the CPU (pinned, for CUDA) and bring it over one matrix at a time.

        Returns a handle whose `remove()` ends it; a copy of the optimizer is not guarded. Raises ValueError if the
        optimizer lacks a parameter that has a basis, and if `start` is of other matrices, or its protected part not
        that of the weights the bases were made from.
        """
        return guard_optimizer(self, self._sketches, optimizer, start, offload)

    @torch.no_grad()
    def leak(
        self, start: Mapping[str, Tensor] | None = None, *, read: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, LayerLeak]:
        """How much of each weight's change since the start lies in its protected space; see `LayerLeak`.

        start: the start weights by name, for the exact figures in float64. Without it they are estimated from a sketch
            taken when the bases were made, to about 20 % of a norm.
        read: what is measured in place of a parameter, one at a time (sharded ones all at once). With master="split"
            that is `AdamW.master_weight`: the model's own weights lack the bits that hold most of a small change.
        """
        start = None if start is None else check_start_weights(start, self)
        read = read or (lambda parameter: parameter)
        if self._sharded:
            from .distributed.layers import measure_sharded

            return measure_sharded(self, {n: read(p) for n, p in self._bound()}, self._sketches, start)
        if start is None:
            return {n: measure_sketched(self[n], read(p), self._sketches[n], n) for n, p in self._bound()}
        return {name: measure_exact(self[name], read(parameter), start[name]) for name, parameter in self._bound()}

    @property
    def remembered(self) -> Mapping[str, Remembered]:
        """What is remembered of earlier tasks, by name; empty without `remember`."""
        return {} if self.memory_of_tasks is None else self.memory_of_tasks.remembered

    def remembered_share(self) -> dict[str, float]:
        """||P dW|| / ||dW|| of what the last task has changed, P the projector onto what is protected now: 1.0 where
        the next task cannot touch it. By name, of subspaces made with `remember` after a task; 0.0 where nothing has
        changed. With `RememberInputs` alone P is of the side that the inputs lie on, and the share is estimated from a
        sketch of 16 rows; not known of sharded models. Bases that are only derived anew protect next to none of it."""
        return {name: shares[-1] for name, shares in self._remembered_shares.items()}

    def remembered_shares(self) -> dict[str, list[float]]:
        """As `remembered_share`, of the change of every task that is known, in the order learned: all of them with
        `RememberInputs` alone, otherwise the last."""
        return {name: list(shares) for name, shares in self._remembered_shares.items()}

    def carry(self) -> Carried:
        """What the subspaces of the next task need of these as `previous`, so that these can be released."""
        return Carried(search_starts(self), self.memory_of_tasks)

    def memory(self) -> int:
        """Bytes of what is stored, of sharded parameters on this rank: bases, sketches, and on the CPU what is
        remembered, with the start weights."""
        tensors = [tensor for layer in (*self.values(), *self._in_place.values()) for tensor in layer.tensors()]
        tensors += self._sketches.values()
        tensors += () if self.memory_of_tasks is None else self.memory_of_tasks.tensors()
        return stored_bytes(tensors)

    def save(self, path: str | Path) -> None:
        """Write bases, sketches and what `summary` shows to one safetensors file, replacing `path` once it is whole."""
        from .storage import save_subspaces

        save_subspaces(self, self._sketches, Path(path), self._ranks())

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Subspaces:
        """Read what `save` wrote, onto the CPU; with `model`, bound to it and each basis on its parameter's device.

        Raises ValueError if the file is truncated or not one of these, or if the model does not fit.
        """
        subspaces = cls(*_read(Path(path), model))
        if model is not None:
            subspaces.bind(model)
            for name, parameter in subspaces._bound():
                subspaces._layers[name] = subspaces._layers[name].to(parameter.device)
                if not subspaces._sketches[name].is_meta:
                    subspaces._sketches[name] = subspaces._sketches[name].to(parameter.device)
        return subspaces

    def summary(self, *, kinds: bool = False) -> str:
        """A table of layer, shape, protected rank, energy held and what is stored, then what is NOT protected. kinds:
        one line for all layers whose names differ only in numbers, from the smallest figure to the largest."""
        from .summary import summarise

        return summarise(self, kinds)

    @property
    def _sharded(self) -> bool:
        return any(layer.owner is not None for layer in self.values())

    def _ranks(self) -> Ranks | None:
        """The ranks that the layers are spread over."""
        if not self._sharded:
            return None
        from .distributed.sharding import sharding_of

        name, parameter = next(iter(self._bound()))
        return sharding_of(name, parameter).ranks

    def _spread(self) -> None:
        self._in_place = {}
        if self._sharded:
            from .distributed.layers import in_place_layers

            with torch.no_grad():
                self._in_place = in_place_layers(self, dict(self._bound()))

    def _bound(self) -> list[tuple[str, Tensor]]:
        bound = [(name, self.parameter(name)) for name in self]
        if gone := [name for name, parameter in bound if parameter is None]:
            raise RuntimeError(f"no parameter is bound to the bases of {list_names(gone)}: call bind(model)")
        return [(name, parameter) for name, parameter in bound if parameter is not None]


@torch.no_grad()
def _derive(
    model: nn.Module,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Choice] | float,
    sides: Sides,
    previous: Mapping[str, LayerSubspace],
    advance: Callable[[], None],
    basis_dtype: torch.dtype | None,
    remembered: Mapping[str, Remembered] | None,
) -> tuple[dict[str, LayerSubspace], dict[str, Tensor]]:
    """`derive_layers`, the work spread over the ranks where there are several."""
    settings = (found, wanted, sides, previous, advance, basis_dtype)
    if _is_sharded(model, found):
        from .distributed.layers import derive_sharded

        return derive_sharded(*settings, remembered)
    if (ranks := _replicas(model)) is not None:
        from .distributed.layers import derive_replicated

        return derive_replicated(*settings, remembered, ranks)
    return derive_layers(*settings, remembered)


def _is_sharded(model: nn.Module, found: Mapping[str, Tensor]) -> bool:
    return any(is_dtensor(matrix) for matrix in found.values()) or any(is_fsdp(module) for module in model.modules())


def _replicas(model: nn.Module) -> Ranks | None:
    """The ranks that hold the same model each."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return None
    from .distributed.agreement import Ranks

    return Ranks.of(model.process_group)


def _groups(model: nn.Module, found: Mapping[str, Tensor]) -> Sequence[Ranks]:
    """Over which the ranks' batches are summed, one group after the other; none for a model on one rank."""
    if _is_sharded(model, found):
        from .distributed.sharding import mesh_ranks

        return mesh_ranks(found)
    replicas = _replicas(model)
    return () if replicas is None else (replicas,)


def _read(path: Path, model: nn.Module | None) -> Parts:
    """What is in the file, of a sharded model what this rank needs."""
    from .storage import load_subspaces

    parameters = {} if model is None else canonical_parameters(model)[0]
    if not any(is_dtensor(parameter) for parameter in parameters.values()):
        return load_subspaces(path)
    from .distributed.files import read_own

    return read_own(path, cast(nn.Module, model))


def _unprotected(rest: Mapping[str, Tensor], trained: Collection[str]) -> list[Unprotected]:
    return [
        Unprotected(pattern, len(names), sum(rest[name].numel() for name in names), is_trained)
        for is_trained in (True, False)
        for pattern, names in group_names(name for name in rest if (name in trained) == is_trained).items()
    ]
