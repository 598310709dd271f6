"""The pixels' part of a modulated layer: a product for each picture, with noise, bias and LeakyReLU.

On a CPU it works through blocks of pixels: what a product wrote is still in the cache when the activation reads it.
On CUDA a Triton kernel does all of it at once; where that cannot run, the matrix library's product and one compiled
pass do, or torch's own passes.
A head is a second, small product of the result, such as the layer to RGB: its gradient is added to the next layer's
block by block, and costs no pass and no tensor of the pixels' size.
Shapes: B pictures, P pixels, I channels in, O channels out, R of the head.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import fused_compiled, fused_triton
from pipeline.ops.matrix_product import SMALLEST_PICTURE, laid_out, sum_of_outer_products, times

BLOCK_BYTES = 4 << 20
"""Of a block's output: with its input it stays in the last cache of any processor, and calls are few."""


class Gradients(NamedTuple):
    """Of a layer's product and its head; None where not asked for."""

    x: Tensor | None
    weight_BIO: Tensor | None
    """Summed over the blocks of pixels in float32, or float64 for float64; of each block in the dtype of x."""
    bias_O: Tensor | None
    noise_BP: Tensor | None
    """One row for each picture, also where all pictures shared the noise."""
    head_BOR: Tensor | None


def product(
    x: Tensor,
    weight_BIO: Tensor,
    bias_O: Tensor | None,
    noise_BP: Tensor | None,
    slope: float,
    head_BOR: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = leaky_relu(x @ weight + bias + noise), (B, P, O) in the dtype of x, and y @ head, (B, P, R), if there is one.

    x: (B, P, I), or (P, I) if all pictures share it. weight_BIO, head_BOR: modulated, in the dtype of x. noise_BP:
    (B or 1, P), one number for all channels. slope: of LeakyReLU below zero; 1 for none.
    """
    if fused_triton.available(x):
        y_BPO = fused_triton.product(x, weight_BIO, bias_O, noise_BP, slope)
        return y_BPO, None if head_BOR is None else fused_triton.product(y_BPO, head_BOR, None, None, 1.0)
    if fused_compiled.available(x):
        y_BPO = fused_compiled.product(x, weight_BIO, bias_O, noise_BP, slope)
        return y_BPO, None if head_BOR is None else torch.bmm(y_BPO, head_BOR)
    x_BPI = x.expand(weight_BIO.shape[0], *x.shape[-2:])
    batch, points, _ = x_BPI.shape
    y_BPO = x.new_empty(batch, points, weight_BIO.shape[2])
    result_BPR = None if head_BOR is None else x.new_empty(batch, points, head_BOR.shape[2])
    left_BPK, right_KO = _addends(bias_O, noise_BP, y_BPO)
    weight_BIO = laid_out(weight_BIO, x_BPI)
    for pictures, pixels in blocks(y_BPO):
        y, rows, weight = y_BPO[pictures, pixels], x_BPI[pictures, pixels], weight_BIO[pictures]
        times(rows, weight, out=y)
        if right_KO.shape[0]:  # after the large product, which is slow where it has to add; one more rounding
            y.baddbmm_(left_BPK[pictures, pixels], right_KO.expand(y.shape[0], -1, -1))
        if slope != 1.0:
            F.leaky_relu_(y, slope)
        if head_BOR is not None and result_BPR is not None:
            torch.bmm(y, head_BOR[pictures], out=result_BPR[pictures, pixels])
    return y_BPO, result_BPR


def product_backward(
    gradients: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    y_BPO: Tensor,
    weight_BIO: Tensor,
    head_BOR: Tensor | None,
    slope: float,
    needs: tuple[bool, ...],
) -> Gradients:
    """The gradients of `product`, from those of its two results (not both None) and from its result y.

    needs: which of x, weight, bias, noise and head.
    """
    need_x, need_weight, need_bias, need_noise, need_head = needs
    gradient_BPO, gradient_BPR = gradients
    exact = torch.promote_types(x.dtype, torch.float32)
    shared = x.ndim == 2
    x_BPI = x.expand(weight_BIO.shape[0], *x.shape[-2:])
    batch, points, _ = x_BPI.shape
    weight_BOI = weight_BIO.transpose(1, 2)
    grad_x = torch.empty_like(x_BPI, memory_format=torch.contiguous_format) if need_x and not shared else None
    grad_weight = torch.zeros_like(weight_BIO, dtype=exact) if need_weight else None
    grad_bias = x.new_zeros(weight_BIO.shape[2], dtype=exact) if need_bias else None
    grad_noise = x.new_empty(batch, points, dtype=exact) if need_noise else None
    grad_head = None
    if head_BOR is not None and gradient_BPR is not None and need_head:
        grad_head = torch.zeros_like(head_BOR, dtype=exact)
    # In memory (P, B, O), for one product over pictures and channels at the end.
    grad_product = y_BPO.new_empty(points, batch, y_BPO.shape[2]).transpose(0, 1) if need_x and shared else None
    of_activation = _activation_backward_on(x)
    for pictures, pixels in blocks(y_BPO):
        y, rows = y_BPO[pictures, pixels], x_BPI[pictures, pixels]
        gradient = None if gradient_BPO is None else gradient_BPO[pictures, pixels]
        if head_BOR is not None and gradient_BPR is not None:
            of_head = gradient_BPR[pictures, pixels]
            gradient = _with_head(gradient, of_head, head_BOR[pictures])
            if grad_head is not None:
                grad_head[pictures] += torch.bmm(y.transpose(1, 2), of_head)
        assert gradient is not None
        gradient, bias, noise = of_activation(gradient, y, slope, need_bias, need_noise)
        if grad_bias is not None and bias is not None:
            grad_bias += bias
        if grad_noise is not None and noise is not None:
            grad_noise[pictures, pixels] = noise
        if grad_weight is not None:
            grad_weight[pictures] += sum_of_outer_products(rows, gradient)
        if grad_x is not None:
            times(gradient, weight_BOI[pictures], out=grad_x[pictures, pixels])
        if grad_product is not None:
            grad_product[pictures, pixels] = gradient
    if grad_product is not None:  # one product sums over the pictures in full precision
        grad_x = x.new_empty(x.shape)
        flat_1PK = grad_product.transpose(0, 1).flatten(1)[None]  # K: pictures times channels out
        times(flat_1PK, laid_out(weight_BOI.flatten(0, 1)[None], flat_1PK), out=grad_x[None])
    return Gradients(grad_x, grad_weight, grad_bias, grad_noise, grad_head)


def _activation_backward_on(x: Tensor) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    """The fastest that works where x is."""
    for kernels in (fused_triton, fused_compiled):
        if kernels.available(x):
            return kernels.activation_backward
    return activation_backward


def _with_head(gradient: Tensor | None, of_head_BPR: Tensor, head_BOR: Tensor) -> Tensor:
    """The gradient of a block of y: what came from the next layer, if anything did, and through the head."""
    head_BRO = head_BOR.transpose(1, 2)
    if gradient is None:
        return torch.bmm(of_head_BPR, head_BRO)
    return torch.baddbmm(gradient, of_head_BPR, head_BRO)


def activation_backward(
    gradient_BPO: Tensor, y_BPO: Tensor, slope: float, need_bias: bool, need_noise: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients before the activation, of which y is the result: of the product, of the bias (O,), of noise (B, P).

    The last two are float32, or float64 for float64, with sums rounded once to y's dtype; None where not asked for.
    """
    exact = torch.promote_types(y_BPO.dtype, torch.float32)
    if slope != 1.0:
        gradient_BPO = torch.ops.aten.leaky_relu_backward(gradient_BPO, y_BPO, slope, True)
    bias_O = _sum_of_pixels(gradient_BPO).sum(dim=0, dtype=exact) if need_bias else None
    noise_BP = _sum_of_channels(gradient_BPO).to(exact) if need_noise else None
    return gradient_BPO, bias_O, noise_BP


def _addends(bias_O: Tensor | None, noise_BP: Tensor | None, y_BPO: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and bias as a product (B, P, K) @ (K, O) with K = 2, 1 or 0: three times as fast as adding them up."""
    batch, points, channels = y_BPO.shape
    given = (noise_BP is not None) + (bias_O is not None)
    left_BPK, right_KO = y_BPO.new_ones(batch, points, given), y_BPO.new_ones(given, channels)
    if noise_BP is not None:
        left_BPK[:, :, 0] = noise_BP
    if bias_O is not None:
        right_KO[-1] = bias_O
    return left_BPK, right_KO


def _sum_of_pixels(x_BPO: Tensor) -> Tensor:
    """(B, O). As a product, which sums in float32: torch's own sum of bfloat16 takes seven times as long on a CPU."""
    if x_BPO.is_cuda or x_BPO.dtype.itemsize > 2:
        return x_BPO.sum(dim=1)
    return torch.bmm(x_BPO.new_ones(1, 1, 1).expand(*x_BPO.shape[:2], 1).transpose(1, 2), x_BPO).squeeze(1)


def _sum_of_channels(x_BPO: Tensor) -> Tensor:
    """(B, P), likewise; with a single column of ones the library takes a slower way."""
    if x_BPO.is_cuda or x_BPO.dtype.itemsize > 2:
        return x_BPO.sum(dim=2)
    return torch.bmm(x_BPO, x_BPO.new_ones(x_BPO.shape[0], x_BPO.shape[2], 16))[:, :, 0]


def blocks(y_BPO: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pictures and pixels to be computed together: several whole pictures, or equal parts of one."""
    batch, points, channels = y_BPO.shape
    most = max(SMALLEST_PICTURE, BLOCK_BYTES // (channels * y_BPO.element_size()))
    if points <= most or y_BPO.is_cuda:
        together = batch if y_BPO.is_cuda else max(1, most // max(1, points))
        for first in range(0, batch, together):
            yield slice(first, first + together), slice(None)
        return
    parts = -(-points // most)
    edges = [points * part // parts for part in range(parts + 1)]
    for picture in range(batch):
        for start, stop in zip(edges, edges[1:], strict=False):
            yield slice(picture, picture + 1), slice(start, stop)
