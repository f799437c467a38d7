import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sculpt_ops import layer as layer_module
from sculpt_ops.basis import Basis
from sculpt_ops.layer import LayerSubspace
from sculpt_ops.ops import split_products
from sculpt_ops.ops.heuristics import Gpu
from sculpt_ops.subspaces import Subspaces

from .ops.accuracy import gaussian, orthonormal
from .training import Kinds, Shapes

pytestmark = pytest.mark.usefixtures("one_thread")

D = 40
MI300X = Gpu(94, True, 304, 0)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of a direction: how far it lies outside the space that is stored.
AWAY = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Of a basis: CᵀC - I, entry by entry.
ORTHONORMAL = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6, torch.float16: 1e-6}


def store(basis: Tensor, form: Literal["protected", "free", "reflector"], dtype: torch.dtype) -> Basis:
    """`basis` (float64) as `form`, in `dtype`."""
    work = basis.to(torch.promote_types(dtype, torch.float32))
    stored = Basis.store(work, "free" if form == "free" else "protected", None if dtype.itemsize > 2 else dtype)
    return stored.reflector() if form == "reflector" else stored


def nearly_singular(cosine: float) -> Tensor:
    """An orthonormal basis whose block of the first coordinates has `cosine` as its smallest singular value."""
    cosines = torch.linspace(0.9, 0.1, 12, dtype=torch.float64)
    cosines[-1] = cosine
    top = orthonormal(12, 12, torch.float64, 1) * cosines
    bottom = orthonormal(D - 12, 12, torch.float64, 2) * (1.0 - cosines**2).sqrt()
    return torch.cat([top, bottom]) @ orthonormal(12, 12, torch.float64, 3).mT


def identity(*rows: int) -> Tensor:
    return torch.eye(D, dtype=torch.float64)[:, list(rows)]


SPACES = {
    **{f"random {k}": orthonormal(D, k, torch.float64) for k in (0, 1, 12, 20, 30, D)},
    "first": identity(*range(12)),
    "first, turned": -identity(*reversed(range(12))),
    "last": identity(*range(D - 12, D)),
    "some of the first": identity(*range(6, 18)),
    **{f"cosine {cosine:.0e}": nearly_singular(cosine) for cosine in (1e-1, 1e-3, 1.1e-4, 9e-5, 1e-8)},
}


def assert_orthonormal(columns: Tensor, dtype: torch.dtype) -> None:
    columns = columns.double()
    assert largest(columns.mT @ columns - torch.eye(columns.shape[1]).double()) <= ORTHONORMAL[dtype]


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("space", SPACES)
def test_reflector_splits_the_space_it_was_made_from(space: str, dtype: torch.dtype) -> None:
    basis = SPACES[space]
    k = basis.shape[1]
    stored = store(basis, "reflector", dtype)
    assert stored.form == "reflector"
    assert stored.columns.dtype is dtype
    B = stored.matrix().double()
    Q = torch.eye(D).double() - B @ B.mT
    assert_orthonormal(Q, dtype)
    span, free = stored.span().double(), stored.free_columns().double()
    assert span.shape == (D, k)
    assert free.shape == (D, D - k)
    assert (stored.length, stored.free, stored.keep, stored.is_span) == (D, D - k, False, False)
    assert_orthonormal(torch.cat([span, free], dim=1), dtype)
    outside = basis - span @ (span.mT @ basis)
    assert largest(outside.norm(dim=0)) <= AWAY[dtype]
    # Q takes the protected space to the first k coordinates.
    assert largest((Q @ span)[k:]) <= ORTHONORMAL[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_span_of_a_reflector_is_orthonormal_at_the_size_of_a_model(dtype: torch.dtype) -> None:
    span = store(orthonormal(576, 288, torch.float64), "reflector", dtype).span().double()
    assert largest(span.mT @ span - torch.eye(288).double()) <= 3e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [0, 1, 12, D])
