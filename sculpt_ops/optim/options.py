"""What `AdamW` takes beyond torch's arguments, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .precision import Master, has_master, wide

__all__ = ["DecayTo", "Options", "Project", "State"]

Project = Literal["both", "gradient", "update"]
State = Literal["full", "subspace"]
DecayTo = Literal["zero", "start"]


@dataclass(frozen=True)
class Options:
    """See `AdamW`. Raises ValueError for a value that is not one of those, or a combination without meaning, TypeError
    for a seed that is no int."""

    project: Project = "both"
    state: State = "full"
    master: Master = "none"
    moment_dtype: torch.dtype | None = None
    decay_to: DecayTo = "zero"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("project", Project), ("state", State), ("master", Master), ("decay_to", DecayTo)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")
        if not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        if self.moment_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"moment_dtype must be torch.float32, torch.bfloat16 or None, got {self.moment_dtype}")
        if self.in_coordinates and self.project != "both":
            raise ValueError(
                f"project must be 'both' with state='subspace', which projects nothing; got {self.project!r}"
            )

    @property
    def in_coordinates(self) -> bool:
        return self.state == "subspace"

    @property
    def stochastic_moments(self) -> bool:
        return self.moment_dtype is torch.bfloat16

    def moments_of(self, parameter: Tensor) -> torch.dtype:
        """The dtype of the moments of `parameter`."""
        if self.moment_dtype is not None:
            return self.moment_dtype
        return wide(parameter.dtype) if has_master(parameter, self.master) else parameter.dtype

    def concern(self, parameter: Tensor, weight_decay: float) -> bool:
        """Whether `parameter` needs more than torch's AdamW, a basis apart."""
        if not parameter.is_floating_point():
            return False
        return (
            has_master(parameter, self.master)
            or self.moments_of(parameter) is not parameter.dtype
            or (self.decay_to == "start" and weight_decay != 0)
        )

    def check_groups(self, groups: Iterable[Mapping[str, Any]], protected: bool) -> None:
        """ValueError for torch's options in `groups` that do not go with these, or with `protected` parameters."""
        special = self.master != "none" or self.moment_dtype is not None or self.decay_to != "zero"
        what = "subspaces" if protected else "master, moment_dtype or decay_to"
        for group in groups if protected or special else ():
            if self.stochastic_moments and any(p.dtype is torch.float64 for p in group["params"]):
                raise ValueError(
                    "moment_dtype=torch.bfloat16 cannot be combined with float64 parameters; leave it None"
                )
            for option in ("fused", "differentiable"):
                if group[option]:
                    raise ValueError(f"{option}=True cannot be combined with {what}; set {option}=False in every group")
            if group["capturable"] and (self.master == "stochastic" or self.stochastic_moments):
                # A captured step would repeat the random numbers of the step it was captured at.
                raise ValueError("capturable=True cannot be combined with stochastic rounding; use master='split'")
