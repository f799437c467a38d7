"""What earlier tasks taught, protected too: bases of their weight changes and of the inputs that they feed a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .linalg import orthonormal, smallest_rank
from .names import list_names
from .ranks import Fraction

if TYPE_CHECKING:
    from .bases import TopSubspace
    from .layer import LayerSubspace

__all__ = [
    "Carried",
    "Memory",
    "Remember",
    "RememberInputs",
    "Remembered",
    "Side",
    "as_remember",
    "change_of",
    "check_memory",
    "extend_changes",
    "extend_inputs",
    "join",
    "memory_of",
    "remember_inputs",
]

Side = Literal["left", "right"]

# A direction whose part outside of a space is smaller belongs to it: float32 bases are known to some 1e-7.
_SMALLEST_SINE = 1e-6
# Numbers of the covariances that are decomposed together: in float64 128 MB, and about three times that at work.
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Remember:
    """Of every earlier task, the top `rank` left and right singular directions of its own weight change: the weights at
    its end less those at its start.

    An update lies outside the top directions of the weights, so that of the next task's weights the top directions are
    the same and nothing of what was learned is protected. Its own top directions are.

    rank: an int, or a float in (0, 1] for a share of min(m, n), rounded down, of one direction at least. Fewer where
        the change has fewer that stand out from the rounding of the weights.

    Raises TypeError unless `rank` is a number, ValueError if it is out of range.
    """

    rank: int | float

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int | float):
            raise TypeError(f"Remember: rank: given {self.rank!r}, wanted an int, or a float in (0, 1] for a share")
        if isinstance(self.rank, int) and self.rank < 1:
            raise ValueError(f"Remember: rank: given {self.rank}, wanted 1 or more")
        if isinstance(self.rank, float) and not 0.0 < self.rank <= 1.0:
            raise ValueError(f"Remember: rank: given {self.rank}, wanted an int, or a float in (0, 1] for a share")

    def rank_of(self, size: int) -> int:
        """Directions of a change with min(m, n) = `size`."""
        return min(self.rank, size) if isinstance(self.rank, int) else max(1, Fraction(self.rank).rank_of(size))


@dataclass(frozen=True)
class RememberInputs:
    """The directions of a layer's inputs x on rows of every earlier task, so that dW x = 0 for those: gradient
    projection memory (Saha, Garg and Roy, ICLR 2021, arXiv 2103.09762).

    Per task the top eigenvectors of the uncentred covariance, outside of what is remembered already (eq. 8), are added
    until all of it together holds the share `energy` of the squared inputs (eq. 9). Of a `torch.nn.Linear`, stored
    (out, in), they are right directions, of GPT-2's `Conv1D` left ones. Layers that get the same tensor share one
    covariance and one basis. Only bases are kept, no data.

    Raises TypeError unless `energy` is a number, ValueError unless it lies in (0, 1].
    """

    energy: float

    def __post_init__(self) -> None:
        if isinstance(self.energy, bool) or not isinstance(self.energy, int | float):
            raise TypeError(f"RememberInputs: energy: given {self.energy!r}, wanted a number in (0, 1]")
        if not 0.0 < self.energy <= 1.0:
            raise ValueError(f"RememberInputs: energy: given {self.energy}, wanted a number in (0, 1]")


@dataclass(frozen=True, eq=False)
class Remembered:
    """Of one matrix (m, n): orthonormal bases on the CPU, float32 (float64 for a float64 matrix); None for nothing yet.

    left: (m, r), right: (n, s), the top singular spaces of all earlier changes, joined.
    inputs: (n, i) if `input_side` is "right", otherwise (m, i); one tensor for all layers that get the same input.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    inputs: Tensor | None = None
    input_side: Side = "right"

    def spans(self, side: Side) -> list[Tensor]:
        """What is remembered of that side."""
        found = [getattr(self, side), self.inputs if side == self.input_side else None]
        return [basis for basis in found if basis is not None]

    def tensors(self) -> dict[str, Tensor]:
        """The bases that are there, by field."""
        found = {"left": self.left, "right": self.right, "inputs": self.inputs}
        return {name: basis for name, basis in found.items() if basis is not None}


