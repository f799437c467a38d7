"""What to protect and what to remember, as a command line or a configuration file writes it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Literal

from ..ranks import Energy, Fraction, Importance, Rank, RankPolicy, Schedule
from ..remember import Remember, RememberInputs

# What to protect in a sequence of tasks: "schedule" is `Schedule(i, n)` at task i of n, None nothing.
Protect = float | RankPolicy | Importance | Literal["schedule"] | None


def parse_protect(text: str) -> Protect:
    """Read a protected share: "0.5", "rank:64", "energy:0.9", "importance" or "importance:0.1:0.8", "none".

    "schedule" follows the run's tasks, "schedule:2:5" stands for task 2 of 5 throughout.
    """
    kind, *numbers = text.split(":")
    try:
        match kind, numbers:
            case "none", []:
                return None
            case "schedule", []:
                return "schedule"
            case "schedule", [task, n_tasks]:
                return Schedule(int(task), int(n_tasks))
            case "rank", [rank]:
                return Rank(int(rank))
            case "energy", [share]:
                return Energy(float(share))
            case "importance", [] | [_, _]:
                return Importance(*map(float, numbers))
        return Fraction(float(text)).share
    except ValueError as error:
        raise ValueError(
            f"protect: got {text!r}, wanted a share from 0 to 1 as 0.5, or rank:64, energy:0.9, importance:0.1:0.8, "
            "schedule, none"
        ) from error


def format_protect(protect: Protect, spec: str = "g") -> str:
    """The inverse of `parse_protect`. spec: how numbers are written; "" keeps every digit."""
    match protect:
        case None:
            return "none"
        case str():
            return protect
        case float() | Fraction():
            return f"{protect if isinstance(protect, float) else protect.share:{spec}}"
    values: list[float] = [getattr(protect, field.name) for field in fields(protect)] if is_dataclass(protect) else []
    return ":".join([type(protect).__name__.lower(), *(f"{value:{spec}}" for value in values)])


def parse_remember(text: str | None) -> tuple[Remember | RememberInputs, ...]:
    """Read what is remembered of earlier tasks: "rank:0.12", "rank:64", "inputs:0.95", both joined by "+"; None."""
    found: dict[str, Remember | RememberInputs] = {}
    for part in [] if text is None else text.split("+"):
        kind, _, number = part.strip().partition(":")
        try:
            if kind not in ("rank", "inputs") or kind in found:
                raise ValueError(f"no {kind}")
            if kind == "inputs":
                found[kind] = RememberInputs(float(number))
            else:
                found[kind] = Remember(int(number) if number.isdigit() else float(number))
        except ValueError as error:
            raise ValueError(
                f"remember: got {text!r}, wanted rank:0.12 (a share of min(m, n), or rank:64), inputs:0.95, both "
                "joined by +, or none"
            ) from error
    return tuple(found.values())
