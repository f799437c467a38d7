"""`sculpt plan`: what it counts from a config is what models, subspaces and optimizers then take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sculpt_ops
from sculpt_ops import Subspaces
from sculpt_ops.continual.plan.gpus import H100, Gpu, Work, find_gpu, projection_work, update_work
from sculpt_ops.continual.plan.models import KNOWN_MODELS, fake_model, open_config
from sculpt_ops.continual.plan.peers import OsfLinear, OsftLinear, factorise
from sculpt_ops.continual.plan.result import Plan, Row, Setting
from sculpt_ops.continual.plan.storage import Footprint, protected_layer
from sculpt_ops.continual.plan.trace import Allocations, Trace, trace_pass
from sculpt_ops.optim.options import Options
from sculpt_ops.targets import resolve_targets

pytest.importorskip("typer", reason="the command line needs pip install sculpt-ops[train]")
pytest.importorskip("transformers", reason="planning needs pip install sculpt-ops[train]")
import transformers
from typer.testing import CliRunner

from sculpt_ops.continual.cli import app
from sculpt_ops.continual.plan import make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = 24


def tiny(model_type: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    sizes: dict[str, Any] = dict(SIZES)
    if model_type == "t5":
        sizes = {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    elif model_type == "gpt2":
        sizes = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    return fake_model(transformers.AutoConfig.for_model(model_type, **sizes), dtype)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config.json and nothing else."""
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    return tmp_path / "config.json"


def nbytes(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def backward(model: PreTrainedModel) -> None:
    tokens = torch.arange(TOKENS).view(1, -1)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


# From the safetensors indices of the published models.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gpt2": 124_439_808,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
}


