"""Pictures from a trained generator into files: a sheet of samples, or one file per picture."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from pipeline.models.cips import Generator
from pipeline.models.sampling import sample_images
from pipeline.pictures import encode_png, tile
from pipeline.schema import Section
from pipeline.storage import StorageConfig, join, write_bytes


class SynthesizeConfig(Section):
    """Which pictures to draw, and where to."""

    model: str | None = None
    """A checkpoint's folder or `models:/NAME@ALIAS`; empty takes the latest checkpoint of `run.name`."""
    out: str = "samples.png"
    """A .png file for one sheet, or a folder for one file per picture; local or s3://."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Picture i is drawn from this seed and its number i alone, however many are asked for."""
    images: PositiveInt = 48
    """Number of pictures."""
    columns: PositiveInt = 8
    """Columns of the sheet."""
    truncation: float = Field(default=1.0, ge=0.0, le=2.0)
    """Psi: 1 leaves styles alone, smaller values pull them to the mean style (fidelity for variety)."""
    size: PositiveInt | None = None
    """Pixels along a picture; empty is the native size, larger samples the same square more densely."""
    noise: Literal["random", "fixed", "off"] = "fixed"
    """Noise maps: one per picture, one for all, or none."""
    scale: PositiveInt = 1
    """Each pixel of the sheet is drawn as scale x scale, to look at small pictures."""
    batch_size: PositiveInt = 16
    """Pictures computed at once."""


def generate(generator: Generator, config: SynthesizeConfig) -> Iterator[np.ndarray]:
    """Yields uint8 batches (b, size, size, 3) of pictures 0 .. images - 1."""
    for start in range(0, config.images, config.batch_size):
        yield (
            sample_images(
                generator,
                range(start, min(start + config.batch_size, config.images)),
                seed=config.seed,
                truncation=config.truncation,
                size=config.size,
                noise=config.noise,
            )
            .cpu()
            .numpy()
        )


def write_pictures(batches: Iterator[np.ndarray], config: SynthesizeConfig, storage: StorageConfig) -> str:
    """Writes the sheet, or a file per picture as they come; returns where."""
    if config.out.endswith(".png"):
        sheet = tile(np.concatenate(list(batches)), config.columns)
        write_bytes(config.out, encode_png(sheet, config.scale), storage)
        return config.out
    number = 0
    for batch in batches:
        for picture in batch:
            name = f"seed{config.seed}-{number:06d}.png"
            write_bytes(join(config.out, name), encode_png(picture, config.scale), storage)
            number += 1
    return config.out
