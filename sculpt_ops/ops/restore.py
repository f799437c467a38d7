"""``restore_``: put the protected part of a weight matrix back to what it was at the start of the task.

The guard for optimizers whose update is not projected: rounding, weight decay and elementwise scaling move a weight
inside the protected space even where its gradient was projected ("Sculpting Subspaces", arXiv 2504.07097, projects only
the gradient). Exact in float64 for both sides in turn: ``L`` and ``R`` do not interfere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_apart, check_restore, check_written, refuse_gradients
from .library import AFTER_AUTOGRAD, LIBRARY, explained

__all__ = ["restore_"]

_RESTORE_ = torch.ops.sculpt.restore_.default


def restore_(
    weight: Tensor,
    left: Tensor | None,
    left_image: Tensor | None,
    right: Tensor | None,
    right_image: Tensor | None,
    *,
    core: Tensor | None = None,
    reference: Tensor | None = None,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    """``W -= L (Lᵀ W - left_image)``, then ``W -= (W R - right_image) Rᵀ``; in place, returns ``weight``.

    Args:
        weight: (..., m, n), float32, float64, bfloat16 or float16.
        left, right: (..., m, r) and (..., n, s), orthonormal columns, as in :func:`sculpt_ops.project`.
        left_image: ``Lᵀ W0``, (..., r, n), computed from the stored basis; needed unless ``keep_left`` or ``block``.
            Taken from the triplets of a randomized SVD instead it would move an untouched W by up to 7 %: ``A V = U S``
            holds only approximately there.
        right_image: ``W0 R``, (..., m, s); needed unless ``keep_right`` or ``block``.
        core: ``Lᵀ W0 R``, (..., r, s); with ``block``: ``W -= L (Lᵀ W R - core) Rᵀ``.
        reference: ``W0``, weight's shape and dtype; with a kept side: ``W = W0 + L Lᵀ (W - W0)``.
        keep_left, keep_right, block: as the bases were used in :func:`sculpt_ops.project`.

    Thin arguments have weight's dtype, or float32 with a half-precision weight. In grad mode none may require grad.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument, what was given and what was wanted; nothing has been
            written.
    """
    thin = left, left_image, right, right_image
    start = {"core": core, "reference": reference}

    def check() -> None:
        check_restore("restore_", weight, *thin, core, reference, keep_left, keep_right, block)
        check_written("restore_", "weight", weight)
        names = ("left", "left_image", "right", "right_image")
        check_apart("restore_", "weight", weight, **dict(zip(names, thin, strict=True)), **start)

    flags = {"keep_left": keep_left, "keep_right": keep_right, "block": block}
    explained(check, _RESTORE_, weight, *thin, **start, **flags)
    return weight


@torch.library.register_fake("sculpt::restore_")
def _restore_fake_(
    weight: Tensor,
    left: Tensor | None,
    left_image: Tensor | None,
    right: Tensor | None,
    right_image: Tensor | None,
    *,
    core: Tensor | None = None,
    reference: Tensor | None = None,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> None:
    thin = (left, left_image, right, right_image, core, reference)
    check_restore("restore_", weight, *thin, keep_left, keep_right, block)


def _restore_autograd_(
    keyset: Any,
    weight: Tensor,
    left: Tensor | None,
    left_image: Tensor | None,
    right: Tensor | None,
    right_image: Tensor | None,
    *,
    core: Tensor | None = None,
    reference: Tensor | None = None,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> None:
    thin = (left, left_image, right, right_image, core, reference)
    check_restore("restore_", weight, *thin, keep_left, keep_right, block)
    names = ("left", "left_image", "right", "right_image", "core", "reference")
    refuse_gradients("restore_", weight=weight, **dict(zip(names, thin, strict=True)))
    _RESTORE_.redispatch(
        keyset & AFTER_AUTOGRAD,
        weight,
        left,
        left_image,
        right,
        right_image,
        core=core,
        reference=reference,
        keep_left=keep_left,
        keep_right=keep_right,
        block=block,
    )
    torch.autograd.graph.increment_version(weight)


LIBRARY.impl("restore_", _restore_autograd_, "Autograd", with_keyset=True)
