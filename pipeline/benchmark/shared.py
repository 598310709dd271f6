"""The generator by the other algebraic form: one product for all pictures, between two scalings of the pixels.

x w' with w'_io = s_i w_io d_o is ((x s) w) d: the weights are not made for each picture, but the pixels are passed over
twice more, and again backward. Kept to be measured against; the same parameters, and the same function.
Shapes: B pictures, P pixels, I channels in, O channels out, Z latent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.benchmark.reference import layer_by_layer
from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.cips import Generator
from pipeline.models.encoding import coordinate_noise
from pipeline.models.layers import GAIN, SLOPE, ModulatedLinear, ToRGB
from pipeline.ops.modulated_linear import EPSILON


class SharedGenerator(Generator):
    """Plain torch: its gradients are torch's own."""

    def _synthesise(self, w_BZ: Tensor, coordinates: Tensor, keys: Tensor | None) -> Tensor:
        noise: list[Tensor | None] = [None] * self.layers
        if keys is not None:
            noise = list(coordinate_noise(coordinates, keys, self.size, self.layers))
        return layer_by_layer(self, self.encoding(coordinates), w_BZ, noise, scaled, colours)


def shared_generator(model: ModelConfig) -> Generator:
    """A fresh one."""
    return build_generator(model, SharedGenerator)


def scaled(layer: ModulatedLinear, x: Tensor, w_BZ: Tensor, noise_BP: Tensor | None) -> Tensor:
    """ModFC. x: (B, P, I), or (P, I) for all pictures."""
    style_BI = _styles(layer, w_BZ)
    demodulation_BO = GAIN * torch.rsqrt(style_BI.square() @ layer.weight.square() + EPSILON)
    y_BPO = _product(x, layer, style_BI)
    y_BPO = y_BPO * demodulation_BO[:, None, :].to(y_BPO.dtype)
    if noise_BP is not None:
        noise_BP = noise_BP.to(layer.noise_strength.dtype) * (layer.noise_strength * GAIN)
        y_BPO = y_BPO + noise_BP[:, :, None].to(y_BPO.dtype)
    return F.leaky_relu_(y_BPO + (layer.bias * GAIN).to(y_BPO.dtype), SLOPE)


def colours(layer: ToRGB, x_BPI: Tensor, w_BZ: Tensor) -> Tensor:
    """The RGB of a group, (B, P, 3)."""
    return _product(x_BPI, layer, _styles(layer, w_BZ)).to(w_BZ.dtype) + layer.bias


def _styles(layer: ModulatedLinear | ToRGB, w_BZ: Tensor) -> Tensor:
    with torch.autocast(w_BZ.device.type, enabled=False):
        return layer.affine(w_BZ) * layer.scale


def _product(x: Tensor, layer: ModulatedLinear | ToRGB, style_BI: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # else the scaling would be one of float32
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return (x * style_BI[:, None, :].to(x.dtype)) @ layer.weight
