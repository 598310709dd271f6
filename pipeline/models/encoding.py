"""What the generator knows of a place: Fourier features, a learned embedding for each pixel, and noise.

Each is a function of the coordinate alone, so no pixel depends on which others are asked for. P counts
points; leading dimensions (...) are (P,) or (B, P).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.coordinates import bilinear_neighbours, check_pixels, normalised
from pipeline.ops.philox import philox4x32
from pipeline.randomness import normal_from_words


class FourierFeatures(nn.Module):
    """e_fo(x, y) = sin(B (x', y')^T + b), all trainable: equation 3 of the paper, without the factor 2 pi."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 2).uniform_(-math.sqrt(9 / 2), math.sqrt(9 / 2)))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-1 / math.sqrt(2), 1 / math.sqrt(2)))

    def forward(self, positions: Tensor) -> Tensor:
        """positions: (..., 2) in [-1, 1]. Returns (..., width)."""
        # bfloat16 cannot tell neighbouring pixels apart: full precision.
        with torch.autocast(positions.device.type, enabled=False):
            return torch.sin(F.linear(positions.to(self.weight.dtype), self.weight, self.bias))


class CoordinateEmbedding(nn.Module):
    """e_co: one learned vector a pixel, bilinear between pixels, clamped at the border."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.randn(size * size, width))

    def forward(self, coordinates: Tensor) -> Tensor:
        """coordinates: (..., 2), int64 or float. Returns (..., width); at a pixel exactly the table's row."""
        if not coordinates.dtype.is_floating_point:
            return F.embedding(_pixel_index(coordinates, self.size), self.weight)
        total = None
        for pixel, share in bilinear_neighbours(coordinates, self.size):
            row = F.embedding(_pixel_index(pixel, self.size), self.weight)
            part = row * share[..., None].to(row.dtype)
            total = part if total is None else total + part
        assert total is not None
        return total


class Encoding(nn.Module):
    """[e_fo, e_co] of a coordinate: twice `width` channels."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.fourier = FourierFeatures(width)
        self.embedding = CoordinateEmbedding(size, width)

    def forward(self, coordinates: Tensor) -> Tensor:
        """coordinates: (..., 2) in pixels. Returns (..., 2 * width)."""
        if not coordinates.dtype.is_floating_point:
            check_pixels(coordinates, self.size, self.size)
        fourier = self.fourier(normalised(coordinates, self.size))
        return torch.cat([fourier, self.embedding(coordinates)], dim=-1)


def coordinate_noise(coordinates: Tensor, keys_B2: Tensor, size: int, layers: int) -> Tensor:
    """Noise for every layer: standard normal at each pixel, bilinear between pixels. float32 (layers, B, P).

    coordinates: (P, 2) or (B, P, 2). keys_B2: int64, one Philox key a picture, or (1, 2) for all.
    A pure function of (key, pixel, layer): layers 4i to 4i + 3 take the four normals that Box-Muller makes of
    the four words of Philox at counter (y * size + x, i, 0, 0).
    """
    coordinates = coordinates if coordinates.ndim == 3 else coordinates[None]
    if not coordinates.dtype.is_floating_point:
        return _pixel_noise(coordinates, keys_B2, size, layers)
    parts = [
        _pixel_noise(pixel, keys_B2, size, layers) * share.to(torch.float32)
        for pixel, share in bilinear_neighbours(coordinates, size)
    ]
    return (parts[0] + parts[1]) + (parts[2] + parts[3])


def _pixel_noise(pixels_BP2: Tensor, keys_B2: Tensor, size: int, layers: int) -> Tensor:
    blocks = torch.arange((layers + 3) // 4, device=pixels_BP2.device)[:, None, None]
    key = (keys_B2[:, 0, None], keys_B2[:, 1, None])
    w0, w1, w2, w3 = philox4x32((_pixel_index(pixels_BP2, size), blocks, 0, 0), key)
    normals = (*normal_from_words(w0, w1), *normal_from_words(w2, w3))
    return torch.stack(normals, dim=1).flatten(0, 1)[:layers]


def _pixel_index(pixels: Tensor, size: int) -> Tensor:
    return pixels[..., 1] * size + pixels[..., 0]
