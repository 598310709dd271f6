"""Functions in fresh processes."""

import os

import pytest
import torch

from pipeline.benchmark.team import cores_for, run_team
from pipeline.training.world import World


def whoami(argument: int, world: World, device: torch.device) -> tuple[int, World, float, int, int]:
    total = world.sum_(torch.tensor(float(argument + world.rank))).item()
    return os.getpid(), world, total, torch.get_num_threads(), len(os.sched_getaffinity(0))


def failing(argument: str, world: World, device: torch.device) -> None:
    raise ValueError(argument)


def test_a_team_sums_and_each_has_a_process_of_its_own() -> None:
    results = run_team(whoami, 10, size=2)
    assert len({process for process, *_ in results} | {os.getpid()}) == 3
    assert [world for _, world, *_ in results] == [World(0, 2), World(1, 2)]
    assert [total for _, _, total, *_ in results] == [21, 21]
    assert all(threads == 1 for *_, threads, _ in results)
    if len(os.sched_getaffinity(0)) >= 2:
        assert all(cores == 1 for *_, cores in results)


def test_apart_each_is_alone() -> None:
    results = run_team(whoami, 10, size=2, apart=True)
    assert [(world, total) for _, world, total, *_ in results] == [(World(), 10), (World(), 10)]


def test_an_error_comes_back() -> None:
    with pytest.raises(ValueError, match="no such thing"):
        run_team(failing, "no such thing")


@pytest.mark.parametrize(
    ("size", "threads", "expected"),
    [(1, 1, [[3]]), (2, 1, [[3], [5]]), (2, 2, [[3, 5], [7, 9]]), (3, 2, [[3, 5, 7, 9]] * 3)],
)
def test_cores_are_dealt_out_where_there_are_enough(size: int, threads: int, expected: list[list[int]]) -> None:
    assert cores_for([3, 5, 7, 9], size, threads) == expected
