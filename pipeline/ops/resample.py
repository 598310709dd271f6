"""The discriminator's low-pass filter: [1, 3, 3, 1] in both directions, as in StyleGAN2."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = (1.0, 3.0, 3.0, 1.0)


def blur_kernel() -> Tensor:
    """The separable [1, 3, 3, 1] filter as a 4 x 4 kernel that sums to 1: float32."""
    taps = torch.tensor(TAPS)
    return torch.outer(taps, taps) / taps.sum().square()


def blur_reference(x_BCHW: Tensor, kernel_44: Tensor, padding: int, stride: int = 1) -> Tensor:
    """What `blur` computes, by a depthwise convolution and torch's own derivatives."""
    channels = x_BCHW.shape[1]
    kernel = kernel_44.to(x_BCHW.dtype).expand(channels, 1, 4, 4)
    return F.conv2d(x_BCHW, kernel, padding=padding, stride=stride, groups=channels)


def blur(x_BCHW: Tensor, kernel_44: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Low-pass each channel by a symmetric kernel; keep every stride-th result.

    padding: 0 to 3 zeros on each side. Output height: (height + 2 * padding - 4) // stride + 1.
    Differentiable any number of times with respect to x; the kernel is a constant.
    """
    return _Blur.apply(x_BCHW, kernel_44, padding, stride)


class _Blur(torch.autograd.Function):
    """A blur whose derivatives are blurs: the transpose of a symmetric filter is the filter again.

    On a CPU torch's own second derivative of a depthwise convolution takes 40 times as long as the
    convolution, and its first derivative in bfloat16 with stride 2 takes 100 times as long.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, kernel_44: Tensor, padding: int, stride: int) -> Tensor:
        ctx.save_for_backward(kernel_44)
        ctx.padding, ctx.stride, ctx.shape = padding, stride, x_BCHW.shape
        return blur_reference(x_BCHW, kernel_44, padding, stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        (kernel_44,) = ctx.saved_tensors
        if ctx.stride > 1:
            batch, channels, height, width = ctx.shape
            grow = 2 * ctx.padding - 3
            dense = torch.empty(
                (batch, channels, height + grow, width + grow),
                dtype=gradient.dtype,
                device=gradient.device,
                memory_format=torch.channels_last,
            ).zero_()
            dense[:, :, :: ctx.stride, :: ctx.stride] = gradient
            gradient = dense
        return blur(gradient, kernel_44, 3 - ctx.padding), None, None, None
