"""The tables of `sculpt bench` and bench/gpu_check.sh: rows in one JSON file, a table and a roofline of it."""

from .command import facts, main, repeat, run

__all__ = ["facts", "main", "repeat", "run"]