def test_free_basis_keeps_its_span(width: int, dtype: torch.dtype) -> None:
    basis = orthonormal(D, width, torch.float64)
    stored = store(basis, "free", dtype)
    assert (stored.form, stored.length, stored.free, stored.keep) == ("free", D, width, True)
    assert stored.is_span == (dtype.itemsize > 2)
    assert stored.reflector() is stored
    assert_orthonormal(stored.span(), dtype)
    assert torch.equal(stored.span(), stored.free_columns())
    outside = basis - stored.span().double() @ (stored.span().double().mT @ basis)
    assert largest(outside.norm(dim=0)) <= AWAY[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "k"), [(D, 12), (300, 140), (700, 20)])
@pytest.mark.parametrize("form", ["free", "reflector"])
def test_what_16_bit_protects_is_the_span_of_the_rounded_columns(
    form: Literal["free", "reflector"], d: int, k: int, dtype: torch.dtype
) -> None:
    stored = store(orthonormal(d, k, torch.float64), form, dtype)
    C = stored.columns.double()
    # The projector onto their span, with nothing but the rounded columns.
    P = C @ torch.linalg.solve(C.mT @ C, C.mT)
    if form == "reflector":
        Q = torch.eye(d).double() - 2.0 * P
        P = Q[:, :k] @ Q[:, :k].mT
    span = stored.span().double()
    assert torch.linalg.matrix_norm(P - span @ span.mT, 2) <= 2.0 * ORTHONORMAL[dtype]
    assert_orthonormal(span, dtype)
    assert stored.correction is not None
    assert stored.correction.dtype is torch.float16
    assert stored.nbytes == 2 * d * k + 2 * k * k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["protected", "free", "reflector"])
def test_projector_onto_the_protected_space(
    form: Literal["protected", "free", "reflector"], dtype: torch.dtype
) -> None:
    stored = store(orthonormal(D, 12, torch.float64), form, dtype)
    span = stored.span().double()
    P = torch.eye(D).double() - span @ span.mT if stored.keep else span @ span.mT
    x = gaussian(D, 5)
    for given in (x, x.float()):
        out = stored.protected(given)
        assert out.dtype is given.dtype
        rounding = 2e-6 if given.dtype is torch.float32 else 0.0
        assert largest(out.double() - P @ given.double()) <= 4.0 * ORTHONORMAL[dtype] + rounding


def test_bases_of_32_bit_are_stored_as_they_are() -> None:
    basis = orthonormal(D, 12, torch.float32).contiguous()
    for dtype in (None, torch.float32):
        stored = Basis.store(basis, "protected", dtype)
        assert stored.columns is basis
        assert stored.span() is basis
        assert stored.nbytes == 4 * D * 12
        assert stored.in_full() is stored


@pytest.mark.parametrize("form", ["free", "reflector"])
def test_in_full_is_the_same_split(form: Literal["free", "reflector"]) -> None:
    stored = store(orthonormal(D, 12, torch.float64), form, torch.bfloat16)
    full = stored.in_full()
    assert full.columns.dtype is torch.float32
    assert torch.equal(full.matrix(), stored.matrix())
    assert torch.equal(full.span(), stored.span())
    assert (full.form, full.free) == (stored.form, stored.free)


@pytest.mark.parametrize("reflectors", [False, True])
def test_every_form_is_saved_and_loaded(tmp_path: Path, reflectors: bool) -> None:
    subspaces = Kinds().subspaces
    if reflectors:
        subspaces.use_reflectors()
    forms = {basis.form for layer in subspaces.values() for basis in _bases(layer)}
    assert forms == {"reflector", "free"} | (set() if reflectors else {"protected"})
    subspaces.save(tmp_path / "subspaces.safetensors")
    loaded = Subspaces.load(tmp_path / "subspaces.safetensors", Kinds())
    assert loaded.memory() == subspaces.memory()
    for name, layer in subspaces.items():
        assert repr(loaded[name]) == repr(layer)
        for old, new in zip(_bases(layer), _bases(loaded[name]), strict=True):
            assert old.form == new.form
            assert torch.equal(old.columns, new.columns)
            assert old.columns.dtype is new.columns.dtype
            assert (old.correction is None) == (new.correction is None)
            assert old.correction is None or new.correction is None or torch.equal(old.correction, new.correction)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"form": "lower"}, "the left basis of square has the form 'lower'"),
        ({"correction": None}, r"the correction of the left basis of square has shape None, wanted \(16, 16\)"),
        ({"correction": torch.zeros(3, 3)}, r"has shape \(3, 3\), wanted \(16, 16\)"),
        ({"columns": torch.zeros(32, 15).half()}, r"the left basis of square has shape \(32, 15\), wanted \(32, 16\)"),
    ],
)
def test_load_refuses_a_basis_that_is_not_whole(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    subspaces = Subspaces.from_model(Shapes(), 0.5, targets="square", basis_dtype=torch.float16)
    layer = subspaces["square"]
    assert layer.left_basis is not None
    broken = replace(layer, left_basis=replace(layer.left_basis, **change))
    Subspaces({"square": broken}, {}).save(tmp_path / "subspaces.safetensors")
    with pytest.raises(ValueError, match=words):
        Subspaces.load(tmp_path / "subspaces.safetensors")


def test_unusable_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"basis_dtype must be one of .*, got torch\.int8"):
        Subspaces.from_model(Shapes(), basis_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"got torch\.bfloat16, wanted None for float64 parameters: square"):
        Subspaces.from_model(Shapes(torch.float64), targets="square", basis_dtype=torch.bfloat16)


