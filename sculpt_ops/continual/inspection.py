"""A model's singular spectra, the ranks that policies take of them, and which parameters are protected at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ..names import canonical_parameters, group_names
from ..ranks import Energy, Fraction, RankPolicy
from ..summary import span
from ..targets import resolve_targets
from .markdown import table
from .plots import draw_energies, draw_spectra
from .result import write_text

__all__ = ["Spectrum", "spectra_of", "write_inspection"]

INSPECTION_FILE, SPECTRA_FILE, ENERGIES_FILE = "inspect.md", "spectra.png", "energies.png"
SHARES = (0.25, 0.5, 0.75)
POLICIES: Mapping[str, RankPolicy] = {
    **{f"{share:g}": Fraction(share) for share in SHARES},
    **{f"energy:{share:g}": Energy(share) for share in (0.5, 0.9)},
}


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one weight, descending, float64 on the CPU."""

    name: str
    shape: tuple[int, int]
    values: Tensor

    def energy(self, share: float) -> float:
        """The share of the squared values in the first `share` of all directions, rounded down."""
        squares = self.values.square()
        total = float(squares.sum())
        return float(squares[: int(share * len(squares))].sum()) / total if total > 0 else 0.0

    def rank(self, policy: RankPolicy) -> int:
        """Directions that `policy` protects."""
        return min(max(policy.choose(self.values.square()), 0), len(self.values))


@torch.no_grad()
def spectra_of(targets: Mapping[str, Tensor], advance: object = None) -> list[Spectrum]:
    """Roots of the eigenvalues of the smaller Gram matrix in float64: to 1e-8 of the largest value. A matrix of n rows
    costs n³ operations: milliseconds at 576, about ten seconds at 4096 on a CPU."""
    found = []
    for name, weight in targets.items():
        wide = weight.detach().double()
        gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
        values = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().flip(0)
        found.append(Spectrum(name, (wide.shape[0], wide.shape[1]), values.cpu()))
        if callable(advance):
            advance()
    return found


def write_inspection(
    model: nn.Module,
    name: str,
    folder: str | Path,
    targets: str | Sequence[str] | None = None,
    advance: object = None,
    summaries: Mapping[str, str] | None = None,
) -> Path:
    """Write inspect.md, spectra.png and energies.png about `model`, called `name`, into `folder`; returns the path of
    the first. summaries: of subspaces (`Subspaces.summary`), by the settings that they were made with. Raises what
    `resolve_targets` does for a model without known weights to protect."""
    found = resolve_targets(model, targets)
    spectra = spectra_of(found, advance)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {kind: [s for s in spectra if s.name in set(names)] for kind, names in group_names(found).items()}
    draw_spectra({kind: [s.values for s in group] for kind, group in kinds.items()}, folder / SPECTRA_FILE)
    energies = {share: {kind: [s.energy(share) for s in group] for kind, group in kinds.items()} for share in SHARES}
    draw_energies(energies, folder / ENERGIES_FILE)
    sections = [
        f"# What can be protected in {name}",
        _parameters(model, found),
        _ranks(kinds),
        f"## Singular spectra\n\n![Singular values of every weight, by kind]({SPECTRA_FILE})",
        "Each line is one weight, the first layer dark, the last light; values over the largest. The flatter a "
        "spectrum, the more directions have to be protected to hold what the weight does.",
        f"![Energy held by the top directions of every layer]({ENERGIES_FILE})",
    ]
    sections += [f"## With `{chosen}`\n\n```text\n{summary}\n```" for chosen, summary in (summaries or {}).items()]
    write_text(folder / INSPECTION_FILE, "\n\n".join(sections) + "\n")
    return folder / INSPECTION_FILE


def _parameters(model: nn.Module, found: Iterable[str]) -> str:
    parameters, _ = canonical_parameters(model)
    total = sum(parameter.numel() for parameter in parameters.values())
    targets = set(found)
    rows = []
    for protected in (True, False):
        for pattern, names in group_names(name for name in parameters if (name in targets) == protected).items():
            elements = sum(parameters[name].numel() for name in names)
            rows.append(
                (
                    "protected" if protected else "**not protected**",
                    f"`{pattern}`",
                    str(len(names)),
                    f"{elements:,}",
                    f"{100 * elements / total:.2f}",
                )
            )
    held = sum(parameters[name].numel() for name in targets)
    said = (
        f"{total:,} parameters, {100 * held / total:.1f} % of them in weights that have a basis. The others move "
        "freely, unless `--others freeze` leaves them as they are."
    )
    header = ("", "parameters", "number", "elements", "% of all")
    return f"## Parameters\n\n{said}\n\n{table(header, rows)}"


def _ranks(kinds: Mapping[str, Sequence[Spectrum]]) -> str:
    rows = []
    for kind, group in kinds.items():
        shapes = ", ".join(sorted({f"{m} x {n}" for m, n in (s.shape for s in group)}))
        ranks = (span([s.rank(policy) for s in group], "d") for policy in POLICIES.values())
        held = (f"{100 * median(s.energy(share) for s in group):.0f}" for share in SHARES)
        flat = median(_effective_rank(s.values) / len(s.values) for s in group)
        rows.append((f"`{kind}`", shapes, *ranks, *held, f"{100 * flat:.0f}"))
    header = ("weights", "shape", *POLICIES, *(f"energy at {share:g}, %" for share in SHARES), "effective rank, %")
    explained = (
        "Ranks over the layers, by `--protect`; then the median share of the squared singular values that a quarter, "
        "half and three quarters of the directions hold, and the median effective rank over min(m, n): the exponential "
        "of the entropy of the squared values' shares (Roy and Vetterli 2007), 100 % for a flat spectrum."
    )
    return f"## Ranks\n\n{table(header, rows)}\n\n{explained}"


def _effective_rank(values: Tensor) -> float:
    shares = values.square() / values.square().sum()
    shares = shares[shares > 0]
    return math.exp(-float((shares * shares.log()).sum()))
