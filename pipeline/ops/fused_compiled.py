"""The fused layer where CUDA is, but not what the Triton kernels need: what follows a product is one compiled pass.

`torch.compile` writes a kernel for whatever device it knows (AMD's, NVIDIA's before Ampere); the products are those of
the matrix library. Shapes: B pictures, P pixels, I channels in, O channels out.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def available(x: Tensor) -> bool:
    """Whether x is on CUDA (ROCm's devices are called so too) and torch compiles for it."""
    return x.is_cuda and _compiles(x.device)


def product(x: Tensor, weight_BIO: Tensor, bias_O: Tensor | None, noise_BP: Tensor | None, slope: float) -> Tensor:
    """leaky_relu(x @ weight + bias + noise), (B, P, O) in the dtype of x: `fused_linear.product` without a head."""
    y_BPO = torch.bmm(x.expand(weight_BIO.shape[0], *x.shape[-2:]), weight_BIO)
    return _compiled(_finished)(y_BPO, bias_O, noise_BP, slope)


def activation_backward(
    gradient_BPO: Tensor, y_BPO: Tensor, slope: float, need_bias: bool, need_noise: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `fused_linear.activation_backward`."""
    return _compiled(_activation_backward)(gradient_BPO, y_BPO, slope, need_bias, need_noise)


def _finished(y_BPO: Tensor, bias_O: Tensor | None, noise_BP: Tensor | None, slope: float) -> Tensor:
    exact = torch.promote_types(y_BPO.dtype, torch.float32)
    sum_BPO = y_BPO.to(exact)
    if bias_O is not None:
        sum_BPO = sum_BPO + bias_O.to(exact)
    if noise_BP is not None:
        sum_BPO = sum_BPO + noise_BP.to(exact)[:, :, None]
    return F.leaky_relu(sum_BPO, slope).to(y_BPO.dtype)


def _activation_backward(
    gradient_BPO: Tensor, y_BPO: Tensor, slope: float, need_bias: bool, need_noise: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    exact = torch.promote_types(y_BPO.dtype, torch.float32)
    if slope != 1.0:
        gradient_BPO = torch.where(y_BPO > 0, gradient_BPO, gradient_BPO * slope)
    bias_O = gradient_BPO.sum(dim=(0, 1), dtype=exact) if need_bias else None
    noise_BP = gradient_BPO.sum(dim=2, dtype=exact) if need_noise else None
    return gradient_BPO, bias_O, noise_BP


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)  # patches and chunks have many sizes


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Whether a small layer comes out right: torch compiles at first use, for which a machine may lack tools."""
    ones = torch.ones(1, 16, 16, device=device)
    try:
        return bool((product(ones, ones, ones[0, 0], ones[0, :1], 1.0) == 18).all())
    except Exception as error:
        print(f"layers are not compiled, since torch.compile does not work for {device}: {error}", flush=True)
        return False
