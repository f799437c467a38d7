"""How alike the input and the output of every target layer are on a sample of data: what `Importance` goes by."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from .dtensor import is_fsdp
from .names import list_names

if TYPE_CHECKING:
    from .distributed.agreement import Ranks

__all__ = ["kept_tokens", "layer_importance", "run_batches"]

_MASKS = ("attention_mask", "decoder_attention_mask")


def layer_importance(
    model: nn.Module,
    targets: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Any] | Tensor] | None,
    groups: Sequence[Ranks] = (),
) -> dict[str, float]:
    """I = mean over tokens of cos(x, W x) for every matrix W of `targets`, divided by its mean over all of them.

    x is what the module that holds W is called with, W x what it returns, less its bias; where W is not square, the
    first min(m, n) entries of both (arXiv 2504.07097, section 3.2, and its published code).

    model: run on every batch in eval mode and without gradients; its modes are put back afterwards.
    batches: model inputs, each a mapping of keyword arguments or a tensor; tensors are moved to the targets' device.
        Tokens that `attention_mask` or `decoder_attention_mask` hides are left out of every layer that sees tokens in
        that mask's shape, or flattened; the former is tried first. Other layers count all that they see.
    groups: of ranks whose batches count together, one after the other.
    A matrix that several modules share, or that is used several times, is measured on all of its calls.

    Where the mean is not above 0, dividing by it means nothing (on SmolLM2-135M half of the 210 cosines are negative
    and the mean is -0.0003 to -0.001). Negative cosines then count as 0, with a warning; the published code divides
    all the same, which reverses the order of the layers.

    Raises TypeError for batches of another type. Raises ValueError if there are none, for a matrix whose module does
    not run on them or is no linear map, for activations that are not finite, and if no cosine is above 0.
    """
    cosines = _Cosines(targets)

    def measure() -> None:
        run_batches(model, batches, next(iter(targets.values())).device, cosines.hooks(), cosines.begin)

    for ranks in groups:
        measure = partial(ranks.each, "from_model", measure)
    measure()
    for ranks in groups:
        cosines.add_up(ranks)
    means = cosines.means()
    if sum(means.values()) <= 0:
        means = {name: max(cosine, 0.0) for name, cosine in means.items()}
        if not any(means.values()):
            raise ValueError(
                f"batches: none of the {len(means)} matrices has an output that points along its input on them, wanted "
                "one at least; protect a fraction or an Energy instead"
            )
        warnings.warn(
            "the mean cosine of layer inputs and outputs is not above 0: negative ones count as 0 importance",
            stacklevel=3,
        )
    mean = sum(means.values()) / len(means)
    return {name: cosine / mean for name, cosine in means.items()}


def run_batches(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor] | None,
    device: torch.device,
    hooks: Mapping[int, Callable[..., None]],
    begin: Callable[[list[Tensor]], None],
) -> None:
    """Run `model` on every batch, moved to `device`, as `layer_importance` says.

    hooks: forward hooks (with keyword arguments), by `id` of a parameter of the module. begin: called before every
        batch with the masks in it, of the tokens that count.
    """
    if batches is None:
        raise ValueError("batches: given None, wanted model inputs to run the layers on")
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: given {type(batches).__name__}, wanted an iterable of model inputs, as a list")
    empty = True
    with _hooked(model, hooks), torch.no_grad(), _uncompiled():
        for batch in batches:
            empty = False
            if isinstance(batch, Tensor):
                begin([])
                model(batch.to(device))
            elif isinstance(batch, Mapping):
                moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                begin([moved[key].bool() for key in _MASKS if isinstance(moved.get(key), Tensor)])
                model(**moved)
            else:
                raise TypeError(f"batches: given {type(batch).__name__} among them, wanted mappings or tensors")
    if empty:
        raise ValueError(
            "batches: empty, wanted at least one model input; a generator is empty once it was gone through"
        )


def kept_tokens(values: Tensor, tokens: torch.Size, masks: Iterable[Tensor]) -> Tensor:
    """`values` (*tokens, ...) of the tokens that count, (n, ...), by the first of `masks` that has the shape `tokens`,
    or has it flattened; as they are if none has."""
    for mask in masks:
        if tokens in (mask.shape, (mask.numel(),)):
            return values[mask.reshape(tokens).to(values.device)]
    return values


class _Cosines:
    """Sums of cos(x, W x) over tokens, and numbers of tokens, for every matrix."""

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        self.targets = targets
        self.sums: dict[str, list[Tensor]] = {name: [] for name in targets}
        self.tokens = dict.fromkeys(targets, 0)
        self._masks: list[Tensor] = []

    def begin(self, masks: list[Tensor]) -> None:
        """Before a batch, with the masks of its tokens."""
        self._masks = masks

    def hooks(self) -> dict[int, Callable[..., None]]:
        """Forward hooks by `id` of the parameter."""
        return {id(parameter): self._hook(name, *parameter.shape) for name, parameter in self.targets.items()}

    def _hook(self, name: str, m: int, n: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x: Any = next(iter((*args, *kwargs.values())), None)
            y = output
            linear = isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()
            # A Linear holds (out, in), GPT-2's Conv1D (in, out).
            if not linear or x.shape[-1:] + y.shape[-1:] not in ((n, m), (m, n)):
                raise ValueError(f"targets: {name} ({m}, {n}) is in a {type(module).__name__}, wanted a linear map")
            if getattr(module, "bias", None) is not None:
                y = y - module.bias
            size = min(m, n)
            self._add(name, cosine_similarity(x[..., :size].float(), y[..., :size].float(), dim=-1))

        return hook

    def _add(self, name: str, cosines: Tensor) -> None:
        cosines = kept_tokens(cosines, cosines.shape, self._masks)
        self.sums[name].append(cosines.sum(dtype=torch.float64))
        self.tokens[name] += cosines.numel()

    def add_up(self, ranks: Ranks) -> None:
        """Count what every rank has seen, each its own batches; collective."""
        own = {name: (float(sum(sums)), self.tokens[name]) for name, sums in self.sums.items()}
        seen = ranks.share("from_model", own)
        self.sums = {name: [torch.tensor(sum(part[name][0] for part in seen)).double()] for name in own}
        self.tokens = {name: sum(part[name][1] for part in seen) for name in own}

    def means(self) -> dict[str, float]:
        if idle := [name for name, tokens in self.tokens.items() if not tokens]:
            raise ValueError(
                f"batches: none of them runs the layers of {list_names(idle)}; leave these out of targets="
            )
        means = {name: float(torch.stack(sums).sum()) / self.tokens[name] for name, sums in self.sums.items()}
        if wild := [name for name, mean in means.items() if math.isnan(mean)]:
            raise ValueError(f"batches: the inputs or outputs of {list_names(wild)} are not finite on them")
        return means


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[int, Callable[..., None]]) -> Iterator[None]:
    """Eval mode, and `hooks` on the modules that hold those parameters."""
    modes = {module: module.training for module in model.modules()}
    handles = [
        # First of all hooks: FSDP's takes the gathered parameters away.
        module.register_forward_hook(hooks[id(parameter)], with_kwargs=True, prepend=True)
        for module in modes
        for parameter in module.parameters(recurse=False)
        if id(parameter) in hooks
    ]
    try:
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
            # FSDP keeps the root's parameters gathered for a backward pass, which does not come.
            if is_fsdp(module):
                cast(Any, module).reshard()


def _uncompiled() -> AbstractContextManager[Any]:
    # A compiled model passes over hooks that are newer than it. Importing dynamo takes 1.3 s; where nobody has, nothing
    # is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
