"""Matrix products of pixels by the library that is fastest at them.

On x86 torch hands float32 products to MKL, which has its fast kernels for Intel's processors only: 145 of 320 GFLOP/s
on two cores of an EPYC. Convolutions go to oneDNN, which has them for all, and a 1x1 convolution of pixels by channels
(channels_last memory) is the same product. bfloat16 is oneDNN's already; on CUDA one library does both.
Shapes: B pictures, P pixels, I channels in, O channels out.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

SMALLEST_PRODUCT = 1 << 24
"""Multiplications from which a convolution's call costs less than what it saves."""


def times(x_BPI: Tensor, weight_BIO: Tensor, out: Tensor) -> None:
    """out = x @ weight, (B, P, O); fastest with weights that are `laid_out`."""
    if not by_convolution(x_BPI, weight_BIO.shape[2]):
        torch.bmm(x_BPI, weight_BIO, out=out)
        return
    weight_OI = weight_BIO[0].t()
    out.copy_(_pixels(F.conv2d(_picture(x_BPI), weight_OI[:, :, None, None])))


def outer(x_BPI: Tensor, y_BPO: Tensor) -> Tensor:
    """x^T @ y, (B, I, O): the outer products of all pixels, summed."""
    if by_convolution(x_BPI, y_BPO.shape[2]):
        size = (y_BPO.shape[2], x_BPI.shape[2], 1, 1)
        return conv2d_weight(_picture(x_BPI), size, _picture(y_BPO))[None, :, :, 0, 0].transpose(1, 2)
    if len(x_BPI) == 1:  # as a matrix: the library copies some of what is transposed in a batch
        return torch.mm(x_BPI[0].t(), y_BPO[0]).unsqueeze(0)
    return torch.bmm(x_BPI.transpose(1, 2), y_BPO)


def laid_out(weight_BIO: Tensor) -> Tensor:
    """The same weights, in memory as `times` wants them where it computes a convolution: (B, O, I)."""
    if weight_BIO.dtype == torch.float32 and weight_BIO.device.type == "cpu" and _mkl_is_slow():
        return weight_BIO.transpose(1, 2).contiguous().transpose(1, 2)
    return weight_BIO


def by_convolution(x_BPI: Tensor, channels_out: int) -> bool:
    """Whether products of these pixels are computed as convolutions: decided by shape and processor, never by time."""
    return (
        x_BPI.dtype == torch.float32
        and x_BPI.device.type == "cpu"
        and len(x_BPI) == 1
        and x_BPI.is_contiguous()
        and x_BPI.numel() * channels_out >= SMALLEST_PRODUCT
        and _mkl_is_slow()
    )


@functools.cache
def _mkl_is_slow() -> bool:
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def _picture(x_1PC: Tensor) -> Tensor:
    """(1, C, P, 1) in channels_last: the same memory."""
    _, points, channels = x_1PC.shape
    return x_1PC.reshape(1, points, 1, channels).permute(0, 3, 1, 2)


def _pixels(x_1CP1: Tensor) -> Tensor:
    """The way back."""
    return x_1CP1.squeeze(3).transpose(1, 2)
