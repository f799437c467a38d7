"""Putting the protected part of the weights back after a step of any optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .binding import bind_to_optimizer, check_still_bound, unwrap_optimizer
from .layer import LayerSubspace, project_each_
from .leak import check_start_weights, measure_sketched
from .ops import restore_
from .tensor_file import FileFormat

if TYPE_CHECKING:
    from .distributed.agreement import Ranks
    from .subspaces import Subspaces

__all__ = ["Guard", "guard_optimizer"]

# What stands for a start weight W0, by part: W0 itself ("weight") or its images ("left_image", "right_image"; of a
# block "core").
Start = dict[str, Tensor]
Bound = dict[str, tuple[Tensor, LayerSubspace]]

_FILE = FileFormat("sculpt_ops.guard", 1, "a guard", "Guard.save")
_PRODUCT = torch.ops.sculpt._product.default


class Guard:
    """What `Subspaces.guard` returns: ends with `remove`, and can be saved for a run that is resumed."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        bound: Bound,
        starts: Mapping[str, Start],
        ranks: Ranks | None = None,
    ) -> None:
        self._bound = dict(bound)
        self._starts = dict(starts)
        self._ranks = ranks
        self._handle = optimizer.register_step_post_hook(self._put_back)

    def remove(self) -> None:
        """Stop guarding, and free what is stored for it."""
        self._handle.remove()
        self._bound.clear()
        self._starts.clear()

    @property
    def nbytes(self) -> int:
        """Bytes stored of the start weights, wherever they are; the bases are those of the subspaces."""
        return sum(part.nbytes for start in self._starts.values() for part in start.values() if not part.is_meta)

    def save(self, path: str | Path) -> None:
        """Write what is stored of the start weights to one safetensors file, replacing `path` once it is whole; for
        `Subspaces.guard(..., start=path)`."""
        parts = {f"{name}:{part}": tensor for name, start in self._starts.items() for part, tensor in start.items()}
        _FILE.write(Path(path), parts, {}, self._ranks)

    @torch.no_grad()
    def _put_back(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        check_still_bound(optimizer, [parameter for parameter, _ in self._bound.values()])
        away = {name: pair for name, pair in self._bound.items() if pair[1].owner is not None}
        if away:
            from .distributed.guarding import restore_at_owners

            restore_at_owners(away, self._restore_one)
        for name, (parameter, layer) in self._bound.items():
            if name not in away:
                self._restore_one(name, parameter, layer)

    def _restore_one(self, name: str, weight: Tensor, layer: LayerSubspace) -> None:
        parts = self._starts[name].items()
        _restore(weight, layer, {part: t.to(weight.device, non_blocking=True) for part, t in parts})


@torch.no_grad()
def guard_optimizer(
    subspaces: Subspaces,
    sketches: Mapping[str, Tensor],
    optimizer: Any,
    start: Mapping[str, Tensor] | str | Path | None,
    offload: bool,
) -> Guard:
    """`Subspaces.guard`; `sketches` are those of `leak.sketch_weight` that belong to the bases."""
    from .optim import AdamW  # which imports the subspaces, which import this

    inner = unwrap_optimizer(optimizer)
    names = {layer: name for name, layer in subspaces.items()}
    bound = {names[layer]: (p, layer) for p, layer in bind_to_optimizer(subspaces, inner).items() if layer.protects}
    split = isinstance(inner, AdamW) and inner._options.master == "split"
    if split and any(parameter.dtype is torch.bfloat16 for parameter, _ in bound.values()):
        raise ValueError(
            "optimizer: got an AdamW with master='split', whose weights have low bits that a guard does not restore; "
            "it leaks nothing without one"
        )
    weights: Mapping[str, Tensor] = {}
    saved: Mapping[str, Start] = {}
    if isinstance(start, Mapping):
        weights = check_start_weights(start, {name: layer for name, (_, layer) in bound.items()})
    elif start is not None:
        path, ranks = Path(start), subspaces._ranks()
        layers = {name: layer for name, (_, layer) in bound.items()}
        saved = _load(path, layers) if ranks is None else ranks.each("guard", lambda: _load(path, layers))

    def make(name: str, weight: Tensor, layer: LayerSubspace) -> Start:
        if name in saved:
            made = {part: tensor.to(weight.device) for part, tensor in saved[name].items()}
        else:
            made = _keep(layer, weights[name].to(weight.device, weight.dtype) if weights else weight)
        if start is not None:
            _check_start(name, weight, layer, made, sketches[name])
        return {part: _offloaded(tensor) for part, tensor in made.items()} if offload else made

    if any(layer.owner is not None for _, layer in bound.values()):
        from .distributed.guarding import make_at_owners

        return Guard(inner, bound, *make_at_owners(bound, make))
    return Guard(inner, bound, {name: make(name, parameter, layer) for name, (parameter, layer) in bound.items()})


def _keep(layer: LayerSubspace, weight: Tensor) -> Start:
    """The smallest form of `weight` from which its protected part can be put back."""
    dtype = _wide(weight)
    shapes = _image_shapes(layer)
    image_bytes = dtype.itemsize * sum(rows * columns for rows, columns in shapes.values())
    if not shapes or image_bytes >= weight.nbytes:
        return {"weight": weight.detach().clone()}
    return {part: image.to(dtype).contiguous() for part, image in _images(layer, weight.detach())}


def _image_shapes(layer: LayerSubspace) -> dict[str, tuple[int, int]]:
    """The shape of every image; none where the basis of a free space is stored, which gives no image."""
    (m, n), (left, right) = layer.shape, layer.protected_dims
    if layer.keep_left or layer.keep_right:
        return {}
    if layer.block:
        return {"core": (left, right)}
    sides = {"left_image": (layer.left_basis, (left, n)), "right_image": (layer.right_basis, (m, right))}
    return {part: shape for part, (basis, shape) in sides.items() if basis is not None}


def _images(layer: LayerSubspace, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    # From the bases as stored, never from singular triplets: W V = U S holds only approximately for those, and an
    # untouched weight was seen to move by up to 7 %. Summed in float64, since an image's error stays in the weight.
    left, right = layer.left, layer.right
    if left is not None and right is not None and layer.block:
        yield "core", left.double().mT @ _PRODUCT(weight, right.double())
        return
    if left is not None:
        yield "left_image", _PRODUCT(weight, left.double(), transpose=True).mT
    if right is not None:
        yield "right_image", _PRODUCT(weight, right.double())


def _restore(weight: Tensor, layer: LayerSubspace, start: Start) -> None:
    # In float32 for half-precision weights, so that they are rounded once and not once a side.
    work = weight.detach().to(_wide(weight))
    if "weight" in start:
        # Of the difference, which is zero where nothing has moved: W then stays as it is, to the bit.
        change = work - start["weight"]
        project_each_([(change, layer)])
        weight.copy_(change.add_(start["weight"]))
        return
    images = start.get("left_image"), layer.right, start.get("right_image")
    restore_(work, layer.left, *images, core=start.get("core"), block=layer.block)
    if work.dtype is not weight.dtype:
        weight.copy_(work)


def _load(path: Path, layers: Mapping[str, LayerSubspace]) -> dict[str, Start]:
    """What `Guard.save` wrote. ValueError for another file, or one for other matrices than those of `layers`."""
    saved: dict[str, Start] = {}
    for key, tensor in _FILE.read(path)[0].items():
        name, _, part = key.rpartition(":")
        saved.setdefault(name, {})[part] = tensor
    for name, layer in layers.items():
        given = {part: tuple(tensor.shape) for part, tensor in saved.get(name, {}).items()}
        wanted = [shapes for shapes in (_image_shapes(layer), {"weight": layer.shape}) if shapes]
        if given not in wanted:
            listed = " or ".join(map(str, wanted))
            raise ValueError(f"{path}: of the start of {name} it has {given or 'nothing'}, wanted {listed}")
    return saved


def _check_start(name: str, parameter: Tensor, layer: LayerSubspace, start: Start, sketch: Tensor) -> None:
    """ValueError unless what is put back from `start` is the protected part of the weight the bases were made from:
    images from another task, or from another basis of the same space, would overwrite a weight with noise."""
    restored = parameter.detach().clone()
    _restore(restored, layer, start)
    error, norm = measure_sketched(layer, restored, sketch, name).total_norm, float(torch.linalg.vector_norm(restored))
    # Well above the rounding of both.
    if not error <= max(1e-4, torch.finfo(parameter.dtype).eps) * norm:
        raise ValueError(
            f"start: for {name} it is not the weight that the basis was made from, or not with this basis: the "
            f"protected parts are {error:.1e} apart, ||W|| is {norm:.1e}"
        )


def _offloaded(tensor: Tensor) -> Tensor:
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
