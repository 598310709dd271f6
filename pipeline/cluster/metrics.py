"""A run's numbers as Ray metrics: each node's agent offers them to Prometheus, under these names after `ray_`.

infra/grafana/training.json draws them. They live as long as rank 0 does; MLflow and log.jsonl keep them.
"""

import threading
from typing import Any

from ray.util.metrics import Counter, Gauge

from pipeline.training.observers import Observer, Tick

RENEW_S = 5.0  # less than the 10 s between two of Ray's reports
RUN = "run"
"""The tag that every metric carries: run.name."""

GAUGES = {
    "cips_images_seen": "Images seen, the run's clock; a restart sets it back to the last checkpoint",
    "cips_images_total": "Images at which training ends",
    "cips_images_per_second": "Since the last tick, sample sheets, evaluations and pauses for checkpoints included",
    "cips_data_wait_share": "Share of the time since the last tick that was spent waiting for data, 0 to 1",
    "cips_checkpoint_seconds": "Seconds since the last tick that training stood still for a checkpoint",
    "cips_memory_gb": "Peak memory of rank 0's process (CPU) or device (CUDA), GB",
    "cips_workers": "Workers that share the global batch",
}
"""Metrics with the one tag, and what they mean."""
SCALAR, DISTANCE = "cips_scalar", "cips_distance"
"""Losses, scores and counts under the tag `name`, such as loss/D; distances under the tag `metric`, such as fid."""
CHECKPOINTS = "cips_checkpoints"
"""A counter, to which Prometheus adds `_total`; a restart counts the checkpoint that it begins from again."""


class RayMetrics(Observer):
    """Exports what rank 0 is told; to be made in a process that is connected to Ray.

    Args:
        run: run.name.
        workers: in this attempt.
    """

    def __init__(self, run: str, workers: int) -> None:
        self.gauges = {name: Gauge(name, text, (RUN,)) for name, text in GAUGES.items()}
        self.scalar = Gauge(SCALAR, "Mean of a loss or score over the images since the last tick", (RUN, "name"))
        self.distance = Gauge(DISTANCE, "Distance to the real images; comparable under one protocol", (RUN, "metric"))
        self.checkpoints = Counter(CHECKPOINTS, "Checkpoints that stand", (RUN,))
        for metric in (*self.gauges.values(), self.scalar, self.distance, self.checkpoints):
            metric.set_default_tags({RUN: run})
        self.held: dict[tuple[str, ...], tuple[Gauge, float, dict[str, str]]] = {}
        self.hold(self.gauges["cips_workers"], workers)
        self.closed = threading.Event()
        threading.Thread(target=self._renew, name="ray-metrics", daemon=True).start()

    def hold(self, gauge: Gauge, value: float, **tags: str) -> None:
        """Sets a gauge, and keeps it set: Ray forgets a value that was not set within two of its reports, 20 s."""
        self.held[(gauge.info["name"], *tags.values())] = (gauge, float(value), tags)
        gauge.set(float(value), tags)

    def tick(self, tick: Tick) -> None:
        values = {
            "cips_images_seen": tick.images_seen,
            "cips_images_total": tick.total_images,
            "cips_images_per_second": tick.images_per_second,
            "cips_data_wait_share": tick.wait_share,
            "cips_checkpoint_seconds": tick.checkpoint_seconds,
            "cips_memory_gb": tick.memory_gb,
        }
        for name, value in values.items():
            self.hold(self.gauges[name], value)
        for name, value in tick.scalars.items():
            self.hold(self.scalar, value, name=name)
        for result in tick.results:
            self.hold(self.distance, result["value"], metric=result["metric"])

    def checkpoint(self, folder: str, images_seen: int, results: list[dict[str, Any]]) -> None:
        self.checkpoints.inc()

    def close(self) -> None:
        self.closed.set()

    def _renew(self) -> None:
        while not self.closed.wait(RENEW_S):
            for gauge, value, tags in list(self.held.values()):
                gauge.set(value, tags)
