"""Optimizers whose whole update stays in the free space."""

from .adamw import AdamW
from .backward import fuse_into_backward

__all__ = ["AdamW", "fuse_into_backward"]
