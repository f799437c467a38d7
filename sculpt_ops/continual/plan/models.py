"""Models without their weights: the configs of well-known ones, and fake-tensor models made from a config alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..hub import find_model, may_be_on_hub

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["KNOWN_MODELS", "fake_model", "open_config", "quiet"]


def _llama(
    width: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    } | more


def _t5(width: int, feed_forward: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "d_model": width,
        "d_ff": feed_forward,
        "d_kv": 64,
        "num_layers": layers,
        "num_heads": heads,
        "vocab_size": 32128,
    } | more


_LONG = {"max_position_embeddings": 131072}
_QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768}
_QWEN3 = {"model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 128}

# What shapes and attention depend on, from the published config.json files.
KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, max_position_embeddings=8192),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True, max_position_embeddings=8192),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True, max_position_embeddings=8192),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, max_position_embeddings=8192),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, **_LONG),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True, **_LONG),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral", max_position_embeddings=32768),
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True, **_QWEN2),
    "qwen2.5-1.5b": _llama(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True, **_QWEN2),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, **_QWEN2),
    "qwen3-8b": _llama(4096, 12288, 36, 32, 8, 151936, **_QWEN3),
    "gpt2": {"model_type": "gpt2"},
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
}


def open_config(model: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a folder, of a config.json file, of a known name (`KNOWN_MODELS`) or of a hub name.

    No weights are looked for. ValueError if there is none, or if it is that of quantised weights.
    """
    from transformers import AutoConfig

    known = KNOWN_MODELS.get(str(model).lower())
    path = Path(model)
    place = None
    neither = f"there is no such folder or config.json, it is none of {', '.join(KNOWN_MODELS)}"
    try:
        if known is not None:
            return AutoConfig.for_model(**known)
        if path.suffix == ".json" and path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError(f"it holds {type(settings).__name__}, wanted a model's config")
            config = AutoConfig.for_model(settings.pop("model_type", None)).from_dict(settings)
        elif path.is_dir() or (path.suffix != ".json" and may_be_on_hub(model)):
            place = find_model(model)
            config = AutoConfig.from_pretrained(
                model, local_files_only=place.local, trust_remote_code=trust_remote_code
            )
        else:
            raise ValueError(f"{neither}, and no hub name")
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised, full fine-tuning needs float weights")
        return config
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        if place is not None and not path.is_dir() and isinstance(error, OSError):
            said = f"{neither}, and {place.missing(said)}"
        raise ValueError(f"model: cannot plan for {model}: {said}") from error


def fake_model(config: PretrainedConfig, dtype: torch.dtype, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """The model of `config` in training mode; under a FakeTensorMode its parameters take no memory."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with quiet():
        try:
            model = kind.from_config(config, dtype=dtype)
        except (ValueError, ImportError, RuntimeError) as error:
            raise ValueError(f"model: cannot build a {config.model_type}: {str(error).splitlines()[0]}") from error
        if gradient_checkpointing:
            # Renamed in transformers 5.23.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
    return model.train()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers has to say about a model that will never run."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
