"""Pictures from a generator and numbered positions: what sample grids, metrics and users' seeds share."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.coordinates import dense_grid, full_grid
from pipeline.models.cips import Generator
from pipeline.pictures import tile, to_uint8
from pipeline.randomness import Purpose, latents, noise_keys

# B batch, H height, W width, P pixels, Z latent


@torch.inference_mode()
def sample_images(
    generator: Generator,
    positions: Sequence[int],
    *,
    seed: int,
    purpose: Purpose = Purpose.SAMPLE,
    noise_purpose: Purpose = Purpose.SAMPLE_NOISE,
    truncation: float = 1.0,
    size: int | None = None,
    noise: str | None = None,
) -> Tensor:
    """Draws one picture per position; each depends on (seed, purpose, position) alone.

    Args:
        positions: numbers of the pictures, each at least 0.
        size: pixels along a picture; None is the native size, others sample the same square more or less densely.
        noise: `random`, `fixed`, `off`, or None for the model's own mode.

    Returns:
        uint8 (B, size, size, 3) on the generator's device.
    """
    device = generator.mean_w.device
    size = size or generator.size
    grid = full_grid(size) if size == generator.size else dense_grid(generator.size, size, size)
    position_B = torch.as_tensor(positions, dtype=torch.int64, device=device)
    z_BZ = latents(seed, purpose, 0, position_B, generator.latent).to(generator.mean_w.dtype)
    keys_B2 = noise_keys(seed, noise_purpose, 0, position_B)
    rgb_BP3 = generator(z_BZ, grid.to(device), keys_B2, truncation=truncation, noise=noise)
    return to_uint8(rgb_BP3).reshape(len(position_B), size, size, 3)


def sample_sheet(generator: Generator, columns: int, rows: int, *, seed: int, batch_size: int = 16) -> np.ndarray:
    """The sheet of pictures 0 .. columns x rows - 1, the same latents at every call: how training looks."""
    positions = range(columns * rows)
    batches = [
        sample_images(generator, positions[start : start + batch_size], seed=seed, noise="fixed").cpu().numpy()
        for start in range(0, len(positions), batch_size)
    ]
    return tile(np.concatenate(batches), columns)
