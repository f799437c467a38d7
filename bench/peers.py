"""What the peers decompose with, each called as its documentation or its own code does."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from accuracy import Bases, Factors
from torch import Tensor, nn

PACKAGES = ("peft", "rhai-innovation-mini-trainer", "scikit-learn", "scipy", "numpy", "transformers")
# The same for every randomized method: what sculpt_ops.rsvd takes by default.
OVERSAMPLE, N_ITER = 16, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def svd_lowrank(matrix: Tensor, rank: int) -> Factors:
    U, S, V = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLE, *matrix.shape), niter=N_ITER)
    return Factors(U[:, :rank], S[:rank], V[:, :rank])


def linalg_svd(matrix: Tensor, rank: int, *, full: bool = False) -> Factors:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=full)
    return Factors(U[:, :rank], S[:rank], Vh[:rank].mT)


def scikit_learn(matrix: Tensor, rank: int, *, normalizer: str = "auto") -> Factors:
    """The default normalizer is none at all for two iterations; "QR" is the accurate one."""
    from sklearn.utils.extmath import randomized_svd

    U, S, Vh = randomized_svd(
        matrix.numpy(),
        rank,
        n_oversamples=OVERSAMPLE,
        n_iter=N_ITER,
        power_iteration_normalizer=normalizer,
        random_state=0,
    )
    return Factors(torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh).mT)


def scipy_svds(matrix: Tensor, rank: int, *, solver: str) -> Factors:
    from scipy.sparse.linalg import svds

    U, S, Vh = svds(matrix.numpy(), k=rank, solver=solver, rng=0)
    U, S, V = (torch.from_numpy(part.copy()) for part in (U[:, ::-1], S[::-1], Vh[::-1].T))
    return Factors(U, S, V)


def peft_decompose(matrix: Tensor, rank: int) -> Factors:
    from peft.tuners.osf.utils import decompose_weight_matrix

    svd = decompose_weight_matrix(matrix, rank)
    return Factors(svd["U_high"], svd["S_high"], svd["V_high"].mT)


def mini_trainer_decompose(matrix: Tensor, rank: int) -> Factors:
    svd = import_mini_trainer().create_svd_dict(matrix, rank)
    return Factors(svd["U_high"], svd["S_high"], svd["V_high"].mT)


def peft_model(model: nn.Module, protect: float = 0.5) -> nn.Module:
    from peft import OSFConfig, get_peft_model

    return get_peft_model(model, OSFConfig(effective_rank=protect, target_modules=TARGETS))


def peft_bases(model: nn.Module) -> Iterator[tuple[str, Bases]]:
    for name, module in model.named_modules():
        if hasattr(module, "osf_svd_params"):
            low = module.osf_svd_params["default"]
            yield name.removeprefix("base_model.model.") + ".weight", Bases(low["U_low"], True, low["V_low"].mT, True)


@torch.no_grad()
def peft_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the adapted layers multiply by, in float64: the weight they were made from, plus the change of U S V."""
    for name, module in model.named_modules():
        if hasattr(module, "osf_svd_params"):
            now = module.osf_svd_params["default"]
            start = (module._osf_U_low_init, module._osf_S_low_init, module._osf_V_low_init)
            change = _product(*now.values()) - _product(*(factor["default"] for factor in start))
            weight = module.get_base_layer().weight.double() + change
            yield name.removeprefix("base_model.model.") + ".weight", weight


def mini_trainer_unset(model: nn.Module, protect: float = 0.5) -> nn.Module:
    """The model in its class for OSFT, before the decomposition."""
    osft = import_mini_trainer()
    made = osft.create_osft_model_class(type(model))(
        copy.deepcopy(model.config), osft_config={}, initialize_osft=False, output_dtype=torch.float32
    )
    made.load_state_dict(model.state_dict())
    made.osft_config = osft.auto_generate_target_osft_config(made, model_name_or_class="llama", rank_ratio=protect)
    return made


def mini_trainer_model(made: Any) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):
        made.reinitialize_osft(decompose_existing_weights=True)
    return made


def mini_trainer_bases(model: nn.Module) -> Iterator[tuple[str, Bases]]:
    for name, module in model.named_modules():
        if hasattr(module, "osft_U_high"):
            low = module.osft_params
            yield f"{name}.weight", Bases(low.U_low, True, low.V_low.mT, True)


@torch.no_grad()
def mini_trainer_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The products of the factors that stand in for the weights, in float64."""
    for name, module in model.named_modules():
        if hasattr(module, "osft_U_high"):
            low = module.osft_params
            high = _product(module.osft_U_high, module.osft_S_high, module.osft_V_high)
            yield f"{name}.weight", high + _product(low.U_low, low.S_low, low.V_low)


def mini_trainer_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """`optimizer` with its step between the projections of gradients and parameters."""
    wrapped: torch.optim.Optimizer = import_mini_trainer().optim_wrapper(optimizer, model)
    return wrapped


def _product(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    return (U.double() * S.double()) @ Vh.double()


def import_mini_trainer() -> Any:
    """mini_trainer.osft_utils without the package's __init__, which imports the whole trainer, numba with it."""
    if "mini_trainer" not in sys.modules:
        spec = importlib.util.find_spec("mini_trainer")
        if spec is None:
            raise ImportError("No module named 'mini_trainer'")
        package = types.ModuleType("mini_trainer")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["mini_trainer"] = package
    from mini_trainer import osft_utils

    return osft_utils


@contextlib.contextmanager
def same_threads() -> Iterator[None]:
    """numpy's and scipy's BLAS at torch's number of threads, where they can be told."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(limits=torch.get_num_threads(), user_api="blas"):
        yield
