"""A machine announces its end: one checkpoint at once, one at each tick until it goes, and on with another machine."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipeline.cluster import training
from pipeline.config import Config, load_config
from pipeline.data.stream import DataConfig
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.notes import read_restarts
from pipeline.training.observers import read_log
from tests import ray_workers
from tests.faults import (
    images_seen,
    last_checkpoint,
    recovery,
    starts,
    train_during,
    wait_for_start,
    wait_until,
)
from tests.mlflow_server import check_one_run, sqlite_uri
from tests.ray_nodes import ray_cluster
from tests.small import SMALL_CLUSTER_SETTINGS
from tests.without_ray import train_without_ray

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

TOTAL, TICK, BATCH = 640, 40, 8
NOTICE_S = 22
SETTINGS = [
    *SMALL_CLUSTER_SETTINGS,
    f"train.total_kimg={TOTAL / 1000}",
    f"train.tick_kimg={TICK / 1000}",
    "train.checkpoint_kimg=0.32",
    "train.keep_checkpoints=100",
    "cluster.max_failures=0",  # a preemption is none
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(2, cpus=1) as found:
        yield found


def drain(cluster: Cluster, node: str) -> None:
    """What a cloud's agent, or Kubernetes' SIGTERM to `ray start --block`, asks Ray to do with a node."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes it back"]
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address, *reason]
    subprocess.run(
        [*command, "--node-id", node, "--deadline-remaining-seconds", str(NOTICE_S)], check=True, timeout=120
    )


def test_a_node_announces_its_end(
    data: DataConfig, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "worker", ray_workers.halting)

    tracking = ["tracking.enabled=true", f"tracking.uri={sqlite_uri(tmp_path)}"]

    def config_of(name: str, halts: dict[str, dict[str, str]], *more: str) -> Config:
        (tmp_path / f"{name}-halts.json").write_text(json.dumps(halts))
        places = [f"data.uri={data.uri}", f"run.dir={tmp_path}", f"run.name={name}"]
        return load_config(None, [*SETTINGS, *places, f"cluster.address={cluster.address}", *more])

    undisturbed = config_of("undisturbed", {})
    train_without_ray(undisturbed, tmp_path / "undisturbed-processes", float64=True)

    # Training waits at its 4th tick for the notice, and stands still from its 8th tick on until its node is gone.
    config = config_of("announced", {"1": {"4": "notice", "8": "end"}}, *tracking)
    noticed, seen_before = 3 * TICK + BATCH, 6 * TICK
    before = []

    def story() -> None:
        both = wait_for_start(config, 1)
        wait_until("the 3rd tick", 180.0, lambda: images_seen(config) >= 2 * TICK)
        assert list_checkpoints(config.run_uri, config.storage) == [0]
        cluster.add_node(num_cpus=1)
        asked = time.time()
        drain(cluster, both[1]["node"])
        wait_until(
            "a checkpoint off the tick, at the notice",
            NOTICE_S - 2.0,
            lambda: noticed in list_checkpoints(config.run_uri, config.storage),
        )
        print(f"SAVED {config.run.name}: {time.time() - asked:.1f} s after the notice was asked for")
        wait_until("the 7th tick", NOTICE_S, lambda: images_seen(config) >= seen_before)
        assert len(starts(config)) == 1  # the node was there all the time
        before.append(list_checkpoints(config.run_uri, config.storage))
        recovery(config, 2, asked + NOTICE_S)

    outcome = train_during(config, story)

    assert seen_before - TICK <= outcome.resumed_from <= seen_before  # at most a tick's images were repeated
    (checkpoints,) = before
    assert checkpoints[:2] == [0, noticed]
    (restart,) = read_restarts(config.run_uri, config.storage)
    assert restart["cause"] == "preempted: the node of worker 1 is taken away"
    first, second = starts(config)
    assert first[1]["node"] not in {worker["node"] for worker in second}
    assert [line["images_seen"] for line in read_log(config.run_uri, config.storage)] == list(range(0, TOTAL + 1, TICK))
    assert last_checkpoint(config) == last_checkpoint(undisturbed)
    check_one_run(config, range(TICK, TOTAL + 1, TICK))
