"""The modulated fully connected layer of CIPS, for pixels times channels: a reference form and a fast one.

Shapes: B pictures, P pixels, I channels in, O channels out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_linear_reference(
    x: Tensor,
    weight_IO: Tensor,
    style_BI: Tensor,
    bias_O: Tensor | None = None,
    noise_BP: Tensor | None = None,
    *,
    demodulate: bool = True,
    gain: float = 1.0,
    eps: float = 1e-8,
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
    return y_BPO if noise_BP is None else y_BPO + noise_BP[:, :, None]


def modulated_linear(
    x: Tensor,
    weight_IO: Tensor,
    style_BI: Tensor,
    bias_O: Tensor | None = None,
    noise_BP: Tensor | None = None,
    *,
    demodulate: bool = True,
    gain: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """y = gain * x @ w' + bias + noise, with w'_io = s_i w_io / sqrt(sum_i (s_i w_io)^2 + eps).

    Equation 2 of the paper; `demodulate=False` leaves the root out.
    x: (B, P, I), or (P, I) if all pictures share it. noise_BP: (B or 1, P), one number for all channels.
    gain: folded into the weights, so it costs no pass over the pixels.
    Returns (B, P, O) in the autocast dtype where autocast is on, else in the dtype of x. The weights are made
    in float32 (float64 for float64) and rounded once. Differentiable any number of times.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        exact = torch.promote_types(weight_IO.dtype, torch.float32)
        weight_IO, style_BI = weight_IO.to(exact), style_BI.to(exact)
        scale_BO = None
        if demodulate:
            scale_BO = gain * torch.rsqrt(style_BI.square() @ weight_IO.square() + eps)
        elif gain != 1.0:
            style_BI = style_BI * gain
        # Cast before adding: the sum is as large as the result.
        addend = None if bias_O is None else bias_O.to(dtype)
        if noise_BP is not None:
            noise_BP1 = noise_BP.to(dtype)[:, :, None]
            addend = noise_BP1 if addend is None else noise_BP1 + addend
        if x.ndim == 2:
            return _shared(x.to(dtype), weight_IO, style_BI, scale_BO, addend)
        weight_BIO = weight_IO * style_BI[:, :, None]
        if scale_BO is not None:
            weight_BIO = weight_BIO * scale_BO[:, None, :]
        if addend is None:
            return torch.bmm(x.to(dtype), weight_BIO.to(dtype))
        return torch.baddbmm(addend, x.to(dtype), weight_BIO.to(dtype))


def _shared(
    x_PI: Tensor, weight_IO: Tensor, style_BI: Tensor, scale_BO: Tensor | None, addend: Tensor | None
) -> Tensor:
    """All pictures in one product (P, I) @ (I, B * O): the input is read once and never copied B times."""
    batch, out = style_BI.shape[0], weight_IO.shape[1]
    weight_IBO = weight_IO[:, None, :] * style_BI.t()[:, :, None]
    if scale_BO is not None:
        weight_IBO = weight_IBO * scale_BO
    y_PBO = (x_PI @ weight_IBO.flatten(1).to(x_PI.dtype)).unflatten(1, (batch, out))
    y_BPO = y_PBO.transpose(0, 1).contiguous()  # strided rows would slow down the next product
    return y_BPO if addend is None else y_BPO.add_(addend)
