"""Wrong input: one error that names the argument, what was given and what was wanted, and nothing has been written."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sculpt_ops
from sculpt_ops.ops.checks import check_foreach_apart

from .accuracy import gaussian, orthonormal

OPS = torch.ops.sculpt
M, N = 12, 20


def make(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "grad": gaussian(M, N, dtype=torch.float32),
        "left": orthonormal(M, 3, torch.float32),
        "right": orthonormal(N, 4, torch.float32, seed=2),
    }
    return {**arguments, **changes}


def shared_left() -> dict[str, Any]:
    grad = gaussian(M, N, dtype=torch.float32)
    return make(grad=grad, left=grad[:, :3])


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    # id, arguments, the argument named, words that say given and wanted
    (
        "left rows",
        make(left=orthonormal(N, 3, torch.float32)),
        "left",
        r"\(20, 3\).*\(\.\.\., 12, r\)|\(\.\.\., 12, r\).*\(20, 3\)",
    ),
    ("right rows", make(right=orthonormal(M, 3, torch.float32)), "right", r"12, 3"),
    ("left 1-d", make(left=torch.ones(M)), "left", r"\(12,?\)"),
    ("grad 1-d", make(grad=torch.ones(M)), "grad", "matrix"),
    ("left too wide", make(left=torch.ones(M, M + 1)), "left", "at most"),
    ("left batch", make(left=torch.ones(2, M, 3)), "left", r"2, 12, 3"),
    ("left dtype", make(left=orthonormal(M, 3, torch.float64)), "left", "float32"),
    ("half basis of float matrix", make(right=orthonormal(N, 3, torch.bfloat16)), "right", "float32|dtype"),
    ("integer grad", make(grad=torch.ones(M, N, dtype=torch.int64)), "grad", "float32, float64, bfloat16 or float16"),
    (
        "complex grad",
        make(grad=torch.ones(M, N, dtype=torch.complex64)),
        "grad",
        "float32, float64, bfloat16 or float16",
    ),
    ("block one side", make(right=None, block=True), "block", "both"),
    ("block keep", make(block=True, keep_left=True), "block", "neither|no keep"),
    ("keep left none", make(left=None, keep_left=True), "keep_left", "left=None"),
    ("keep right none", make(right=None, keep_right=True), "keep_right", "right=None"),
]
IN_PLACE_ONLY: list[tuple[str, dict[str, Any], str, str]] = [
    ("left inside grad", shared_left(), "left", "memory"),
    ("expanded grad", make(grad=torch.ones(M, 1).expand(M, N)), "grad", "overlaps itself|stored once"),
    ("negated grad", make(grad=torch.randn(M, N, dtype=torch.complex64).conj().imag), "grad", "negates what it shows"),
]


def snapshot(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}


def unchanged(arguments: dict[str, Any], before: dict[str, Tensor]) -> bool:
    return all(torch.equal(arguments[k], v) for k, v in before.items())


def call(entry: str, positional: tuple[Any, ...], flags: dict[str, Any]) -> None:
    if entry == "inference":  # no Autograd kernel in between: the C++ checks themselves
        with torch.inference_mode():
            OPS.project_(*positional, **flags)
    elif entry == "foreach":
        listed = {"keep_left": "keep_lefts", "keep_right": "keep_rights"}
        flags = {listed.get(k, k): [v] if k in listed else v for k, v in flags.items()}
        sculpt_ops.foreach_project_(*[[p] for p in positional], **flags)
    elif entry == "fake":
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            OPS.project_(*[None if p is None else mode.from_tensor(p) for p in positional], **flags)
    else:
        getattr(sculpt_ops, entry)(*positional, **flags)


@pytest.mark.parametrize(("arguments", "name", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
@pytest.mark.parametrize("entry", ["project", "project_", "inference", "fake", "foreach"])
def test_project_refuses(entry: str, arguments: dict[str, Any], name: str, words: str) -> None:
    before = snapshot(arguments)
    flags = {k: v for k, v in arguments.items() if isinstance(v, bool)}
    # Of torch.ops in inference mode the C++ kernels' own words: there is no Python below the Autograd key.
    kinds = (ValueError, TypeError, RuntimeError) if entry == "inference" else (ValueError, TypeError)
    with pytest.raises(kinds, match=words) as caught:
        call(entry, (arguments["grad"], arguments["left"], arguments["right"]), flags)
    assert f"{name}:" in str(caught.value)
    assert unchanged(arguments, before)


@pytest.mark.parametrize(
    ("arguments", "name", "words"), [w[1:] for w in IN_PLACE_ONLY], ids=[w[0] for w in IN_PLACE_ONLY]
)
def test_in_place_refuses_shared_memory(arguments: dict[str, Any], name: str, words: str) -> None:
    before = snapshot(arguments)
    with pytest.raises(ValueError, match=words) as caught:
        sculpt_ops.project_(**arguments)
    assert f"{name}:" in str(caught.value)
    assert unchanged(arguments, before)
    sculpt_ops.project(**arguments)  # the functional form has no such limit


def test_another_device_is_refused() -> None:
    arguments = make(left=torch.empty(M, 3, device="meta"))
    with pytest.raises(ValueError, match=r"left: given device meta"):
        sculpt_ops.project_(**arguments)


def test_a_leaf_that_requires_grad_is_refused_before_anything_is_written() -> None:
    leaf = torch.nn.Parameter(gaussian(M, N, dtype=torch.float32))
    before = leaf.detach().clone()
    left = orthonormal(M, 3, torch.float32)
    for matrix, basis in (
        (leaf, left),
        (leaf[2:], orthonormal(M - 2, 3, torch.float32)),
        (leaf.detach().requires_grad_(), left),
    ):
        with pytest.raises(RuntimeError, match="grad: given a leaf"):
            sculpt_ops.project_(matrix, basis)
    with pytest.raises(RuntimeError, match=r"grads\[0\]: given a tensor that requires grad"):
        sculpt_ops.foreach_project_([leaf], [left], [None])
    with pytest.raises(RuntimeError, match="weight: given a tensor that requires grad"):
        sculpt_ops.restore_(leaf, left, left.mT @ before, None, None)
    assert torch.equal(leaf.detach(), before)
    with torch.no_grad():
        sculpt_ops.project_(leaf, left)
    assert (left.mT @ leaf).norm() < 1e-5


def test_a_basis_that_requires_grad_is_refused_in_place_only() -> None:
    grad, left = gaussian(M, N, dtype=torch.float32), orthonormal(M, 3, torch.float32).requires_grad_()
    before = grad.clone()
    with pytest.raises(RuntimeError, match="left: given a tensor that requires grad"):
        sculpt_ops.project_(grad, left)
    with pytest.raises(RuntimeError, match=r"lefts\[0\]: given a tensor that requires grad"):
        sculpt_ops.foreach_project_([grad], [left], [None])
    assert torch.equal(grad, before)
    assert sculpt_ops.project(grad, left).requires_grad


def test_foreach_refuses_entries_that_share_memory_and_lists_of_other_lengths() -> None:
    matrix = gaussian(2 * M, N, dtype=torch.float32)
    left = orthonormal(M, 3, torch.float32)
    before = matrix.clone()
    with pytest.raises(ValueError, match=r"entries 0 and 1 that share memory"):
        sculpt_ops.foreach_project_([matrix[:M], matrix[M - 1 : -1]], [left, left], [None, None])
    with pytest.raises(ValueError, match=r"share memory"):
        sculpt_ops.foreach_project_([matrix[:, :12], matrix[:, 8:]], [None, None], [None, None])
    with pytest.raises(ValueError, match=r"memory of its own"):
        sculpt_ops.foreach_project_([matrix[:M], matrix[M:]], [None, matrix[:M, :3]], [None, None])
    with pytest.raises(ValueError, match=r"lefts: given 1 entries, wanted 2"):
        sculpt_ops.foreach_project_([matrix[:M], matrix[M:]], [left], [None, None])
    with pytest.raises(ValueError, match=r"keep_lefts: given 3 entries, wanted 2"):
        sculpt_ops.foreach_project_([matrix[:M], matrix[M:]], [left, left], [None, None], keep_lefts=[True] * 3)
    # The second entry is wrong: the first has not been projected.
    with pytest.raises(ValueError, match=r"entry 1.*left"):
        sculpt_ops.foreach_project_([matrix[:M], matrix[M:]], [left, left[:5]], [None, None])
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("by", ["op", "check"])
def test_foreach_refuses_a_basis_inside_any_entry(by: str) -> None:
    def call(grads: list[Tensor], lefts: list[Tensor | None]) -> None:
        check = sculpt_ops.foreach_project_ if by == "op" else partial(check_foreach_apart, "foreach_project_")
        check(grads, lefts, [None] * len(grads))

    matrix = gaussian(100, 8, dtype=torch.float32)
    left = orthonormal(100, 2, torch.float32)
    long, short, below, beside = matrix[:, :4], matrix[:2, 4:], matrix[2:4, 4:], matrix[50:52, :2]
    before = matrix.clone()
    words = r"lefts.*memory"
    # The entry that begins last before the basis, and one that begins before that and ends later.
    with pytest.raises(ValueError, match=words):
        call([long, short], [left, beside])
    with pytest.raises(ValueError, match=words):
        call([short, long], [beside, left])
    with pytest.raises(ValueError, match=words):
        call([matrix[:2], matrix[2:]], [matrix[4:6, :2], None])
    assert torch.equal(matrix, before)
    call([long, short], [None, below[:, :2]])
    call([long, short], [None, matrix[50:52, 4:6]])
    call([long, short], [left, beside[:, :0]])


RESTORE_WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no left image", {"left_image": None}, "left_image"),
    ("no right image", {"right_image": None}, "right_image"),
    ("left image shape", {"left_image": torch.ones(4, N)}, "left_image"),
    ("right image shape", {"right_image": torch.ones(M, 3)}, "right_image"),
    ("image dtype", {"left_image": torch.ones(3, N, dtype=torch.float64)}, "left_image"),
    ("keep without reference", {"keep_left": True}, "reference"),
    ("reference shape", {"keep_left": True, "reference": torch.ones(M, N + 1)}, "reference"),
    ("block without core", {"block": True}, "core|block"),
    ("core shape", {"block": True, "core": torch.ones(4, 3)}, "core"),
    ("block and keep", {"block": True, "keep_right": True, "core": torch.ones(3, 4)}, "block"),
    ("keep without basis", {"left": None, "left_image": None, "keep_left": True}, "keep_left"),
]


@pytest.mark.parametrize(("changes", "name"), [w[1:] for w in RESTORE_WRONG], ids=[w[0] for w in RESTORE_WRONG])
@pytest.mark.parametrize("inference", [False, True])
def test_restore_refuses(changes: dict[str, Any], name: str, inference: bool) -> None:
    base = make()
    weight, left, right = base["grad"], base["left"], base["right"]
    arguments = {
        "weight": weight,
        "left": left,
        "left_image": left.mT @ weight,
        "right": right,
        "right_image": weight @ right,
        **changes,
    }
    before = snapshot(arguments)
    thin = [arguments.pop(k) for k in ("weight", "left", "left_image", "right", "right_image")]
    with torch.inference_mode(inference), pytest.raises((ValueError, TypeError, RuntimeError), match=f"({name}):"):
        OPS.restore_(*thin, **arguments)
    assert torch.equal(weight, before["weight"])


def test_restore_refuses_shared_memory() -> None:
    weight = gaussian(M, N, dtype=torch.float32)
    left = orthonormal(M, 3, torch.float32)
    before = weight.clone()
    with pytest.raises(ValueError, match=r"left_image: .*memory"):
        sculpt_ops.restore_(weight, left, weight[:3], None, None)
    with pytest.raises(ValueError, match=r"reference: .*memory"):
        sculpt_ops.restore_(weight, left, None, None, None, keep_left=True, reference=weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["grad", "left", "right"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    for op in (sculpt_ops.project, sculpt_ops.project_):
        with pytest.raises(TypeError, match=f"{name}: given list, wanted a tensor"):
            op(**make(**{name: [[1.0]]}))
    with pytest.raises(TypeError, match="grad: given NoneType, wanted a tensor"):
        sculpt_ops.project(None, make()["left"])  # type: ignore[arg-type]


def test_one_tensor_may_stand_for_a_list_of_matrices() -> None:
    grads = gaussian(3, M, N, dtype=torch.float32)
    lefts = [orthonormal(M, 3, torch.float32, seed=seed) for seed in range(3)]
    expected = [sculpt_ops.project(grad, left) for grad, left in zip(grads, lefts, strict=True)]
    sculpt_ops.foreach_project_(grads, lefts, [None] * 3)  # type: ignore[arg-type]
    assert torch.equal(grads, torch.stack(expected))
