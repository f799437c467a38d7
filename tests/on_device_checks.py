"""The ops on the device that SCULPT_TEST_DEVICE names: what CPU tests cannot see of the kernels of a GPU.

Not run without it: on the CPU the other tests ask for the same and more.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import sculpt_ops
from sculpt_ops import reference
from sculpt_ops.basis import Basis
from sculpt_ops.layer import LayerSubspace

NAME = os.environ.get("SCULPT_TEST_DEVICE", "")
pytestmark = pytest.mark.skipif(not NAME, reason="SCULPT_TEST_DEVICE names no device")
DEVICE = torch.device(NAME or "cpu")
CUDA = DEVICE.type == "cuda"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLAGS: dict[str, dict[str, bool]] = {
    "remove": {},
    "keep_left": {"keep_left": True},
    "keep_right": {"keep_right": True},
    "keep_both": {"keep_left": True, "keep_right": True},
    "block": {"block": True},
}
# Sizes that Triton takes, that fill a GPU, and ranks where arithmetic is the limit.
SHAPES = ((199, 321, 17, 33), (512, 8448, 32, 64), (1024, 768, 400, 300))
BACKENDS = ("", "cublas", "triton") if CUDA else ("",)


@pytest.fixture(params=BACKENDS, ids=lambda name: name or "chosen")
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SCULPT_BACKEND", request.param)
    return str(request.param)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def orthonormal(rows: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    columns = torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(columns)[0].to(DEVICE, dtype).contiguous()


def assert_close(out: Tensor, grad: Tensor, left: Tensor | None, right: Tensor | None, **flags: bool) -> None:
    """At most twice the error of the plain expression in the same dtype, plus rounding of the result and a floor."""
    exact = reference.project(grad.double(), *(b if b is None else b.double() for b in (left, right)), **flags)
    plain = reference.project(grad, left, right, **flags).double()
    rounding = (exact.to(grad.dtype).double() - exact).abs().max()
    floor = 8 * torch.finfo(grad.dtype).eps * float(grad.double().abs().max())
    assert (out.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2 * rounding + floor


def refused(backend: str, error: RuntimeError) -> None:
    """A forced variant may refuse; any other error is one."""
    if backend != "triton" or "cannot run" not in str(error):
        raise error


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project(dtype: torch.dtype, flags: dict[str, bool], shape: tuple[int, ...], backend: str) -> None:
    m, n, r, s = shape
    grad, left, right = gaussian(m, n, dtype=dtype), orthonormal(m, r, dtype), orthonormal(n, s, dtype, 2)
    cases: list[tuple[Tensor | None, Tensor | None]] = [(left, right)]
    if not flags:
        cases += [(left, None), (None, right)]
    for a, b in cases:
        try:
            out = sculpt_ops.project(grad, a, b, **flags)
        except RuntimeError as error:
            refused(backend, error)
            continue
        assert_close(out, grad, a, b, **flags)
        assert torch.equal(sculpt_ops.project_(grad.clone(), a, b, **flags), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
def test_foreach_project_of_remove_and_keep(dtype: torch.dtype, backend: str) -> None:
    sizes = [(128, 320, 16, 32), (320, 128, 48, 16), (96, 96, 16, 16), (70, 45, 7, 5)] * 3
    grads = [gaussian(m, n, dtype=dtype, seed=i) for i, (m, n, _, _) in enumerate(sizes)]
    lefts: list[Tensor | None] = [orthonormal(m, r, dtype) for m, _, r, _ in sizes]
    rights: list[Tensor | None] = [orthonormal(n, s, dtype, 2) for _, n, _, s in sizes]
    keeps = [i % 4 == 1 for i in range(len(sizes))], [i % 3 == 1 for i in range(len(sizes))]
    outs = [grad.clone() for grad in grads]
    sculpt_ops.foreach_project_(outs, lefts, rights, keep_lefts=keeps[0], keep_rights=keeps[1])
    for out, grad, left, right, keep_left, keep_right in zip(outs, grads, lefts, rights, *keeps, strict=True):
        assert_close(out, grad, left, right, keep_left=keep_left, keep_right=keep_right)
    outs = [grad.clone() for grad in grads]
    sculpt_ops.foreach_project_(outs, lefts, [None] * len(sizes))
    for out, grad, left in zip(outs, grads, lefts, strict=True):
        assert_close(out, grad, left, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_library_products_of_a_list_have_the_bits_of_each_alone(
    dtype: torch.dtype, flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCULPT_BACKEND", "cublas")
    sizes = [(128, 320, 16, 32), (320, 128, 48, 16), (512, 384, 200, 100), (70, 45, 7, 5), (512, 1024, 0, 64)]
    grads = [gaussian(m, n, dtype=dtype, seed=i) for i, (m, n, _, _) in enumerate(sizes)]
    grads[1] = grads[1].mT.contiguous().mT
    lefts: list[Tensor | None] = [orthonormal(m, r, dtype) for m, _, r, _ in sizes]
    rights: list[Tensor | None] = [orthonormal(n, s, dtype, 2) for _, n, _, s in sizes]
    if not flags:
        grads, lefts, rights = grads * 3, [*lefts, *lefts, *[None] * 5], [*rights, *[None] * 5, *rights]
    keeps = {f"{name}s": [True] * len(grads) for name in flags if name != "block"}
    outs = [torch.empty_strided(g.shape, g.stride(), dtype=dtype, device=DEVICE).copy_(g) for g in grads]
    sculpt_ops.foreach_project_(outs, lefts, rights, **keeps, block="block" in flags)
    for out, grad, left, right in zip(outs, grads, lefts, rights, strict=True):
        alone = torch.empty_strided(grad.shape, grad.stride(), dtype=dtype, device=DEVICE).copy_(grad)
        assert torch.equal(out, sculpt_ops.project_(alone, left, right, **flags))
        assert_close(out, grad, left, right, **flags)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_metrics(dtype: torch.dtype, flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact projectors onto the span of rounded columns, one by one and in a list."""
    monkeypatch.delenv("SCULPT_BACKEND", raising=False)
    m, n, r, s = 640, 1152, 64, 96
    grad = gaussian(m, n, dtype=dtype)
    bases = [orthonormal(m, r).bfloat16().to(dtype), orthonormal(n, s, seed=2).bfloat16().to(dtype)]
    wide = torch.promote_types(dtype, torch.float32)
    metrics = [torch.linalg.inv(b.double().mT @ b.double()).to(wide) for b in bases]
    exact = reference.project(
        grad.double(),
        *(b.double() for b in bases),
        **flags,
        left_metric=metrics[0].double(),
        right_metric=metrics[1].double(),
    )
    out = sculpt_ops.project(grad, *bases, **flags, left_metric=metrics[0], right_metric=metrics[1])
    rounding = (exact.to(dtype).double() - exact).norm()
    # Of bfloat16 two sides in turn, rounded in between; float32 products may be TF32 where the user asks for it.
    assert (out.double() - exact).norm() <= 2 * rounding + 2e-5 * grad.double().norm()
    listed = [grad.clone(), grad.clone()]
    keeps = {f"{name}s": [True, True] for name in flags if name != "block"}
    sculpt_ops.foreach_project_(
        listed,
        [bases[0]] * 2,
        [bases[1]] * 2,
        **keeps,
        block="block" in flags,
        left_metrics=[metrics[0], None],
        right_metrics=[metrics[1], None],
    )
    assert torch.equal(listed[0], out)
    assert_close(listed[1], grad, *bases, **flags)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_of_programs_without_python(dtype: torch.dtype, flags: dict[str, bool]) -> None:
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    grad, left, right = gaussian(2, 199, 321, dtype=dtype), orthonormal(199, 17), orthonormal(321, 33)
    left, right = (basis if dtype.itemsize == 2 else basis.to(dtype) for basis in (left, right))
    for matrix, own in ((grad, (left, right)), (grad[0], (left.to(dtype), right.to(dtype)))):
        out = torch.ops.sculpt.project.default._op_dk(key, matrix, *own, **flags)
        assert_close(out, matrix, *own, **flags)
    omega = torch.ops.sculpt.test_matrix.default._op_dk(key, grad, 9, seed=3)
    assert torch.equal(omega.cpu(), sculpt_ops.ops.test_matrix(grad.cpu(), 9, seed=3))


