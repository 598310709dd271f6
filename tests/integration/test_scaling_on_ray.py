"""The benchmark of scaling under Ray Train beside plain processes."""

import pytest
import ray
import torch

from jobs import benchmark
from pipeline.cluster.scaling import run_on_ray
from pipeline.config import load_config
from pipeline.training.world import World
from tests.small import SMALL_SETTINGS

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow]


def test_results_of_all_workers_come_back_by_rank(ray_address: str) -> None:
    def work(argument: int, world: World, device: torch.device, report: object) -> tuple[int, float, int]:
        assert callable(report)
        report()
        return world.rank, world.sum_(torch.tensor(float(argument + world.rank))).item(), torch.get_num_threads()

    found = run_on_ray(work, 10, load_config("demo", [f"cluster.address={ray_address}"]).cluster, 2, 1)
    assert found == [(0, 21.0, 1), (1, 21.0, 1)]
    assert not ray.is_initialized()


def test_the_whole_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scaling", "--config", "demo", *SMALL_SETTINGS, "train.r1_interval=2", "--pictures", "4"]
    benchmark.main([*words, "--workers", "1", "--updates", "2", "--rounds", "1", "--ray"])
    text = capsys.readouterr().out
    assert "of the rate of 1 worker(s)" in text and "on Ray |" in text