@functools.cache
def kinds() -> dict[str, LayerSubspace]:
    return {name: layer.with_reflectors() for name, layer in Kinds().subspaces.items()}


@pytest.mark.parametrize("name", kinds())
def test_coordinates_are_those_of_the_free_columns(name: str) -> None:
    """L_freeᵀ G R_free, an isometry of the free part with `from_coordinates` as its adjoint and inverse."""
    layer = kinds()[name]
    L, R = (_free(basis, d) for basis, d in zip((layer.left_basis, layer.right_basis), layer.shape, strict=True))
    grad, coordinates = gaussian(*layer.shape), gaussian(*layer.free_shape, seed=5)
    scale = float(grad.norm())
    assert (L.shape[1], R.shape[1]) == layer.free_shape
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = grad.to(dtype)
        result = layer.to_coordinates(given)
        assert result.dtype is torch.float32
        assert result.is_contiguous()
        # Of the gradient as rounded, to float32.
        assert (result.double() - L.mT @ given.double() @ R).norm() <= 1e-6 * scale
    back = layer.from_coordinates(coordinates.float())
    assert back.dtype is torch.float32
    assert (back.double() - L @ coordinates @ R.mT).norm() <= 2e-6 * float(coordinates.norm())
    assert (layer.to_coordinates(back).double() - coordinates).norm() <= 2e-6 * float(coordinates.norm())
    assert abs(float(back.norm() / coordinates.norm()) - 1.0) <= 1e-6
    inner = float((layer.to_coordinates(grad.float()).double() * coordinates).sum())
    assert inner == pytest.approx(float((grad * back.double()).sum()), abs=1e-5)


