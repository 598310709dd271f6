"""What a watcher sees: one line a tick, and a folder that a restart does not confuse."""

import json
import socket
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage import StorageConfig, StorageError
from pipeline.training import observers
from pipeline.training.observers import RunFolder, Tick, duration, read_log

STORAGE = StorageConfig()


def a_tick(images_seen: int, loss: float = 1.0) -> Tick:
    result = {"metric": "fd_test", "value": 12.5, "protocol": {"images": 2}}
    losses = {"loss/D": loss, "loss/G": 0.5, "loss/r1": 0.1}
    return Tick(images_seen, 8000, 75.0, 200.0, 0.014, 1.5, losses, [result], 0.25)


def test_the_line_says_all() -> None:
    line = a_tick(4000).line()
    parts = "kimg     4.0/8|time 1m15s|left 0m20s|sec/kimg   5.00|img/s  200.0|wait  1.4%|D 1.000|G 0.500|r1 0.100"
    for part in [*parts.split("|"), "checkpoint 0.25 s", "mem 1.5 GB", "fd_test 12.5"]:
        assert part in line


def test_metrics_carry_the_names_that_trackers_show() -> None:
    metrics = a_tick(4000).metrics()
    assert metrics["progress/kimg"] == 4.0
    assert metrics["timing/sec_per_kimg"] == 5.0
    assert metrics["timing/data_wait_share"] == 0.014
    assert metrics["timing/checkpoint_seconds"] == 0.25
    assert metrics["fd_test"] == 12.5


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 90000)] == ["0m00s", "1m00s", "59m59s", "1h00m", "25h00m"]


def test_a_restart_replaces_the_lines_that_it_repeats(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), STORAGE, 0)
    for images_seen in (0, 1000, 2000, 3000):
        folder.tick(a_tick(images_seen))
    again = RunFolder(str(tmp_path), STORAGE, 1000)  # the last checkpoint stood at 1000
    again.tick(a_tick(2000, loss=7.0))
    log = read_log(str(tmp_path), STORAGE)
    assert [line["images_seen"] for line in log] == [0, 1000, 2000]
    assert log[-1]["scalars"]["loss/D"] == 7.0
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["total_images"] == 8000


def test_sheets_lie_by_images_seen(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), STORAGE, 0)
    sheet = np.zeros((4, 4, 3), np.uint8)
    folder.sheet("reals", 0, sheet)
    folder.sheet("samples", 1000, sheet)
    folder.close()
    assert (tmp_path / "reals.png").exists() and (tmp_path / "samples" / "0000001000.png").exists()


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines are told to wait; when the folder is there, all are in the log, and so before a checkpoint stands."""
    place = tmp_path / "place"
    place.write_text("in the way")
    folder = RunFolder(str(tmp_path / "other"), STORAGE, 0)
    folder.folder = str(place / "run")
    folder.tick(a_tick(0))
    folder.tick(a_tick(1000))
    printed = capsys.readouterr().out
    assert printed.count("training goes on, log lines wait") == 1 and f"{place}/run/log.jsonl" in printed
    with pytest.raises(StorageError, match="log.jsonl"):
        folder.write_log()
    place.unlink()
    folder.write_log()
    assert [line["images_seen"] for line in read_log(str(place / "run"), STORAGE)] == [0, 1000]
    folder.close()
    assert "works again" in capsys.readouterr().out


def test_a_store_that_hangs_costs_a_tick_a_second_at_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        folder = RunFolder(str(tmp_path), STORAGE, 0)
        folder.folder = "s3://bucket/run"
        folder.storage = StorageConfig(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", anonymous=True)
        for number in range(2):
            began = time.monotonic()
            folder.tick(a_tick(number))
            folder.sheet("samples", number, np.zeros((4, 4, 3), np.uint8))
            assert time.monotonic() - began < observers.LINE_WAIT_S + 5
        silent.accept()  # it was asked
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(observers, "CLOSE_WAIT_S", 0.1)
            began = time.monotonic()
            folder.close()
            assert time.monotonic() - began < 8
    assert "4 log lines and sheets were not written to s3://bucket/run" in capsys.readouterr().out


def test_a_log_from_before_pauses_and_times_were_told_is_still_shown() -> None:
    line = asdict(a_tick(4000))
    del line["checkpoint_seconds"], line["time"]
    assert Tick(**line).metrics()["timing/checkpoint_seconds"] == 0
    assert "checkpoint" not in Tick(**line).line()
    assert Tick(**line).time == 0
