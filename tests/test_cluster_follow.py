"""What the driver shows of a run, from the run's folder alone."""

import time
from pathlib import Path

import pytest

from pipeline.cluster.follow import Follower
from pipeline.storage import StorageConfig
from pipeline.training.notes import Word, note_restart
from pipeline.training.observers import RunFolder
from tests.test_training_observers import a_tick

STORAGE = StorageConfig()


def test_each_line_is_shown_once_and_again_after_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    RunFolder(folder, STORAGE, 0).tick(a_tick(0))
    follower = Follower(folder, STORAGE, 900.0)  # what an earlier attempt has logged is not shown again
    log = RunFolder(folder, STORAGE, 0)
    for images_seen in (1000, 2000):
        log.tick(a_tick(images_seen))
    follower._show()
    follower._show()
    printed = capsys.readouterr().out
    assert [printed.count(f"kimg     {kimg}.0/8") for kimg in (0, 1, 2)] == [0, 1, 1]

    note_restart(folder, STORAGE, "worker 1: worker died")
    follower._show()
    waiting = "waiting for the workers to start (cluster.worker_start_timeout_s=900)"
    assert capsys.readouterr().out == f"restart 1: worker 1: worker died\n{waiting}\n"
    RunFolder(folder, STORAGE, 0).tick(a_tick(1000, loss=2.0))
    follower._show()
    printed = capsys.readouterr().out
    assert printed.count("kimg     1.0/8") == 1
    assert "restarts 1" in printed


def test_what_workers_say_is_shown_with_what_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, shown = str(tmp_path), list[str]()
    say(tmp_path, Word(0, 1, 0.0, "of an earlier attempt"))
    with Follower(folder, STORAGE, 900.0):
        say(tmp_path, Word(1, 1, 0.0, "no checkpoint at 400 images"))
        say(tmp_path, Word(0, 1, 0.0, "of an earlier attempt"), Word(0, 2, 0.0, "2 workers run"))
        wait_for(capsys, shown, "worker 0: 2 workers run\n")
        RunFolder(folder, STORAGE, 0).tick(a_tick(1000))
        wait_for(capsys, shown, "kimg     1.0/8")
    lines = [line for line in "".join(shown).splitlines() if line.startswith(("w", "kimg"))]
    assert lines[0] == "waiting for the workers to start (cluster.worker_start_timeout_s=900)"
    assert set(lines[1:4]) == {
        "worker 1: no checkpoint at 400 images",
        "worker 0: 2 workers run",
        "waiting for the first tick: reading the data, the first batches",
    }
    assert lines[4].startswith("kimg     1.0/8") and len(lines) == 5


def say(folder: Path, *words: Word) -> None:
    """As a worker keeps what it prints."""
    (folder / "workers").mkdir(exist_ok=True)
    (folder / "workers" / f"rank-{words[0].rank}.log").write_text("".join(f"{word.line()}\n" for word in words))


def wait_for(capsys: pytest.CaptureFixture[str], shown: list[str], text: str, deadline_s: float = 10) -> None:
    """Adds what is printed to `shown` until it holds a text."""
    deadline = time.monotonic() + deadline_s
    while text not in "".join(shown):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{text!r} was not shown within {deadline_s:g} s, but {shown}")
        time.sleep(0.05)
        shown.append(capsys.readouterr().out)


def test_the_last_lines_are_shown_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Follower(str(tmp_path), STORAGE, 900.0):
        RunFolder(str(tmp_path), STORAGE, 0).tick(a_tick(8000))
    assert "kimg     8.0/8" in capsys.readouterr().out