def test_float32_bases_views_and_batches(backend: str) -> None:
    grad = gaussian(2, 130, 400, dtype=torch.bfloat16)[:, :, 40:360]
    left, right = orthonormal(130, 16), orthonormal(320, 32, seed=2)
    for kept in ({}, {"keep_left": True}):
        assert_close(
            sculpt_ops.project(grad, left, right, **kept), grad.contiguous(), left.float(), right.float(), **kept
        )
    column_major = gaussian(320, 130).mT
    assert_close(sculpt_ops.project(column_major, left), column_major, left, None)


def test_float32_gradients_of_remove() -> None:
    inputs = [gaussian(9, 7).double(), orthonormal(9, 2).double(), orthonormal(7, 3).double()]
    assert torch.autograd.gradcheck(sculpt_ops.project, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("rank", [40, 200])
@pytest.mark.parametrize(("m", "n"), [(448, 640), (777, 421)])
def test_coordinates_of_a_bfloat16_matrix(m: int, n: int, rank: int) -> None:
    """By products of bfloat16 parts on a GPU: one side and both, a small rank and one of more arithmetic."""
    bases = [Basis(orthonormal(length, rank), "protected").reflector() for length in (m, n)]
    grad = gaussian(m, n, dtype=torch.bfloat16)
    for left, right in (bases, (bases[0], None), (None, bases[1])):
        layer = LayerSubspace((m, n), rank, 1.0, left, right)
        L, R = (
            torch.eye(size, device=DEVICE).double() if basis is None else basis.free_columns().double()
            for basis, size in ((left, m), (right, n))
        )
        found = layer.to_coordinates(grad)
        assert (found.dtype, found.shape) == (torch.float32, layer.free_shape)
        assert (found.double() - L.mT @ grad.double() @ R).norm() <= 2e-5 * grad.double().norm()
        back = layer.from_coordinates(found, torch.bfloat16)
        assert (back.double() - L @ found.double() @ R.mT).norm() <= 2**-7 * found.double().norm()
        found, back = layer.to_coordinates(grad.float()), layer.from_coordinates(found)
        assert (found.double() - L.mT @ grad.double() @ R).norm() <= 1e-5 * grad.double().norm()
        assert (back.double() - L @ found.double() @ R.mT).norm() <= 3e-5 * found.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("protect", [0.4, 0.6])
def test_bases_in_16_bit_and_float32_steps(protect: float, dtype: torch.dtype) -> None:
    """Large ranks, so that products are made of parts on a GPU: what is left of a step in the protected space."""
    weight = torch.nn.ParameterDict({"w": gaussian(640, 512)})
    subspaces = sculpt_ops.Subspaces.from_model(weight, protect, targets="w", basis_dtype=dtype)
    layer = subspaces["w"].with_reflectors()
    columns = layer.left_basis.matrix().double()  # type: ignore[union-attr]
    scale = 1.0 if layer.keep_left else 2.0
    assert (columns.mT @ columns / scale - torch.eye(columns.shape[1], device=DEVICE)).abs().max() <= 4e-6
    step = layer.from_coordinates(gaussian(*layer.free_shape))
    for basis, matrix in ((layer.left_basis, step), (layer.right_basis, step.mT)):
        assert basis is not None
        assert basis.protected(matrix.double()).norm() <= 6e-6 * step.norm()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_compiled_and_in_a_graph() -> None:
    grad, left, right = gaussian(256, 512), orthonormal(256, 16), orthonormal(512, 16, seed=2)
    wanted = sculpt_ops.project(grad, left, right)
    compiled: Any = torch.compile(lambda g: sculpt_ops.project(g, left, right), fullgraph=True)
    assert torch.equal(compiled(grad), wanted)
    work = [grad.clone(), grad.clone()]
    sculpt_ops.foreach_project_([grad.clone(), grad.clone()], [left, left], [right, right])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sculpt_ops.foreach_project_(work, [left, left], [right, right])
    for item in work:
        item.copy_(grad)
    graph.replay()
    for item in work:
        torch.testing.assert_close(item, wanted, rtol=0, atol=1e-5)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_every_other_device_makes_the_same_sketch_and_the_same_subspace() -> None:
    matrix = gaussian(300, 200)
    torch.testing.assert_close(
        sculpt_ops.sketch(matrix, 24, seed=3).cpu(), sculpt_ops.sketch(matrix.cpu(), 24, seed=3), rtol=0, atol=1e-3
    )
    ours, host = sculpt_ops.rsvd(matrix, 8, seed=3), sculpt_ops.rsvd(matrix.cpu(), 8, seed=3)
    torch.testing.assert_close(ours[1].cpu(), host[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("flags", [FLAGS["remove"]], ids=["remove"])
def test_optimizer_leaves_the_protected_part(dtype: torch.dtype, flags: dict[str, bool]) -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(64, 48, bias=False, device=DEVICE, dtype=dtype) for _ in range(2)])
    subspaces = sculpt_ops.Subspaces.from_model(model, protect=0.25, targets="*")
    optimizer = sculpt_ops.AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        for p in model.parameters():
            p.grad = gaussian(*p.shape, seed=step)
        optimizer.step()
    assert all(not torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
    for (name, p), start in zip(model.named_parameters(), before, strict=True):
        change, layer = (p.detach() - start).double(), subspaces[name]
        assert layer.left is not None
        leak = (layer.left.double().mT @ change).norm() / change.norm()
        assert leak < 1e-5


def test_short_padded_rows_have_finite_gradients() -> None:
    """Batches of 64 tokens padded on the left, where cuDNN's attention had NaN on an H100."""
    transformers = pytest.importorskip("transformers")
    from sculpt_ops.continual.attention import without_cudnn_attention

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=512))
    model = model.to(DEVICE)
    lengths = torch.tensor([64, 61, 40, 33, 20, 9, 4, 3], device=DEVICE)
    mask = (torch.arange(64, device=DEVICE) >= 64 - lengths[:, None]).long()
    tokens = torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with without_cudnn_attention(), torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model(input_ids=tokens, attention_mask=mask, labels=tokens.where(mask.bool(), -100)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
