"""Which of torch's attention kernels a run uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["without_cudnn_attention"]


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """torch's other attention kernels, as long as it lasts.

    cuDNN's, the default on Hopper since torch 2.11, has NaN in its backward where a mask is given, sequences have 64
    tokens more than a multiple of 128, and a row has next to nothing to attend to, as padding on the left has nothing
    (https://github.com/pytorch/pytorch/issues/196678). On an H100 the loss was NaN in every run that came to tasks of
    short texts, the only ones that had batches of 64 tokens.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
