"""Settings of a run from text: a YAML file, flags that win over it, and what the run's own folder keeps of them."""

from __future__ import annotations

import difflib
import json
import shlex
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .config import GENERATED, TrainConfig, check_used
from .defaults import AUTO
from .policies import format_protect, parse_protect
from .result import RUN_FILE, resume_command, write_text
from .tasks import Task, choose_tasks, task_folders

__all__ = [
    *("ARGUMENTS", "COMMAS", "FIELDS", "SETTINGS_FILE"),
    *("check_files", "is_list", "is_optional", "keep_settings", "kept_settings", "kind_of", "make_config", "read_yaml"),
]

# In a run's folder: what the run goes on with, in the form of a file for --config.
SETTINGS_FILE = "settings.yaml"

FIELDS = {entry.name: entry for entry in fields(TrainConfig)}
# Given by their place on the command line.
ARGUMENTS = ("model", "tasks")
# Fields that are several values, which a flag is given repeatedly for, or one with commas.
LISTS = ("tasks", "targets", "order", "ability", "task_epochs")
# Fields that name files or folders; the model may be a hub name.
PATHS = ("model", "tasks", "remember_text", "ability")
# One flag for all values.
COMMAS = ("order", "task_epochs")
WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def make_config(
    path: str | Path | None = None, flags: Mapping[str, Any] | None = None, added: Sequence[str | Path] = ()
) -> TrainConfig:
    """The settings of a YAML file, of one key per field of `TrainConfig`, with those of `flags` in their place. With
    resume, what neither gives is as the run in the output has kept it.

    flags: values or their text, by field; None for what was not given. Paths are relative to the working directory.
    added: tasks to be learned after those of a run that is resumed; one that is among them already stays where it is.
    ValueError names the field that is unknown (with the nearest there is), missing, of the wrong type, or given for a
    method that has no use for it. What only the file's method has a use for is left out where a flag names another.
    """
    file = {} if path is None else read_yaml(path)
    named = {name: value for name, value in (flags or {}).items() if value is not None}
    given = file | named
    _check_names(given)
    resumed = _read("resume", given.get("resume", False))
    if added and (not resumed or "order" in given):
        instead = "with order, wanted it in there" if resumed else "without resume, wanted it among TASKS"
        raise ValueError(f"add: got {added[0]} {instead}")
    if resumed:
        file = _kept_for(given) | file
        given = file | named
    for name, entry in FIELDS.items():
        if entry.default is MISSING and name not in given:
            place = name.upper() if name in ARGUMENTS else f"--{name}"
            raise ValueError(f"{name}: missing; give it on the command line ({place}) or in the file of --config")
    if added:
        tasks = _read("tasks", given["tasks"])
        there = {folder.resolve() for task in tasks for folder in task_folders(Path(task))}
        folders = [folder for task in added for folder in task_folders(Path(task))]
        given["tasks"] = [*tasks, *(str(folder) for folder in folders if folder.resolve() not in there)]
    values = {name: _read(name, value) for name, value in given.items()}
    method, own = values.get("method", TrainConfig.method), str(file.get("method", TrainConfig.method))
    # Where a flag names another method, what in the file was for the file's own goes with that.
    used = {
        name: value
        for name, value in values.items()
        if name in named or method in (methods := FIELDS[name].metadata["methods"]) or own not in methods
    }
    config = TrainConfig(**used)
    check_used(method, used)
    return config


def check_files(config: TrainConfig) -> None:
    """ValueError for a task folder or a file that is not there. To be asked before anything else: what opens them takes
    seconds to import, and a model minutes to open."""
    if config.sequence is None:
        choose_tasks(config.tasks, config.order)
    texts = [] if config.remember_text in (None, GENERATED) else [config.remember_text]
    for name, files in (("remember_text", texts), ("ability", config.ability or ())):
        for file in files:
            if not Path(str(file)).is_file():
                raise ValueError(f"{name}: there is no file {file}")


