"""Training by plain processes, whose start costs a tenth of Ray's: what a disturbed run on Ray has to come to.

They import this module, which therefore does not know Ray.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import Config
from pipeline.models.cips import Generator
from pipeline.training import loop
from pipeline.training.world import World
from tests.ddp import default_dtype, on_workers


def train_without_ray(config: Config, folder: Path, *, float64: bool = False) -> None:
    """The training of a configuration by as many processes as it has workers; they meet in this folder."""
    on_workers(_train, [config.cluster.workers], folder, config.model_dump(mode="json"), float64)


def _train(world: World, settings: dict[str, Any], float64: bool) -> int:
    plan = Config.model_validate(settings).plan()
    with training_in_float64() if float64 else contextlib.nullcontext():
        return loop.train(plan, world, torch.device("cpu")).images_seen


def blank_sheet(generator: Generator, columns: int, rows: int, *, seed: int, batch_size: int = 16) -> np.ndarray:
    """Stands for a sheet of samples, which are drawn from float32 latents; nothing of training depends on it."""
    return np.zeros((columns, rows, 3), np.uint8)


@contextlib.contextmanager
def training_in_float64(sheet: Callable[..., np.ndarray] = blank_sheet) -> Iterator[None]:
    """All weights, and so all of training, are in float64 inside; a sheet of samples is drawn by `sheet`."""
    drawn, loop.sample_sheet = loop.sample_sheet, sheet
    try:
        with default_dtype(torch.float64):
            yield
    finally:
        loop.sample_sheet = drawn
