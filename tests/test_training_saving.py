"""Checkpoints are tried again until they stand; training waits for a store only as long as is said."""

import threading
from pathlib import Path

import pytest

from pipeline.storage import StorageConfig, StorageError
from pipeline.training import saving
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.saving import Saving
from pipeline.training.world import World
from tests.test_training_checkpoint import a_state
from tests.test_training_checkpoint_writer import Gate, a_writer, gate
from tests.test_training_loop import Watcher

__all__ = ["gate"]
STORAGE = StorageConfig()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RETRY_S", 0.05)


def a_saving(folder: Path, patience_s: float = 60.0) -> tuple[Saving, Watcher]:
    watcher = Watcher()
    return Saving(a_writer(folder), [watcher], patience_s), watcher


def block(folder: Path) -> Path:
    """A file where the folder of the checkpoints should be."""
    (folder / "checkpoints").write_text("in the way")
    return folder / "checkpoints"


def test_what_failed_is_due_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, watcher = a_saving(tmp_path)
    blocked = block(tmp_path)
    kept.begin(a_state(images_seen=8), [])
    assert not kept.wait() and kept.unsaved
    assert "no checkpoint at 8 images: " in capsys.readouterr().out
    blocked.unlink()
    kept.begin(a_state(images_seen=16), [])
    assert kept.wait()
    assert watcher.checkpoints == list_checkpoints(str(tmp_path), STORAGE) == [16]


def test_the_last_one_is_tried_until_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, watcher = a_saving(tmp_path)
    blocked, state = block(tmp_path), a_state(images_seen=8)
    kept.begin(state, [])
    cleared = threading.Timer(0.5, blocked.unlink)
    cleared.start()
    kept.finish(state, [], World())
    cleared.join()
    assert watcher.checkpoints == list_checkpoints(str(tmp_path), STORAGE) == [8]
    assert "the last checkpoint is tried again, for 60 s at most" in capsys.readouterr().out


def test_patience_for_the_last_one_ends_with_its_error(tmp_path: Path) -> None:
    kept, watcher = a_saving(tmp_path, patience_s=0.3)
    block(tmp_path)
    state = a_state(images_seen=8)
    kept.begin(state, [])
    with pytest.raises(StorageError, match="checkpoints/0000000008"):
        kept.finish(state, [], World())
    assert watcher.checkpoints == []


def test_one_that_takes_too_long_leaves_the_next_to_a_later_tick(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving, "LONGEST_WAIT_S", 0.1)
    kept, watcher = a_saving(tmp_path)
    kept.begin(a_state(images_seen=8), [])
    assert gate.reached.wait(60)
    assert 0.1 <= kept.begin(a_state(images_seen=16), []) < 5
    assert kept.unsaved and "no checkpoint at 16 images yet" in capsys.readouterr().out
    gate.open.set()
    state = a_state(images_seen=24)
    kept.finish(state, [], World())  # 16 was left to a later tick, and the end is one
    assert watcher.checkpoints == [8, 24]
