"""What this project does inside Ray Train's controller: it notes what happens to the workers, and ends a vain wait.

<run>/workers.json     {"time", "workers": [{"rank", "address", "node", "pid"}]} of each start of the workers
<run>/restarts.json    why they were started again (`pipeline.training.notes`)
"""

import json
import os
import time
from typing import Any

from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    SchedulingState,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError

from pipeline.cluster.resources import LOOK_S, remedy, shortage_now
from pipeline.cluster.session import ClusterError
from pipeline.config import ClusterConfig
from pipeline.storage import MissingError, StorageConfig, StorageError, join, read_bytes, write_bytes
from pipeline.training.notes import note_restart

WORKERS = "workers.json"
WITHOUT_WORKERS = (InitializingState, SchedulingState, ReschedulingState, RestartingState, ResizingState)
GOODBYE_S = 5  # for workers that stopped answering to leave torch's process group; Ray's own 30 s only delay a restart


class Watch(ControllerCallback, WorkerGroupCallback):
    """One for each run; its methods are called by Ray Train's controller, in the controller's process.

    Ray Train by itself looks for room for workers without end. Here that ends `cluster.worker_start_timeout_s` after
    workers were last seen running, in a `ClusterError` that `fit` raises.
    """

    def __init__(self, cluster: ClusterConfig, folder: str, storage: StorageConfig) -> None:
        self.cluster, self.folder, self.storage = cluster, folder, storage
        self.without_since: float | None = None
        self.size = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        # Ray hands this one variable to nobody: it must be set in the process that reads it.
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", str(GOODBYE_S))

    def after_worker_group_start(self, worker_group: Any) -> None:
        workers = worker_group.get_workers()
        self.size = len(workers)
        note_workers(self.folder, self.storage, [described(worker) for worker in workers])

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, RestartingState):
            note_restart(self.folder, self.storage, cause_of(current_state.training_failed_error, self.cluster))
        if isinstance(current_state, ResizingState):
            wanted = current_state.scaling_decision.num_workers
            note_restart(self.folder, self.storage, f"resized: {self.size} to {wanted} workers")
        if not isinstance(current_state, WITHOUT_WORKERS):
            self.without_since = None
            return
        now = time.monotonic()
        self.without_since = now if self.without_since is None else self.without_since
        if now - self.without_since >= self.cluster.worker_start_timeout_s:
            raise ClusterError(
                f"no workers for {now - self.without_since:.0f} s: {shortage_now(self.cluster)}; {remedy(self.cluster)}"
            )
        if current_state is previous_state:
            time.sleep(LOOK_S)  # too few machines for an elastic group: Ray would ask again at once, and again


def cause_of(error: Exception, cluster: ClusterConfig) -> str:
    """Why workers are started again, in a line."""
    if isinstance(error, PreemptionError):
        ranks = ", ".join(map(str, error.preemption_info.preempted_ranks))
        return f"preempted: the node of worker {ranks} is taken away"
    if isinstance(error, ControllerError):
        return last_line(error.controller_failure)
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return last_line(error)
    return "; ".join(f"worker {rank}: {_failure(cause, cluster)}" for rank, cause in sorted(failures.items()))


def _failure(cause: Exception, cluster: ClusterConfig) -> str:
    if isinstance(cause, WorkerHealthCheckTimeoutError):
        return f"no answer for {cluster.health_check_timeout_s:g} s (cluster.health_check_timeout_s)"
    return last_line(cause)


def last_line(error: Exception) -> str:
    """The last line of an error, which in Ray's is the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def described(worker: Any) -> dict[str, Any]:
    """Where one of Ray Train's workers runs."""
    place = worker.metadata
    return {
        "rank": worker.distributed_context.world_rank,
        "address": place.node_ip,
        "node": place.node_id,
        "pid": place.pid,
    }


def note_workers(folder: str, storage: StorageConfig, workers: list[dict[str, Any]]) -> None:
    """Writes down where the workers run. A store that fails is said, not raised: training can do without."""
    try:
        notes = [*read_workers(folder, storage), {"time": time.time(), "workers": workers}]
        write_bytes(join(folder, WORKERS), json.dumps(notes, indent=1).encode(), storage)
    except (OSError, ValueError, StorageError) as error:
        print(f"could not note the workers: {error}", flush=True)


def read_workers(folder: str, storage: StorageConfig) -> list[dict[str, Any]]:
    """Each start of a run's workers, oldest first: its Unix time, and rank, address, node and process of each."""
    try:
        return list(json.loads(read_bytes(join(folder, WORKERS), storage)))
    except MissingError:
        return []
