"""The modulated fully connected layer of CIPS, for pixels times channels: a reference form and a fast one.

Of two algebraic forms the one with weights modulated for each picture is the fast one: they are small beside the
pixels, which one product reads and writes once. Scaling the pixels by the style before one product shared by all
pictures, and by the demodulation after it, passes over all of them twice more, and again backward.

Shapes: B pictures, P pixels, I channels in, O channels out, R of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.fused_linear import product, product_backward

EPSILON = 1e-8


def modulated_linear_reference(
    x: Tensor,
    weight_IO: Tensor,
    style_BI: Tensor,
    bias_O: Tensor | None = None,
    noise_BP: Tensor | None = None,
    *,
    demodulate: bool = True,
    gain: float = 1.0,
    slope: float = 1.0,
    eps: float = EPSILON,
) -> Tensor:
    """Equation 2 of the paper, literally: per-picture weights, applied as one grouped 1x1 convolution.

    Arguments and result as in `modulated_linear`. Slow; the tests hold the fast form against it.
    """
    batch, channels = style_BI.shape
    x_BPI = x.expand(batch, -1, -1)
    weight_BOI = weight_IO.t()[None] * style_BI[:, None, :]
    if demodulate:
        weight_BOI = weight_BOI / torch.sqrt(weight_BOI.square().sum(dim=2, keepdim=True) + eps)
    images_1CHW = x_BPI.transpose(1, 2).reshape(1, batch * channels, -1, 1)
    kernels = weight_BOI.reshape(-1, channels, 1, 1)
    y_BOP = F.conv2d(images_1CHW, kernels, groups=batch).reshape(batch, weight_IO.shape[1], -1)
    y_BPO = y_BOP.transpose(1, 2) * gain
    if bias_O is not None:
        y_BPO = y_BPO + bias_O
    if noise_BP is not None:
        y_BPO = y_BPO + noise_BP[:, :, None]
    return F.leaky_relu(y_BPO, slope)


def modulated_linear(
    x: Tensor,
    weight_IO: Tensor,
    style_BI: Tensor,
    bias_O: Tensor | None = None,
    noise_BP: Tensor | None = None,
    *,
    demodulate: bool = True,
    gain: float = 1.0,
    slope: float = 1.0,
    eps: float = EPSILON,
    keep_weights: bool = False,
) -> Tensor:
    """leaky_relu(gain * x @ w' + bias + noise), with w'_io = s_i w_io / sqrt(sum_i (s_i w_io)^2 + eps).

    Equation 2 of the paper; `demodulate=False` leaves the root out.
    x: (B, P, I), or (P, I) if all pictures share it. noise_BP: (B or 1, P), one number for all channels.
    gain: folded into the weights, so it costs no pass over the pixels. slope: of LeakyReLU below zero; 1 for none.
    keep_weights: for the gradients, keep the modulated weights (B, I, O) instead of making them again.
    Returns (B, P, O) in the autocast dtype where autocast is on, else in the dtype of x. The weights are made
    in float32 (float64 for float64) and rounded once. Differentiable any number of times.
    """
    rule = _Rule(demodulate, gain, slope, eps, keep_weights)
    return _apply((x, weight_IO, style_BI, bias_O, noise_BP, None), rule)[0]


def modulated_linear_with_head(
    x: Tensor,
    weight_IO: Tensor,
    style_BI: Tensor,
    bias_O: Tensor | None,
    noise_BP: Tensor | None,
    head_BOR: Tensor,
    *,
    demodulate: bool = True,
    gain: float = 1.0,
    slope: float = 1.0,
    eps: float = EPSILON,
    keep_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """`modulated_linear`, y, and a small product of it, y @ head: (B, P, O) and (B, P, R), in the same dtype.

    The product and its gradients are computed while y is in the cache. head_BOR: one matrix for each picture.
    """
    rule = _Rule(demodulate, gain, slope, eps, keep_weights)
    return _apply((x, weight_IO, style_BI, bias_O, noise_BP, head_BOR), rule)


def _apply(inputs: tuple[Any, ...], rule: "_Rule") -> tuple[Any, Any]:
    x, weight_IO, style_BI, *rest = inputs
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        exact = torch.promote_types(weight_IO.dtype, torch.float32)
        return _ModulatedLinear.apply(x.to(dtype), weight_IO.to(exact), style_BI.to(exact), *rest, rule)


class _Rule:
    """What of a layer is no tensor."""

    def __init__(self, demodulate: bool, gain: float, slope: float, eps: float, keep_weights: bool) -> None:
        self.demodulate, self.gain, self.slope, self.eps = demodulate, gain, slope, eps
        self.keep_weights = keep_weights

    def demodulation(self, weight_IO: Tensor, style_BI: Tensor) -> Tensor:
        """Factor of each output channel, gain included: (B, O), or (B, 1) without demodulation."""
        if not self.demodulate:
            return torch.full_like(style_BI[:, :1], self.gain)
        return self.gain * torch.rsqrt(style_BI.square() @ weight_IO.square() + self.eps)


class _ModulatedLinear(torch.autograd.Function):
    """Keeps one tensor of the pixels' size for each layer: its result, which the next layer takes as its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_IO: Tensor,
        style_BI: Tensor,
        bias_O: Tensor | None,
        noise_BP: Tensor | None,
        head_BOR: Tensor | None,
        rule: _Rule,
    ) -> tuple[Tensor, Tensor | None]:
        weight_BIO = _modulated(weight_IO, style_BI, rule.demodulation(weight_IO, style_BI), x.dtype)
        rounded_BOR = None if head_BOR is None else head_BOR.to(x.dtype)
        y_BPO, result_BPR = product(x, weight_BIO, bias_O, noise_BP, rule.slope, rounded_BOR)
        ctx.rule = rule
        ctx.set_materialize_grads(False)  # the last layer's y has none but its head's
        kept_BIO = weight_BIO if rule.keep_weights else None
        ctx.save_for_backward(x, weight_IO, style_BI, bias_O, noise_BP, head_BOR, y_BPO, kept_BIO)
        return y_BPO, result_BPR

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        *inputs, y_BPO, weight_BIO = ctx.saved_tensors  # once only: a recomputed segment hands them out once
        needs = ctx.needs_input_grad[:6]
        if gradients == (None, None):  # in a second derivative that does not depend on this layer
            return (None,) * 7
        with torch.autocast(y_BPO.device.type, enabled=False):  # also where it is called under autocast
            if torch.is_grad_enabled():  # a derivative of this derivative is wanted
                return *_plain_backward(gradients, tuple(inputs), needs, ctx.rule), None
            return *_backward(gradients, tuple(inputs), y_BPO, weight_BIO, needs, ctx.rule), None


