"""Command line options from the fields of `TrainConfig`, so that a setting is described in one place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING
from typing import Annotated, Any

import typer

from .defaults import AUTO
from .settings import ARGUMENTS, COMMAS, FIELDS, is_list, kind_of

METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT"}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for every field of `TrainConfig` (model and tasks as arguments), which its first
    parameter, `settings`, gets as a dict: text as it was given, None for what was not given."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        settings = {name: given.pop(name) for name in FIELDS}
        # A list that was not given comes as an empty one.
        command({name: None if value == [] else value for name, value in settings.items()}, **given)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    parameters = [_parameter(name) for name in FIELDS] + own
    arranged = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(arranged)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in arranged}
    return run


def _parameter(name: str) -> inspect.Parameter:
    kind: Any = list[str] if is_list(name) and name not in COMMAS else str
    if name in ARGUMENTS:
        declared: Any = typer.Argument(help=_help(name), metavar=name.upper(), show_default=False)
    elif kind_of(name) is bool:
        kind, flag = bool, name.replace("_", "-")
        declared = typer.Option(f"--{flag}/--no-{flag}", help=_help(name), show_default=False)
    else:
        declared = typer.Option(help=_help(name), metavar=METAVARS[kind_of(name)], show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def _help(name: str) -> str:
    entry = FIELDS[name]
    text, choices = entry.metadata["help"], entry.metadata.get("choices")
    if choices is not None:
        text = f"{text.removesuffix('.')}: {', '.join(choices)}."
    if entry.default in (MISSING, None, AUTO) or isinstance(entry.default, bool):
        return str(text)
    return f"{text}  [default: {entry.default}]"
