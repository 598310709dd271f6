"""Fewer workers and more again: a machine goes, another comes, and the sequence of global batches stays (promise 4)."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from torch import Tensor

from pipeline.cluster import training
from pipeline.cluster.session import ClusterError
from pipeline.config import Config, load_config
from pipeline.data.stream import DataConfig
from pipeline.storage import StorageConfig
from pipeline.training import local
from pipeline.training.checkpoint import GENERATOR, TRAINING, read_info, read_tensors
from pipeline.training.notes import read_restarts
from pipeline.training.observers import read_log
from tests import ray_workers
from tests.ddp import one_thread
from tests.faults import recovery, starts, train_during, wait_for_images, wait_for_start
from tests.mlflow_server import check_one_run, sqlite_uri
from tests.ray_nodes import ray_cluster
from tests.small import SMALL_CLUSTER_SETTINGS
from tests.without_ray import training_in_float64

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

TOTAL, TICK = 640, 40
SETTINGS = [
    *SMALL_CLUSTER_SETTINGS,
    "train.r1_interval=4",
    f"train.total_kimg={TOTAL / 1000}",
    f"train.tick_kimg={TICK / 1000}",
    f"train.checkpoint_kimg={TICK / 1000}",
    "cluster.resize_interval_s=1",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:  # read by the head: a dead machine is known after 3 to 5 seconds
        patch.setenv("RAY_health_check_period_ms", "1000")
        patch.setenv("RAY_health_check_timeout_ms", "2000")
        patch.setenv("RAY_health_check_failure_threshold", "3")
        with ray_cluster(2, cpus=1) as found:
            yield found


def config_of(folder: Path, name: str, data: DataConfig, halts: dict[str, Any], *more: str) -> Config:
    (folder / f"{name}-halts.json").write_text(json.dumps(halts))
    return load_config(None, [*SETTINGS, f"data.uri={data.uri}", f"run.dir={folder}", f"run.name={name}", *more])


def tensors_of(folder: str) -> dict[str, Tensor]:
    info, storage = read_info(folder, StorageConfig()), StorageConfig()
    return read_tensors(folder, GENERATOR, info, storage) | read_tensors(folder, TRAINING, info, storage)


def remove_node_of(cluster: Cluster, worker: dict[str, Any]) -> None:
    """Ends the node that a worker runs on, with all that runs there."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == worker["node"]]
    cluster.remove_node(node, allow_graceful=False)


def test_two_workers_then_one_then_two(
    data: DataConfig, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64, where another number of workers is rounding and no more (tests/integration/test_same_on_ray.py).
    monkeypatch.setattr(local, "local_device", lambda: torch.device("cpu"))
    alone = config_of(tmp_path, "alone", data, {})
    with training_in_float64(), one_thread():
        expected = tensors_of(local.train_here(alone.plan()).checkpoint)

    monkeypatch.setattr(training, "worker", ray_workers.halting)
    more = [f"cluster.address={cluster.address}", "cluster.min_workers=1"]
    more += ["tracking.enabled=true", f"tracking.uri={sqlite_uri(tmp_path)}"]
    config = config_of(tmp_path, "elastic", data, {"1": {"4": "end"}, "2": {"3": "end"}}, *more)

    def story() -> None:
        both = wait_for_start(config, 1)
        wait_for_images(config, 2 * TICK)
        lost = time.time()
        remove_node_of(cluster, both[1])
        recovery(config, 2, lost)

        wait_for_images(config, 3 * TICK)
        found = time.time()
        cluster.add_node(num_cpus=1)
        recovery(config, 3, found)

    outcome = train_during(config, story)

    assert [len(workers) for workers in starts(config)] == [2, 1, 2]
    lost, resized = [restart["cause"] for restart in read_restarts(config.run_uri, config.storage)]
    assert lost.startswith("worker ") and resized == "resized: 1 to 2 workers"
    assert [line["images_seen"] for line in read_log(config.run_uri, config.storage)] == list(range(0, TOTAL + 1, TICK))
    found = tensors_of(outcome.checkpoint)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9, msg=name)
    check_one_run(config, range(TICK, TOTAL + 1, TICK))


def test_a_machine_that_nobody_replaces_ends_the_run_in_time(
    data: DataConfig, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "worker", ray_workers.halting)
    more = [f"cluster.address={cluster.address}", "cluster.worker_start_timeout_s=15"]
    config = config_of(tmp_path, "lost", data, {"1": {"4": "end"}}, *more)

    def story() -> None:
        both = wait_for_start(config, 1)
        wait_for_images(config, 2 * TICK)
        remove_node_of(cluster, both[1])

    with pytest.raises(ClusterError) as told:
        train_during(config, story)
    for part in ("training lost ended: no workers for ", "asked for 2 workers", "room for 1", "min_workers"):
        assert part in str(told.value)
    assert not ray.is_initialized()
