"""Wrong use of DTensors: one message, the same on every rank, before anything is sent; ranks that die; compiled ops."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import sculpt_ops
from sculpt_ops import reference
from sculpt_ops.ops import rounding
from tests.ops.accuracy import gaussian, orthonormal

from .placed import COLUMNS, ROWS, WHOLE, line, place, whole
from .ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


def grad() -> DTensor:
    return place(gaussian(12, 8, dtype=torch.float32), line(), ROWS)


def left() -> DTensor:
    return place(orthonormal(12, 3, torch.float32), line(), WHOLE)


def partial() -> DTensor:
    return DTensor.from_local(torch.ones(12, 8), line(), [Partial()])


def elsewhere() -> DTensor:
    mesh = init_device_mesh("cpu", (line().size(),), mesh_dim_names=("other",))
    return place(orthonormal(12, 3, torch.float32), mesh, WHOLE)


def lists(second: Any, basis: Any) -> None:
    sculpt_ops.foreach_project_([grad(), second], [left(), basis], [None, None])


def twice() -> None:
    given = grad()
    sculpt_ops.foreach_project_([given, given], [left(), left()], [None, None])


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "plain basis": (
        lambda: sculpt_ops.project_(grad(), orthonormal(12, 3, torch.float32)),
        r"project_: left: given a plain tensor, wanted a DTensor on the mesh of grad: distribute_tensor",
    ),
    "plain matrix": (
        lambda: sculpt_ops.project(torch.ones(12, 8), left()),
        r"project: grad: given a plain tensor, wanted a DTensor on the mesh of left",
    ),
    "plain image": (
        lambda: sculpt_ops.restore_(grad(), left(), torch.ones(3, 8), None, None),
        r"restore_: left_image: given a plain tensor",
    ),
    "plain in a list": (lambda: lists(torch.ones(12, 8), None), r"foreach_project_: grads\[1\]: given a plain tensor"),
    "another mesh": (
        lambda: sculpt_ops.project_(grad(), elsewhere()),
        r"project_: left: given a DTensor on .*other.*, wanted the mesh of grad",
    ),
    "another mesh in a list": (lambda: lists(grad(), elsewhere()), r"foreach_project_: lefts\[1\]: given a DTensor on"),
    "a sum": (
        lambda: sculpt_ops.project_(partial(), left()),
        r"project_: grad: given placements \(Partial\(sum\),\), a sum that is not reduced, .* redistribute it first",
    ),
    "sketch of a sum": (lambda: sculpt_ops.sketch(partial(), 3, seed=0), r"sketch: input: given placements \(Partial"),
    "shape": (lambda: sculpt_ops.project_(grad(), place(torch.eye(8), line(), WHOLE)), r"left: given shape \(8, 8\)"),
    "one matrix twice": (twice, r"foreach_project_: grads: given entries 0 and 1 that share memory"),
    "split batch": (
        lambda: sculpt_ops.rsvd(place(torch.ones(4, 6, 5), line(), ROWS), 2),
        r"rsvd: input: .* wanted batch dimensions whole",
    ),
    "halves apart": (
        lambda: rounding.split_(
            grad(),
            place(torch.zeros(12, 8, dtype=torch.bfloat16), line(), COLUMNS),
            place(torch.zeros(12, 8, dtype=torch.int16), line(), ROWS),
        ),
        r"_split_: high: given placements \(Shard\(dim=1\),\), wanted those of value",
    ),
    "start": (
        lambda: sculpt_ops.top_subspace(grad(), 2, start=torch.ones(8, 2)),
        r"top_subspace: start: given with a DTensor",
    ),
    "not finite": (
        lambda: sculpt_ops.top_subspace(grad().mul_(float("nan")), 2),
        r"top_subspace: matrix: given NaN or Inf",
    ),
    "orthonormalize not finite": (
        lambda: sculpt_ops.orthonormalize(grad().mul_(float("inf"))),
        r"orthonormalize: input: given NaN or Inf",
    ),
}


def wrong() -> dict[str, str]:
    messages = {}
    for name, (call, expected) in WRONG.items():
        with pytest.raises((ValueError, torch.linalg.LinAlgError), match=expected) as caught:
            call()
        messages[name] = str(caught.value)
    return messages


def outside_the_mesh() -> str | None:
    mesh = DeviceMesh("cpu", [0])
    given = DTensor.from_local(torch.ones(4, 4) if torch.distributed.get_rank() == 0 else torch.ones(0), mesh, [WHOLE])
    if torch.distributed.get_rank() == 0:
        sculpt_ops.project_(given, place(torch.eye(4), mesh, WHOLE))
        return None
    with pytest.raises(ValueError, match="wanted a mesh that this rank is part of") as caught:
        torch.ops.sculpt.sketch(
            DTensor.from_local(torch.ones(0), mesh, [WHOLE], shape=(4, 4), stride=(4, 1)), 2, seed=0
        )
    return str(caught.value)


def one_dies() -> None:
    given, basis = grad(), left()
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    sculpt_ops.project_(given, basis)


def one_does_not_come() -> None:
    group = torch.distributed.new_group(timeout=datetime.timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu")
    given, basis = place(torch.ones(12, 8), mesh, ROWS), place(torch.eye(12), mesh, ROWS)
    if torch.distributed.get_rank() == 0:
        sculpt_ops.project_(given, basis)


def compiled() -> None:
    matrix, narrow, wide = gaussian(12, 8, dtype=torch.float32), left(), orthonormal(12, 10, torch.float32)
    sent = place(wide, line(), WHOLE)
    for how in (ROWS, COLUMNS):
        for function, expected in (
            (lambda x: torch.ops.sculpt.project_(x, narrow), reference.project(matrix, whole(narrow))),
            (lambda x: torch.ops.sculpt.foreach_project_([x], [sent], [None]), reference.project(matrix, wide)),
            (lambda x: x.copy_(torch.ops.sculpt.sketch(x, 8, seed=1)), sculpt_ops.sketch(matrix, 8, seed=1)),
            (lambda x: x.copy_(torch.ops.sculpt.orthonormalize(x)), sculpt_ops.orthonormalize(matrix)),
            (lambda x: x.copy_(torch.ops.sculpt.rsvd(x, 8)[0]), sculpt_ops.rsvd(matrix, 8)[0]),
        ):
            torch.compiler.reset()
            given = place(matrix, line(), how)
            torch.compile(function, fullgraph=True, backend="aot_eager")(given)
            assert (whole(given) - expected).abs().max() < 1e-5


def test_wrong_use_is_the_same_error_on_every_rank(ranks: Ranks) -> None:
    first, *others = ranks.run(wrong)
    assert all(other == first for other in others)


def test_a_rank_outside_the_mesh(two_ranks: Ranks) -> None:
    assert two_ranks.run(outside_the_mesh)[1] is not None


def test_fullgraph_compilation(two_ranks: Ranks) -> None:
    two_ranks.run(compiled)


def test_a_dead_rank_ends_the_others(two_ranks: Ranks) -> None:
    failed, died = two_ranks.attempt(one_dies)
    assert died.kind == "EOFError"
    assert failed.kind == "RuntimeError"
    assert "project_: a rank died, or did not come" in failed.message
    assert "The above exception was the direct cause" in failed.trace


def test_a_rank_that_does_not_come_ends_the_others_after_the_timeout(two_ranks: Ranks) -> None:
    failed, result = two_ranks.attempt(one_does_not_come, timeout=25.0)
    assert result is None
    assert failed.kind == "RuntimeError"
    assert "project_: a rank died, or did not come" in failed.message


@pytest.mark.parametrize("order", ["sculpt_ops first", "DTensor first"])
def test_the_rules_are_there_whichever_module_is_imported_first(order: str) -> None:
    imports = ["import sculpt_ops", "from torch.distributed.tensor import DTensor, Shard, init_device_mesh"]
    if order == "DTensor first":
        imports.reverse()
    script = """
import os, sys, tempfile, torch, torch.distributed as dist
{}
{}
assert not any(type(finder).__module__.startswith("sculpt_ops") for finder in sys.meta_path)
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
grad = DTensor.from_local(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
basis = DTensor.from_local(torch.eye(4), grad.device_mesh, [Shard(0)])
torch.ops.sculpt.project_(grad, basis)
print(float(grad.full_tensor().abs().sum()))
dist.destroy_process_group()
""".format(*imports)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.0"


def test_importing_the_package_does_not_import_dtensors() -> None:
    script = (
        "import sys, sculpt_ops; print([name for name in sys.modules if name.startswith('torch.distributed.tensor')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
