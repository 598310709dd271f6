"""What a run is doing, from its folder: the state in a word, the best distance, the age of everything."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import StorageConfig
from pipeline.training.notes import note_restart
from pipeline.training.observers import RunFolder
from pipeline.training.status import StatusError, distances, read_status, state_of, tick_period
from tests.test_training_observers import a_tick

STORAGE = StorageConfig()
NOW = 1_700_000_000.0


def line(images_seen: int, age: float, seconds: float = 0.0) -> dict[str, Any]:
    """A line of the log, told so long before NOW."""
    told = NOW - age if age >= 0 else 0.0
    return {"images_seen": images_seen, "total_images": 8000, "seconds": seconds, "time": told, "results": []}


def restart(age: float) -> dict[str, Any]:
    return {"cause": "worker 1: killed", "time": NOW - age}


TEN_SECONDS = [line(seen, 1000.0, seconds=seen / 100) for seen in (0, 1000, 2000)]
MINUTES = [line(seen, 5000.0, seconds=seen / 10) for seen in (0, 1000, 2000)]


@pytest.mark.parametrize(
    ("log", "restarts", "checkpoint", "state"),
    [
        ([], [], None, "starting"),
        ([line(0, 1700)], [], None, "running"),  # how long a tick takes is not known yet
        ([line(0, 1900)], [], None, "stalled"),
        ([*TEN_SECONDS, line(3000, 100, 30)], [], 2000, "running"),
        ([*TEN_SECONDS, line(3000, 130, 30)], [], 2000, "stalled"),
        ([*MINUTES, line(3000, 390, 300)], [], 2000, "running"),
        ([*MINUTES, line(3000, 410, 300)], [], 2000, "stalled"),
        ([*TEN_SECONDS, line(3000, 300, 30)], [restart(100)], 2000, "restarting"),
        ([*TEN_SECONDS, line(3000, 300, 30)], [restart(130)], 2000, "stalled"),
        ([*TEN_SECONDS, line(3000, 10, 30)], [restart(60)], 2000, "running"),
        ([*TEN_SECONDS, line(3000, -1, 30)], [], 2000, "unknown"),
        ([*TEN_SECONDS, line(8000, 9999, 80)], [], 8000, "ended"),
        ([*TEN_SECONDS, line(8000, 10, 80)], [], 2000, "running"),  # the last checkpoint is being written
    ],
)
def test_the_state(log: list[dict[str, Any]], restarts: list[dict[str, Any]], checkpoint: int, state: str) -> None:
    assert state_of(log, restarts, checkpoint, NOW) == state


def test_a_tick_takes_as_long_as_the_longest_lately_and_a_restart_is_no_tick() -> None:
    assert tick_period([]) is None
    assert tick_period([line(0, 0, 0.5)]) is None
    assert tick_period([line(0, 0, 100), line(1000, 0, 5), line(2000, 0, 15), line(3000, 0, 18)]) == 10
    long_ago = [line(0, 0, 0), line(1000, 0, 500)]
    assert tick_period([*long_ago, *(line(2000 + n, 0, 510 + 10 * n) for n in range(30))]) == 10


def test_distances_are_compared_under_the_protocol_of_the_last() -> None:
    def measured(seen: int, value: float, images: int) -> dict[str, Any]:
        result = {"metric": "fid", "value": value, "protocol": {"images": images}}
        return line(seen, 0) | {"results": [result]}

    best, last = distances([measured(0, 1.0, 8), measured(1, 9.0, 64), measured(2, 7.0, 64), measured(3, 8.0, 64)])
    assert best is not None and last is not None
    assert (best["value"], best["images_seen"]) == (7.0, 2)
    assert (last["value"], last["images_seen"]) == (8.0, 3)
    assert distances([line(0, 0)]) == (None, None)


def test_a_folder_tells_what_its_run_is_doing(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    ticks = RunFolder(folder, STORAGE, 0)
    for seen in (0, 1000, 2000):
        ticks.tick(replace(a_tick(seen), seconds=seen / 100, time=NOW + seen / 100))
    note_restart(folder, STORAGE, "worker 1: killed")
    status = read_status(folder, STORAGE, NOW + 50)
    assert (status.images_seen, status.total_images, status.images_per_second) == (2000, 8000, 200.0)
    assert (status.seconds_left, status.tick_age_s, status.tick_period_s) == (30.0, 30.0, 10.0)
    assert (status.checkpoint, status.checkpoint_age_s, status.samples, status.tracking_run) == (None,) * 4
    assert [each["cause"] for each in status.restarts] == ["worker 1: killed"]
    assert status.best is not None and status.best["value"] == 12.5


def test_a_place_without_a_run_is_refused_with_the_runs_beside_it(tmp_path: Path) -> None:
    RunFolder(str(tmp_path / "demo"), STORAGE, 0).tick(a_tick(0))
    with pytest.raises(StatusError, match=r"no run at .*/dmeo: .* there are demo$"):
        read_status(str(tmp_path / "dmeo"), STORAGE)