@dataclass(frozen=True)
class Memory:
    """What the next task's subspaces are to know of the tasks before it.

    remembered: by name of the matrix. start_weights: on the CPU, as they were when the subspaces were made, for the
    change that the next ones remember; empty without `Remember`. start_sketches: in their place the sketches of
    `leak.sketch_side`, on the CPU, where inputs alone are remembered, at the start of every task until then side by
    side; empty where neither is kept.
    """

    remembered: Mapping[str, Remembered] = field(default_factory=dict)
    start_weights: Mapping[str, Tensor] = field(default_factory=dict)
    start_sketches: Mapping[str, Tensor] = field(default_factory=dict)

    def from_here(self, found: Mapping[str, Tensor]) -> Memory:
        """The same with the weights `found` as start weights."""
        return replace(self, start_weights={name: w.detach().to("cpu", copy=True) for name, w in found.items()})

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        yield from self.start_weights.values()
        yield from self.start_sketches.values()
        for remembered in self.remembered.values():
            yield from remembered.tensors().values()


class Carried(dict[str, "LayerSubspace"]):
    """What `Subspaces.carry` returns: what a search for the next bases starts from, and what is remembered."""

    def __init__(self, layers: Mapping[str, LayerSubspace], memory: Memory | None) -> None:
        super().__init__(layers)
        self.memory_of_tasks = memory


def memory_of(previous: object) -> Memory | None:
    """What a `previous` of `Subspaces.from_model` remembers. None without a previous, at the first task.

    Raises ValueError if it has none: what the tasks before have changed is then not known.
    """
    if previous is None:
        return None
    # Subspaces and what their `carry` returned.
    memory = getattr(previous, "memory_of_tasks", None)
    if memory is None:
        raise ValueError(
            "previous: it remembers nothing, wanted subspaces that were made with the same remember=, or what their "
            "carry() returned; None at the first task"
        )
    assert isinstance(memory, Memory)
    return memory


def as_remember(remember: object, sides: str) -> tuple[Remember | None, RememberInputs | None]:
    """The two ways to remember that are meant by one of them, a sequence of both, or None."""
    given = remember if isinstance(remember, tuple | list) else () if remember is None else (remember,)
    changes = [each for each in given if isinstance(each, Remember)]
    inputs = [each for each in given if isinstance(each, RememberInputs)]
    if len(changes) + len(inputs) < len(given) or len(changes) > 1 or len(inputs) > 1:
        raise TypeError(f"remember: given {remember!r}, wanted Remember(...), RememberInputs(...) or one of each")
    if given and sides == "block":
        raise ValueError(
            "remember: given with sides='block', wanted 'both', 'left' or 'right': a block protects the product of two "
            "spaces, and what is remembered are directions of one side"
        )
    return next(iter(changes), None), next(iter(inputs), None)


def check_memory(found: Mapping[str, Tensor], memory: Memory, changes: Remember | None) -> None:
    """ValueError unless `memory` is of the matrices `found`, with start weights if `changes` are to be remembered."""
    if missing := [name for name in found if name not in memory.remembered]:
        raise ValueError(
            f"previous: it remembers nothing of {list_names(missing)}, wanted subspaces of the same targets"
        )
    if changes is not None and (missing := [name for name in found if name not in memory.start_weights]):
        raise ValueError(
            f"previous: it has no start weights of {list_names(missing)}, wanted subspaces made with "
            "remember=Remember(...): what a task has changed is not known"
        )
    for name, matrix in found.items():
        m, n = matrix.shape
        start, remembered = memory.start_weights.get(name), memory.remembered[name]
        lengths = [(len(basis), m) for basis in remembered.spans("left")]
        lengths += [(len(basis), n) for basis in remembered.spans("right")]
        if (start is not None and start.shape != matrix.shape) or any(given != wanted for given, wanted in lengths):
            raise ValueError(f"previous: what it remembers of {name} is of another shape, wanted {(m, n)}")


def join(bases: Iterable[Tensor]) -> Tensor:
    """Basis (d, r), float64, of the span of all columns of `bases` (each (d, k), orthonormal), on the device of the
    first: its columns first, then of each further one what lies outside, directions nearer than 1e-6 left out."""
    joined, *others = (basis.double() for basis in bases)
    for other in others:
        outside = other.to(joined.device)
        if not joined.shape[1]:
            joined = outside
            continue
        for _ in range(2):
            outside = outside - joined @ (joined.mT @ outside)
        squares, vectors = torch.linalg.eigh(outside.mT @ outside)
        new = min(int((squares > _SMALLEST_SINE**2).sum()), len(joined) - joined.shape[1])
        chosen = slice(len(squares) - new, None)
        joined = torch.cat([joined, outside @ (vectors[:, chosen] * squares[chosen].rsqrt())], dim=1)
    return joined


def extend_changes(remembered: Remembered, top: TopSubspace, weight: Tensor, sides: str) -> Remembered:
    """`remembered` joined with `top`, of the change of `weight`, on the protected sides."""
    top = _above_rounding(top, weight)
    if sides != "right":
        remembered = replace(remembered, left=_stored_join(remembered.left, top.left))
    if sides != "left":
        remembered = replace(remembered, right=_stored_join(remembered.right, top.right))
    return remembered


