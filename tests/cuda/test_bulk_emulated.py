"""Hopper's bulk copies and wide operands on the emulated GPU: what kernels may rely on and what may not pass."""

from __future__ import annotations

import ctypes
import re
import shutil

import pytest
import torch
from torch import Tensor

from .emulated_gpu import aligned, library, pointer

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

SEEDS = range(12)
NOTHING, FENCE, READS, THREADS, BARRIER_FENCE, ROOM = range(6)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(None, "bulk_cases", tmp_path_factory.mktemp("bulk"))


def copied(gpu: ctypes.CDLL, given: Tensor, columns: int, out: Tensor, span: int, missing: int, seed: int) -> int:
    """Boxes from (-8, -8) on: of the first `columns` of what is given to all but the last column of `out`."""
    wide, high = span // 2 or 24, 20
    across, down = (-(-(size + 8) // box) for size, box in ((out.shape[1], wide), (out.shape[0], high)))
    boxes = (ctypes.c_int * 7)(wide, high, -8, across, down, span, missing)
    source = pointer(given), columns, len(given), 2 * given.shape[1]
    target = pointer(out), out.shape[1] - 1, len(out), 2 * out.shape[1]
    error: int = gpu.boxes(*source, *target, boxes, seed)
    return error


@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_boxes_come_and_go(gpu: ctypes.CDLL, span: int) -> None:
    given = aligned(torch.randn(45, 72).bfloat16())
    for seed in SEEDS:
        out = aligned(torch.ones(50, 80).bfloat16())
        assert copied(gpu, given, 67, out, span, NOTHING, seed) == 0, gpu.wrong()
        wanted = torch.zeros_like(out)
        wanted[:45, :67], wanted[:, 79] = given[:, :67], 1
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        (FENCE, "what no proxy fence"),
        (READS, "never waited for|yet to read"),
        (THREADS, "different numbers"),
        (BARRIER_FENCE, "barrier that no proxy fence"),
    ],
)
def test_what_a_copy_needs(gpu: ctypes.CDLL, missing: int, why: str) -> None:
    given, out = aligned(torch.randn(45, 72).bfloat16()), aligned(torch.ones(50, 80).bfloat16())
    for seed in SEEDS:
        assert copied(gpu, given, 67, out, 64, missing, seed) != 0
        assert re.search(why, gpu.wrong().decode())


def test_maps_that_cannot_be(gpu: ctypes.CDLL) -> None:
    given, out = torch.zeros(45 * 72 + 8).bfloat16(), aligned(torch.ones(50, 80).bfloat16())
    for matrix in (aligned(given)[:-53].view(45, 71), aligned(given)[4:-4].view(45, 72)):
        assert copied(gpu, matrix, 67, out, 64, NOTHING, 0) != 0
        assert b"not encoded" in gpu.wrong()
    assert copied(gpu, aligned(given)[:-8].view(45, 72), 67, out, 512, NOTHING, 0) != 0
    assert b"not encoded" in gpu.wrong()


def test_slots_filled_too_soon(gpu: ctypes.CDLL) -> None:
    given, faults = aligned(torch.randn(45, 72).bfloat16()), 0
    for seed in SEEDS:
        out = aligned(torch.zeros(50, 80).bfloat16())
        faults += copied(gpu, given, 67, out, 32, ROOM, seed) != 0 or not torch.equal(out[:45, :67], given[:, :67])
    assert faults > 6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide", [16, 32, 64])
def test_operands_wider_than_a_row(gpu: ctypes.CDLL, wide: int, transposed: bool) -> None:
    """M goes on where the descriptor says; 0 bytes further are the same numbers again."""
    a, b = aligned(torch.randn(16, 64).bfloat16()), torch.randn(16, 16).bfloat16()
    blocks = b.view(2, 8, 2, 8).transpose(1, 2).reshape(4, 8, 8)
    fragments = aligned((blocks.mT if transposed else blocks).contiguous())
    for further in (0, 32 * wide):
        rows = a if further else a[:, :wide].repeat(1, 64 // wide)
        out = aligned(torch.zeros(64, 16))
        assert gpu.product(pointer(a), pointer(fragments), pointer(out), wide, further, transposed, 1) == 0, gpu.wrong()
        torch.testing.assert_close(out, rows.float().mT @ b.float(), rtol=1e-5, atol=1e-5)