def test_every_known_model_is_tested() -> None:
    assert set(KNOWN_MODELS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_the_published_size(name: str) -> None:
    """Counted with one layer and with two: all layers are alike."""
    settings = dict(KNOWN_MODELS[name])
    depth = next((key for key in ("num_hidden_layers", "num_layers") if key in settings), "n_layer")
    layers = settings.get(depth, 12)

    def size(depth_wanted: int) -> int:
        config = transformers.AutoConfig.for_model(**settings | {depth: depth_wanted})
        with FakeTensorMode():
            return sum(parameter.numel() for parameter in fake_model(config, torch.float32).parameters())

    one, two = size(1), size(2)
    assert one + (layers - 1) * (two - one) == PUBLISHED[name]
    assert open_config(name.upper()).model_type == settings["model_type"]


@pytest.mark.parametrize(
    ("model_type", "dtype", "autocast"),
    [
        ("llama", torch.float32, False),
        ("llama", torch.float32, True),
        ("llama", torch.bfloat16, False),
        ("t5", torch.float32, False),
        ("gpt2", torch.float32, False),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_without_values_allocates_what_a_real_one_does(
    model_type: str, dtype: torch.dtype, autocast: bool, checkpointing: bool
) -> None:
    model = tiny(model_type, dtype)
    config = model.config

    def trace(model: PreTrainedModel) -> Trace:
        return trace_pass(model, 2, TOKENS, autocast=autocast)

    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    real = trace(model)
    with FakeTensorMode():
        fake = trace(fake_model(config, dtype, checkpointing))
    assert fake == real
    assert real.gradients == sum(parameter.nbytes for parameter in model.parameters())
    assert len(real.arrivals) == len(list(model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointing_holds_less_and_multiplies_more() -> None:
    config = open_config("llama-2-7b")
    config.num_hidden_layers = 6
    with FakeTensorMode():
        models = [fake_model(config, torch.float32, checkpointing) for checkpointing in (False, True)]
        plain, checkpointed = (trace_pass(model, 1, 256) for model in models)
        parameters = sum(parameter.numel() for parameter in models[0].parameters())
    # Embeddings are looked up, not multiplied with.
    parameters -= config.vocab_size * config.hidden_size
    assert plain.operations == pytest.approx(6 * parameters * 256, rel=0.001)
    # The output layer is not run again.
    assert 1.0 < checkpointed.operations / plain.operations < 4 / 3
    assert checkpointed.activations < 0.8 * plain.activations


SETTINGS: list[dict[str, Any]] = [
    {"protect": protect, "sides": sides, "state": state}
    for protect in (0.25, 0.75)
    for sides in ("both", "left", "right")
    for state in ("full", "subspace")
] + [
    {"protect": 0.5, "sides": "block"},
    {"protect": 0.0},
    {"protect": 1.0, "state": "subspace"},
    {"protect": 0.5, "basis_dtype": "bfloat16"},
    {"protect": 0.75, "basis_dtype": "bfloat16", "state": "subspace"},
    {"protect": 0.5, "dtype": "bfloat16", "master": "split"},
    {"protect": 0.5, "dtype": "bfloat16", "master": "split", "state": "subspace"},
    {"protect": 0.5, "dtype": "bfloat16", "master": "stochastic", "state": "subspace", "moment_dtype": "bfloat16"},
    {"protect": 0.5, "others": "freeze"},
]


@pytest.mark.parametrize("wanted", SETTINGS, ids=str)
def test_planned_bytes_are_those_of_a_real_step(wanted: dict[str, Any], config_file: Path) -> None:
    setting = {"sides": "both", "state": "full", "master": "none", "dtype": "float32", "others": "train"} | wanted
    basis, moments = (setting.get(name) for name in ("basis_dtype", "moment_dtype"))
    plan = make_plan(
        config_file,
        protect=(setting["protect"],),
        sides=setting["sides"],
        others=setting["others"],
        dtypes=(setting["dtype"],),
        bf16=False,
        moment_dtype=moments,
        tokens=TOKENS,
        peers=False,
    )
    chosen = {"method": "sculpt", "state": setting["state"], "master": setting["master"], "basis_dtype": basis}
    (row,) = (row for row in plan.settings if vars(row.setting).items() >= chosen.items())
    assert row.memory is not None

    model = tiny(dtype=getattr(torch, setting["dtype"]))
    subspaces = Subspaces.from_model(
        model,
        protect=setting["protect"],
        sides=setting["sides"],
        others=setting["others"],
        basis_dtype=None if basis is None else getattr(torch, basis),
    )
    optimizer = sculpt_ops.AdamW(
        [p for p in model.named_parameters() if p[1].requires_grad],
        subspaces=subspaces,
        state=setting["state"],
        master=setting["master"],
        moment_dtype=None if moments is None else getattr(torch, moments),
    )
    for _ in range(2):
        backward(model)
        gradients = nbytes(p.grad for p in model.parameters() if p.grad is not None)
        with Allocations(everything(model, optimizer)) as step:
            optimizer.step()
        optimizer.zero_grad()
    states = nbytes(value for state in optimizer.state.values() for name, value in state.items() if name != "step")
    assert (row.memory.weights, row.memory.gradients) == (nbytes(model.parameters()), gradients)
    assert (row.memory.bases, row.memory.states) == (subspaces.memory(), states)
    assert 0 < step.peak <= row.memory.buffers + 64 * len(list(model.parameters()))
    kept = row.memory.weights + row.memory.bases + states
    assert row.memory.peak >= kept + max(gradients, row.memory.activations)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Tensors that are there before a step."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*model.parameters(), *model.buffers(), *gradients, *states]


def test_planned_peak_in_backward_is_enough(config_file: Path) -> None:
    plan = make_plan(config_file, dtypes=("float32",), bf16=False, tokens=TOKENS, peers=False)
    (row,) = (row for row in plan.settings if row.setting.state == "subspace" and row.setting.basis_dtype is None)
    assert row.memory is not None
    assert row.memory.peak_in_backward is not None
    model = tiny()
    subspaces = Subspaces.from_model(model, protect=0.5)
    optimizer = sculpt_ops.AdamW(model.named_parameters(), subspaces=subspaces, state="subspace")
    sculpt_ops.fuse_into_backward(model, optimizer)
    backward(model)
    with Allocations(everything(model, optimizer)) as taken:
        backward(model)
    planned = row.memory.peak_in_backward - row.memory.weights - row.memory.bases - row.memory.states
    assert 0.7 * planned < taken.peak < 1.02 * planned
    assert row.memory.peak_in_backward < row.memory.peak


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import peers

    return peers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_takes_what_is_planned_for_it(dtype: torch.dtype, peers: Any) -> None:
    pytest.importorskip("peft")
    # peft 0.21.2 replaces the parameters of a bfloat16 model by float32 ones after it has put its hooks on them.
    check_peer(peers.peft_model(tiny(dtype=dtype), 0.25), OsfLinear, "freeze", dtype, hooks=dtype is torch.float32)


def test_mini_trainer_takes_what_is_planned_for_it(peers: Any) -> None:
    try:
        peers.import_mini_trainer()
    except ImportError as error:
        pytest.skip(f"mini_trainer: {error}")
    check_peer(peers.mini_trainer_model(peers.mini_trainer_unset(tiny(), 0.25)).train(), OsftLinear, "train")


def check_peer(real: Any, kind: Any, others: Any, dtype: torch.dtype = torch.float32, *, hooks: bool = False) -> None:
    """hooks: whether it projects gradients during the backward pass."""
    planned = tiny(dtype=dtype)
    factorise(planned, {name: min(w.shape) // 4 for name, w in resolve_targets(planned).items()}, kind, others)

    def size(model: nn.Module, trained: bool) -> int:
        held = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "_osf_" in name)]
        return sum(tensor.nbytes for tensor in held if tensor.requires_grad == trained)

    assert [size(planned, trained) for trained in (True, False)] == [size(real, trained) for trained in (True, False)]
    mine, theirs = (trace_pass(model, 2, TOKENS) for model in (planned, real))
    assert mine.gradients == theirs.gradients
    layers = [layer for layer in planned.modules() if hooks and isinstance(layer, kind)]
    in_hooks = sum(work.operations for layer in layers for work in layer.projections())
    assert mine.operations + in_hooks == theirs.operations
    assert mine.activations == pytest.approx(theirs.activations, rel=0.02)
    assert mine.peak == pytest.approx(theirs.peak, rel=0.02)


def test_floors_by_hand() -> None:
    weight = torch.empty(100, 40, device="meta", dtype=torch.bfloat16)
    low, whole = (protected_layer((100, 40), 10, "both", None, coordinates) for coordinates in (True, False))
    assert update_work(weight, None, Options()) == Work((3 * 2 + 4 * 2) * 4000)
    split = Options(state="subspace", master="split")
    assert update_work(weight, low, split) == Work((3 * 2 + 4) * 4000 + (4 * 4 + 8) * 90 * 30)
    projected = projection_work(weight, whole, Options())
    assert [work.operations for work in projected] == [4 * 4000 * 20] * 2
    assert [work.moved for work in projected] == [2 * 2 * 4000 + 4 * 1400, 2 * 4 * 4000 + 4 * 1400]
    # The short side's free space is the narrower: its coordinates come first, and the reflector has less to turn.
    narrow = protected_layer((100, 40), 30, "both", None, coordinates=True)
    taken, brought = projection_work(weight, narrow, split)
    assert taken.operations == brought.operations == 2 * 4000 * 10 + 4 * 100 * 10 * 30
    assert Gpu("g", 1, bandwidth=10.0, products=2.0).seconds([Work(20), Work(10, 6)]) == 5.0


def test_gpus() -> None:
    assert find_gpu("80GB").memory == 80 * 10**9
    assert find_gpu("24 gib") == replace(H100, name="24 gib", memory=24 * 2**30)
    assert find_gpu("l40s").memory == 48 * 10**9
    assert find_gpu("RTX 4090").source == "data sheet"
    for wrong in ("80", "0GB", "Voodoo", "-3GB"):
        with pytest.raises(ValueError, match=r"gpu: got '.*wanted a size as 80GB"):
            find_gpu(wrong)


def candidate(peak: int, seconds: float | None, peak_in_backward: int = 10**9, **setting: Any) -> Row:
    memory = Footprint(0, 0, 0, 0, 0, 0, peak, peak_in_backward)
    return Row(Setting("sculpt", "bfloat16", False, "0.5", **setting), memory, seconds)


def test_the_cheapest_is_fast_then_accurate_then_able_to_clip_then_small() -> None:
    rows = (
        candidate(90, 0.5, master="split"),
        candidate(70, 1.00, master="stochastic"),
        candidate(75, 1.04, master="split", basis_dtype="bfloat16"),
        candidate(78, 1.04, master="split"),
        candidate(60, 1.20, 50, state="subspace", master="split"),
    )
    plan = Plan("m", 1, 1, 1, 1, 1, "both", False, replace(H100, memory=80), True, rows)
    assert plan.cheapest("0.5") == rows[3]
    assert replace(plan, gpu=replace(H100, memory=74)).cheapest("0.5") == rows[1]
    assert replace(plan, gpu=replace(H100, memory=55)).cheapest("0.5") == replace(
        rows[4], setting=replace(rows[4].setting, in_backward=True)
    )
    clipping = candidate(70, 1.0, 50, master="split", basis_dtype="bfloat16")
    in_backward = candidate(90, 1.0, 60, master="split")
    assert replace(plan, settings=(in_backward, clipping)).cheapest("0.5") == clipping
    none = replace(plan, gpu=replace(H100, memory=40))
    assert none.cheapest("0.5") is None
    assert none.smallest("0.5").peak == 50


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *(str(argument) for argument in arguments)])


def test_table(config_file: Path) -> None:
    result = run(config_file.parent, "--tokens", 48, "--protect", "0.25", "--protect", "rank:8", "--gpu", "1GB")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "2 matrices" not in lines[0]
    assert "14 matrices to protect, sides both; 1 x 48 tokens a forward pass" in lines[0]
    for label in ("AdamW", "0.25  full", "rank:8  subspace, split, bf16 bases", "0.25  PEFT OSF"):
        assert any(line.startswith(f"  {label} ") for line in lines), label
    assert lines[-2].startswith("  --protect 0.25 --state subspace")
    assert lines[-1].endswith("GB to spare (tight: the CUDA context and fragmentation come on top)")
    assert "a floor, not measured" in result.stdout
    small = run(config_file, "--tokens", 48, "--no-peers", "--gpu", "0.0001GB")
    assert "none; --protect 0.5" in small.stdout
    assert "PEFT" not in small.stdout.partition("full, subspace:")[0]


def test_json(config_file: Path) -> None:
    result = run(config_file, "--tokens", 48, "--gpu", "H100", "--dtype", "float32", "--no-bf16", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["rows"], plan["length"], plan["matrices"]) == (1, 48, 14)
    assert [row["setting"]["method"] for row in plan["settings"]][-2:] == ["PEFT OSF", "mini_trainer OSFT"]
    assert {row["seconds"] for row in plan["settings"]} == {None}
    assert plan["cheapest"]["0.5"]["setting"]["basis_dtype"] is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpu", "big"], "gpu: got 'big', wanted a size as 80GB or 24GiB, or one of H100"),
        (["--protect", "energy:0.9"], "protect: got energy:0.9, wanted a share as 0.5, or rank:64"),
        (["--protect", "none"], "protect: got none, wanted"),
        (["--protect", "lots"], "protect: got 'lots'"),
        (["--tokens", "50", "--batch-size", "3"], "tokens: got 50, wanted a multiple of batch_size 3"),
        (["--tokens", "128", "--batch-size", "1"], "the model has 64 positions"),
        (["--tokens", "0"], "wanted 1 or more"),
        (["--dtype", "float16"], "dtype: got 'float16', wanted one of float32, bfloat16"),
        (["--moment-dtype", "int8"], "moment_dtype: got 'int8'"),
        (["--others", "sell"], "others: got 'sell'"),
        (["--sides", "top"], "sides must be one of both"),
        (["--targets", "*.nothing"], "'*.nothing' matches no parameter"),
    ],
)
def test_wrong_use_is_one_line(options: list[str], complaint: str, config_file: Path) -> None:
    assert complaint in refused(run(config_file, *options))


def refused(result: Any) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def test_wrong_models(config_file: Path, tmp_path: Path) -> None:
    assert "model: cannot plan for ./llama-9: there is no such folder" in refused(run("./llama-9"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "cannot plan for" in refused(run(empty))
    settings = json.loads(config_file.read_text())
    for change, complaint in (
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
        ({"model_type": "never-heard-of"}, "never-heard-of"),
        ({"model_type": "bert"}, "no default targets for model type 'bert'"),
    ):
        config_file.write_text(json.dumps(settings | change))
        assert complaint in refused(run(config_file))
    config_file.write_text("{")
    assert "cannot plan for" in refused(run(config_file))
