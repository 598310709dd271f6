"""Every random draw of the pipeline, as a pure function of what it is for.

A draw is named by (seed, purpose, images seen, position in the global batch); nothing else enters, so no
generator state is carried, saved or split between workers, and any worker can draw any part of the global
batch.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from pipeline.ops.philox import MASK, philox4x32


class Purpose(IntEnum):
    """What a draw is for: the second key word, so no two purposes share a draw. Never renumber a member."""

    LATENT_DISCRIMINATOR = 1
    LATENT_GENERATOR = 2
    NOISE_DISCRIMINATOR = 3
    NOISE_GENERATOR = 4
    FLIP = 5
    CORNER = 6
    STRIDE = 7
    SAMPLE = 8
    SAMPLE_NOISE = 9
    EVALUATE = 10
    EVALUATE_NOISE = 11
    MEAN_W = 12
    CROP = 13
    TURN = 14
    REAL_CROP = 15
    REAL_TURN = 16


def words(seed: int, purpose: Purpose, images_seen: int | Tensor, positions: Tensor, count: int) -> Tensor:
    """Random 32-bit words: int64 (B, count) in [0, 2^32), on the device of `positions`.

    seed: in [0, 2^32). images_seen: in [0, 2^64), or an int64 tensor (B,) for positions of several batches.
    positions: int64 (B,) in [0, 2^32), places in the global batch. A smaller `count` gives the first words of a
    larger one. Raises ValueError for anything else.
    """
    _check_range("seed", seed, 1 << 32)
    if isinstance(images_seen, Tensor):
        images_seen = images_seen[:, None]
    else:
        _check_range("images_seen", images_seen, 1 << 64)
    if positions.dtype != torch.int64 or positions.ndim != 1:
        raise ValueError(
            "positions must be an int64 tensor of shape (B,), such as torch.arange(start, stop), "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )
    if positions.device.type == "cpu" and positions.numel():  # elsewhere the check would wait for the device
        low, high = (int(bound) for bound in positions.aminmax())
        _check_range("positions", low, 1 << 32)
        _check_range("positions", high, 1 << 32)
    if count < 1:
        raise ValueError(f"count must be at least 1 word a position, got {count}")
    blocks = torch.arange((count + 3) // 4, device=positions.device)
    counter = (blocks[None, :], positions[:, None], images_seen & MASK, images_seen >> 32)
    return torch.stack(philox4x32(counter, (seed, int(purpose))), dim=-1).flatten(1)[:, :count]


def uniform_from_words(word: Tensor) -> Tensor:
    """32-bit words to float32 in [0, 1): the top 24 bits, all that a float32 holds."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def normal_from_words(word_0: Tensor, word_1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float32) from two words: the Box-Muller transform, cosine then sine.

    The radius is taken of 1 - u in (0, 1], so the logarithm is finite and |normal| <= sqrt(2 ln 2^24) = 5.77.
    Words are the same on every device; the last bits of the logarithm and the sine are each device's own.
    """
    radius = torch.sqrt(-2.0 * torch.log(1.0 - uniform_from_words(word_0)))
    angle = (2.0 * math.pi) * uniform_from_words(word_1)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def uniform(seed: int, purpose: Purpose, images_seen: int, positions: Tensor, count: int) -> Tensor:
    """Uniform float32 (B, count) in [0, 1). Arguments as in `words`."""
    return uniform_from_words(words(seed, purpose, images_seen, positions, count))


def normal(seed: int, purpose: Purpose, images_seen: int, positions: Tensor, count: int) -> Tensor:
    """Standard normal float32 (B, count). Arguments as in `words`."""
    pairs = words(seed, purpose, images_seen, positions, count + count % 2).unflatten(1, (-1, 2))
    return torch.stack(normal_from_words(pairs[..., 0], pairs[..., 1]), dim=-1).flatten(1)[:, :count]


def latents(seed: int, purpose: Purpose, images_seen: int, positions: Tensor, size: int) -> Tensor:
    """Latents z: standard normal float32 (B, size)."""
    return normal(seed, purpose, images_seen, positions, size)


def noise_keys(seed: int, purpose: Purpose, images_seen: int, positions: Tensor) -> Tensor:
    """One Philox key a picture for the generator's noise: int64 (B, 2) in [0, 2^32)."""
    return words(seed, purpose, images_seen, positions, 2)


def flips(seed: int, images_seen: int | Tensor, positions: Tensor) -> Tensor:
    """Which pictures to mirror: bool (B,), true for half of them."""
    return words(seed, Purpose.FLIP, images_seen, positions, 1)[:, 0] >= 1 << 31


def quarter_turns(seed: int, purpose: Purpose, images_seen: int | Tensor, positions: Tensor) -> Tensor:
    """How many quarter turns each picture makes, counter-clockwise: int64 (B,) in 0 .. 3, each as likely."""
    return words(seed, purpose, images_seen, positions, 1)[:, 0] >> 30


def crop_corners(
    seed: int, purpose: Purpose, images_seen: int | Tensor, positions: Tensor, height: int, width: int, size: int
) -> Tensor:
    """Top left corners (x, y) of squares of `size` pixels in larger pictures: int64 (B, 2), uniform."""
    if size > min(height, width) or size < 1:
        raise ValueError(f"a square of {size} pixels does not fit into pictures of {width}x{height}")
    choices = torch.tensor([width - size + 1, height - size + 1], device=positions.device)
    return (words(seed, purpose, images_seen, positions, 2) * choices) >> 32


def corners(seed: int, images_seen: int, positions: Tensor, size: int, patch: int, stride: int) -> Tensor:
    """Top left corners (x, y) of patches, in pixels: int64 (B, 2), uniform over all places where they fit.

    The paper's P_{K,sigma}: K x K pixels that lie sigma apart, with 0 <= u < W - (K - 1) sigma for both axes.
    """
    choices = size - (patch - 1) * stride
    if patch < 1 or stride < 1 or choices < 1:
        raise ValueError(
            f"a patch of {patch} pixels with stride {stride} spans {(patch - 1) * stride + 1} pixels and "
            f"does not fit in size {size}: both must be at least 1, and (patch - 1) * stride below size"
        )
    return (words(seed, Purpose.CORNER, images_seen, positions, 2) * choices) >> 32


def stride(seed: int, images_seen: int, strides: Sequence[int]) -> int:
    """The stride of this whole batch (all workers): one of `strides`, each as likely."""
    if not strides:
        raise ValueError("strides must name at least one stride, got none; use [1] for dense patches")
    word = words(seed, Purpose.STRIDE, images_seen, torch.zeros(1, dtype=torch.int64), 1)
    return strides[(int(word) * len(strides)) >> 32]


def _check_range(name: str, value: int, stop: int) -> None:
    if not 0 <= value < stop:
        raise ValueError(f"{name} must be in [0, 2^{stop.bit_length() - 1}), got {value}")
