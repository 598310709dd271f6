"""Full fp32 where CUDA's default is TF32, with 10 bits of mantissa."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions in fp32 on a GPU too: for second derivatives, and for distances that others can compare."""
    # Not `cudnn.flags`, whose defaults would switch cuDNN off.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
