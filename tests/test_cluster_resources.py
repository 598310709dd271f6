"""Room for workers on nodes, and the words for it, without a cluster."""

import pytest

from pipeline.cluster.resources import is_busy, one_worker, remedy, room, shortage, worker_resources
from pipeline.config import ClusterConfig, ConfigError, load_config

GPU_WORKERS = ClusterConfig(workers=4, use_gpu=True, cpus_per_worker=8)
LARGE, SMALL, HEAD = {"CPU": 36.0, "GPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}, {"memory": 1e9}


def test_a_worker_takes_its_cores_and_a_whole_gpu() -> None:
    assert worker_resources(GPU_WORKERS) == {"CPU": 8, "GPU": 1.0}
    assert worker_resources(ClusterConfig(cpus_per_worker=2)) == {"CPU": 2}


def test_each_worker_fits_on_one_node_or_not_at_all() -> None:
    assert room(GPU_WORKERS, []) == 0
    assert room(GPU_WORKERS, [HEAD]) == 0
    assert room(GPU_WORKERS, [LARGE]) == 4  # its GPUs are the bound
    assert room(GPU_WORKERS, [{"CPU": 20.0, "GPU": 4.0}]) == 2  # its cores are
    assert room(GPU_WORKERS, [SMALL, SMALL, SMALL]) == 0  # 12 cores in all, but in no place 8
    assert room(GPU_WORKERS, [LARGE, HEAD, LARGE]) == 8


def test_a_shortage_says_what_is_asked_for_and_what_there_is() -> None:
    assert shortage(GPU_WORKERS, [SMALL, HEAD], {"CPU": 4.0}) == (
        "asked for 4 workers with 8 CPU and 1 GPU each; there is room for 0, with 4 CPU and 1 GPU on 2 nodes, "
        "of which 4 CPU and 0 GPU are free"
    )
    elastic = GPU_WORKERS.model_copy(update={"min_workers": 1})
    assert shortage(elastic, [SMALL], SMALL).startswith("asked for 1 worker with")


def test_a_cluster_is_busy_when_what_is_free_does_not_do() -> None:
    assert not is_busy(GPU_WORKERS, LARGE)
    assert is_busy(GPU_WORKERS, {"CPU": 36.0, "GPU": 3.0}) and is_busy(GPU_WORKERS, {"CPU": 36.0})
    assert not is_busy(one_worker(GPU_WORKERS), {"CPU": 8.0, "GPU": 1.0})


def test_a_remedy_names_the_settings_that_help() -> None:
    assert "cluster.use_gpu=false" in remedy(GPU_WORKERS) and "cluster.min_workers" in remedy(GPU_WORKERS)
    elastic = ClusterConfig(workers=4, min_workers=2, worker_start_timeout_s=60)
    assert "use_gpu" not in remedy(elastic) and "min_workers" not in remedy(elastic)
    assert "cluster.worker_start_timeout_s=60" in remedy(elastic)
    task = one_worker(ClusterConfig(workers=4, min_workers=2))
    assert remedy(task) == "add machines, or wait longer (cluster.worker_start_timeout_s=900)"


def test_fewer_than_all_workers_are_asked_for_by_name() -> None:
    assert ClusterConfig(workers=4).fewest_workers == 4
    assert ClusterConfig(workers=4, min_workers=2).fewest_workers == 2
    with pytest.raises(ConfigError, match=r"min_workers is 5: expected at most cluster.workers \(4\)"):
        load_config(None, ["cluster.workers=4", "cluster.min_workers=5"])
