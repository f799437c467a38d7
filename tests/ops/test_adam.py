"""AdamW's moments and steps in one pass: its twin to the bit, near torch's AdamW; a bad call writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.optim.adamw import adamw

from sculpt_ops import reference
from sculpt_ops.ops import adam as adam_ops
from sculpt_ops.ops.adam import adam_, adam_cuda_
from sculpt_ops.ops.heuristics import H100
from sculpt_ops.optim import rows

from .adam_cases import DECAYS, HYPERPARAMETERS, SHAPES, Case, a_case

BF16, F32, F64, I16 = torch.bfloat16, torch.float32, torch.float64, torch.int16


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("step_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("moment_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("grad_dtype", [F32, BF16], ids=str)
def test_the_kernel_is_its_twin_to_the_bit(
    grad_dtype: torch.dtype, moment_dtype: torch.dtype, step_dtype: torch.dtype, decays: str, maximize: bool
) -> None:
    ours = a_case(SHAPES, grad_dtype, decays, moment_dtype=moment_dtype, step_dtype=step_dtype)
    twin, before = ours.clone(), ours.clone()
    for _ in range(3):
        adam_(*ours, **HYPERPARAMETERS, maximize=maximize)
        reference.adam_(*twin, **HYPERPARAMETERS, maximize=maximize)
        assert all(torch.equal(a, b) for a, b in zip(ours.written(), twin.written(), strict=True))
    assert not any(step.isnan().any() for step in ours.steps)
    for name in ("grads", "weights", "lows", "starts"):
        pairs = zip(getattr(ours, name), getattr(before, name), strict=True)
        assert all(a is b or torch.equal(a, b) for a, b in pairs)


def test_what_is_written_in_bfloat16_is_that_of_float32_rounded() -> None:
    """The step is that of the moments before they are rounded."""
    narrow = a_case(SHAPES, BF16, moment_dtype=BF16, step_dtype=BF16)
    wide = narrow.clone()
    names = ("steps", "firsts", "seconds")
    wide = wide._replace(**{name: [t.float() for t in getattr(wide, name)] for name in names})
    for case in (narrow, wide):
        adam_(*case, **HYPERPARAMETERS)
    for name in names:
        pairs = zip(getattr(narrow, name), getattr(wide, name), strict=True)
        assert all(torch.equal(a, b.bfloat16()) for a, b in pairs)


@given(
    lr=st.floats(0, 10),
    beta1=st.floats(0, 0.9999),
    beta2=st.floats(0, 0.999999),
    eps=st.floats(1e-12, 1.0),
    taken=st.integers(0, 10**6),
)
def test_the_kernel_is_its_twin_at_any_hyperparameters(lr: float, taken: int, **hyperparameters: float) -> None:
    ours = a_case([(33,)], lr=lr, decays="none")
    ours.counts[0].fill_(taken)
    twin = ours.clone()
    adam_(*ours, **hyperparameters, weight_decay=0)
    reference.adam_(*twin, **hyperparameters, weight_decay=0)
    for a, b in zip(ours.written(), twin.written(), strict=True):
        # The last bit of two `pow` may differ.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_error_is_at_most_twice_torchs(maximize: bool) -> None:
    case = a_case([(257, 129)])
    arguments = {"amsgrad": False, "maximize": maximize, "foreach": False, "capturable": False, "differentiable": False}
    arguments |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    results = {}
    for dtype in (F32, F64):
        weight = case.weights[0]
        assert weight is not None
        moments = [case.firsts[0].to(dtype), case.seconds[0].to(dtype)]
        step, lr = torch.zeros_like(weight, dtype=dtype), float(case.lr)
        lists: Any = [[step], [case.grads[0].to(dtype)], *[[m] for m in moments], [], [case.counts[0].clone()]]
        adamw(*lists, **arguments, lr=lr, weight_decay=0.0)
        step -= weight.to(dtype) * (lr * HYPERPARAMETERS["weight_decay"])
        results[dtype] = [step, *moments]
    adam_(*case, **HYPERPARAMETERS, maximize=maximize)
    for ours, theirs, exact in zip(case.written(), results[F32], results[F64], strict=False):
        error, allowed = (ours - exact).abs(), (theirs - exact).abs()
        assert error.norm() <= 2 * allowed.norm()
        assert error.max() <= 2 * allowed.max()


def test_threads_do_not_change_the_result() -> None:
    shapes = [(300_001,), (5,), (16_384,), (70_000,)]
    parallel, serial = a_case(shapes, decays="halves"), a_case(shapes, decays="halves")
    adam_(*parallel, **HYPERPARAMETERS)
    try:
        torch.set_num_threads(1)
        adam_(*serial, **HYPERPARAMETERS)
    finally:
        torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(parallel.written(), serial.written(), strict=True))


def test_the_learning_rate_may_be_float32_and_lists_empty() -> None:
    ours = a_case([(7,)])._replace(lr=torch.tensor([0.5]))
    twin = ours.clone()
    adam_(*ours, **HYPERPARAMETERS)
    reference.adam_(*twin, **HYPERPARAMETERS)
    assert torch.equal(ours.steps[0], twin.steps[0])
    adam_(*a_case([]), **HYPERPARAMETERS)


def test_version_counters_move() -> None:
    case = a_case([(3,)])
    before = [t._version for t in case.written()]
    adam_(*case, **HYPERPARAMETERS)
    assert [t._version for t in case.written()] == [version + 1 for version in before]


@pytest.mark.parametrize("decays", ["none", "halves", "start"])
def test_opcheck(decays: str) -> None:
    opcheck(torch.ops.sculpt._adam_.default, tuple(a_case([(3, 4), (5,)], decays=decays)), HYPERPARAMETERS)


def replaced(name: str, value: Any, at: int = 1) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        column = list(getattr(case, name))
        column[at] = value(column[at]) if callable(value) else value
        return case._replace(**{name: column})

    return change


# In the second of two entries, so that the first would have been written.
WRONG: dict[str, tuple[Callable[[Case], Case], str]] = {
    "too few": (lambda c: c._replace(seconds=c.seconds[:1]), r"seconds: .*1"),
    "too many": (lambda c: c._replace(weights=[*c.weights, None]), r"weights: .*3"),
    "shape": (replaced("firsts", lambda t: t[:4]), r"firsts: .*\(4\)|firsts: .*\(4,\)"),
    "shape of a weight": (replaced("weights", lambda t: t[:4].clone()), r"weights: .*\(4\)|weights: .*\(4,\)"),
}
# What only the device's kernel sees: not while tracing.
REFUSED: dict[str, tuple[Callable[[Case], Case], str]] = WRONG | {
    "strides": (replaced("steps", lambda t: torch.zeros(10)[::2]), "steps: .*contiguous"),
    "dtype of steps": (replaced("steps", lambda t: t.double()), "steps: .*float32"),
    "dtype of grads": (replaced("grads", lambda t: t.half()), "grads: .*float32 or bfloat16"),
    "dtype of firsts": (replaced("firsts", lambda t: t.half()), "firsts: .*float32 or bfloat16"),
    "moments of two dtypes": (replaced("seconds", lambda t: t.bfloat16()), "seconds: .*dtype of firsts"),
    "dtype of counts": (replaced("counts", torch.tensor(1)), "counts: .*float32"),
    "size of counts": (replaced("counts", torch.zeros(2)), r"counts: .*\(2\)|counts: .*\(2,\)"),
    "lows without weights": (replaced("lows", torch.zeros(5, dtype=I16)), "lows: .*bfloat16 weights"),
    "starts of another dtype": (replaced("starts", torch.zeros(5, dtype=BF16)), "starts: .*dtype of weights"),
    "starts alone": (
        lambda c: replaced("starts", torch.zeros(5))(replaced("weights", None)(c)),
        "weights: .*where lows or starts",
    ),
    "learning rates": (lambda c: c._replace(lr=torch.zeros(2)), "lr: .*one number"),
    "one moment twice": (lambda c: c._replace(seconds=[c.seconds[0], c.firsts[1]]), "(firsts|seconds): .*memory"),
    "a count twice": (lambda c: c._replace(counts=[c.counts[0], c.counts[0]]), "counts: .*memory"),
    "the gradient written": (lambda c: c._replace(steps=[c.steps[0], c.grads[1]]), "(steps|grads): .*memory"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_errors_leave_everything_as_it_was(wrong: str) -> None:
    change, words = REFUSED[wrong]
    case = change(a_case([(6,), (5,)]))
    before = [t.clone() for t in case.all()]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"_adam_: {words}"):
        adam_(*case, **HYPERPARAMETERS)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"_adam_: {words}"):  # the C++ checks
        adam_(*case, **HYPERPARAMETERS)
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(case.all(), before, strict=True))


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_while_tracing(wrong: str) -> None:
    change, words = WRONG[wrong]
    case = change(a_case([(6,), (5,)]))
    with torch._subclasses.FakeTensorMode() as mode:
        columns = [[t if t is None else mode.from_tensor(t) for t in column] for column in case[:-1]]
        with pytest.raises(ValueError, match=f"_adam_: {words}"):
            adam_(*columns, mode.from_tensor(case.lr), **HYPERPARAMETERS)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["grads", "weights", "steps"])
def test_what_requires_grad_is_refused(name: str) -> None:
    case = a_case([(6,), (5,)])
    leaf = getattr(case, name)[1].clone().requires_grad_()
    changed = replaced(name, leaf)(case)
    with pytest.raises(RuntimeError, match=f"_adam_: {name}: given a tensor that requires grad"):
        adam_(*changed, **HYPERPARAMETERS)
    assert all(step.isnan().all() for step in case.steps)
    with torch.no_grad():
        adam_(*changed, **HYPERPARAMETERS)


# The GPU's side of it, on tensors of the CPU: what C++ would refuse, Python has refused, and which kernel is called.
ON_THE_GPU: dict[str, tuple[Callable[[Case], Case], str]] = REFUSED | {
    "device of firsts": (replaced("firsts", lambda t: t.to("meta")), "firsts: .*device of the first of grads"),
    "device of counts": (replaced("counts", lambda t: t.to("meta")), "counts: .*device of .*, or the CPU"),
    "device of starts": (replaced("starts", torch.zeros(5, device="meta")), "starts: .*device of"),
    "device of the learning rate": (lambda c: c._replace(lr=c.lr.to("meta")), "lr: .*device of grads"),
    "a half learning rate": (lambda c: c._replace(lr=c.lr.half()), "lr: .*float32 or float64"),
    "a weight written": (lambda c: c._replace(firsts=[c.weights[0], c.firsts[1]]), "(weights|firsts): .*memory"),  # type: ignore[list-item]
    "lows beside float32": (replaced("lows", torch.zeros(5, dtype=I16)), "lows: .*float32 .*bfloat16 weights"),
    "lows of another dtype": (replaced("lows", torch.zeros(5)), "lows: .*int16"),
    "dtype of weights": (replaced("weights", lambda t: t.half()), "weights: .*float32 or bfloat16"),
}  # fmt: skip


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernel was called; the twin stands in for C++."""
    names: list[str] = []
    twin = reference.adam_

    def stand_in(name: str) -> Callable[..., None]:
        def run(*args: Any, **hyperparameters: Any) -> None:
            names.append(name)
            twin(*args, **hyperparameters)

        return run

    monkeypatch.setattr(torch.ops.sculpt, "_cuda_adam_", stand_in("kernel"), raising=False)
    monkeypatch.setattr(reference, "adam_", stand_in("twin"))
    return names


