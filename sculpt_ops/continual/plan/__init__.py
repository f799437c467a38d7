"""What training a model takes, before it is tried: memory and least time of every way to train it, from its config."""

from __future__ import annotations

from .planner import make_plan

__all__ = ["make_plan"]
