"""What the driver shows of a run, from the run's folder alone."""

from pathlib import Path

import pytest

from pipeline.cluster.follow import Follower, RestartNotes, read_restarts
from pipeline.storage import StorageConfig
from pipeline.training.observers import RunFolder
from tests.test_training_observers import a_tick

STORAGE = StorageConfig()


def test_each_line_is_shown_once_and_again_after_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    RunFolder(folder, STORAGE, 0).tick(a_tick(0))
    follower = Follower(folder, STORAGE)  # what an earlier attempt has logged is not shown again
    log = RunFolder(folder, STORAGE, 0)
    for images_seen in (1000, 2000):
        log.tick(a_tick(images_seen))
    follower._show()
    follower._show()
    printed = capsys.readouterr().out
    assert [printed.count(f"kimg     {kimg}.0/8") for kimg in (0, 1, 2)] == [0, 1, 1]

    RestartNotes(folder, STORAGE).after_exception(None, {1: RuntimeError("a long story\nworker died")})
    RunFolder(folder, STORAGE, 0).tick(a_tick(1000, loss=2.0))
    follower._show()
    printed = capsys.readouterr().out
    assert "workers failed: worker 1: worker died" in printed
    assert printed.count("kimg     1.0/8") == 1
    assert [note["cause"] for note in read_restarts(folder, STORAGE)] == ["worker 1: worker died"]


def test_the_last_lines_are_shown_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Follower(str(tmp_path), STORAGE):
        RunFolder(str(tmp_path), STORAGE, 0).tick(a_tick(8000))
    assert "kimg     8.0/8" in capsys.readouterr().out
