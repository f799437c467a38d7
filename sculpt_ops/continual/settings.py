"""Settings of a run from text: a YAML file, and flags that win over it."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .config import TrainConfig, check_used
from .defaults import AUTO
from .policies import parse_protect

__all__ = ["ARGUMENTS", "COMMAS", "FIELDS", "is_list", "is_optional", "kind_of", "make_config", "read_yaml"]

FIELDS = {entry.name: entry for entry in fields(TrainConfig)}
# Given by their place on the command line.
ARGUMENTS = ("model", "tasks")
# Fields that are several values, which a flag is given repeatedly for, or one with commas.
LISTS = ("tasks", "targets", "order", "ability", "task_epochs")
# One flag for all values.
COMMAS = ("order", "task_epochs")
WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def make_config(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> TrainConfig:
    """The settings of a YAML file, of one key per field of `TrainConfig`, with those of `flags` in their place.

    flags: values or their text, by field; None for what was not given. Paths are relative to the working directory.
    ValueError names the field that is unknown (with the nearest there is), missing, of the wrong type, or given for a
    method that has no use for it. What only the file's method has a use for is left out where a flag names another.
    """
    file = {} if path is None else read_yaml(path)
    named = {name: value for name, value in (flags or {}).items() if value is not None}
    given = file | named
    for name in given:
        if name not in FIELDS:
            near = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1)
            raise ValueError(f"{name}: no such setting{f', did you mean {near[0]}?' if near else ''}")
    for name, entry in FIELDS.items():
        if entry.default is MISSING and name not in given:
            place = name.upper() if name in ARGUMENTS else f"--{name}"
            raise ValueError(f"{name}: missing; give it on the command line ({place}) or in the file of --config")
    values = {name: _read(name, value) for name, value in given.items()}
    method, own = values.get("method", TrainConfig.method), str(file.get("method", TrainConfig.method))
    # Where a flag names another method, what in the file was for the file's own goes with that.
    kept = {
        name: value
        for name, value in values.items()
        if name in named or method in (methods := FIELDS[name].metadata["methods"]) or own not in methods
    }
    config = TrainConfig(**kept)
    check_used(method, kept)
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping a YAML file holds; ValueError if it is not there or none, or has a key twice."""
    import yaml  # type: ignore[import-untyped]

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        settings, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"config: {path} holds {type(settings).__name__}, wanted one setting a line, as `lr: 3e-5`")
    # YAML's reader takes the last of them.
    names = [key.value for key, _ in node.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"config: {path} has {', '.join(twice)} more than once")
    return settings


def kind_of(name: str) -> type:
    """The plain type of a field's values: float, int, bool or str."""
    hint = _HINTS[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((kind for kind in (bool, int, float) if kind in kinds and name != "protect"), str)


def is_optional(name: str) -> bool:
    return type(None) in get_args(_HINTS[name])


def is_list(name: str) -> bool:
    return name in LISTS


_HINTS = get_type_hints(TrainConfig)


def _read(name: str, value: Any) -> Any:
    if value == AUTO and FIELDS[name].default == AUTO:
        return AUTO
    if name == "protect":
        return parse_protect(_text(name, "none" if value is None else value))
    if value is None or value == "none":
        # "none" is also what report_to has for nothing.
        if is_optional(name):
            return None
        if value is None:
            raise ValueError(f"{name}: got nothing, wanted {WORDS[kind_of(name)]}")
    if not is_list(name):
        return _read_one(name, kind_of(name), value)
    if name in COMMAS and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    values = value if isinstance(value, list | tuple) else [value]
    if name == "task_epochs":
        return [_read_one(name, float, entry) for entry in values]
    return [_text(name, entry) for entry in values]


def _read_one(name: str, kind: type, value: Any) -> Any:
    wrong = ValueError(f"{name}: got {value!r}, wanted {WORDS[kind]}{' or none' if is_optional(name) else ''}")
    if kind is str:
        return _text(name, value)
    if kind is bool:
        known = {"true": True, "false": False}
        if str(value).lower() not in known:
            raise wrong
        return known[str(value).lower()]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        # YAML takes 3e-5 for text: its numbers have a dot.
        number = float(value)
        if kind is int and number != int(number):
            raise wrong
    except (ValueError, OverflowError) as error:
        raise wrong from error
    return int(number) if kind is int else number


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError(f"{name}: got {value!r}, wanted text")
    return str(value)
