"""AdamW's elementwise work on a GPU by the CUDA C++ kernel, against its twin, and the optimizer on top of it.

Values, alignment and the graph with everything on the device passed on an H200 (torch 2.11, CUDA 13.0). NOT YET RUN ON
A GPU: counts on the CPU, the refusals, moments and steps in bfloat16, the optimizer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sculpt_ops
from sculpt_ops import layer, reference
from sculpt_ops.layer import project_each_
from sculpt_ops.ops import adam as adam_ops
from sculpt_ops.ops.adam import adam_, in_one_pass
from sculpt_ops.ops.variants import cuda_missing
from sculpt_ops.optim import rows as optim_rows

from ..ops.adam_cases import DECAYS, HYPERPARAMETERS, SHAPES, Case, a_case

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_missing() is not None, reason="needs a GPU and the CUDA C++ kernels"
)


def on_gpu(case: Case) -> Case:
    return Case(*[[t if t is None else t.cuda() for t in column] for column in case[:-1]], case.lr.cuda())


def near(ours: list[Tensor], twins: list[Tensor]) -> None:
    """Within the rounding of the kernel's fused products and sums."""
    for a, b in zip(ours, twins, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values(grad_dtype: torch.dtype, decays: str, maximize: bool) -> None:
    twin = a_case([*SHAPES, *[(3, 7)] * 300], grad_dtype, decays)
    ours = on_gpu(twin)
    for _ in range(3):
        torch.ops.sculpt._cuda_adam_(*ours, **HYPERPARAMETERS, maximize=maximize)
        reference.adam_(*twin, **HYPERPARAMETERS, maximize=maximize)
    near(ours.written(), twin.written())


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_in_bfloat16(grad_dtype: torch.dtype, step_dtype: torch.dtype, decays: str) -> None:
    """Within the rounding of fused products, or a unit of bfloat16 where that tips them."""
    twin = a_case([*SHAPES, *[(3, 7)] * 300], grad_dtype, decays, moment_dtype=torch.bfloat16, step_dtype=step_dtype)
    ours = on_gpu(twin)
    torch.ops.sculpt._cuda_adam_(*ours, **HYPERPARAMETERS)
    reference.adam_(*twin, **HYPERPARAMETERS)
    if step_dtype == torch.float32:
        near(ours.steps, twin.steps)
    for name in ("firsts", "seconds") if step_dtype == torch.float32 else ("steps", "firsts", "seconds"):
        for a, b in zip(getattr(ours, name), getattr(twin, name), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2**-7, atol=1e-7)
            assert (a.cpu() != b).float().sum() <= 1 + 0.01 * b.numel()


def test_memory_that_does_not_start_at_a_multiple_of_sixteen() -> None:
    twin = a_case([(1000,)])
    ours = on_gpu(twin)
    room = torch.empty(1001, device="cuda")
    ours = ours._replace(grads=[room[1:].copy_(ours.grads[0])])
    torch.ops.sculpt._cuda_adam_(*ours, **HYPERPARAMETERS)
    reference.adam_(*twin, **HYPERPARAMETERS)
    near(ours.written(), twin.written())


def test_a_graph_follows_learning_rate_and_counts() -> None:
    case = a_case([(129, 65), (5,)], decays="halves")
    ours, twin = on_gpu(case), case.clone()
    torch.ops.sculpt._cuda_adam_(*on_gpu(case), **HYPERPARAMETERS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.sculpt._cuda_adam_(*ours, **HYPERPARAMETERS)
    for lr in (1e-3, 1e-2, 0.0):
        ours.lr.fill_(lr)
        twin.lr.fill_(lr)
        graph.replay()
        reference.adam_(*twin, **HYPERPARAMETERS)
    near(ours.written(), twin.written())


def test_the_build_has_code_for_this_device() -> None:
    assert in_one_pass(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("lr_on", ["cpu", "cuda"])
def test_counts_on_the_cpu(lr_on: str) -> None:
    twin = a_case([*SHAPES, *[(3, 7)] * 300])
    ours = on_gpu(twin)
    # One in three on the device: both kinds in one launch.
    counts = [count if i % 3 else count.cuda() for i, count in enumerate(twin.clone().counts)]
    ours = ours._replace(counts=counts, lr=twin.lr.to(lr_on))
    for _ in range(3):
        adam_(*ours, **HYPERPARAMETERS)
        reference.adam_(*twin, **HYPERPARAMETERS)
    near(ours.written(), twin.written())


def test_counts_on_the_cpu_are_refused_in_a_graph() -> None:
    case = on_gpu(a_case([(6,), (5,)]))
    case = case._replace(counts=[count.cpu() for count in case.counts])
    adam_(*on_gpu(a_case([(6,)])), **HYPERPARAMETERS)  # loads the kernel
    before = [count.clone() for count in case.counts]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.lr.add_(1)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="_adam_: counts: given on the CPU while a CUDA graph"):
            adam_(*case, **HYPERPARAMETERS)
    assert all(map(torch.equal, case.counts, before))
    assert all(step.isnan().all() for step in case.steps)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("firsts", lambda t: t.cpu(), "firsts: .*device of the first of grads"),
        ("counts", lambda t: t.double(), "counts: .*float32"),
        ("seconds", lambda t: t[:3], "seconds: .*shape"),
        ("steps", lambda t: torch.full((10,), torch.nan, device="cuda")[::2], "steps: .*contiguous"),
        ("grads", lambda t: t.half(), "grads: .*float32 or bfloat16"),
        ("seconds", lambda t: t.bfloat16(), "seconds: .*dtype of firsts"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(name: str, change: Any, words: str) -> None:
    """Through the wrapper: what the C++ kernel throws itself ended the process on torch 2.11."""
    case = on_gpu(a_case([(6,), (5,)]))
    column = list(getattr(case, name))
    column[1] = change(column[1])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"_adam_: {words}"):
        adam_(*case._replace(**{name: column}), **HYPERPARAMETERS)
    assert all(step.isnan().all() for step in case.steps)


SHAPES_OF_WEIGHTS = [(64, 48), (33, 65), (48,)]


def optimizer(dtype: torch.dtype, lr: Any, **options: Any) -> tuple[list[Tensor], sculpt_ops.AdamW]:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in SHAPES_OF_WEIGHTS]
    # With an option of our own, so that torch's AdamW does not take the step.
    return list(weights), sculpt_ops.AdamW(weights, lr=lr, weight_decay=0.1, decay_to="start", **options)


def feed(weights: list[Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    for weight in weights:
        drawn = torch.randn(weight.shape, device="cuda").to(weight.dtype)
        weight.grad = drawn if weight.grad is None else weight.grad.copy_(drawn)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step in one pass."""
    made: list[int] = []
    one_pass = optim_rows._one_pass

    def counted(*args: Any) -> list[Tensor]:
        made.append(1)
        return one_pass(*args)

    monkeypatch.setattr(optim_rows, "_one_pass", counted)
    return made


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("master", ["none", "split"])
def test_the_optimizer_steps_as_without_the_kernel(
    master: str, capturable: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if master == "split" else torch.float32
    results = []
    for there in (True, False):
        monkeypatch.setattr(adam_ops, "_kernel_runs", lambda index, there=there: there)
        weights, stepper = optimizer(dtype, 1e-2, master=master, capturable=capturable)
        for seed in range(5):
            feed(weights, seed)
            stepper.step()
        results.append([stepper.master_weight(weight) for weight in weights])
        assert len(calls) == 5
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sides", "state"),
    [*[(sides, "full") for sides in ("both", "left", "right", "block")], ("both", "subspace"), ("left", "subspace")],
)
@pytest.mark.parametrize("master", ["none", "stochastic"])
def test_steps_of_bfloat16_weights(master: Any, sides: Any, state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projected in bfloat16: weights as with steps in float32 but for the last place, and no larger a leak."""
    changes, leaks, dtypes = [], [], []
    apply = optim_rows.apply_steps

    def noted(options: Any, rows: Any, steps: list[Tensor]) -> None:
        dtypes.extend(step.dtype for step in steps)
        apply(options, rows, steps)

    monkeypatch.setattr(optim_rows, "apply_steps", noted)
    for narrow in (True, False):
        if not narrow:
            monkeypatch.setattr(optim_rows, "_steps_in_bfloat16", lambda options, row: False)
            monkeypatch.setattr(layer, "_has_tensor_cores", lambda _: False)
        torch.manual_seed(0)
        model = torch.nn.ModuleList(
            torch.nn.Linear(n, m, bias=False, device="cuda", dtype=torch.bfloat16) for m, n in ((256, 384), (320, 128))
        )
        subspaces = sculpt_ops.Subspaces.from_model(model, protect=0.3, sides=sides, targets="*")
        start = [weight.detach().clone() for weight in model.parameters()]
        stepper = sculpt_ops.AdamW(
            model.named_parameters(), lr=1e-2, weight_decay=0.1, subspaces=subspaces, master=master, state=state
        )
        for seed in range(10):
            feed(list(model.parameters()), seed)
            stepper.step()
        changes.append([w.detach().float() - s.float() for w, s in zip(model.parameters(), start, strict=True)])
        free = [change.clone() for change in changes[-1]]
        project_each_(zip(free, subspaces.values(), strict=True))
        leaks.append([float((c - f).norm()) for c, f in zip(changes[-1], free, strict=True)])
    assert dtypes == [torch.bfloat16] * 20 + [torch.float32] * 20
    for ours, theirs, leak, other in zip(*changes, *leaks, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
        assert leak <= 1.05 * other


def test_a_captured_step_of_the_optimizer(calls: list[int]) -> None:
    lr, lr_eager = (torch.tensor(1e-2, device="cuda") for _ in range(2))
    weights, captured = optimizer(torch.float32, lr, capturable=True)
    twins, eager = optimizer(torch.float32, lr_eager, capturable=True)
    feed(weights, 0)
    feed(twins, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # makes the state
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    assert len(calls) == 3
    for seed, rate in enumerate((1e-2, 1e-3, 3e-2), start=1):
        for number, columns in ((lr, weights), (lr_eager, twins)):
            number.fill_(rate)
            feed(columns, seed)
        graph.replay()
        eager.step()
    for ours, theirs in zip(weights, twins, strict=True):
        assert torch.equal(ours, theirs)
