"""A node dies with all that runs on it, and another takes its place; test_network.py does it to whole machines."""

import time
from pathlib import Path

import pytest

from pipeline.config import Config, load_config
from pipeline.training.notes import read_restarts
from pipeline.training.observers import read_log
from tests.faults import last_checkpoint, recovery, starts, train_during, train_without_ray, wait_for_images
from tests.ray_nodes import ray_cluster
from tests.small import SMALL_CLUSTER_SETTINGS, small_data

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

TOTAL, TICK = 1200, 80
SETTINGS = [
    *SMALL_CLUSTER_SETTINGS,
    f"train.total_kimg={TOTAL / 1000}",
    f"train.tick_kimg={TICK / 1000}",
    "train.checkpoint_kimg=0.16",
]


def losses_of(config: Config) -> list[dict[str, float]]:
    lines = read_log(config.run_uri, config.storage)
    assert [line["images_seen"] for line in lines] == list(range(0, TOTAL + 1, TICK))
    return [line["scalars"] for line in lines]


def test_a_node_dies_and_another_takes_its_place(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    places = [f"data.uri={data.uri}", f"run.dir={tmp_path}/runs"]
    undisturbed = load_config(None, [*SETTINGS, *places, "run.name=undisturbed"])
    train_without_ray(undisturbed, tmp_path / "undisturbed")
    with ray_cluster(2, cpus=1) as cluster:
        places.append(f"cluster.address={cluster.address}")
        config = load_config(None, [*SETTINGS, *places, "run.name=replaced"])

        def story() -> None:
            wait_for_images(config, 240)
            ((first, _),) = starts(config)  # rank 0 writes the log and the checkpoints
            (node,) = [node for node in cluster.worker_nodes if node.node_id == first["node"]]
            fault = time.time()
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            recovery(config, 2, fault)

        outcome = train_during(config, story)

    before, after = starts(config)
    assert len({worker["node"] for worker in before}) == len({worker["node"] for worker in after}) == 2
    assert before[0]["node"] not in {worker["node"] for worker in after}
    assert len(read_restarts(config.run_uri, config.storage)) == 1
    assert outcome.resumed_from >= 160
    assert losses_of(config) == losses_of(undisturbed)
    assert last_checkpoint(config) == last_checkpoint(undisturbed)
