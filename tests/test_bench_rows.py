"""The order of the GPU benchmark's rows, their shares of the time, and its baselines."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from sculpt_ops import bench, reference
from sculpt_ops.bench import command, projections, rows
from sculpt_ops.bench.timing import Ceilings, Contender, measure

SMALL = {"first": (((64, 64), (64, 96)), 1), "second": (((64, 64), (32, 32), (48, 48)), 1)}


def test_the_foremost_cases_come_first_and_each_once() -> None:
    found = list(projections.cases(SMALL, False))
    assert len(set(found)) == len(found)
    half, single = torch.bfloat16, torch.float32
    # Of the first model's shapes at rank 16: a basis of the matrix's dtype, then float32.
    assert found[:4] == [("first", 64, 64, 16, half, half, kind) for kind in ("left", "both", "right", "block")]
    assert [case.basis_dtype for case in found[:16]] == [half] * 8 + [single] * 8
    assert [case.rank for case in found if case.model == "first" and case.dtype is half] == [16] * 16 + [32] * 16
    # A shape that two models share is measured once.
    assert {(case.m, case.n) for case in found if case.model == "second"} == {(32, 32), (48, 48)}
    models = [(case.dtype, case.model) for case in found]
    assert list(dict.fromkeys(models)) == [(d, name) for d in (half, single) for name in ("first", "second")]
    assert all(case.rank <= min(case.m, case.n) // 2 for case in found)


def row_of(case: projections.Case) -> dict[str, Any]:
    return {"table": "projection", "model": case.model, "kind": case.kind, "contenders": {}}


def test_a_row_that_fails_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def projection(_: Any, index: int, case: projections.Case) -> dict[str, Any]:
        if index in (1, 70):
            raise RuntimeError(f"of row {index}")
        return row_of(case) | {"index": index}

    for name in ("decompositions", "small_svds", "models", "optimizer_step"):
        table = iter if name != "models" else lambda setting: (_ for _ in [1 / 0])
        monkeypatch.setattr(command, name, lambda setting, table=table: table(()))
    monkeypatch.setattr(projections, "projection", projection)
    monkeypatch.setattr(command, "cases", lambda *_: projections.cases(SMALL, False))
    total, saved = len(list(projections.cases(SMALL, False))), []
    assert total > 70
    found = bench.run(torch.device("cpu"), 30, True, say=lambda _: None, save=lambda it: saved.append(len(it["rows"])))
    assert [row["index"] for row in found["rows"]] == [i for i in range(total) if i not in (1, 70)]
    assert len(found["failed"]) == 3
    assert saved[0] == command.FIRST_ROWS - 1
    assert saved[-1] == total - 2
    assert found["complete"]


def test_no_table_takes_the_time_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row takes 0.05 of 2 seconds, and there are more than fit."""

    def projection(_: Any, index: int, case: projections.Case) -> dict[str, Any]:
        time.sleep(0.05)
        return row_of(case)

    def endless(table: str) -> Any:
        def rows(setting: Any) -> Any:
            while not setting.over():
                time.sleep(0.05)
                yield {"table": table, "contenders": {}}

        return rows

    tables = ("decompositions", "small_svds", "models", "optimizer_step")
    for name in tables:
        monkeypatch.setattr(command, name, endless(name))
    monkeypatch.setattr(projections, "projection", projection)
    monkeypatch.setattr(command, "cases", lambda *_: projections.cases(SMALL, False))
    found = bench.run(torch.device("cpu"), 2, True, say=lambda _: None)
    assert not found["complete"]
    assert {row["table"] for row in found["rows"]} == {"projection", *tables}


def test_some_tables_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("decompositions", "small_svds", "models", "optimizer_step"):
        monkeypatch.setattr(command, name, lambda _, name=name: iter([{"table": name, "contenders": {}}]))
    monkeypatch.setattr(
        projections, "projection", lambda setting, index, case: row_of(case) | {"index": index, "rank": case.rank}
    )
    monkeypatch.setattr(command, "cases", lambda *_: projections.cases(SMALL, False))
    quiet: Any = {"small": True, "say": lambda _: None}
    found = bench.run(torch.device("cpu"), 30, **quiet, only=["projections"], ranks=[32])
    wanted = [case for case in projections.cases(SMALL, False) if case.rank == 32]
    assert [row["rank"] for row in found["rows"]] == [32] * len(wanted)
    assert (found["complete"], found["only"], found["ranks"]) == (True, ["projections"], [32])
    found = bench.run(torch.device("cpu"), 30, **quiet, only=["models", "optimizer_step"])
    assert [row["table"] for row in found["rows"]] == ["models", "optimizer_step"]
    assert found["complete"]
    assert {name for name, _, _ in command.tables(iter(()))} == set(command.TABLES)


def test_a_short_run_compiles_little() -> None:
    case = projections.Case("x", 32, 48, 4, torch.bfloat16, torch.float32, "left")
    names = {}
    for short in (False, True):
        setting = rows.Setting(torch.device("cpu"), Ceilings(1.0, 1.0, 1.0), True, time.monotonic() + 60, short)
        for index in (0, 8, 24):
            row = projections.projection(setting, index, case)
            assert row["chosen"] == "cpu"
            assert row["basis"] == "float32"
            names[short, index] = set(row["contenders"])
    always = {"sculpt", "sculpt, cublas", "mm + addmm_", "sculpt, bf16 basis and metric"}
    assert names[False, 24] == always | {"sculpt, triton"}
    assert names[True, 24] == always
    assert names[True, 8] == always | {"expression"}
    assert names[True, 0] == names[False, 0] == names[False, 8] == always | {"sculpt, triton", "expression"}


def test_slow_calls_are_timed_less_often() -> None:
    calls = {"quick": 0.0, "slow": 0.07, "slower": 0.6}
    contenders = [Contender(name, lambda _, s=s: time.sleep(s), once=name == "slower") for name, s in calls.items()]
    found = measure(contenders, 1, torch.device("cpu"), 5)
    assert {name: entry["rounds"] for name, entry in found.items()} == {"quick": 5, "slow": 2, "slower": 1}
    assert found["slower"]["us"] == pytest.approx(0.6e6, rel=0.1)


def test_the_baselines_take_a_float32_basis_by_a_float32_copy() -> None:
    grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    left, right = (rows.basis(size, 8, torch.float32, grad.device) for size in grad.shape)
    for block in (False, True):
        exact = reference.project(grad.double(), left.double(), right.double(), block=block)
        rounded = exact.to(grad.dtype)
        for baseline in (rows.library, rows.expression):
            work = grad.clone()
            baseline(work, left, right, block)
            assert (work.double() - exact).norm() <= 1.01 * (rounded.double() - exact).norm()
