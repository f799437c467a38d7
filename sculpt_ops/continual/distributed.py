"""A run on several processes, as torchrun and accelerate launch start them: the group, and the sharded model."""

from __future__ import annotations

import datetime
import functools
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from .config import TrainConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from ..distributed.agreement import Ranks

__all__ = ["World", "is_first_process", "join_world", "parallel_mode", "restarted", "shard"]

RESTARTS = "TORCHELASTIC_RESTART_COUNT"
TORCHRUN = "torchrun --nproc-per-node N -m sculpt_ops train"
# What other launchers set, MPI's for example; accelerate would go by them.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# In the messages of gloo and NCCL when a rank is gone or late; they come as plain RuntimeError.
LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Timed out",
    "timed out",
    "timeout",
    "Broken pipe",
    "a rank died",
)

T = TypeVar("T")

# Process groups of this process, one a run.
_groups = itertools.count()


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them.

    parallel: "fsdp", "ddp", or None for a process on its own. device: this process's. mesh: of all of them, for "fsdp".
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    parallel: str | None = None
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.parallel == "fsdp"

    def share(self, what: str, value: T) -> list[T]:
        """`value` of every rank; small Python objects."""
        return [value] if self.parallel is None else self._ranks.share(what, value)

    def together(self, what: str, work: Callable[[], T]) -> T:
        """`work()`, which must not wait for another rank. What it raises on one rank is raised on all."""
        if self.parallel is None:
            return work()
        done: list[T] = []
        self._ranks.together(what, lambda: done.append(work()))
        return done[0]

    def in_turns(self, what: str, work: Callable[[], T]) -> T:
        """As `together`, on one process of a machine after the other: for what takes much memory for a moment."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        done: list[T] = []

        def attempt(mine: bool) -> None:
            if mine:
                done.append(work())

        for turn in range(1 + max(self.share(what, local))):
            self.together(what, functools.partial(attempt, turn == local))
        return done[0]

    def on_first(self, what: str, work: Callable[[], object]) -> None:
        """Do `work` on the first rank; the others wait, and raise what it raises."""
        self.together(what, lambda: work() if self.first else None)

    @property
    def _ranks(self) -> Ranks:
        # Not above: with it comes torch.distributed.tensor, a second of `sculpt --help`.
        from ..distributed.agreement import Ranks

        return Ranks.of(dist.group.WORLD)


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def restarted() -> bool:
    """Whether torchrun has started this process anew after one had failed."""
    return int(os.environ.get(RESTARTS, "0")) > 0


def parallel_mode(config: TrainConfig, cuda: bool) -> str | None:
    """How the processes share the work: as `config` says, or accelerate's own settings; None for a single process.

    ValueError where FSDP was asked for and something else would run, and where the launcher is not known.
    """
    asked = config.parallel
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if several := [name for name in SIZES if int(os.environ.get(name, "1")) > 1]:
            raise ValueError(
                f"{several[0]}: got {os.environ[several[0]]} processes, but no RANK, as from MPI; wanted {TORCHRUN}"
            )
        if asked is not None or _flag("ACCELERATE_USE_FSDP"):
            raise ValueError(
                f"parallel: got {asked or 'fsdp'!r} in one process that no launcher started; use {TORCHRUN}"
            )
        return None
    if config.fuse_backward:
        raise ValueError("fuse_backward: got True under a launcher; wanted a single process")
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return asked or "fsdp"
    if not _flag("ACCELERATE_USE_FSDP"):
        if asked == "fsdp":
            raise ValueError(
                "parallel: got 'fsdp', but accelerate was configured to run without it; set distributed_type: FSDP "
                f"with fsdp_version: 2, or use {TORCHRUN}"
            )
        return "ddp"
    if asked == "ddp":
        raise ValueError("parallel: got 'ddp', but accelerate was configured for FSDP; wanted 'fsdp' or nothing")
    if not cuda or _flag("ACCELERATE_USE_CPU"):
        raise ValueError(
            "accelerate was configured for FSDP, which it has on GPUs only: on CPUs it would run DDP, the whole model "
            f"on every process; use {TORCHRUN}, which shards there too"
        )
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"fsdp_version: got {version} in accelerate's configuration, wanted 2")
    if _flag("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params: got true in accelerate's configuration, wanted false")
    return "fsdp"


@contextmanager
def join_world(config: TrainConfig) -> Iterator[World]:
    """The process group of the launcher, until the end of the block; a single process needs none.

    gloo on CPUs, NCCL on GPUs, one GPU a process by LOCAL_RANK. ValueError as in `parallel_mode`; TimeoutError if not
    all processes come within config.ddp_timeout; ConnectionError if one is gone, or late, later on.
    """
    cuda = torch.cuda.is_available() and not config.cpu
    parallel = parallel_mode(config, cuda)
    if parallel is None:
        yield World(torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    own = not dist.is_initialized()
    if own:
        _start_group(cuda, config.ddp_timeout)
    # The model is sharded before accelerate sees it: with this set it would do it once more, its own way.
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    lost = False
    try:
        mesh = _mesh(device) if parallel == "fsdp" else None
        yield World(device, dist.get_rank(), dist.get_world_size(), parallel, mesh)
    except RuntimeError as error:
        lost = any(sign in str(error) for sign in LOST)
        if not lost:
            raise
        raise ConnectionError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} lost another one, which died or did not come within "
            f"{config.ddp_timeout} s (ddp_timeout); its own message says why: {str(error).splitlines()[0]}"
        ) from error
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked
        # NCCL would wait here for the rank that is gone.
        if own and not (lost and cuda):
            # What keeps the group alive in a cycle makes the process abort at its end: 3 of 16 over gloo (torch 2.13).
            gc.collect()
            dist.destroy_process_group()


def shard(model: PreTrainedModel, world: World) -> None:
    """`fully_shard` every layer of `model`, then what is left, in place; tied embeddings stay together in the root.

    Moves it to world.device layer by layer; sends nothing. Gradients are averaged in float32 whatever the weights'
    dtype. ValueError if the model does not name the classes of its layers.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} names no layers to shard (_no_split_modules)")
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*layers, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
    # An encoder is called on its own there, without the root that holds its embedding.
    register_fsdp_forward_method(model, "generate")


def _mesh(device: torch.device) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))


def _start_group(cuda: bool, seconds: int) -> None:
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    timeout = datetime.timedelta(seconds=seconds)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
        # torchrun's store outlives a restart: under the same keys the new processes find the addresses of the dead ones
        # (4 of 6 restarts with torch 2.13 over gloo), and a second run in one process those of the first.
        store = PrefixStore(f"run-{os.environ.get(RESTARTS, 0)}-{next(_groups)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        # NCCL connects at the first collective only.
        dist.barrier()
    except RuntimeError as error:
        raise TimeoutError(
            f"rank {rank} of {size} found no group of {size} processes within {seconds} s (ddp_timeout): "
            f"{str(error).splitlines()[0]}"
        ) from error


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