def change_of(weight: Tensor, start: Tensor) -> Tensor:
    """`weight` - `start` (on any device), in float32 (float64)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(wide) - start.to(weight.device, wide)


def _above_rounding(top: TopSubspace, weight: Tensor) -> TopSubspace:
    """`top` without the directions of a change that are rounding of `weight`.

    Rounding moves its entries by at most eps / 2 of themselves; as a random matrix that has singular values of up to
    0.4 eps of the root mean square of those of the weight.
    """
    eps = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=top.near.dtype))
    floor = eps * norm / min(weight.shape) ** 0.5
    rank = int((top.singular_values > floor).sum())
    if rank == top.rank:
        return top
    far, values = (None if part is None else part[..., :rank] for part in (top.far, top.values))
    return replace(top, rank=rank, near=top.near[:, :rank], rest=None, far=far, values=values)


def _stored_join(before: Tensor | None, found: Tensor) -> Tensor:
    """`before` (on the CPU) and `found`, joined, in the dtype of `found`, on the CPU."""
    if before is None:
        return found.to("cpu", copy=True).contiguous()
    if not found.shape[1]:
        return before
    return orthonormal(join([before.to(found.device), found]).to(found.dtype)).cpu()


def remember_inputs(
    remembered: Mapping[str, Remembered], covariances: Mapping[tuple[str, ...], Tensor], energy: float
) -> dict[str, Remembered]:
    """`remembered` with the directions of new inputs (`input_covariances`), one basis for all layers that share one."""
    # What the layers of a covariance remember already may differ, where an earlier task had them share less.
    todo: dict[tuple[tuple[str, ...], int], tuple[Tensor | None, Tensor]] = {}
    for names, covariance in covariances.items():
        for name in names:
            before = remembered[name].inputs
            todo[names, id(before)] = before, covariance
    extended = dict(zip(todo, extend_inputs(list(todo.values()), energy), strict=True))
    out = dict(remembered)
    for names in covariances:
        for name in names:
            out[name] = replace(out[name], inputs=extended[names, id(remembered[name].inputs)])
    return out


def extend_inputs(pairs: Sequence[tuple[Tensor | None, Tensor]], energy: float) -> list[Tensor]:
    """Of every pair, a basis (d, r) and a covariance (d, d): the basis and the fewest eigenvectors of what the
    covariance is outside of it that together hold the share `energy` of its trace; on the CPU.

    Arithmetic in float64; those of one size are decomposed side by side."""
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for place, (_, covariance) in enumerate(pairs):
        alike.setdefault((len(covariance), covariance.device), []).append(place)
    found: dict[int, Tensor] = {}
    for (size, _), places in alike.items():
        at_once = max(1, _AT_ONCE // max(1, size**2))
        for first in range(0, len(places), at_once):
            chunk = places[first : first + at_once]
            rests = torch.stack([_outside(*pairs[place]) for place in chunk])
            for place, rest, values, vectors in zip(chunk, rests, *torch.ops.sculpt._eigh(rests), strict=True):
                basis, covariance = pairs[place]
                rank = _missing_rank(covariance, rest, values, energy)
                chosen = vectors[:, len(values) - rank :].flip(1)
                found[place] = _stored_join(basis, chosen.to(covariance.dtype))
    return [found[place] for place in range(len(pairs))]


def _outside(basis: Tensor | None, covariance: Tensor) -> Tensor:
    """`covariance` without the directions of `basis`, in float64."""
    rest = covariance.double()
    if basis is None:
        return rest
    known = basis.to(rest.device, torch.float64)
    for _ in range(2):
        rest = rest - known @ (known.mT @ rest)
        rest = rest.mT
    return rest


def _missing_rank(covariance: Tensor, rest: Tensor, values: Tensor, energy: float) -> int:
    """How many of the eigenvectors of `rest`, with `values` (ascending), the share `energy` still takes."""
    # Read at once, and counted on the CPU: a GPU that others use too is long in answering.
    total, outside = torch.stack([covariance.double().trace(), rest.trace()]).tolist()
    squares = values.cpu().flip(0)
    # Below this an eigenvalue is rounding of the float32 sums, whose directions nobody has seen.
    squares = squares[squares > len(squares) * torch.finfo(covariance.dtype).eps * total]
    missing = energy * total - (total - outside)
    left = float(squares.sum())
    if missing <= 0 or left <= 0:
        return 0
    return smallest_rank(squares, min(missing / left, 1.0), left) or len(squares)
