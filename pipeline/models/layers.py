"""Layers with equalised learning rates, after Karras et al. (Progressive GAN, StyleGAN2).

Weights are stored with unit variance and scaled by 1 / sqrt(fan in) when used, so that Adam moves all of them
at the same relative speed. LeakyReLU is positively homogeneous: its gain sqrt(2) is folded into the weights
and biases before it and costs no pass over the activations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.modulated_linear import modulated_linear, modulated_linear_with_head

SLOPE = 0.2
GAIN = math.sqrt(2.0)


def lrelu_(x: Tensor) -> Tensor:
    """LeakyReLU in place; its gain is folded into what made x."""
    return F.leaky_relu(x, SLOPE, inplace=True)


class EqualLinear(nn.Module):
    """y = x W^T lr_mul / sqrt(in) + b lr_mul; then LeakyReLU with gain sqrt(2) if `activate`.

    W is stored as N(0, 1) / lr_mul, b as bias_init / lr_mul: the layer starts the same for every lr_mul and
    learns lr_mul times as fast.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias_init: float = 0.0,
        lr_mul: float = 1.0,
        activate: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_mul))
        self.activate = activate
        gain = GAIN if activate else 1.0
        self.weight_scale = gain * lr_mul / math.sqrt(in_features)
        self.bias_scale = gain * lr_mul

    def forward(self, x: Tensor) -> Tensor:
        # Scaling the input instead of the weight is the same product and touches batch, not out, rows.
        y = F.linear(x * self.weight_scale, self.weight, self.bias * self.bias_scale)
        return lrelu_(y) if self.activate else y


class EqualConv2d(nn.Module):
    """y = gain * (x * W / sqrt(fan in) + b); LeakyReLU with gain sqrt(2) in between if `activate`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        activate: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.stride, self.padding, self.activate = stride, padding, activate
        self.bias_scale = gain * (GAIN if activate else 1.0)
        self.weight_scale = self.bias_scale / math.sqrt(in_channels * kernel**2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * self.bias_scale
        weight = self.weight * self.weight_scale
        y_BCHW = F.conv2d(x_BCHW, weight, bias, stride=self.stride, padding=self.padding)
        return lrelu_(y_BCHW) if self.activate else y_BCHW


class Mapping(nn.Module):
    """The mapping network z -> w: PixelNorm, then fully connected layers that learn at lr_mul."""

    def __init__(self, latent: int, layers: int, lr_mul: float = 0.01) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EqualLinear(latent, latent, lr_mul=lr_mul, activate=True) for _ in range(layers)))

    def forward(self, z_BZ: Tensor) -> Tensor:
        # A few small products: full precision costs nothing and keeps styles exact under autocast.
        with torch.autocast(z_BZ.device.type, enabled=False):
            return self.layers(z_BZ * torch.rsqrt(z_BZ.square().mean(dim=1, keepdim=True) + 1e-8))


class ModulatedLinear(nn.Module):
    """ModFC: weights scaled by a style and demodulated, then noise, bias and LeakyReLU with gain sqrt(2)."""

    def __init__(self, in_features: int, out_features: int, latent: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.affine = EqualLinear(latent, in_features, bias_init=1.0)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1.0 / math.sqrt(in_features)

    def forward(self, x: Tensor, w_BZ: Tensor, noise_BP: Tensor | None = None, *, keep_weights: bool = False) -> Tensor:
        """(B, P, O) of x (B, P, I), or (P, I) for all pictures. noise_BP: standard normal (B or 1, P).

        keep_weights: see `modulated_linear`.
        """
        return modulated_linear(*self._inputs(x, w_BZ, noise_BP), gain=GAIN, slope=SLOPE, keep_weights=keep_weights)

    def with_rgb(
        self, x: Tensor, w_BZ: Tensor, noise_BP: Tensor | None, to_rgb: "ToRGB", *, keep_weights: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and `to_rgb` of its result (B, P, 3), which is computed while the result is in the cache."""
        y_BPO, colour_BP3 = modulated_linear_with_head(
            *self._inputs(x, w_BZ, noise_BP), to_rgb.weights(w_BZ), gain=GAIN, slope=SLOPE, keep_weights=keep_weights
        )
        return y_BPO, to_rgb.finish(colour_BP3)

    def _inputs(
        self, x: Tensor, w_BZ: Tensor, noise_BP: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        if noise_BP is not None:
            noise_BP = noise_BP.to(self.noise_strength.dtype) * (self.noise_strength * GAIN)
        return x, self.weight, _style(self.affine, w_BZ) * self.scale, self.bias * GAIN, noise_BP


class ToRGB(nn.Module):
    """Modulated linear layer to RGB: no demodulation, no noise, no activation."""

    def __init__(self, in_features: int, latent: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, 3))
        self.affine = EqualLinear(latent, in_features, bias_init=1.0)
        self.bias = nn.Parameter(torch.zeros(3))
        self.scale = 1.0 / math.sqrt(in_features)

    def weights(self, w_BZ: Tensor) -> Tensor:
        """What multiplies the pixels of each picture, (B, I, 3)."""
        return self.weight * (_style(self.affine, w_BZ) * self.scale)[:, :, None]

    def finish(self, colour_BP3: Tensor) -> Tensor:
        """RGB of pixels that were multiplied by `weights`, in the parameters' dtype: it is summed in full precision."""
        return colour_BP3.to(self.bias.dtype) + self.bias

    def forward(self, x_BPI: Tensor, w_BZ: Tensor) -> Tensor:
        """(B, P, 3) of x alone; a layer's own `with_rgb` is faster."""
        return self.finish(x_BPI @ self.weights(w_BZ))


def _style(affine: EqualLinear, w_BZ: Tensor) -> Tensor:
    with torch.autocast(w_BZ.device.type, enabled=False):
        return affine(w_BZ)
