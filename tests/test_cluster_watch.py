"""What is noted in Ray Train's controller, and when it gives up, with Ray's own states and errors but no cluster."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from pipeline.cluster import watch
from pipeline.cluster.resources import shortage
from pipeline.cluster.session import ClusterError
from pipeline.cluster.watch import Watch, cause_of, read_workers
from pipeline.config import ClusterConfig
from pipeline.storage import StorageConfig
from pipeline.training.notes import read_restarts

CLUSTER = ClusterConfig(workers=2, worker_start_timeout_s=30, health_check_timeout_s=7)
STORAGE = StorageConfig()
DECISION = ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1})
DEATH = WorkerGroupError("both", {1: RuntimeError("a long story\nworker died"), 0: RuntimeError("connection reset")})


def group(*nodes: str) -> Any:
    """Stands for a worker group: what Ray says of the place of each worker."""

    def worker(rank: int, node: str) -> Any:
        place = SimpleNamespace(node_ip=f"10.0.0.{rank}", node_id=node, pid=100 + rank)
        return SimpleNamespace(metadata=place, distributed_context=SimpleNamespace(world_rank=rank))

    workers = [worker(rank, node) for rank, node in enumerate(nodes)]
    return SimpleNamespace(get_workers=lambda: workers)


def test_each_start_and_each_restart_is_noted_once(tmp_path: Path) -> None:
    folder = str(tmp_path)
    noted = Watch(CLUSTER, folder, STORAGE)
    noted.after_worker_group_start(group("a", "b"))
    running, restarting = RunningState(), RestartingState(training_failed_error=DEATH)
    noted.after_controller_state_update(running, restarting)
    noted.after_controller_state_update(restarting, SchedulingState(DECISION))
    noted.after_worker_group_start(group("a"))
    noted.after_controller_state_update(running, ResizingState(scaling_decision=DECISION))
    causes = [restart["cause"] for restart in read_restarts(folder, STORAGE)]
    assert causes == ["worker 0: connection reset; worker 1: worker died", "resized: 1 to 2 workers"]
    first, second = read_workers(folder, STORAGE)
    assert first["workers"] == [
        {"rank": 0, "address": "10.0.0.0", "node": "a", "pid": 100},
        {"rank": 1, "address": "10.0.0.1", "node": "b", "pid": 101},
    ]
    assert [worker["node"] for worker in second["workers"]] == ["a"] and second["time"] >= first["time"]


def test_causes_are_one_line_each() -> None:
    hung = WorkerGroupError("hung", {0: WorkerHealthCheckTimeoutError("hanging\nWorker info: ...")})
    assert cause_of(hung, CLUSTER) == "worker 0: no answer for 7 s (cluster.health_check_timeout_s)"
    taken = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [2], "b": [1]}))
    assert cause_of(taken, CLUSTER) == "preempted: the node of worker 1, 2 is taken away"
    assert cause_of(ControllerError(RuntimeError("one\ntwo")), CLUSTER) == "two"


def test_a_vain_search_for_room_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "shortage_now", lambda cluster: shortage(cluster, [{"CPU": 1.0}], {"CPU": 0.0}))
    now, slept = [1000.0], list[float]()
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append, time=time.time)
    monkeypatch.setattr(watch, "time", clock)
    watching = Watch(CLUSTER, str(tmp_path), STORAGE)
    initial, scheduling = InitializingState(), SchedulingState(DECISION)
    again = ReschedulingState(training_failed_error=ControllerError(WorkerGroupStartupTimeoutError(2)))

    watching.after_controller_state_update(initial, scheduling)
    now[0] += 29
    watching.after_controller_state_update(scheduling, again)
    assert not slept
    watching.after_controller_state_update(again, again)  # Ray's elastic policy found too little, and asks again
    assert slept == [watch.LOOK_S]
    watching.after_controller_state_update(again, RunningState())  # workers run: the clock starts anew
    now[0] += 1000
    watching.after_controller_state_update(RunningState(), RestartingState(training_failed_error=DEATH))
    now[0] += 29
    watching.after_controller_state_update(scheduling, again)
    now[0] += 1
    with pytest.raises(ClusterError, match="no workers for 30 s: asked for 2 workers .* there is room for 1"):
        watching.after_controller_state_update(again, scheduling)


def test_a_hung_worker_holds_up_a_restart_for_seconds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(name, "9")
    Watch(CLUSTER, str(tmp_path), STORAGE).after_controller_start(None)
    assert os.environ[name] == "9"  # what a user set stays
    monkeypatch.delenv(name)
    Watch(CLUSTER, str(tmp_path), STORAGE).after_controller_start(None)
    assert os.environ.pop(name) == str(watch.GOODBYE_S)
