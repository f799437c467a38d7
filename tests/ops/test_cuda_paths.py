"""The CUDA kernels' code paths without a GPU: library products run on CPU tensors, the choice of variant is pure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from sculpt_ops import reference
from sculpt_ops.ops import cuda_limits, foreach_cuda, side_lists, split_products, variants
from sculpt_ops.ops.heuristics import forced_backend
from sculpt_ops.ops.library_products import project_cublas
from sculpt_ops.ops.split_products import can_split, project_split

from .accuracy import DTYPES, REMOVE_AND_KEEP, assert_accurate, gaussian, orthonormal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_library_products(dtype: torch.dtype, flags: dict[str, bool], batch: tuple[int, ...]) -> None:
    grad = gaussian(*batch, 31, 45, dtype=dtype)
    left, right = orthonormal(31, 6, dtype), orthonormal(45, 9, dtype, seed=2)
    full = {"keep_left": False, "keep_right": False, "block": False, **flags}
    out = torch.empty_like(grad)
    project_cublas(grad, left, right, out, **full)
    assert_accurate(out, reference.project, grad, left, right, **flags)
    in_place = grad.clone()
    project_cublas(in_place, left, right, in_place, **full)
    assert torch.equal(in_place, out)


def test_library_products_of_a_half_matrix_with_a_float32_basis_and_of_one_side() -> None:
    grad, left = gaussian(31, 45, dtype=torch.bfloat16), orthonormal(31, 6, torch.float32)
    variants.project_into(grad, left, None, out := torch.empty_like(grad), False, False, False)
    assert_accurate(out, reference.project, grad, left)
    right = orthonormal(45, 6, torch.bfloat16)
    variants.project_into(grad, None, right, out := torch.empty_like(grad), False, True, False)
    assert_accurate(out, reference.project, grad, None, right, keep_right=True)


@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("m", "n", "r", "s"), [(31, 45, 6, 9), (45, 31, 20, 25), (200, 300, 8, 8), (300, 200, 140, 9)])
def test_parts_of_float32_bases(
    m: int, n: int, r: int, s: int, dtypes: tuple[torch.dtype, torch.dtype], flags: dict[str, bool]
) -> None:
    left, right = orthonormal(m, r, dtypes[0]), orthonormal(n, s, dtypes[1], seed=2)
    full = {"keep_left": False, "keep_right": False, "block": False, **flags}
    cases = [(left, right)] if flags else [(left, right), (left, None), (right.new_zeros(m, 0).float(), right)]
    if flags == {"keep_left": True}:
        cases.append((left, None))
    # A matrix of which next to nothing is left, so that errors are not lost in the rounding of what is.
    spanned = left.double() @ gaussian(r, s, dtype=torch.float64) @ right.double().mT
    for grad in (gaussian(m, n, dtype=torch.bfloat16), spanned.bfloat16()):
        for a, b in cases:
            assert can_split(grad, a, b)
            project_split(grad, a, b, out := torch.empty_like(grad), **full)
            exact = reference.project(grad.double(), *(x if x is None else x.double() for x in (a, b)), **flags)
            rounding = (exact.bfloat16().double() - exact).norm()
            # Twice where one side's result is rounded before the other side's turn.
            assert (out.double() - exact).norm() <= 2 * rounding + 2e-5 * grad.double().norm()
            in_place = grad.clone()
            project_split(in_place, a, b, in_place, **full)
            assert torch.equal(in_place, out)


class Launches(TorchDispatchMode):
    """Names of what a GPU would launch: all but views and allocations, and what `named` takes for one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def named(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.names.append(name)
            with _disable_current_modes():
                return function(*args)

        return run


@pytest.mark.parametrize(("m", "n"), [(200, 300), (300, 200)])
@pytest.mark.parametrize(
    ("r", "s", "flags", "wanted"),
    [
        (8, None, {}, "split_parts product split_parts addmm"),
        (None, 8, {}, "split_parts product split_parts addmm"),
        (8, None, {"keep_left": True}, "split_parts product split_parts mm"),
        (8, 16, {}, "split_parts product split_parts product product corrected_parts addmm"),
        (80, 60, {}, "split_parts product split_parts addmm product split_parts addmm"),
        (8, 16, {"block": True}, "split_parts product split_parts product corrected_parts addmm"),
        (8, 16, {"keep_left": True}, "split_parts product split_parts product corrected_parts mm"),
        (8, 16, {"keep_right": True}, "split_parts product split_parts product corrected_parts mm"),
        (8, 16, {"keep_left": True, "keep_right": True}, "split_parts product split_parts product corrected_parts mm"),
    ],
)
def test_the_launches_of_parts(
    m: int, n: int, r: int | None, s: int | None, flags: dict[str, bool], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is Triton; its kernels' twins stand for them."""
    launches = Launches()
    kernels = {name: launches.named(name, getattr(reference, name)) for name in ("split_parts", "corrected_parts")}
    monkeypatch.setattr(split_products, "_kernels", lambda tensor: SimpleNamespace(**kernels))
    monkeypatch.setattr(split_products, "wide_mm", launches.named("product", split_products.wide_mm))
    grad = gaussian(m, n, dtype=torch.bfloat16)
    left = None if r is None else orthonormal(m, r, torch.float32)
    right = None if s is None else orthonormal(n, s, torch.float32)
    full = {"keep_left": False, "keep_right": False, "block": False, **flags}
    with launches:
        project_split(grad, left, right, grad, **full)
    assert launches.names == wanted.split()


def multiplications(grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **flags: bool) -> int:
    full = {"keep_left": False, "keep_right": False, "block": False, **flags}
    with FlopCounterMode(display=False) as counter:
        project_cublas(grad, left, right, torch.empty_like(grad), **full)
    return int(counter.get_total_flops()) // 2


def test_the_operations_of_two_sides() -> None:
    """The thin factor takes the second side where one is kept; never more than one side after the other."""
    m, n, r, s = 96, 160, 12, 40
    grad = gaussian(m, n, dtype=torch.float32)
    left, right = orthonormal(m, r, torch.float32), orthonormal(n, s, torch.float32, seed=2)
    apart = 2 * m * n * (r + s)
    assert multiplications(grad, left, right, keep_left=True) == 2 * m * n * r + 2 * n * r * s
    assert multiplications(grad, left, right, keep_right=True) == 2 * m * n * s + 2 * m * r * s
    for flags in ({"block": True}, {"keep_left": True, "keep_right": True}):
        assert multiplications(grad, left, right, **flags) == 2 * m * n * r + 2 * n * r * s < apart
        assert multiplications(grad.mT, right, left, **flags) == 2 * m * n * r + 2 * n * r * s
        assert multiplications(grad.expand(3, m, n), left, right, **flags) == 3 * (2 * m * n * r + 2 * n * r * s)
    # Bytes are the limit, and both at once save a read and a write.
    assert multiplications(grad, left, right) == apart + 2 * min(m, n) * r * s
    # From a rank of 88 in float32, without tensor cores, arithmetic is.
    left, right = orthonormal(m, 90, torch.float32), orthonormal(n, 90, torch.float32, seed=2)
    assert multiplications(grad, left, right) == 2 * m * n * 180


def test_the_backend_can_be_forced_and_fails_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCULPT_BACKEND", raising=False)
    assert forced_backend() is None
    monkeypatch.setenv("SCULPT_BACKEND", "cublas")
    assert forced_backend() == "cublas"
    monkeypatch.setenv("SCULPT_BACKEND", "mkl")
    with pytest.raises(ValueError, match="SCULPT_BACKEND: given 'mkl', wanted 'cublas', 'triton' or 'cuda'"):
        forced_backend()
    monkeypatch.setenv("SCULPT_BACKEND", "triton")
    grad, left = gaussian(31, 45), orthonormal(31, 6, torch.float64)
    before = grad.clone()
    asked = r"grad \(31, 45\) torch\.float64, left \(31, 6\) torch\.float64"
    with pytest.raises(RuntimeError, match=rf"project_: SCULPT_BACKEND: given 'triton', but it cannot run {asked}: .*"):
        variants.project_into(grad, left, None, grad, False, False, False, "project_")
    assert torch.equal(grad, before)


def half_case(m: int = 512, n: int = 640, r: int = 64, s: int = 32) -> tuple[torch.Tensor, ...]:
    grad = torch.zeros(m, n, dtype=torch.bfloat16)
    return grad, torch.zeros(m, r), torch.zeros(n, s, dtype=torch.bfloat16)


def test_what_the_cuda_kernels_take() -> None:
    grad, left, right = half_case()
    for bases in ((left, right), (left, None), (None, right)):
        assert variants.why_not_cuda(grad, *bases, False, False, False) is None
    assert variants.why_not_cuda(grad, left, right, False, False, True) is None
    assert variants.why_not_cuda(grad, left, None, True, False, False) is None
    assert variants.why_not_cuda(grad, None, right, False, True, False) is None
    assert variants.why_not_cuda(grad, left, right, True, True, False) is None
    halves = grad.half(), left.half(), right.half()
    assert variants.why_not_cuda(*halves, False, True, False) is None
    metric = torch.zeros(32, 32)
    assert variants.why_not_cuda(grad, None, right, False, False, False, None, metric) is None
    why = variants.why_not_cuda(grad, left, right, False, False, False, torch.zeros(64, 64), metric)
    assert why is not None
    assert "left_metric: wanted a bfloat16 basis with it, given torch.float32" in why
    why = variants.why_not_cuda(grad, left.bfloat16(), right, False, False, True, None, metric)
    assert why is not None
    assert "wanted only where each side by itself can run: given block" in why


def test_lists_for_one_launch_each() -> None:
    """By side, length and form, with the flags and the largest rank of each; the panels of all are counted."""
    half, single = torch.bfloat16, torch.float32
    shapes = [(4096, 512, 64, 16), (4096, 104, 16, None), (512, 4096, None, 32), (4096, 512, 8, 16)]
    grads = [torch.zeros(m, n, dtype=half) for m, n, _, _ in shapes]
    dtypes = (half, half, half, single)
    lefts = [None if r is None else torch.zeros(m, r, dtype=d) for (m, _, r, _), d in zip(shapes, dtypes, strict=True)]
    rights = [None if s is None else torch.zeros(n, s, dtype=half) for _, n, _, s in shapes]
    metrics = [None, None, torch.zeros(32, 32), torch.zeros(16, 16)]

    def flags(i: int) -> tuple[bool, bool, bool]:
        return i == 1, i == 0, False

    lists = side_lists.side_lists(grads, lefts, rights, [], metrics, flags, [0, 1, 2, 3])
    assert [(one.places, one.keep, one.right, one.form, one.length, one.rank) for one in lists] == [
        ((0, 1), (False, True), False, 0, 4096, 64),
        ((3,), (False,), False, 1, 4096, 8),
        ((0,), (True,), True, 0, 512, 16),
        ((2,), (False,), True, 2, 4096, 32),
        ((3,), (False,), True, 2, 512, 16),
    ]
    assert [one.panels for one in lists] == [16 + 4, 16, 128, 16, 128]


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (lambda g, u, v: (g.unsqueeze(0), u, v), {}, "grad: wanted one matrix"),
        (lambda g, u, v: (g.float(), u, v), {}, "grad: wanted dtype bfloat16 or float16, given torch.float32"),
        (lambda g, u, v: (g.half(), u, v.half()), {}, "left: wanted dtype float16, given torch.float32"),
        (lambda g, u, v: (g.half(), u.half(), v.half()), {"block": True}, "float16 wanted only where each side"),
        (lambda g, u, v: (g.mT.contiguous().mT, u, v), {}, "grad: wanted contiguous memory"),
        (lambda g, u, v: (g.flatten()[4:-636].view(511, 640), u[:-1], v), {}, "multiple of 16 bytes"),
        (lambda g, u, v: (g, None, None), {}, "at least one basis"),
        (lambda g, u, v: (g, u, None), {"keep_right": True}, "keep_right: wanted only with a right basis"),
        (lambda g, u, v: (g, u.repeat(1, 2), v), {"keep_left": True}, "wanted only where each side by itself can run"),
        (lambda g, u, v: (g, u, None), {"block": True}, "block: wanted only with both bases"),
        (lambda g, u, v: (g, u, v[:-1]), {}, "right: wanted one matrix of 640 rows"),
        (lambda g, u, v: (g, u[None], v), {}, "left: wanted one matrix of 512 rows"),
        (lambda g, u, v: (g, u.double(), v), {}, "left: wanted dtype bfloat16 or float32"),
        (lambda g, u, v: (g, u.mT.contiguous().mT, v), {}, "left: wanted contiguous memory"),
        (lambda g, u, v: (g, u.repeat(1, 3), v), {}, "left, right: wanted ranks of 1 to 128"),
        (lambda g, u, v: (g[:, :636].contiguous(), u, None), {}, "rows of a multiple of 8 numbers"),
        (lambda g, u, v: (g, u[:, :0].contiguous(), None), {}, "left: wanted a rank of 1 to 64"),
        (lambda g, u, v: (g, u.repeat(1, 2), None), {}, "left: wanted a rank of 1 to 64"),
        (lambda g, u, v: (g, None, v.repeat(1, 5)), {}, "right: wanted a rank of 1 to 128"),
    ],
)
def test_what_the_cuda_kernels_cannot_do_never_reaches_them(
    change: object, flags: dict[str, bool], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(change)
    grad, left, right = change(*half_case())
    full = {"keep_left": False, "keep_right": False, "block": False, **flags}
    why = variants.why_not_cuda(grad, left, right, **full)
    assert why is not None
    assert words in why
    # There is no such op on the CPU: reaching it would raise another error.
    monkeypatch.setattr(variants, "cuda_missing", lambda: None)
    assert variants.project_cuda(grad, left, right, grad, **full) == why


def test_a_length_that_fits_no_cluster_goes_to_another_variant() -> None:
    grad, left, right = half_case(11008, 4096)
    assert "left: wanted a rank" in (variants.why_not_cuda(grad, left, None, False, False, False) or "")
    assert variants.why_not_cuda(grad, None, right, False, False, False) is None


def test_a_gpu_without_room_for_a_cluster_gets_another_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPCs of less than 16 multiprocessors are; and a build that has no code for the GPU."""
    grad, left, right = half_case()
    asked = []

    def runs(index: int | None, right: bool, length: int, extent: int, r: int, form: Any) -> bool:
        asked.append((right, length, extent, r))
        return not right

    monkeypatch.setattr(cuda_limits, "_side_runs", runs)
    assert variants.why_not_cuda(grad, left, None, False, False, False) is None
    why = variants.why_not_cuda(grad, None, right, False, True, False)
    assert "right: wanted code for this GPU (TORCH_CUDA_ARCH_LIST=9.0a) and room for the cluster" in (why or "")
    assert "right: wanted code" in (cuda_limits.why_not_sides(grad, left, right) or "")
    of_list = cuda_limits.MANY
    assert asked == [(False, 512, 640, 64), (True, 640, 512, 32), (False, 512, of_list, 64), (True, 640, of_list, 32)]
    assert (
        variants.why_not_cuda(grad, left, right, False, False, False) is None
    )  # both sides have a kernel of their own
    monkeypatch.setattr(cuda_limits, "_both_runs", lambda index: False)
    why = variants.why_not_cuda(grad, left, right, False, False, False)
    assert "wanted code for a GPU of capability 9.0" in (why or "")


def test_batches_are_not_sent_to_kernels_of_single_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "cuda_missing", lambda: None)
    grad, left = torch.zeros(16, 576, 576, dtype=torch.bfloat16), torch.zeros(576, 16, dtype=torch.bfloat16)
    assert variants.backend_of(grad[0], left, None, False, 16) == "cuda"
    assert variants.backend_of(grad, left, None, False) == "triton"


def test_lists_with_batches_are_checked_anew_where_their_shapes_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCULPT_BACKEND", "cublas")
    store, first = gaussian(4 * 64 * 64, dtype=torch.float32), gaussian(64, 64, dtype=torch.float32)
    left, other = (orthonormal(64, 8, torch.float32, seed=seed) for seed in (1, 2))

    def project(one: torch.Tensor, two: torch.Tensor) -> None:
        foreach_cuda.foreach_into([one, two], [other, left], [None, None], (), (), False)

    project(first, store[: 2 * 64 * 64].view(2, 64, 64))
    before = first.clone()
    with pytest.raises(ValueError, match="left"):
        project(first, store[: 2 * 64 * 64].view(2, 32, 128))
    assert torch.equal(first, before)
    third = store[2 * 64 * 64 : 3 * 64 * 64].view(64, 64)
    project(third, store[: 2 * 64 * 64].view(2, 64, 64))
    with pytest.raises(ValueError, match="share"):
        project(third, store.view(4, 64, 64))


@pytest.mark.parametrize(
    ("facts", "r", "both"),
    [
        ((80, 108, 163 * 1024), 32, None),
        ((100, 148, 227 * 1024), 64, None),
        ((75, 40, 64 * 1024), 16, "capability 8.0"),
        ((89, 58, 99 * 1024), 64, f"{99 * 1024} bytes"),
    ],
)
def test_other_gpus(facts: tuple[int, int, int], r: int, both: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_limits, "cuda_facts", lambda index: cuda_limits.CudaFacts(*facts))
    grad, left, right = half_case(r=r)
    assert "capability 9.0" in (variants.why_not_cuda(grad, None, right, False, False, False) or "")
    why = variants.why_not_cuda(grad, left, right, False, False, False)
    assert why is None if both is None else both in (why or "")


@pytest.mark.skipif(variants.cuda_missing() is None, reason="the CUDA C++ kernels are there")
def test_the_cuda_kernels_fail_aloud_where_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCULPT_BACKEND", "cuda")
    grad, left = gaussian(31, 45), orthonormal(31, 6, torch.float64)
    with pytest.raises(RuntimeError, match=r"project: SCULPT_BACKEND: given 'cuda', but it cannot run grad \(31, 45\)"):
        variants.project_into(grad, left, None, grad.clone(), False, False, False)
    with pytest.raises(RuntimeError, match="foreach_project_: SCULPT_BACKEND: given 'cuda'"):
        foreach_cuda.foreach_into([grad], [left], [None], (), (), False)
    # What the kernels could take, and beside it what they could not.
    half, basis, _ = half_case()
    with pytest.raises(RuntimeError, match=r"given 'cuda', but it cannot run grad \(512, 640\)"):
        foreach_cuda.foreach_into([half, grad], [basis, left], [None, None], (), (), False)


def test_a_list_without_triton_goes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach_cuda, "triton_missing", lambda: "no triton")
    monkeypatch.setattr(variants, "choose", lambda *args, **kwargs: "cublas")
    grads = [gaussian(31 + i, 45) for i in range(3)]
    lefts = [orthonormal(31 + i, 3 + i, torch.float64) for i in range(3)]
    wanted = [reference.project(grad, left) for grad, left in zip(grads, lefts, strict=True)]
    foreach_cuda.foreach_into(grads, lefts, [None] * 3, (), (), False)
    for grad, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, exact)


_INTERPRETED = """
import torch
from sculpt_ops import reference
from sculpt_ops.ops import cuda_limits, foreach_cuda, split_products, variants
torch.manual_seed(0)
def basis(*shape): return torch.linalg.qr(torch.randn(*shape))[0]
for batch in ((), (3,), (2, 2)):
    grad = torch.randn(*batch, 33, 50)
    for left, right in ((basis(33, 5), basis(50, 7)), (basis(*batch, 33, 16), basis(*batch[1:], 50, 3))):
        for flags in ({}, {"keep_left": True}, {"keep_right": True}, {"block": True}):
            full = {"keep_left": False, "keep_right": False, "block": False, **flags}
            for a, b in ((left, right), (left, None), (None, right)):
                if (a is None and ("keep_left" in flags or "block" in flags)) or (
                    b is None and ("keep_right" in flags or "block" in flags)):
                    continue
                out = torch.empty_like(grad)
                assert variants.project_triton(grad, a, b, out, **full) is None
                torch.testing.assert_close(out, reference.project(grad, a, b, **flags), rtol=0, atol=2e-5)
                variants.project_into(grad.clone(), a, b, out, **full)
                torch.testing.assert_close(out, reference.project(grad, a, b, **flags), rtol=0, atol=2e-5)
print("all equal")
"""


def test_the_triton_path_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "SCULPT_BACKEND": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all equal"
