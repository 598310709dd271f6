"""Workers for tests: the real one, in float64, or with a sign or a halt at a moment that a test waits for.

They run in Ray's workers, so signs and halts are files in run.dir.
"""

import json
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cluster import training
from pipeline.cluster.preemption import leaving
from pipeline.cluster.watch import read_workers
from pipeline.config import Config
from pipeline.models.cips import Generator
from pipeline.training.loop import Evaluate
from pipeline.training.world import World
from tests.without_ray import blank_sheet, training_in_float64

PATIENCE_S = 400.0
worker, reported = training.worker, training.reported


def signing(settings: dict[str, Any]) -> dict[str, Any]:
    """The real worker; each rank leaves a file when it begins an evaluation, and one when it has ended it."""
    training.reported = signed
    return worker(settings)


def signed(config: Config, device: torch.device, world: World) -> Evaluate:
    evaluation = reported(config, device, world)

    def evaluate(generator: Generator, images_seen: int) -> dict[str, Any]:
        sign(config, "begun", images_seen, world.rank).touch()
        result = evaluation(generator, images_seen)
        sign(config, "ended", images_seen, world.rank).touch()
        return result

    return evaluate


def sign(config: Config, what: str, images_seen: int, rank: int) -> Path:
    """The file that says that a rank has begun, or ended, the evaluation at a count of images."""
    return Path(config.run.dir, f"{config.run.name}-evaluation-{images_seen}-{rank}-{what}")


def halting(settings: dict[str, Any]) -> dict[str, Any]:
    """The real worker, in float64; rank 0 halts at some ticks of some starts, and so all do in the next update.

    <run.dir>/<run.name>-halts.json: {"2": {"4": "end"}} halts at the 4th tick of the 2nd start until Ray ends it,
    "notice" instead of "end" until the notice of a preemption has come.
    """
    config = Config.model_validate(settings["config"])
    plan = json.loads(Path(config.run.dir, f"{config.run.name}-halts.json").read_text())
    halts = plan.get(str(len(read_workers(config.run_uri, config.storage))), {})
    ticks = count(1)

    def halting_sheet(*arguments: Any, **options: Any) -> np.ndarray:
        match halts.get(str(next(ticks))):
            case "notice":
                halt(leaving)
            case "end":
                halt(lambda: False)
        return blank_sheet(*arguments, **options)

    with training_in_float64(halting_sheet):
        return worker(settings)


def in_float64(settings: dict[str, Any]) -> dict[str, Any]:
    """The real worker, in float64."""
    with training_in_float64():
        return worker(settings)


def halt(ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ended():
        if time.monotonic() > deadline:
            raise TimeoutError(f"this worker stood still for {PATIENCE_S:g} s, and nothing happened to it")
        time.sleep(0.05)
