"""Checkpoints written beside training: a snapshot, one at a time, never a thread left behind."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.storage import StorageConfig, StorageError, write_bytes
from pipeline.training import checkpoint
from pipeline.training.checkpoint import list_checkpoints, load_checkpoint, read_info
from pipeline.training.checkpoint_writer import Attempt, CheckpointWriter
from tests.test_training_checkpoint import CONFIG, a_state

STORAGE = StorageConfig()


class Gate:
    """The store, whose writes wait until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def write(self, uri: str, data: bytes, storage: StorageConfig) -> None:
        self.reached.set()
        assert self.open.wait(60)
        write_bytes(uri, data, storage)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(checkpoint, "write_bytes", gate.write)
    yield gate
    gate.open.set()


def a_writer(folder: Path, keep: int = 3) -> CheckpointWriter:
    return CheckpointWriter(str(folder), CONFIG, "abc", keep, STORAGE)


def written(writer: CheckpointWriter) -> Attempt:
    attempt = writer.take_back(wait=True)
    assert attempt is not None
    return attempt


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_the_file_holds_the_values_of_the_moment(tmp_path: Path, gate: Gate) -> None:
    state, same, writer = a_state(), a_state(), a_writer(tmp_path)
    writer.begin(state, [])
    assert gate.reached.wait(60)
    with torch.no_grad():
        for value in state.tensors().values():
            value.add_(1)
    gate.open.set()
    attempt = written(writer)
    assert (attempt.error, attempt.images_seen) == (None, 8)
    loaded = a_state(seed=1, images_seen=0)
    load_checkpoint(attempt.folder, loaded, read_info(attempt.folder, STORAGE), STORAGE)
    for name, value in same.tensors().items():
        assert torch.equal(value, loaded.tensors()[name]), name


def test_nothing_stands_before_the_write_has_ended(tmp_path: Path, gate: Gate) -> None:
    writer = a_writer(tmp_path)
    assert writer.take_back(wait=True) is None
    writer.begin(a_state(), [])
    assert gate.reached.wait(60)
    assert writer.take_back(wait=False) is None
    assert list_checkpoints(str(tmp_path), STORAGE) == []
    with pytest.raises(RuntimeError, match="0000000008 is being written; take it back"):
        writer.begin(a_state(images_seen=16), [])
    gate.open.set()
    assert written(writer).error is None
    assert list_checkpoints(str(tmp_path), STORAGE) == [8]
    assert writer.take_back(wait=True) is None


def test_the_thread_ends_with_the_checkpoint(tmp_path: Path, gate: Gate) -> None:
    writer = a_writer(tmp_path)
    writer.begin(a_state(), [])
    assert [thread.daemon for thread in writing_threads()] == [True]
    gate.open.set()
    written(writer)
    assert writing_threads() == []


def test_a_store_that_fails_is_handed_back_and_the_next_one_stands(tmp_path: Path) -> None:
    writer = a_writer(tmp_path)
    blocked = tmp_path / "checkpoints" / "0000000008" / "training.safetensors"
    blocked.mkdir(parents=True)
    writer.begin(a_state(), [])
    assert isinstance(written(writer).error, StorageError)
    writer.begin(a_state(images_seen=16), [])
    assert written(writer).error is None
    assert list_checkpoints(str(tmp_path), STORAGE) == [16]


def test_what_a_failed_one_left_goes_when_a_later_one_stands(tmp_path: Path) -> None:
    """Also what an earlier process left; what is newer stays: somebody may be writing it."""
    for images_seen in (4, 8, 99):
        blocked = tmp_path / "checkpoints" / f"{images_seen:010d}" / "training.safetensors"
        blocked.mkdir(parents=True)
    writer = a_writer(tmp_path)
    writer.begin(a_state(), [])
    assert isinstance(written(writer).error, StorageError)
    assert (tmp_path / "checkpoints" / "0000000008" / "generator.safetensors").exists()
    writer.begin(a_state(images_seen=16), [])
    assert written(writer).error is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0000000016", "0000000099"]


def test_what_comes_before_a_checkpoint_is_done_before_it(tmp_path: Path) -> None:
    """A failure of it does not keep the checkpoint from standing."""
    seen: list[list[int]] = []

    def before() -> None:
        seen.append(list_checkpoints(str(tmp_path), STORAGE))
        raise StorageError("no log today")

    writer = CheckpointWriter(str(tmp_path), CONFIG, "abc", 3, STORAGE, before)
    writer.begin(a_state(), [])
    assert written(writer).error is None
    assert seen == [[]] and list_checkpoints(str(tmp_path), STORAGE) == [8]


def test_a_defect_is_handed_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "write_bytes", broken)
    writer = a_writer(tmp_path)
    writer.begin(a_state(), [])
    assert isinstance(written(writer).error, ZeroDivisionError)


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    writer = a_writer(tmp_path, keep=1)
    for images_seen, value in ((8, 5.0), (16, 1.0), (24, 3.0), (32, None), (40, None)):
        results = [] if value is None else [{"metric": "fd_test", "value": value, "protocol": {}}]
        writer.begin(a_state(images_seen=images_seen), results)
        assert written(writer).error is None
    assert list_checkpoints(str(tmp_path), STORAGE) == [16, 40]


ENDS = """
import sys, threading
from pathlib import Path
from pipeline.training import checkpoint
from tests.test_training_checkpoint_writer import a_state, a_writer
reached = threading.Event()
def blocked(*arguments):
    reached.set()
    threading.Event().wait()
checkpoint.write_bytes = blocked
a_writer(Path(sys.argv[1])).begin(a_state(), [])
assert reached.wait(60)
print("ends")
"""


def test_a_process_that_ends_does_not_hang_on_a_store_that_does(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr
    assert list_checkpoints(str(tmp_path), STORAGE) == []
