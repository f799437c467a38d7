"""Lists of matrices through the CUDA C++ kernel of one side: one launch for all of a side of the same length and form.

Two sides are two launches, the left ones first. What the kernel reads of a list lies on the device for as long as the
addresses stay the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _host
from ..triton_kernels.tables import upload
from .cuda_limits import MANY, BasisForm, basis_form, cuda_facts

__all__ = ["Located", "SideList", "side_lists"]

# Room for one entry: sculpt::SideEntry of csrc/cuda/project_side.h.
_ENTRY_BYTES = 256


class SideList(NamedTuple):
    """Matrices of a list, by their positions in it, whose bases on one side have the same length and form.

    keep: of each. rank: the largest.
    """

    places: tuple[int, ...]
    keep: tuple[bool, ...]
    right: bool
    form: BasisForm
    length: int
    rank: int
    panels: int
    device: torch.device

    def locate(
        self,
        grads: Sequence[Tensor],
        lefts: Sequence[Tensor | None],
        rights: Sequence[Tensor | None],
        left_metrics: Sequence[Tensor | None],
        right_metrics: Sequence[Tensor | None],
    ) -> Located:
        """The list at the addresses of these tensors."""
        bases, metrics = (rights, right_metrics) if self.right else (lefts, left_metrics)
        entries = torch.empty(_ENTRY_BYTES * len(self.places), dtype=torch.uint8)
        torch.ops.sculpt._cuda_side_entries(
            [grads[i] for i in self.places],
            [bases[i] for i in self.places],
            [metrics[i] for i in self.places] if self.form == BasisForm.METRIC else [],
            self.keep,
            self.right,
            self.form,
            self.length,
            self.rank,
            entries,
        )
        return Located(self, *upload(entries.numpy(), self.device))


class Located(NamedTuple):
    """A list and where it lies: call `launch` as often as its addresses stay the same."""

    sides: SideList
    entries: Tensor
    source: Tensor

    def launch(self) -> None:
        sides = self.sides
        torch.ops.sculpt._cuda_project_sides_(
            self.entries, sides.panels, sides.right, sides.form, sides.length, sides.rank
        )


def side_lists(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    left_metrics: Sequence[Tensor | None],
    right_metrics: Sequence[Tensor | None],
    flags: Callable[[int], tuple[bool, bool, bool]],
    places: Sequence[int],
) -> list[SideList]:
    """The lists of these places, whose sides the kernel can run: left ones first. Lists of metrics may be empty."""
    alike: defaultdict[tuple[bool, BasisForm, int, torch.device], list[tuple[int, Tensor]]] = defaultdict(list)
    for right, bases, metrics in ((False, lefts, left_metrics), (True, rights, right_metrics)):
        for i in places:
            basis = bases[i]
            if basis is not None:
                form = basis_form(basis, metrics[i] if metrics else None)
                alike[right, form, basis.shape[0], basis.device].append((i, basis))
    lists = []
    for (right, form, length, device), members in alike.items():
        places_of = tuple(i for i, _ in members)
        rank = max(basis.shape[1] for _, basis in members)
        plan = _host.side_panels(length, MANY, rank, form, cuda_facts(device.index).multiprocessors)
        assert plan is not None, (length, rank, form)
        across = [grads[i].shape[0 if right else 1] for i in places_of]
        lists.append(
            SideList(
                places_of,
                tuple(flags(i)[right] for i in places_of),
                right,
                form,
                length,
                rank,
                sum(-(-extent // plan[1]) for extent in across),
                device,
            )
        )
    return lists