def keep_settings(config: TrainConfig) -> None:
    """Write the settings of a run into its folder, which is made if need be: whole, and with paths that hold in any
    working directory. Tasks that are not all of them folders are left out."""
    import yaml  # type: ignore[import-untyped]

    names = [name for name, entry in FIELDS.items() if config.method in entry.metadata["methods"]]
    kept = {name: _plain(name, getattr(config, name)) for name in names if name not in ("output", "resume", "tasks")}
    tasks: Sequence[Task | str | Path] = config.tasks
    if config.sequence is None:
        # One by one and in order: another may come to lie beside them, and one that is added is not to be sorted in.
        tasks, kept["order"] = choose_tasks(config.tasks, config.order), None
    if not any(isinstance(task, Task) for task in tasks):
        kept["tasks"] = _plain("tasks", tasks)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    about = f"# The settings of this run, which `{resume_command('RUN')}` goes on with.\n"
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)
    write_text(output / SETTINGS_FILE, about + text)


def kept_settings(output: Path) -> dict[str, Any] | None:
    """What `keep_settings` wrote; None of a folder without it."""
    path = output / SETTINGS_FILE
    return read_yaml(path, "resume") if path.exists() else None


def _plain(name: str, value: Any) -> Any:
    """A field's value as YAML holds it and `_read` reads it, to the last digit."""
    if name == "protect":
        return format_protect(value, spec="")
    if value is None:
        return None
    if is_list(name) and not isinstance(value, str | Path):
        return [_plain_one(name, entry) for entry in value]
    return [_plain_one(name, value)] if is_list(name) else _plain_one(name, value)


def _plain_one(name: str, value: Any) -> Any:
    if name in PATHS and value != GENERATED and Path(value).exists():
        return str(Path(value).absolute())
    return float(value) if name == "task_epochs" else kind_of(name)(value)


def _kept_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the run in the output of `given` has kept; ValueError if the two are too little to go on with."""
    missing = [name for name in ARGUMENTS if name not in given]
    if "output" not in given:
        # `--resume RUN` reads as a model.
        run = given["model"] if missing == ["tasks"] else "RUN"
        raise ValueError(f"output: missing; to go on with a run: {resume_command(run)}")
    output = Path(_text("output", given["output"]))
    kept = kept_settings(output)
    if kept is None and missing:
        if not (output / RUN_FILE).exists():
            raise ValueError(f"resume: there is no run in {output}, wanted its folder, or MODEL and TASKS to begin one")
        raise ValueError(
            f"resume: {output} is of a version that kept no {SETTINGS_FILE}; wanted all that it was started with: "
            f"{_whole_command(output)}"
        )
    _check_names(kept or {}, f" in {output / SETTINGS_FILE}")
    return kept or {}


def _check_names(given: Mapping[str, Any], where: str = "") -> None:
    for name in given:
        if name not in FIELDS:
            near = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1)
            raise ValueError(f"{name}: no such setting{where}{f', did you mean {near[0]}?' if near else ''}")


def _whole_command(output: Path) -> str:
    """What goes on with a run by its results alone: every setting that is not the default. Paths are as they were
    given, of ability files the names."""
    try:
        config = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))["config"]
        words = ["sculpt", "train", config["model"], *config["tasks"], "--output", str(output), "--resume"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"resume: {output / RUN_FILE} is damaged ({error!r}); name another output") from error
    for name, entry in FIELDS.items():
        value, flag = config.get(name), name.replace("_", "-")
        if name in (*ARGUMENTS, "output", "name", "resume", "parallel") or value in (None, entry.default):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name in COMMAS:
            words += [f"--{flag}", ",".join(map(str, value))]
        else:
            words += [
                word for each in (value if isinstance(value, list) else [value]) for word in (f"--{flag}", str(each))
            ]
    return shlex.join(words)


def read_yaml(path: str | Path, argument: str = "config") -> dict[str, Any]:
    """The mapping a YAML file holds; ValueError, which begins with `argument`, if it is not there or none, or has a key
    twice."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{argument}: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        settings, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(
            f"{argument}: {path} holds {type(settings).__name__}, wanted one setting a line, as `lr: 3e-5`"
        )
    # YAML's reader takes the last of them.
    names = [key.value for key, _ in node.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{argument}: {path} has {', '.join(twice)} more than once")
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
