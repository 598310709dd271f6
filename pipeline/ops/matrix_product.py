"""Matrix products of pixels by the library that is fastest at them.

On x86 torch hands float32 products to MKL, which has its fast kernels for Intel's processors only: 145 GFLOP/s on two
cores of an EPYC with AVX-512, where oneDNN reaches 240 to 340. oneDNN does convolutions, and a 1x1 convolution of
pixels by channels (channels_last memory) is the same product. bfloat16 is oneDNN's already; on CUDA one library does
both. Which one computes depends on the processor, the number of channels and whether there are at least
`SMALLEST_PICTURE` pixels, never on time or on how many more pixels there are: that would change the last bits.
Shapes: B pictures, P pixels, I channels in, O channels out; C either.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

SMALLEST_PICTURE = 128
"""Pixels; with fewer rows both libraries switch kernels, and the last bits change."""
SMALLEST_WEIGHT = 1 << 16
"""Elements from which a convolution's call costs less than what it saves: 256 x 256 channels."""


def times(x_BPI: Tensor, weight_BIO: Tensor, out: Tensor) -> None:
    """out = x @ weight, (B, P, O); without gradients. Fastest with weights that are `laid_out`."""
    if not by_convolution(x_BPI, weight_BIO.shape[2]):
        torch.bmm(x_BPI, weight_BIO, out=out)
        return
    for x_PI, weight_IO, out_PO in zip(x_BPI, weight_BIO, out, strict=True):
        out_PO.copy_(convolution(x_PI, weight_IO))


def convolution(x_PI: Tensor, weight_IO: Tensor) -> Tensor:
    """x @ weight, (P, O), by oneDNN; without gradients. Copies weights that do not lie in memory as (O, I)."""
    kernel = weight_IO.t()[:, :, None, None]
    # conv2d would leave oneDNN aside where there is only one thread.
    y_1OP1 = torch.mkldnn_convolution(_picture(x_PI), kernel, None, [0, 0], [1, 1], [1, 1], 1)
    return y_1OP1[0, :, :, 0].t()


def sum_of_outer_products(x_BPI: Tensor, y_BPO: Tensor) -> Tensor:
    """x^T @ y, (B, I, O); without gradients."""
    if torch.get_num_threads() > 1 and by_convolution(x_BPI, y_BPO.shape[2]):  # else torch would not take oneDNN
        size = (y_BPO.shape[2], x_BPI.shape[2], 1, 1)
        each = [
            conv2d_weight(_picture(x), size, _picture(y))[:, :, 0, 0].t() for x, y in zip(x_BPI, y_BPO, strict=True)
        ]
        return torch.stack(each) if len(each) > 1 else each[0][None]
    if len(x_BPI) == 1:  # as a matrix: the library copies some of what is transposed in a batch
        return torch.mm(x_BPI[0].t(), y_BPO[0]).unsqueeze(0)
    return torch.bmm(x_BPI.transpose(1, 2), y_BPO)


def laid_out(weight_BIO: Tensor, x_BPI: Tensor) -> Tensor:
    """The same weights, in memory as `times` wants them for these pixels: (B, O, I) for a convolution."""
    if by_convolution(x_BPI, weight_BIO.shape[2]):
        return weight_BIO.transpose(1, 2).contiguous().transpose(1, 2)
    return weight_BIO


def by_convolution(x_BPI: Tensor, channels_out: int) -> bool:
    """Whether products of these pixels are computed as convolutions."""
    return (
        x_BPI.dtype == torch.float32
        and x_BPI.device.type == "cpu"
        and x_BPI.shape[1] >= SMALLEST_PICTURE
        and x_BPI.shape[2] * channels_out >= SMALLEST_WEIGHT
        and mkl_is_slow()
    )


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this processor is one that MKL has no fast kernels for, and oneDNN has."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    try:
        return not is_intel(Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        return False


def is_intel(cpuinfo: str) -> bool:
    """What Linux says of the processor's maker."""
    return "GenuineIntel" in cpuinfo


def _picture(x_PC: Tensor) -> Tensor:
    """(1, C, P, 1) in channels_last: the same memory if the pixels lie one after the other."""
    return x_PC.contiguous()[None, :, None, :].permute(0, 3, 1, 2)
