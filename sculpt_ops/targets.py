"""Which parameters of a model get a basis: defaults for known architectures, glob patterns for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .dtensor import is_dtensor
from .names import canonical_parameters, group_names, list_names

__all__ = ["DEFAULT_TARGETS", "resolve_targets"]

_LLAMA = (
    "*.self_attn.[qkvo]_proj.weight",
    "*.mlp.gate_proj.weight",
    "*.mlp.up_proj.weight",
    "*.mlp.down_proj.weight",
)
_PHI3 = ("*.self_attn.qkv_proj.weight", "*.self_attn.o_proj.weight", "*.mlp.gate_up_proj.weight", _LLAMA[3])
_OPT = ("*.self_attn.[qkv]_proj.weight", "*.self_attn.out_proj.weight", "*.fc[12].weight")
# c_attn holds q, k and v side by side and is decomposed as the one matrix that it is.
_GPT2 = ("*.attn.c_attn.weight", "*.crossattention.[cq]_attn.weight", "*.c_proj.weight", "*.mlp.c_fc.weight")
_T5 = (
    "*.SelfAttention.[qkvo].weight",
    "*.EncDecAttention.[qkvo].weight",
    "*.DenseReluDense.wi.weight",
    "*.DenseReluDense.wi_[01].weight",
    "*.DenseReluDense.wo.weight",
)

# By `model.config.model_type` of Hugging Face transformers: every attention and feed-forward matrix, as in arXiv
# 2504.07097.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite", "olmo2", "smollm3"), _LLAMA),
    "phi3": _PHI3,
    "opt": _OPT,
    "gpt2": _GPT2,
    "t5": _T5,
    "mt5": _T5,
}

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Packages whose parameters hold packed numbers, bitsandbytes' under a float dtype until they move to the GPU.
_QUANTISERS = ("bitsandbytes", "torchao", "hqq", "optimum")


def resolve_targets(model: nn.Module, targets: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of `model` to protect, by canonical name (see `names.canonical_name`), in the model's order.

    targets: one or more glob patterns (`fnmatch`: `*`, `?`, `[abc]`, case-sensitive) that must match the whole
        parameter name, as "model.layers.*.mlp.*.weight". None takes `DEFAULT_TARGETS` for `model.config.model_type`. A
        pattern that matches an alias of a tied parameter selects the stored parameter.

    Raises ValueError if the architecture is unknown and no pattern is given, if a pattern matches nothing, or if a
    matched parameter cannot be projected: frozen, quantised, wrapped by LoRA, on the meta device, sharded, empty or not
    2-d.
    """
    parameters, aliases = canonical_parameters(model)
    found: dict[str, nn.Parameter] = {}
    if targets is None:
        patterns = _default_patterns(model, parameters)
    else:
        patterns = (targets,) if isinstance(targets, str) else tuple(targets) if isinstance(targets, Sequence) else ()
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"targets must be a glob pattern or a non-empty sequence of them, got {targets!r}")
    # LoRA moves q_proj.weight to q_proj.base_layer.weight: matched under both names, it gets the LoRA message below
    # instead of "matches no parameter".
    names = {name: name for name in parameters} | aliases
    names = {alias.replace(".base_layer.", "."): name for alias, name in names.items()} | names
    for pattern in patterns:
        matched = {name for alias, name in names.items() if fnmatchcase(alias, pattern)}
        if not matched and targets is not None:
            raise ValueError(f"targets: {pattern!r} matches no parameter; the model has {_candidates(parameters)}")
        found |= {name: parameters[name] for name in matched}
    if not found:
        raise ValueError(f"the default targets {patterns} match no parameter; the model has {_candidates(parameters)}")
    found = {name: parameter for name, parameter in parameters.items() if name in found}
    _refuse_unfit(model, found)
    return found


def _default_patterns(model: nn.Module, parameters: dict[str, nn.Parameter]) -> tuple[str, ...]:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[model_type]
    kind = f"model type {model_type!r}" if model_type else f"{type(model).__name__} (it has no config.model_type)"
    raise ValueError(
        f"no default targets for {kind}; pass targets= with one or more glob patterns on the parameter name. "
        f"2-d parameters: {_candidates(parameters)}. Known model types: {', '.join(sorted(DEFAULT_TARGETS))}"
    )


def _candidates(parameters: dict[str, nn.Parameter]) -> str:
    return list_names(group_names(n for n, p in parameters.items() if p.ndim == 2), limit=12) or "no 2-d parameter"


def _refuse_unfit(model: nn.Module, found: dict[str, nn.Parameter]) -> None:
    quantised_model = bool(getattr(model, "is_quantized", False)) or (
        getattr(getattr(model, "config", None), "quantization_config", None) is not None
    )
    reasons: dict[str, list[str]] = {}
    for name, parameter in found.items():
        reason = _unfit(name, parameter, quantised_model)
        if reason:
            reasons.setdefault(reason, []).append(name)
    if reasons:
        listed = "; ".join(f"{reason}: {list_names(names)}" for reason, names in reasons.items())
        raise ValueError(f"these targets cannot be protected. {listed}")


def _unfit(name: str, parameter: Tensor, quantised_model: bool) -> str | None:
    """Why this parameter cannot be decomposed and projected, with what to do about it; None if it can."""
    if any(part in ("lora_A", "lora_B", "base_layer") for part in name.split(".")):
        return "wrapped by LoRA (merge and unload the adapter first, with peft's merge_and_unload())"
    kinds = (type(parameter), type(parameter.data))
    if not is_dtensor(parameter) and any(kind.__module__.startswith("torch.distributed") for kind in kinds):
        return "sharded by something else than fully_shard (FSDP2)"
    by_quantiser = any(kind.__module__.partition(".")[0] in _QUANTISERS for kind in kinds)
    if quantised_model or by_quantiser or parameter.dtype not in _DTYPES:
        return (
            f"quantised, stored as {parameter.dtype} (load the model in full precision, or dequantise and rebuild it "
            "without config.quantization_config)"
        )
    if parameter.device.type == "meta":
        return "on the meta device, without values (load the weights first, without offloading)"
    if parameter.ndim != 2:
        return f"not a 2-d matrix but of shape {tuple(parameter.shape)} (narrow targets= to matrices)"
    if parameter.numel() == 0:
        return f"empty, of shape {tuple(parameter.shape)} (leave them out with targets=)"
    if not parameter.requires_grad:
        return "frozen (call requires_grad_(True) on them, or leave them out with targets=)"
    return None
