"""A forward and a backward pass of a model without values: what they hold at most, and their matrix products."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .models import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Allocations", "Trace", "trace_pass"]


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that come into being under this mode, but for the storages of `known`.

    now: alive. peak: the most so far. finished: of the gradients passed to `finish`. peak_unfinished: the most of
    now - finished. operations: of matrix products and convolutions, attention not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = self.finished = self.peak_unfinished = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def finish(self, gradient: Tensor) -> int:
        """Count `gradient` as finished; returns what was alive beside the finished ones, itself included."""
        alive = self.now - self.finished
        self.finished += gradient.nbytes
        return alive

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.peak_unfinished = max(self.peak_unfinished, self.now - self.finished)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Attention without dropout of its own: on a CPU it would not be fused then; on a GPU it is, and takes no more. And
    rows of one sequence: transformers looks at the positions, assumes several where there are no values to look at, and
    then needs a mask, with which attention copies the keys of shared heads."""
    from transformers import masking_utils

    attention = F.scaled_dot_product_attention

    def without_dropout(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs)

    with (
        _replaced(F, "scaled_dot_product_attention", without_dropout),
        _replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    found = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, found)


@dataclass(frozen=True)
class Trace:
    """Bytes of one forward and backward pass, weights not counted.

    activations: the most at any time without the finished gradients: what is kept for the backward pass, logits, and
        the gradient at hand.
    peak: the most with all gradients that exist by then.
    gradients: of all trained parameters, when the pass is over.
    arrivals: of every trained parameter its name and what is alive when its gradient is finished, if those finished
        before have been freed.
    operations: of the matrix products; a multiplication and an addition are two.
    """

    activations: int
    peak: int
    gradients: int
    arrivals: tuple[tuple[str, int], ...]
    operations: int


def trace_pass(model: PreTrainedModel, rows: int, length: int, *, autocast: bool = False) -> Trace:
    """Run `model` on `rows` x `length` tokens, `autocast`: in bfloat16; to be called under the FakeTensorMode that the
    model was made under. An encoder-decoder reads half of the tokens and writes the other half.

    What is counted is what the model's own code allocates through torch on a CPU, attention in its fused form: no
    buffers inside of libraries, no rounding up by the allocator. The rows are taken as unpadded. ValueError if the code
    asks for values.
    """
    device = next(model.parameters()).device
    length = length // 2 if model.config.is_encoder_decoder else length
    tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
    inputs = {"input_ids": tokens, "labels": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    allocations = Allocations([*model.parameters(), *model.buffers(), tokens])
    arrivals: list[tuple[str, int]] = []
    handles = [
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: arrivals.append((name, allocations.finish(p.grad)))
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        with quiet(), _as_on_a_gpu(), allocations:
            with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                loss = model(**inputs, use_cache=False).loss
            loss.backward()
    except RuntimeError as error:
        # Of data-dependent control flow, as in most mixtures of experts.
        raise ValueError(
            f"model: the code of {type(model).__name__} cannot be run without values: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
    return Trace(
        activations=allocations.peak_unfinished,
        peak=allocations.peak,
        gradients=gradients,
        arrivals=tuple(arrivals),
        operations=allocations.operations,
    )
