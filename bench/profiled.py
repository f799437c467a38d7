"""Where a decomposition's time goes: the share of it inside matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PRODUCTS = {"aten::matmul", "aten::mm", "aten::bmm", "aten::addmm", "sculpt::_product", "sculpt::_gram"}


def product_shares(call: Callable[[], Any], matrix: Tensor) -> tuple[float, float]:
    """Share of the wall time of five calls in products with `matrix`, and in all products, nested ones counted once."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        begin = time.perf_counter()
        for _ in range(5):
            call()
        wall = time.perf_counter() - begin
    outermost = [event for event in recorded.events() if event.name in PRODUCTS and not _inside_product(event)]
    sizes = [list(matrix.shape), list(matrix.mT.shape)]
    with_matrix = [event for event in outermost if any(shape in sizes for shape in event.input_shapes)]
    seconds = [sum(event.cpu_time_total for event in events) * 1e-6 for events in (with_matrix, outermost)]
    return seconds[0] / wall, seconds[1] / wall


def _inside_product(event: Any) -> bool:
    while (event := event.cpu_parent) is not None:
        if event.name in PRODUCTS:
            return True
    return False
