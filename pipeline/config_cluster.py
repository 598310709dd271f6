"""The `cluster` section: how many workers divide the global batch, where, and how soon a failure is noticed.

Plain data, so it lives beside `pipeline.config` and not in `pipeline.cluster`, which imports Ray.
"""

import os
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.schema import Section

LOCAL = "local"


class ClusterConfig(Section):
    """How many workers divide the global batch, where, and how soon a failure is noticed."""

    backend: Literal["ray", "local"] = "ray"
    """ray: Ray Train workers, restarted after failures; local: one worker in this process, without Ray."""
    address: str | None = None
    """Ray cluster to join (`auto`: the one that this machine belongs to); empty takes RAY_ADDRESS, which submitted jobs
    have, else this machine alone."""
    workers: PositiveInt = 1
    """Workers that share the global batch; changes speed, not the result."""
    min_workers: PositiveInt | None = None
    """Go on with as few as this while machines are missing, and with all again when they are back; empty: with all."""
    resize_interval_s: PositiveFloat = 60.0
    """With `cluster.min_workers`, how often to look for room for more; growing costs a restart from a checkpoint."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: PositiveInt = 1
    """Processor cores reserved for each worker, decoding included."""
    threads_per_worker: PositiveInt | None = None
    """Threads of a worker's tensor operations; empty is `cluster.cpus_per_worker`. Part of bit-equality."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts from the latest checkpoint before giving up; -1: without end. Preemptions do not count."""
    collective_timeout_s: PositiveFloat = 600.0
    """A worker that answers, but does not come to a collective operation, ends the attempt after this; longer than
    the difference between workers in any evaluation or wait for data."""
    worker_start_timeout_s: PositiveFloat = 900.0
    """How long to wait for room for the workers, at the start and after a loss; new machines take minutes to boot."""
    health_check_interval_s: PositiveFloat = 2.0
    """How often workers are polled and notices of preemption looked for; also the longest that a report can take."""
    health_check_timeout_s: PositiveFloat = 120.0
    """A worker whose process answers no poll for this long counts as dead; longer than Ray takes to notice that a
    machine is gone (a minute unless set otherwise), so that nothing is started there again."""

    @property
    def threads(self) -> int:
        """Threads of a worker's tensor operations."""
        return self.threads_per_worker or max(1, int(self.cpus_per_worker))

    @property
    def fewest_workers(self) -> int:
        """Workers without which training waits."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _fewest_at_most_all(self) -> "ClusterConfig":
        if self.fewest_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}: expected at most cluster.workers ({self.workers})")
        return self


def address_of(cluster: ClusterConfig) -> str:
    """`cluster.address`, else RAY_ADDRESS, else `local`: a cluster of this machine's own."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or LOCAL