@pytest.mark.parametrize("corrected", [0, 128])
@pytest.mark.parametrize("name", kinds())
def test_coordinates_by_products_of_bfloat16_parts(name: str, corrected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU makes those of a bfloat16 matrix, and its steps where no free basis is stored; ranks large and small."""
    monkeypatch.setattr(layer_module, "_has_tensor_cores", lambda _: True)
    monkeypatch.setattr(split_products, "CORRECTED", corrected)
    layer = kinds()[name]
    L, R = (_free(basis, d) for basis, d in zip((layer.left_basis, layer.right_basis), layer.shape, strict=True))
    grad = gaussian(*layer.shape, dtype=torch.bfloat16)
    result = layer.to_coordinates(grad)
    assert (result.dtype, result.shape) == (torch.float32, layer.free_shape)
    assert result.is_contiguous()
    assert (result.double() - L.mT @ grad.double() @ R).norm() <= 2e-5 * float(grad.double().norm())
    if not (layer.keep_left or layer.keep_right):
        coordinates = gaussian(*layer.free_shape, dtype=torch.float32)
        back = layer.from_coordinates(coordinates, torch.bfloat16)
        assert back.dtype is torch.bfloat16
        error = (back.double() - L @ coordinates.double() @ R.mT).norm()
        assert error <= 2**-8 * float(coordinates.norm())


@pytest.mark.parametrize("corrected", [0, 128])
@pytest.mark.parametrize("name", kinds())
def test_coordinates_of_float32_by_parts(name: str, corrected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU makes them at large ranks, and steps out of them, with free bases too."""
    monkeypatch.setattr(layer_module, "_has_tensor_cores", lambda _: True)
    monkeypatch.setattr(split_products, "CORRECTED", corrected)
    monkeypatch.setattr(split_products, "SPLIT_FLOAT32", 1)
    layer = kinds()[name]
    L, R = (_free(basis, d) for basis, d in zip((layer.left_basis, layer.right_basis), layer.shape, strict=True))
    grad, coordinates = (gaussian(*shape, dtype=torch.float32) for shape in (layer.shape, layer.free_shape))
    found, back = layer.to_coordinates(grad), layer.from_coordinates(coordinates)
    assert found.dtype is back.dtype is torch.float32
    assert (found.double() - L.mT @ grad.double() @ R).norm() <= 1e-5 * float(grad.norm())
    assert (back.double() - L @ coordinates.double() @ R.mT).norm() <= 1e-5 * float(coordinates.norm())
    for basis, turned in ((layer.left_basis, back), (layer.right_basis, back.mT)):
        if basis is not None:
            assert basis.protected(turned.double()).norm() <= 6e-6 * float(back.norm())


@pytest.mark.parametrize(
    ("gpu", "wanted"),
    [(Gpu(90, False, 132, 0), True), (Gpu(80, False, 108, 0), True), (Gpu(89, False, 128, 0), False), (MI300X, False)],
)
def test_parts_are_for_tensor_cores(gpu: Gpu, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "gpu_of", lambda index: gpu)
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert layer_module._has_tensor_cores(on_gpu) is wanted
    assert not layer_module._has_tensor_cores(torch.ones(2, 2))


def test_float32_steps_are_projected_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU at large ranks; what keeps a side or is a block is left to the ops."""
    parts = []
    made = split_products.project_to_float32
    monkeypatch.setattr(layer_module, "_has_tensor_cores", lambda _: True)
    monkeypatch.setattr(split_products, "SPLIT_FLOAT32", 1)
    monkeypatch.setattr(layer_module, "project_to_float32", lambda *given: parts.append(given) or made(*given))
    taken = 0
    for layer in Kinds().subspaces.values():
        if layer.block or not layer.protects:
            continue
        grad = gaussian(*layer.shape, dtype=torch.float32)
        exact = grad.double()
        layer_module.project_each_([(exact, layer.with_bases(lambda b: Basis(b.span().double(), _plain(b))))])
        layer_module.project_each_([(grad, layer)], in_parts=True)
        assert (grad.double() - exact).norm() <= 1e-5 * float(exact.norm())
        taken += not (layer.keep_left or layer.keep_right)
    assert len(parts) == taken > 0


def _plain(basis: Basis) -> Literal["protected", "free"]:
    return "free" if basis.keep else "protected"


@pytest.mark.parametrize("name", kinds())
def test_coordinates_hold_nothing_protected(name: str) -> None:
    layer = kinds()[name]
    back = layer.from_coordinates(gaussian(*layer.free_shape, dtype=torch.float32))
    if layer.left_basis is not None:
        assert layer.protected_left(back.double()).norm() <= 1e-6 * float(back.norm())
    if layer.right_basis is not None:
        assert layer.protected_right(back.mT.double()).norm() <= 1e-6 * float(back.norm())


def test_coordinates_of_float64_weights() -> None:
    weight = gaussian(24, 56)
    left, right = (store(orthonormal(d, 6, torch.float64), "reflector", torch.float64) for d in weight.shape)
    layer = LayerSubspace((24, 56), 6, 1.0, left, right)
    L, R = (_free(basis, d) for basis, d in zip((layer.left_basis, layer.right_basis), layer.shape, strict=True))
    assert (layer.to_coordinates(weight) - L.mT @ weight @ R).norm() <= 1e-13 * float(weight.norm())


def _bases(layer: LayerSubspace) -> list[Basis]:
    return [basis for basis in (layer.left_basis, layer.right_basis) if basis is not None]


def _free(basis: Basis | None, d: int) -> Tensor:
    return torch.eye(d).double() if basis is None else basis.free_columns().double()
