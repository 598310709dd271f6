"""The generator of "Conditionally-Independent Pixel Synthesis" (Anokhin et al., CVPR 2021), RGB summed.

Every pixel is computed from its coordinates and the style w alone; no operation crosses pixels.
Shapes: B pictures, P pixels, Z latent, C channels.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.encoding import Encoding, coordinate_noise
from pipeline.models.layers import Mapping, ModulatedLinear, ToRGB
from pipeline.ops.matrix_product import SMALLEST_PICTURE

NoiseMode = Literal["random", "fixed", "off"]
Recompute = Literal["none", "layer", "segment"]


class Generator(nn.Module):
    """Mapping, encoding, one ModFC, then log2(size) - 1 groups of (ModFC, ModFC, ToRGB); their RGB is summed.

    size: the native grid is size x size pixels.
    width: channels of the Fourier features, and as many of the coordinate embedding.
    widths: channels of each group; the first ModFC has those of the first group.
    noise: the mode of calls that name none.
    max_pixels_in_flight: without gradients, compute at most about so many pixels (B * P) at once.
    """

    mean_w: Tensor
    recompute: Recompute = "layer"
    """What the backward pass computes again: nothing; each layer's modulated weights; or whole groups of layers."""

    def __init__(
        self,
        size: int,
        width: int,
        widths: Sequence[int],
        latent: int = 512,
        mapping_layers: int = 8,
        noise: str = "random",
        max_pixels_in_flight: int | None = None,
    ) -> None:
        super().__init__()
        self.size, self.latent, self.widths = size, latent, tuple(widths)
        self.noise = noise
        self.max_pixels_in_flight = max_pixels_in_flight
        self.mapping = Mapping(latent, mapping_layers)
        self.encoding = Encoding(size, width)
        self.first = ModulatedLinear(2 * width, widths[0], latent)
        self.groups = nn.ModuleList(
            Group(before, after, latent) for before, after in zip([widths[0], *widths], widths, strict=False)
        )
        self.layers = 1 + 2 * len(self.groups)
        self.register_buffer("mean_w", torch.zeros(latent))
        if noise == "off":  # a strength that is never used never gets a gradient
            for name, parameter in self.named_parameters():
                if name.endswith("noise_strength"):
                    parameter.requires_grad_(False)

    def forward(
        self,
        z_BZ: Tensor,
        coordinates: Tensor,
        noise_keys_B2: Tensor | None = None,
        *,
        truncation: float = 1.0,
        noise: str | None = None,
    ) -> Tensor:
        """RGB in [-1, 1] (not clamped), (B, P, 3), of latents z at `coordinates`. See `synthesis`.

        truncation: psi, pulls w towards its mean: w = mean_w + psi (w - mean_w).
        """
        w_BZ = self.mapping(z_BZ)
        if truncation != 1.0:
            w_BZ = torch.lerp(self.mean_w, w_BZ, truncation)
        return self.synthesis(w_BZ, coordinates, noise_keys_B2, noise)

    def synthesis(
        self,
        w_BZ: Tensor,
        coordinates: Tensor,
        noise_keys_B2: Tensor | None = None,
        noise: str | None = None,
    ) -> Tensor:
        """RGB (B, P, 3) of styles w at coordinates (P, 2), the same for all pictures, or (B, P, 2).

        coordinates: in pixels, x first; int64 for pixels, float for points between them.
        noise: "random" needs `noise_keys_B2` (int64, one key a picture), "fixed" is one map for all pictures,
        "off" is none; None takes the generator's own mode.
        """
        keys = self._keys(self.noise if noise is None else noise, noise_keys_B2, w_BZ)
        self._check(w_BZ, coordinates)
        batch, points = w_BZ.shape[0], coordinates.shape[-2]
        chunks = 1
        if self.max_pixels_in_flight is not None and not torch.is_grad_enabled():
            chunks = min(-(-batch * points // self.max_pixels_in_flight), max(1, points // SMALLEST_PICTURE))
        if chunks <= 1:
            return self._synthesise(w_BZ, coordinates, keys)
        parts = coordinates.tensor_split(chunks, dim=-2)
        return torch.cat([self._synthesise(w_BZ, part, keys) for part in parts], dim=1)

    def _synthesise(self, w_BZ: Tensor, coordinates: Tensor, keys: Tensor | None) -> Tensor:
        noise: Sequence[Tensor | None] = [None] * self.layers
        if keys is not None:
            noise = coordinate_noise(coordinates, keys, self.size, self.layers).unbind(0)
        keep = self.recompute == "none"
        x_BPC = self.first(self.encoding(coordinates), w_BZ, noise[0], keep_weights=keep)
        rgb_BP3 = None
        for index, group in enumerate(self.groups):
            inputs = (x_BPC, w_BZ, noise[2 * index + 1], noise[2 * index + 2], keep)
            if self.recompute == "segment" and torch.is_grad_enabled():
                x_BPC, colour_BP3 = checkpoint(group, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BPC, colour_BP3 = group(*inputs)
            rgb_BP3 = colour_BP3 if rgb_BP3 is None else rgb_BP3 + colour_BP3
        assert rgb_BP3 is not None
        return rgb_BP3

    def _keys(self, mode: str, noise_keys_B2: Tensor | None, w_BZ: Tensor) -> Tensor | None:
        if mode not in get_args(NoiseMode):
            raise ValueError(f"noise must be one of {', '.join(get_args(NoiseMode))}, got {mode!r}")
        if mode == "off":
            return None
        if mode == "fixed":
            return torch.zeros(1, 2, dtype=torch.int64, device=w_BZ.device)
        if noise_keys_B2 is None:
            raise ValueError(
                'noise "random" needs noise_keys_B2, one key a picture: '
                'pass randomness.noise_keys(...), or noise="fixed" or noise="off"'
            )
        if noise_keys_B2.shape != (w_BZ.shape[0], 2) or noise_keys_B2.dtype != torch.int64:
            raise ValueError(
                f"noise_keys_B2 must be int64 ({w_BZ.shape[0]}, 2), one key a picture, "
                f"got {noise_keys_B2.dtype} {tuple(noise_keys_B2.shape)}"
            )
        return noise_keys_B2

    def _check(self, w_BZ: Tensor, coordinates: Tensor) -> None:
        if w_BZ.ndim != 2 or w_BZ.shape[1] != self.latent:
            raise ValueError(f"w must be (B, {self.latent}), got {tuple(w_BZ.shape)}")
        if coordinates.ndim not in (2, 3) or coordinates.shape[-1] != 2:
            raise ValueError(f"coordinates must be (P, 2) or (B, P, 2), x first, got {tuple(coordinates.shape)}")
        if coordinates.ndim == 3 and coordinates.shape[0] != w_BZ.shape[0]:
            raise ValueError(
                f"{w_BZ.shape[0]} styles but coordinates for {coordinates.shape[0]} pictures; "
                "pass one list a picture, or one list (P, 2) for all"
            )


class Group(nn.Module):
    """Two ModFC layers and the RGB that they add to the picture."""

    def __init__(self, in_features: int, out_features: int, latent: int) -> None:
        super().__init__()
        self.linear_0 = ModulatedLinear(in_features, out_features, latent)
        self.linear_1 = ModulatedLinear(out_features, out_features, latent)
        self.to_rgb = ToRGB(out_features, latent)

    def forward(
        self, x_BPC: Tensor, w_BZ: Tensor, noise_0: Tensor | None, noise_1: Tensor | None, keep_weights: bool = False
    ) -> tuple[Tensor, Tensor]:
        x_BPC = self.linear_0(x_BPC, w_BZ, noise_0, keep_weights=keep_weights)
        return self.linear_1.with_rgb(x_BPC, w_BZ, noise_1, self.to_rgb, keep_weights=keep_weights)
