"""A training's watcher that logs to its MLflow run."""

from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.storage import mlflow_environment
from pipeline.tracking.logger import RunLogger
from pipeline.training.observers import Observer, Tick


class RunObserver(Observer):
    """Hands numbers and sheets to the logger's thread; nothing here waits for the tracking server."""

    def __init__(self, config: Config, run_id: str) -> None:
        self.flush_timeout_s = config.tracking.flush_timeout_s
        self.logger = RunLogger(config.tracking_uri, run_id, environment=mlflow_environment(config.storage))

    def tick(self, tick: Tick) -> None:
        self.logger.metrics(tick.metrics(), tick.images_seen)

    def sheet(self, name: str, images_seen: int, image_HWC: np.ndarray) -> None:
        if name == "reals":
            self.logger.image("reals.png", image_HWC)
        else:
            self.logger.image(f"{name}/{images_seen:010d}.png", image_HWC, images_seen)

    def checkpoint(self, folder: str, images_seen: int, results: list[dict[str, Any]]) -> None:
        self.logger.text("checkpoint.txt", f"{folder}\n")

    def close(self) -> None:
        # The driver ends the run: a worker cannot know whether it will be started again.
        self.logger.close(self.flush_timeout_s, status=None)
