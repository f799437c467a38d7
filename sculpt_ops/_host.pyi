from collections.abc import Sequence
from typing import Any, Literal

thresholds: dict[str, float]
torch_version: str
compiler: str

def philox(counter: Sequence[int], seed: int) -> list[int]: ...
def choose(
    m: int,
    n: int,
    r: int,
    s: int,
    batch: int,
    dtype: str,
    basis: str,
    capability: int,
    hip: bool,
    multiprocessors: int,
    l2_bytes: int,
    triton: bool,
    cuda: bool,
    block: bool,
) -> Literal["cublas", "triton", "cuda"]: ...
def stacked(m: int, n: int, r: int, s: int, dtype: str) -> bool: ...
def left_first(m: int, n: int, r: int, s: int) -> bool: ...
def adam_chunks(sizes: Sequence[int], block: int) -> tuple[list[tuple[int, int]], tuple[int, int]]: ...
def swizzled(width: int, row: int, column: int) -> int: ...
def side_panels(
    length: int, extent: int, r: int, form: int, multiprocessors: int
) -> tuple[int, int, int, int, int, int, int, int] | None: ...
def both_panels(
    m: int,
    n: int,
    r: int,
    s: int,
    split: bool,
    block: bool,
    multiprocessors: int,
    shared_bytes: int,
    capability: int,
) -> dict[str, Any] | None: ...
def jacobi_rounds(q: int) -> list[list[tuple[int, int]]]: ...
def jacobi_rotation(alpha: float, beta: float, gamma: float, q: int) -> tuple[float, float, bool]: ...