@pytest.mark.parametrize("wrong", ON_THE_GPU)
def test_python_refuses_what_the_cuda_kernel_would(wrong: str, called: list[str]) -> None:
    change, words = ON_THE_GPU[wrong]
    case = change(a_case([(6,), (5,)]))
    before = [t if t.is_meta else t.clone() for t in case.all()]
    with pytest.raises((ValueError, TypeError), match=f"_adam_: {words}"):
        adam_cuda_(*case, **HYPERPARAMETERS)
    assert not called
    for now, then in zip(case.all(), before, strict=True):
        assert now is then or torch.equal(now, then) or now.isnan().all()


def test_counts_on_the_cpu_are_refused_while_a_graph_is_captured(
    called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_ops, "is_capturing", lambda device: True)
    case = a_case([(6,), (5,)])
    with pytest.raises(RuntimeError, match=r"_adam_: counts: given on the CPU while .*capturable=True"):
        adam_cuda_(*case, **HYPERPARAMETERS)
    assert not called
    assert [float(count) for count in case.counts] == [0.0, 3.0]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("decays", DECAYS)
def test_the_cuda_kernel_steps_where_it_is(
    decays: str, there: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_ops, "in_one_pass", lambda device: there)
    ours = a_case(SHAPES, decays=decays)
    twin = ours.clone()
    adam_cuda_(*ours, **HYPERPARAMETERS)
    adam_(*twin, **HYPERPARAMETERS)
    assert called == ["kernel" if there else "twin"]
    assert all(torch.equal(a, b) for a, b in zip(ours.written(), twin.written(), strict=True))
    adam_cuda_(*a_case([]), **HYPERPARAMETERS)
    assert len(called) == 1


