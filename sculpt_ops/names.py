"""Parameter names without the prefixes of DDP, torch.compile, FSDP and activation checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

__all__ = ["canonical_name", "canonical_parameters", "group_names", "list_names"]

# DistributedDataParallel and torch.compile wrap the whole model, the other two any submodule. `module` is a common name
# for a submodule of one's own, so it is dropped at the front only.
_OUTER = re.compile(r"^(?:module\.|_orig_mod\.)+")
_INNER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def canonical_name(name: str) -> str:
    """`name` without the prefixes of wrappers: "module._orig_mod.layers.0.weight" is "layers.0.weight"."""
    return _OUTER.sub("", _INNER.sub("", name))


def canonical_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Every parameter of `model` once, by canonical name, and every alias of a tied one with the name it stands for.

    That is the first in `named_parameters`, the one that is stored. Raises ValueError if two parameters share a
    canonical name.
    """
    parameters: dict[str, nn.Parameter] = {}
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = canonical_name(name)
        if id(parameter) in names:
            aliases[name] = names[id(parameter)]
        elif name in parameters:
            raise ValueError(f"two parameters of the model are both called {name!r} once wrapper prefixes are dropped")
        else:
            parameters[name] = parameter
            names[id(parameter)] = name
    return parameters, aliases


def group_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ only in numbers, together: {"layers.*.weight": ["layers.0.weight", "layers.1.weight"]}."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "*", name), []).append(name)
    return groups


def list_names(names: Iterable[str], limit: int = 8) -> str:
    """A few of `names` for an error message: "a, b and 3 more"."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
