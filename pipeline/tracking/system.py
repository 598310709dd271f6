"""How busy the machine is that a run is told from: MLflow's own system metrics, at the run's ticks."""

import contextlib
import threading
from collections.abc import Mapping

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

SAMPLE_S = 10.0
PREFIX = "system/"  # MLflow shows these on a page of their own


class SystemMetrics:
    """Samples processor, memory, disk, network and NVIDIA GPUs in a thread until it is closed.

    MLflow's own thread would count in samples rather than in images, and end at the server's first outage: here the
    means since the last tick go the way of all scalars. A sample costs about a millisecond.
    """

    def __init__(self, sample_s: float = SAMPLE_S) -> None:
        self.monitors = _monitors()
        self.sample_s = sample_s
        self.sampling, self.closed = threading.Lock(), threading.Event()
        self.take()  # shares of the processor count from here
        self.thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)
        self.thread.start()

    def take(self) -> dict[str, float]:
        """The means since the last call, such as system/cpu_utilization_percentage; network in MB since the start."""
        found: dict[str, float] = {}
        with self.sampling:
            for monitor in self.monitors:
                with contextlib.suppress(Exception):  # whatever it is, training goes on
                    monitor.collect_metrics()
                    means: Mapping[str, float] = monitor.aggregate_metrics()
                    found |= {PREFIX + name: float(value) for name, value in means.items()}
                    monitor.clear_metrics()
        return found

    def close(self) -> None:
        """Ends the thread."""
        self.closed.set()
        self.thread.join()

    def _sample(self) -> None:
        while not self.closed.wait(self.sample_s):
            with self.sampling:
                for monitor in self.monitors:
                    with contextlib.suppress(Exception):
                        monitor.collect_metrics()


def _monitors() -> list[BaseMetricsMonitor]:
    """What this machine has; nothing, and a word about it, without psutil."""
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError as cause:
        print(f"no system metrics: {cause}; pip install psutil, or tracking.system_metrics=false", flush=True)
        return []
    monitors: list[BaseMetricsMonitor] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no GPU or no nvidia-ml-py, no network
            monitors.append(kind())
    return monitors