def _backward(
    gradients: tuple[Any, ...],
    inputs: tuple[Any, ...],
    y_BPO: Tensor,
    weight_BIO: Tensor | None,
    needs: tuple[bool, ...],
    rule: _Rule,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, style, bias, noise and head."""
    x, weight_IO, style_BI, bias_O, noise_BP, head_BOR = inputs
    scale_BO = rule.demodulation(weight_IO, style_BI)
    if weight_BIO is None:
        weight_BIO = _modulated(weight_IO, style_BI, scale_BO, x.dtype)
    rounded_BOR = None if head_BOR is None else head_BOR.to(x.dtype)
    wanted = (needs[0], needs[1] or needs[2], *needs[3:])
    found = product_backward((gradients[0], gradients[1]), x, y_BPO, weight_BIO, rounded_BOR, rule.slope, wanted)
    grad_weight, grad_style, grad_bias, grad_noise, grad_head = None, None, None, None, None
    if found.weight_BIO is not None:
        grad_weight, grad_style = _modulation_backward(found.weight_BIO, weight_IO, style_BI, scale_BO, rule)
    if found.bias_O is not None:
        grad_bias = found.bias_O.to(bias_O.dtype)
    if found.noise_BP is not None:
        grad_noise = found.noise_BP.sum_to_size(noise_BP.shape).to(noise_BP.dtype)
    if found.head_BOR is not None:
        grad_head = found.head_BOR.to(head_BOR.dtype)
    return found.x, grad_weight, grad_style, grad_bias, grad_noise, grad_head


def _modulated(weight_IO: Tensor, style_BI: Tensor, scale_BO: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of each picture (B, I, O), rounded once."""
    return (weight_IO * style_BI[:, :, None]).mul_(scale_BO[:, None, :]).to(dtype)


def _modulation_backward(
    gradient_BIO: Tensor, weight_IO: Tensor, style_BI: Tensor, scale_BO: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and style from that of the modulated weights w'_bio = w_io s_bi d_bo."""
    product_BIO = gradient_BIO * weight_IO
    grad_style = product_BIO @ scale_BO[:, :, None].expand(-1, product_BIO.shape[2], 1)
    grad_scale_BO = (style_BI[:, None, :] @ product_BIO).squeeze(1)
    grad_weight = (gradient_BIO * style_BI[:, :, None]).mul_(scale_BO[:, None, :]).sum(dim=0)
    grad_style = grad_style.squeeze(2)
    if rule.demodulate:
        # d = gain / sqrt(sum_i (s_i w_io)^2 + eps), so dd / ds_i = -d^3 / gain^2 s_i w_io^2, and alike for w.
        root_BO = -grad_scale_BO * scale_BO.pow(3) / rule.gain**2
        grad_weight += weight_IO * (style_BI.square().t() @ root_BO)
        grad_style = grad_style + style_BI * (root_BO @ weight_IO.square().t())
    return grad_weight, grad_style


def _plain_backward(
    gradients: tuple[Any, ...], inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], rule: _Rule
) -> list[Tensor | None]:
    """The gradients by torch's own rules, which can be differentiated again."""
    x, weight_IO, style_BI, bias_O, noise_BP, head_BOR = inputs
    assert x is not None and weight_IO is not None and style_BI is not None
    weight_BIO = weight_IO * style_BI[:, :, None] * rule.demodulation(weight_IO, style_BI)[:, None, :]
    y_BPO = x @ weight_BIO.to(x.dtype)
    if bias_O is not None:
        y_BPO = y_BPO + bias_O.to(x.dtype)
    if noise_BP is not None:
        y_BPO = y_BPO + noise_BP.to(x.dtype)[:, :, None]
    y_BPO = F.leaky_relu(y_BPO, rule.slope)
    results = [y_BPO] if head_BOR is None else [y_BPO, y_BPO @ head_BOR.to(x.dtype)]
    given = [(result, gradient) for result, gradient in zip(results, gradients, strict=False) if gradient is not None]
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need and tensor is not None]
    found = torch.autograd.grad(
        [result for result, _ in given],
        wanted,
        [gradient for _, gradient in given],
        create_graph=True,
        allow_unused=True,  # the head, where only y was used
    )
    each = iter(found)
    return [next(each) if need else None for need in needs]