@pytest.mark.parametrize(
    ("missing", "capability", "code", "wanted"),
    [(None, 80, True, True), (None, 75, True, False), ("no nvcc", 90, True, False), (None, 80, False, False)],
)
def test_where_the_cuda_kernel_is(
    missing: str | None, capability: int, code: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built, a device from 8.0 on, and code for it: a build has that of one architecture unless told otherwise."""
    monkeypatch.setattr(adam_ops, "cuda_missing", lambda: missing)
    monkeypatch.setattr(adam_ops, "gpu_of", lambda index: H100._replace(capability=capability))
    monkeypatch.setattr(torch.ops.sculpt, "_cuda_adam_runs", lambda index: code, raising=False)
    monkeypatch.setattr(adam_ops, "_kernel_runs", adam_ops._kernel_runs.__wrapped__)
    assert adam_ops.in_one_pass(torch.device("cuda", 0)) is wanted
    assert adam_ops.in_one_pass(torch.device("cpu"))
    assert not adam_ops.in_one_pass(torch.device("meta"))


META, CPU = torch.device("meta"), torch.device("cpu")
GROUP = {"foreach": None, "differentiable": False, "betas": (0.9, 0.999), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}


def serves(case: Case, **group: Any) -> bool:
    decays = [
        weight if weight is None else rows.Decayed(weight, low, start)
        for weight, low, start in zip(case.weights, case.lows, case.starts, strict=True)
    ]
    return rows._serves(GROUP | group, case.grads, [case.firsts, case.seconds], case.counts, decays)


def on(device: torch.device, case: Case) -> Case:
    return Case(*[[t if t is None else t.to(device) for t in column] for column in case[:-1]], case.lr)


def test_which_steps_of_the_optimizer_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device in the place of a GPU."""
    cpu = a_case([(6,), (5,)], decays="halves")
    case = on(META, cpu)
    assert serves(cpu)
    assert not serves(case)
    monkeypatch.setattr(rows, "in_one_pass", lambda device: True)
    assert serves(case)
    assert serves(case._replace(counts=cpu.counts))
    assert serves(on(META, a_case([(6,), (5,)], moment_dtype=BF16)))
    assert serves(case, lr=torch.zeros((), device=META))
    assert serves(case, lr=torch.zeros(()), betas=(torch.zeros(()), 0.9))
    for wrong in (
        replaced("firsts", lambda t: t.bfloat16()),
        replaced("grads", lambda t: t.half()),
        replaced("grads", torch.zeros(5)),
        replaced("grads", torch.empty(10, device=META)[::2]),
        replaced("weights", torch.zeros(5, dtype=BF16)),
        replaced("counts", lambda t: t.double()),
    ):
        assert not serves(wrong(case))
    assert not serves(case, betas=(torch.zeros((), device=META), 0.9))
    assert not serves(case, foreach=True)
    assert not serves(case, differentiable=True)


@pytest.mark.parametrize(
    ("given", "device", "dtype"),
    [
        (0.5, CPU, F64),
        (torch.tensor(0.5), CPU, F64),
        (torch.zeros((), device=META), META, F32),
        (torch.zeros((), device=META, dtype=BF16), META, F64),
    ],
)
def test_a_learning_rate_on_a_gpu_stays_there(
    given: Any, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    monkeypatch.setattr(rows, "step_adam_", lambda *args, **_: rates.append(args[8]))
    case = a_case([(6,)])
    columns = [case.firsts, case.seconds]
    group = GROUP | {"lr": given, "maximize": False}
    with torch.device(META):  # a default device changes nothing
        rows._one_pass(group, case.grads, columns, case.counts, [None], [F32])
    assert [(rate.device, rate.dtype) for rate in rates] == [(device, dtype)]
    assert rates[0] is given or dtype is F64
