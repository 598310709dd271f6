"""The generator as published code computes it: pictures as (B, C, H, W), grouped 1x1 convolutions, every step apart.

What the fast form is measured against. The same parameters by the same names, and the same function.
Shapes: B pictures, C channels, H height, W width, I channels in, O channels out, Z latent.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.cips import Generator, Group
from pipeline.models.encoding import coordinate_noise
from pipeline.models.layers import GAIN, SLOPE, ModulatedLinear, ToRGB

Modulated = Callable[[ModulatedLinear, Tensor, Tensor, Tensor | None], Tensor]
"""(layer, x, w, noise) to the layer's result."""
ToColours = Callable[[ToRGB, Tensor, Tensor], Tensor]
"""(layer, x, w) to RGB."""


class ReferenceGenerator(Generator):
    """Takes whole grids (P, 2) or (B, P, 2), which become pictures of one row where they are no square."""

    def _synthesise(self, w_BZ: Tensor, coordinates: Tensor, keys: Tensor | None) -> Tensor:
        batch, points = w_BZ.shape[0], coordinates.shape[-2]
        width = math.isqrt(points) if math.isqrt(points) ** 2 == points else points
        features = self.encoding(coordinates).expand(batch, -1, -1)
        x_BCHW = features.transpose(1, 2).reshape(batch, -1, points // width, width)
        noise: list[Tensor | None] = [None] * self.layers
        if keys is not None:
            maps = coordinate_noise(coordinates, keys, self.size, self.layers)
            noise = [one.reshape(-1, 1, points // width, width) for one in maps]
        rgb_B3HW = layer_by_layer(self, x_BCHW, w_BZ, noise, styled, colours)
        return rgb_B3HW.flatten(2).transpose(1, 2)


def layer_by_layer(
    generator: Generator, x: Tensor, w_BZ: Tensor, noise: Sequence[Tensor | None], modulated: Modulated, rgb: ToColours
) -> Tensor:
    """The RGB of all groups, summed, by other forms of ModFC and ToRGB; pixels may be laid out in any way."""
    x = modulated(generator.first, x, w_BZ, noise[0])
    total: Tensor | None = None
    for index, group in enumerate(generator.groups):
        assert isinstance(group, Group)
        x = modulated(group.linear_0, x, w_BZ, noise[2 * index + 1])
        x = modulated(group.linear_1, x, w_BZ, noise[2 * index + 2])
        colour = rgb(group.to_rgb, x, w_BZ)
        total = colour if total is None else total + colour
    assert total is not None
    return total


def reference_generator(model: ModelConfig) -> Generator:
    """A fresh one."""
    return build_generator(model, ReferenceGenerator)


def styled(layer: ModulatedLinear, x_BCHW: Tensor, w_BZ: Tensor, noise_B1HW: Tensor | None) -> Tensor:
    """ModFC: convolution, noise, bias, activation and gain, one after the other."""
    y_BCHW = convolved(layer, x_BCHW, w_BZ, demodulate=True)
    if noise_B1HW is not None:
        y_BCHW = y_BCHW + layer.noise_strength * noise_B1HW.to(y_BCHW.dtype)
    return F.leaky_relu(y_BCHW + layer.bias[:, None, None], SLOPE) * GAIN


def colours(layer: ToRGB, x_BCHW: Tensor, w_BZ: Tensor) -> Tensor:
    """The RGB of a group (B, 3, H, W)."""
    return convolved(layer, x_BCHW, w_BZ, demodulate=False) + layer.bias[:, None, None]


def convolved(layer: ModulatedLinear | ToRGB, x_BCHW: Tensor, w_BZ: Tensor, *, demodulate: bool) -> Tensor:
    """Equation 2 of the paper: the weights of each picture, applied as one grouped convolution."""
    batch, channels, height, width = x_BCHW.shape
    style_BI = layer.affine(w_BZ)
    weight_BOI = layer.scale * layer.weight.t() * style_BI[:, None, :]
    if demodulate:
        weight_BOI = weight_BOI * torch.rsqrt(weight_BOI.square().sum(dim=2, keepdim=True) + 1e-8)
    kernels = weight_BOI.reshape(-1, channels, 1, 1)
    images_1CHW = x_BCHW.reshape(1, batch * channels, height, width)
    return F.conv2d(images_1CHW, kernels, groups=batch).reshape(batch, -1, height, width)
