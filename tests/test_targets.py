from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sculpt_ops.names import canonical_name, canonical_parameters, group_names
from sculpt_ops.subspaces import Subspaces
from sculpt_ops.targets import DEFAULT_TARGETS, resolve_targets

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
LLAMA = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"} | {
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
PHI3 = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
OPT = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"}
DECODERS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite", "olmo2", "smollm3"], LLAMA),
    "phi3": PHI3,
    "opt": OPT,
}


def tiny(model_type: str, **changes: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, object] = dict(SMALL)
    if model_type == "gpt2":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    elif model_type in ("t5", "mt5"):
        sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    elif model_type == "opt":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
    if model_type in ("phi3", "smollm3"):
        sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(model_type, **(sizes | changes))
    auto = transformers.AutoModelForSeq2SeqLM if model_type in ("t5", "mt5") else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config)


def test_every_default_is_tested() -> None:
    assert set(DEFAULT_TARGETS) == set(DECODERS) | {"gpt2", "t5", "mt5"}


@pytest.mark.parametrize("model_type", DECODERS)
def test_default_targets_of_decoders(model_type: str) -> None:
    found = set(resolve_targets(tiny(model_type)))
    prefix = "model.decoder.layers" if model_type == "opt" else "model.layers"
    assert found == {f"{prefix}.{layer}.{part}.weight" for layer in range(2) for part in DECODERS[model_type]}


def test_default_targets_of_gpt2_are_as_stored() -> None:
    found = resolve_targets(tiny("gpt2", add_cross_attention=True))
    parts = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    parts |= {"crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj"}
    assert set(found) == {f"transformer.h.{layer}.{part}.weight" for layer in range(2) for part in parts}
    layer = Subspaces.from_model(tiny("gpt2"), 0.25)["transformer.h.0.attn.c_attn.weight"]
    assert layer.shape == (16, 48)  # Conv1D stores (in, out)
    assert layer.left is not None
    assert layer.left.shape == (16, 4)


@pytest.mark.parametrize(("model_type", "gated"), [("t5", False), ("t5", True), ("mt5", True)])
def test_default_targets_of_t5(model_type: str, gated: bool) -> None:
    model = tiny(model_type, feed_forward_proj="gated-gelu" if gated else "relu")
    feed_forward = ["wi_0", "wi_1", "wo"] if gated else ["wi", "wo"]
    wanted = set()
    for block in range(2):
        for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
            for place, attention in enumerate(attentions):
                wanted |= {f"{stack}.block.{block}.layer.{place}.{attention}.{x}.weight" for x in "qkvo"}
            last = len(attentions)
            wanted |= {f"{stack}.block.{block}.layer.{last}.DenseReluDense.{x}.weight" for x in feed_forward}
    assert set(resolve_targets(model)) == wanted


def test_patterns_select_in_model_order() -> None:
    model = tiny("llama")
    found = resolve_targets(model, ["*.mlp.down_proj.weight", "*.layers.1.self_attn.q_proj.weight"])
    assert list(found) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    assert list(resolve_targets(model, "*.0.mlp.up_proj.weight")) == ["model.layers.0.mlp.up_proj.weight"]


