"""A training's watcher that logs to its MLflow run."""

from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.storage import mlflow_environment
from pipeline.tracking.logger import Point, RunLogger
from pipeline.tracking.system import SystemMetrics
from pipeline.training.observers import Observer, Tick

CLOCK = "progress/kimg"
"""In every tick's metrics: where MLflow knows it for a step, it knows all of that tick."""


class RunObserver(Observer):
    """Hands numbers and sheets to the logger's thread; nothing here waits for the tracking server."""

    def __init__(self, config: Config, run_id: str) -> None:
        self.flush_timeout_s = config.tracking.flush_timeout_s
        self.logger = RunLogger(config.tracking_uri, run_id, environment=mlflow_environment(config.storage))
        self.system = SystemMetrics() if config.tracking.system_metrics else None

    def resumed(self, images_seen: int, log: list[dict[str, Any]]) -> None:
        ticks = [Tick(**line) for line in log]
        self.logger.catch_up([Point(tick.images_seen, tick.time, tick.metrics()) for tick in ticks], CLOCK)

    def tick(self, tick: Tick) -> None:
        system = self.system.take() if self.system else {}
        self.logger.metrics(tick.metrics() | system, tick.images_seen)

    def sheet(self, name: str, images_seen: int, image_HWC: np.ndarray) -> None:
        if name == "reals":
            self.logger.image("reals.png", image_HWC)
        else:
            self.logger.image(f"{name}/{images_seen:010d}.png", image_HWC, images_seen)

    def checkpoint(self, folder: str, images_seen: int, results: list[dict[str, Any]]) -> None:
        self.logger.text("checkpoint.txt", f"{folder}\n")

    def close(self) -> None:
        if self.system:
            self.system.close()
        # The driver ends the run: a worker cannot know whether it will be started again.
        self.logger.close(self.flush_timeout_s, status=None)
