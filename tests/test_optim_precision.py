"""bfloat16 weights with a master in two halves or rounded stochastically, moments in 16 bit; saved and loaded."""

import copy
import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sculpt_ops import layer
from sculpt_ops.layer import project_each_
from sculpt_ops.optim import AdamW, rows
from sculpt_ops.optim.options import Options
from sculpt_ops.subspaces import Subspaces

from .training import SHAPES, Kinds, Shapes, assert_same_weights, feed, recorded, start_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = torch.bfloat16


def in_float32(model: Kinds) -> Kinds:
    """The same weights in float32, with the same bases."""
    wide = Kinds()
    wide.load_state_dict(model.state_dict())
    wide.subspaces = Subspaces(model.subspaces, {}).bind(wide)
    return wide


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"decay_to": "start"}, {"foreach": True}, {"moment_dtype": BF16}], ids=str
)
@pytest.mark.parametrize("mode", ["full", "update", "subspace"])
def test_split_halves_are_the_float32_weight_to_the_bit(mode: str, options: dict[str, Any]) -> None:
    """Fed the same numbers. With project="both" they are what a bfloat16 `.grad` holds after projection in place."""
    narrow = Kinds((BF16,))
    wide = in_float32(narrow)
    options = {"lr": 1e-3, "weight_decay": 0.1, "state": "subspace" if mode == "subspace" else "full"} | options
    project = {"full": "both", "update": "update", "subspace": "both"}[mode]
    optimizer = AdamW(narrow.parameters(), master="split", subspaces=narrow.subspaces, project=project, **options)  # type: ignore[arg-type]
    project = "both" if mode == "subspace" else "update"
    reference = AdamW(wide.parameters(), subspaces=wide.subspaces, project=project, **options)  # type: ignore[arg-type]
    for grads in recorded(narrow, 60):
        feed(narrow, grads)
        optimizer.step()
        feed(wide, [parameter.grad for parameter in narrow.parameters() if parameter.grad is not None])
        reference.step()
    for (name, parameter), exact in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert optimizer.state[parameter]["low"].dtype is torch.int16
        assert torch.equal(optimizer.master_weight(parameter), exact), name
        assert ((parameter.float() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("state", ["full", "subspace"])
@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("master", ["none", "stochastic"])
def test_steps_in_bfloat16_change_bfloat16_weights_as_well(
    master: Any, lr: float, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU makes them: as near to float32 weights as with steps in float32, with no larger a leak."""
    on_a_gpu = rows._steps_in_bfloat16
    errors, leaks = [], []
    for narrow in (False, True):

        def chosen(options: Options, row: rows.Row, narrow: bool = narrow) -> bool:
            on_gpu: Any = SimpleNamespace(is_cuda=narrow, dtype=row.parameter.dtype)
            return on_a_gpu(options, row._replace(parameter=on_gpu))

        monkeypatch.setattr(rows, "_steps_in_bfloat16", chosen)
        if narrow:
            monkeypatch.setattr(layer, "_has_tensor_cores", lambda _: True)
        model = Kinds((BF16,))
        wide = in_float32(model)
        start = start_of(wide)
        options: dict[str, Any] = {"lr": lr, "weight_decay": 0.1, "state": state}
        optimizer = AdamW(model.parameters(), subspaces=model.subspaces, master=master, **options)
        exact = AdamW(wide.parameters(), subspaces=wide.subspaces, **options)
        for grads in recorded(model, 100):
            feed(model, grads)
            feed(wide, grads)
            optimizer.step()
            exact.step()
        error = leak = 0.0
        for (name, parameter), reference in zip(model.named_parameters(), wide.parameters(), strict=True):
            weight = parameter.detach().float()
            change = weight - start[name]
            error += float((weight - reference.detach()).square().sum())
            free = change.clone()
            project_each_([(free, model.subspaces[name])])
            leak += float((change - free).square().sum())
        errors.append(error**0.5)
        leaks.append(leak**0.5)
    assert errors[1] <= 1.02 * errors[0]
    assert leaks[1] <= 1.02 * leaks[0]


def test_room_of_a_step_by_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, made in one pass: the step alone, of three copies that others take, in two or four bytes a number."""
    monkeypatch.setattr(rows, "in_one_pass", lambda device: True)
    layer, group = Kinds().subspaces["both_25_32"], {"amsgrad": False, "foreach": None}

    def share(options: dict[str, Any], dtype: torch.dtype = BF16, is_cuda: bool = True, **changes: Any) -> float:
        parameter: Any = SimpleNamespace(
            is_cuda=is_cuda, dtype=dtype, device=None, numel=lambda: 6000, element_size=lambda: dtype.itemsize
        )
        row = rows.Row(parameter, 0, {}, layer, None)
        return rows._share_of_bucket(Options(**options), group | changes, row) / 6000

    assert share({}) == share({"master": "stochastic"}) == pytest.approx(2 / 3, abs=1e-3)
    # At the first step there are no low bits yet.
    assert share({"master": "split"}) == share({}, torch.float32) == pytest.approx(4 / 3, abs=1e-3)
    assert share({}, torch.float64) == 8
    for options in ({"state": "subspace"}, {"moment_dtype": BF16}):
        assert share(options) == 4
    assert share({}, amsgrad=True) == share({}, foreach=True) == share({}, is_cuda=False) == 4


@pytest.mark.parametrize(
    ("options", "changes", "wanted"),
    [
        ({}, {}, True),
        ({"master": "stochastic"}, {}, True),
        ({"project": "update"}, {}, True),
        ({}, {"is_cuda": False}, False),
        ({}, {"dtype": torch.float32}, False),
        ({"master": "split"}, {"low": torch.zeros(1, dtype=torch.int16)}, False),
        ({"state": "subspace"}, {}, True),
        ({"state": "subspace"}, {"layer": "both_75_32"}, False),
        ({}, {"layer": "both_75_32"}, True),
        ({"project": "gradient"}, {}, False),
        ({}, {"layer": None}, False),
    ],
)
def test_which_steps_are_in_bfloat16(options: dict[str, Any], changes: dict[str, Any], wanted: bool) -> None:
    parameter: Any = SimpleNamespace(is_cuda=True, dtype=BF16)
    for name in ("is_cuda", "dtype"):
        setattr(parameter, name, changes.get(name, getattr(parameter, name)))
    state = {"low": changes["low"]} if "low" in changes else {}
    layers = Kinds().subspaces
    name = changes.get("layer", "both_25_32")
    bound = None if name is None else layers[name]
    assert bound is None or (bound.keep_left or bound.keep_right) == ("75" in name)
    assert rows._steps_in_bfloat16(Options(**options), rows.Row(parameter, 0, state, bound, None)) is wanted


def test_split_without_a_basis_is_torch_adamw_in_float32_to_rounding() -> None:
    """Not to the bit: torch decays the weight in place before it adds the step."""
    narrow, wide = Shapes(BF16), Shapes()
    wide.load_state_dict(narrow.state_dict())
    start = start_of(wide)
    optimizer, reference = AdamW(narrow.parameters(), master="split"), torch.optim.AdamW(wide.parameters())
    for grads in recorded(narrow, 60):
        feed(narrow, grads)
        feed(wide, grads)
        optimizer.step()
        reference.step()
    for (name, exact), parameter in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        error = (optimizer.master_weight(parameter) - exact.detach()).norm()
        rounding = 2 * 2**-24 * 60**0.5 * start[name].norm()
        assert error <= 1e-5 * (exact.detach() - start[name]).norm() + rounding


def test_steps_below_the_rounding_of_the_weights_are_not_lost() -> None:
    """At lr 1e-5 a step is 1/100 of a unit in the last place: without a master most of it is gone."""
    exact, change, models = Kinds(), {}, {}
    exact.load_state_dict(Kinds((BF16,)).state_dict())
    grads = recorded(exact, 100)
    for master in ("none", "stochastic", "split"):
        models[master] = Kinds((BF16,))
    optimizers = {m: AdamW(k.parameters(), 1e-5, subspaces=k.subspaces, master=m) for m, k in models.items()}  # type: ignore[arg-type]
    reference, start = AdamW(exact.parameters(), 1e-5, subspaces=exact.subspaces), start_of(exact)
    for of_step in grads:
        for model, optimizer in ((exact, reference), *((models[m], optimizers[m]) for m in models)):
            feed(model, of_step)
            optimizer.step()
    moved = torch.cat([(p.detach() - w).flatten() for p, w in zip(exact.parameters(), start.values(), strict=True)])
    for master, model in models.items():
        weights = [optimizers[master].master_weight(p) for p in model.parameters()]
        change[master] = torch.cat([(p - w).flatten() for p, w in zip(weights, start.values(), strict=True)])
    along = {master: float(c @ moved / (moved @ moved)) for master, c in change.items()}
    assert along["none"] < 0.5
    assert along["split"] == pytest.approx(1.0, abs=1e-2)
    assert along["stochastic"] == pytest.approx(1.0, abs=0.1)


def test_stochastic_rounding_is_right_on_average() -> None:
    """The mean of what 24 seeds make of a weight, against float32: within 5 standard deviations of its noise."""
    wide, errors = Shapes(), []
    wide.load_state_dict(Shapes(BF16).state_dict())
    grads = recorded(Shapes(BF16), 20)
    reference = AdamW(
        wide.parameters(), 1e-4, project="update", subspaces=Subspaces.from_model(wide, targets=list(SHAPES))
    )
    for of_step in grads:
        feed(wide, of_step)
        reference.step()
    for seed in range(24):
        model = Shapes(BF16)
        subspaces = Subspaces.from_model(model, targets=list(SHAPES))
        optimizer = AdamW(
            model.parameters(), 1e-4, project="update", subspaces=subspaces, master="stochastic", seed=seed
        )
        for of_step in grads:
            feed(model, of_step)
            optimizer.step()
        pairs = zip(model.parameters(), wide.parameters(), strict=True)
        errors.append(torch.cat([(p.detach().double() - q.detach().double()).flatten() for p, q in pairs]))
    noise = torch.stack(errors)
    assert float(noise.std()) > 1e-4
    assert abs(float(noise.mean())) <= 5 * float(noise.std()) / noise.numel() ** 0.5
    # Of every weight: none is drawn in one direction.
    means = noise.mean(0).abs() / (noise.std(0) / 24**0.5).clamp(min=1e-12)
    assert float((means > 4.0).double().mean()) < 0.01


def test_stochastic_rounding_depends_on_seed_step_and_parameter_alone() -> None:
    def stepped(seed: int, steps: int = 1) -> list[Tensor]:
        """The same weight and the same step (betas 0: minus the sign of the gradient) in two parameters."""
        weights = [nn.Parameter(torch.full((64, 64), 0.3, dtype=BF16)) for _ in range(2)]
        optimizer = AdamW(weights, 3e-4, betas=(0.0, 0.0), weight_decay=0.0, master="stochastic", seed=seed)
        for _ in range(steps):
            for weight in weights:
                weight.data.fill_(0.3)
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        return [weight.detach() for weight in weights]

    first, second = stepped(0)
    for weight in (first, second):
        assert len(weight.unique()) == 2
    assert not torch.equal(first, second)
    assert torch.equal(first, stepped(0)[0])
    assert not torch.equal(first, stepped(1)[0])
    assert not torch.equal(first, stepped(0, steps=2)[0])
    assert torch.equal(stepped(0, steps=2)[0], stepped(0, steps=2)[0])


@pytest.mark.parametrize("state", ["full", "subspace"])
def test_moments_in_bfloat16_do_not_stall(state: str) -> None:
    """0.999 v + 0.001: rounded to nearest v stops at 0.25, where the change is half a unit in the last place."""
    weight = nn.Parameter(torch.zeros(48, 48))
    options: dict[str, Any] = {"moment_dtype": BF16, "weight_decay": 0.0}
    if state == "subspace":
        with torch.no_grad():
            weight.copy_(torch.eye(48))
        module = nn.ParameterDict({"w": weight})
        options |= {"subspaces": Subspaces.from_model(module, 0.5, targets="w"), "state": state}
    optimizer = AdamW([weight], 1e-3, **options)
    signs = torch.randn(48, 48, generator=torch.Generator().manual_seed(0)).sign()
    mean_square = 1.0
    for _ in range(700):
        weight.grad = signs.clone()
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    if state == "subspace":
        mean_square = float(optimizer._bound[weight].to_coordinates(signs).square().mean())
    assert second.dtype is BF16
    assert float(second.float().mean()) == pytest.approx((1.0 - 0.999**700) * mean_square, rel=1e-2)


@pytest.mark.parametrize(
    ("dtype", "master", "moment_dtype", "wanted"),
    [
        (BF16, "none", None, BF16),
        (BF16, "split", None, torch.float32),
        (BF16, "stochastic", None, torch.float32),
        (BF16, "none", torch.float32, torch.float32),
        (BF16, "split", BF16, BF16),
        (torch.float32, "split", None, torch.float32),
        (torch.float32, "none", BF16, BF16),
        (torch.float16, "split", None, torch.float16),
    ],
)
@pytest.mark.parametrize("state", ["full", "subspace"])
def test_dtypes_of_the_state(
    state: str, dtype: torch.dtype, master: str, moment_dtype: torch.dtype | None, wanted: torch.dtype
) -> None:
    """Of matrices with a basis and of those without; only bfloat16 weights have low bits."""
    model = Shapes(dtype)
    options: dict[str, Any] = {"master": master, "moment_dtype": moment_dtype, "state": state, "eps": 1e-4}
    optimizer = AdamW(model.parameters(), subspaces=Subspaces.from_model(model, targets="wide"), **options)
    train(model, optimizer, 2)
    for parameter in model.parameters():
        kept = optimizer.state[parameter]
        assert kept["exp_avg"].dtype is kept["exp_avg_sq"].dtype is wanted
        assert ("low" in kept) == (master == "split" and dtype is BF16)
        assert parameter.isfinite().all()


MASTERS: list[dict[str, Any]] = [
    {"master": "none"},
    {"master": "split"},
    {"master": "split", "moment_dtype": BF16, "amsgrad": True},
    {"master": "stochastic", "moment_dtype": BF16, "seed": 5},
    {"master": "stochastic", "decay_to": "start"},
]


@pytest.mark.parametrize("options", MASTERS, ids=str)
@pytest.mark.parametrize("state", ["full", "subspace"])
def test_resume_is_to_the_bit(state: str, options: dict[str, Any]) -> None:
    """Saved by torch.save and read with weights_only; every tensor comes back in its dtype, to the bit."""
    model, resumed = Kinds((BF16, torch.float32)), Kinds((BF16, torch.float32))
    optimizer = AdamW(model.parameters(), 1e-2, subspaces=model.subspaces, state=state, **options)  # type: ignore[arg-type]
    train(model, optimizer, 5)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights, saved = torch.load(buffer, weights_only=True)
    resumed.load_state_dict(weights)
    after = AdamW(resumed.parameters(), subspaces=resumed.subspaces, state=state, **options)  # type: ignore[arg-type]
    after.load_state_dict(saved)
    assert after.param_groups[0]["lr"] == 1e-2
    for old, new in zip(model.parameters(), resumed.parameters(), strict=True):
        for name, value in optimizer.state[old].items():
            assert after.state[new][name].dtype is value.dtype
            assert torch.equal(after.state[new][name], value)
            assert after.state[new][name].data_ptr() != value.data_ptr()
    train(model, optimizer, 5)
    train(resumed, after, 5)
    assert_same_weights(model, resumed)


def test_plain_torch_state_of_bfloat16_weights_is_taken_over_in_float32() -> None:
    model = Shapes(BF16)
    plain = torch.optim.AdamW(model.parameters())
    train(model, plain, 3)
    saved = copy.deepcopy(plain.state_dict())
    optimizer = AdamW(model.parameters(), master="split")
    optimizer.load_state_dict(saved)
    for index, parameter in enumerate(model.parameters()):
        assert optimizer.state[parameter]["exp_avg_sq"].dtype is torch.float32
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"].bfloat16(), saved["state"][index]["exp_avg_sq"])


@pytest.mark.parametrize("state", ["full", "subspace"])
def test_accelerate_prepares_saves_and_resumes(state: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def prepared() -> tuple[Any, nn.Module, Any, AdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8)).to(BF16)
        subspaces = Subspaces.from_model(model, 0.5, targets="*.weight")
        optimizer = AdamW(model.parameters(), 1e-3, subspaces=subspaces, state=state, master="split")  # type: ignore[arg-type]
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer), optimizer

    def run(accelerator: Any, model: nn.Module, wrapped: Any, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 24, generator=torch.Generator().manual_seed(step)).to(BF16)
            accelerator.backward(model(x).float().square().mean())
            wrapped.step()
            wrapped.zero_grad()

    accelerator, model, wrapped, optimizer = prepared()
    run(accelerator, model, wrapped, range(4))
    accelerator.save_state(str(tmp_path))
    low = optimizer.state[next(model.parameters())]["low"].clone()
    run(accelerator, model, wrapped, range(4, 8))
    accelerator, other, wrapped, resumed = prepared()
    accelerator.load_state(str(tmp_path))
    kept = resumed.state[next(other.parameters())]
    assert kept["exp_avg"].dtype is kept["exp_avg_sq"].dtype is torch.float32
    assert torch.equal(kept["low"], low)
    run(accelerator, other, wrapped, range(4, 8))
    assert_same_weights(model, other)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.master_weight(a), resumed.master_weight(b))


def test_unusable_options_are_refused() -> None:
    parameters = [nn.Parameter(torch.zeros(4, 4, dtype=BF16))]
    with pytest.raises(ValueError, match="master must be one of none, split, stochastic; got 'fp32'"):
        AdamW(parameters, master="fp32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay_to must be one of zero, start; got 'base'"):
        AdamW(parameters, decay_to="base")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"moment_dtype must be torch\.float32, torch\.bfloat16 or None, got torch\.fl"
    ):
        AdamW(parameters, moment_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"moment_dtype=torch\.bfloat16 cannot be combined with float64 parameters"):
        AdamW([nn.Parameter(torch.zeros(4, 4).double())], moment_dtype=BF16)
    for option in ("fused", "differentiable"):
        with pytest.raises(ValueError, match=f"{option}=True cannot be combined with master, moment_dtype or decay_to"):
            AdamW(parameters, master="split", **{option: True})  # type: ignore[arg-type]
    for stochastic in ({"master": "stochastic"}, {"moment_dtype": BF16}):
        with pytest.raises(ValueError, match="capturable=True cannot be combined with stochastic rounding"):
            AdamW(parameters, capturable=True, **stochastic)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_16_bit_weights_without_more_bits_are_warned_of_once(dtype: torch.dtype) -> None:
    def stepped(
        options: dict[str, Any], dtype: torch.dtype, guarded: bool = False, cast: torch.dtype | None = None
    ) -> list[str]:
        model = nn.Linear(8, 8, bias=False, dtype=dtype)
        subspaces = Subspaces.from_model(model, 0.5, targets="weight")
        optimizer = AdamW(model.parameters(), subspaces=subspaces, **options)
        optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does when it prepares an optimizer
        model.to(cast)
        if guarded:
            subspaces.guard(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model.weight.grad = torch.ones_like(model.weight)
                optimizer.step()
        return [str(warning.message) for warning in caught if "16 bit" in str(warning.message)]

    (message,) = stepped({}, dtype)
    assert "guard(optimizer)" in message
    assert not stepped({}, dtype, guarded=True)
    assert not stepped({}, torch.float32)
    assert len(stepped({}, torch.float32, cast=dtype)) == 1
    assert len(stepped({"master": "split"}, dtype)) == (dtype is not BF16)