def test_unknown_model_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"no default targets for Sequential.*targets=.*\*\.weight"):
        resolve_targets(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model = tiny("llama")
    model.config.model_type = "never_heard_of"
    with pytest.raises(ValueError, match=r"'never_heard_of'.*model\.layers\.\*\.self_attn\.q_proj\.weight"):
        resolve_targets(model)


def test_pattern_without_a_match_is_named() -> None:
    with pytest.raises(ValueError, match=r"'\*\.query\.weight' matches no parameter.*q_proj\.weight"):
        resolve_targets(tiny("llama"), ["*.q_proj.weight", "*.query.weight"])
    for bad in ([], 3, [None]):
        with pytest.raises(TypeError, match="targets must be a glob pattern"):
            resolve_targets(tiny("llama"), bad)  # type: ignore[arg-type]


def test_matched_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not a 2-d matrix.*\(16,\).*model\.norm\.weight"):
        resolve_targets(tiny("llama"), "model.norm.weight")


def test_alias_of_a_tied_parameter_selects_the_stored_one() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    for patterns in ("lm_head.weight", "model.embed_tokens.weight", ["lm_head.weight", "model.embed_tokens.weight"]):
        assert list(resolve_targets(model, patterns)) == ["model.embed_tokens.weight"]
    untied = tiny("llama", tie_word_embeddings=False)
    assert list(resolve_targets(untied, "lm_head.weight")) == ["lm_head.weight"]


class _LoraLinear(nn.Module):
    """The parameter names that peft gives to a wrapped layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})


def test_unfit_targets_are_listed_in_one_error() -> None:
    model = tiny("llama")
    layers = model.model.layers
    layers[0].self_attn.q_proj.weight.requires_grad_(False)
    layers[1].self_attn.k_proj.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    layers[0].mlp.up_proj = _LoraLinear(layers[0].mlp.up_proj)
    layers[1].mlp.up_proj.to("meta")
    layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="cannot be protected") as caught:
        resolve_targets(model)
    message = str(caught.value)
    for name, advice in (
        ("model.layers.0.self_attn.q_proj.weight", "requires_grad_(True)"),
        ("model.layers.1.self_attn.k_proj.weight", "torch.uint8"),
        ("model.layers.0.mlp.up_proj.base_layer.weight", "merge_and_unload"),
        ("model.layers.1.mlp.up_proj.weight", "meta device"),
        ("model.layers.1.mlp.down_proj.weight", "empty"),
    ):
        assert name in message
        assert advice in message
    assert "v_proj" not in message


@pytest.mark.parametrize("mark", ["config", "attribute"])
def test_quantised_model_is_refused(mark: str) -> None:
    model = tiny("llama")
    if mark == "config":
        model.config.quantization_config = {"quant_method": "gguf"}
    else:
        model.is_quantized = True
    with pytest.raises(ValueError, match=r"quantised.*full precision.*and 6 more"):
        resolve_targets(model)


def test_parameters_of_a_quantiser_are_refused_under_any_dtype() -> None:
    class Params4bit(nn.Parameter):
        pass

    Params4bit.__module__ = "bitsandbytes.nn.modules"
    model = nn.Linear(4, 4)
    model.weight = Params4bit(torch.randn(4, 4))
    with pytest.raises(ValueError, match="quantised"):
        resolve_targets(model, "weight")


def test_canonical_names() -> None:
    assert canonical_name("module._orig_mod.layers.0.weight") == "layers.0.weight"
    assert canonical_name("_orig_mod.module.layers.0._checkpoint_wrapped_module.q.weight") == "layers.0.q.weight"
    assert canonical_name("layers.0._fsdp_wrapped_module._orig_mod.weight") == "layers.0.weight"
    assert canonical_name("encoder.module.weight") == "encoder.module.weight"
    assert canonical_name("submodule.weight") == "submodule.weight"


def test_wrapped_models_give_the_same_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, attribute: str, wrapped: nn.Module) -> None:
            super().__init__()
            self.add_module(attribute, wrapped)
            self.config = getattr(wrapped, "config", None)

    model = tiny("llama")
    names = list(resolve_targets(model))
    assert list(resolve_targets(Wrapper("_orig_mod", Wrapper("module", model)))) == names
    model.model.layers[0] = Wrapper("_checkpoint_wrapped_module", model.model.layers[0])
    assert list(resolve_targets(model)) == names


def test_default_targets_of_a_model_in_ddp(tmp_path: Path) -> None:
    model = tiny("llama")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert list(resolve_targets(wrapped)) == list(resolve_targets(model))
    finally:
        dist.destroy_process_group()


def test_colliding_canonical_names_are_refused() -> None:
    class Colliding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))
            self.module = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="both called 'weight'"):
        canonical_parameters(Colliding())


def test_group_names() -> None:
    def names() -> Iterator[str]:
        yield from ("a.0.w", "a.1.w", "a.10", "b2.w")

    assert group_names(names()) == {"a.*.w": ["a.0.w", "a.1.w"], "a.*": ["a.10"], "b2.w": ["b2.w"]}
