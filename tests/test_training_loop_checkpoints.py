"""Training goes on while a checkpoint is written: what it costs, what is told, and what is left when things go wrong.

A store that is slow or dies is the real one, held up or killed between two of its own calls.
"""

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.stream import DataConfig
from pipeline.models.cips import Generator
from pipeline.storage import StorageConfig, StorageError, write_bytes
from pipeline.training import checkpoint
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.loop import Plan, train
from pipeline.training.observers import Tick
from pipeline.training.world import World
from tests.ddp import on_workers
from tests.small import small_data, small_plan
from tests.test_training_checkpoint_writer import writing_threads
from tests.test_training_loop import CPU, Interrupted, StopsAt, Watcher, files_of, run

Write = Callable[[str, bytes, StorageConfig], None]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return small_data(tmp_path_factory.mktemp("data"))


class Signals(Watcher):
    """Sets an event when a tick is told."""

    def __init__(self, images_seen: int) -> None:
        super().__init__()
        self.images_seen, self.reached = images_seen, threading.Event()

    def tick(self, tick: Tick) -> None:
        super().tick(tick)
        if tick.images_seen == self.images_seen:
            self.reached.set()


def held_up(images_seen: int, until: threading.Event) -> Write:
    """The store, which takes a checkpoint only after an event."""

    def write(uri: str, content: bytes, storage: StorageConfig) -> None:
        if f"{images_seen:010d}" in uri:
            assert until.wait(60)
        write_bytes(uri, content, storage)

    return write


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one at 64 images is written only when 96 images have been seen, and holds the values at 64."""
    plan = small_plan(tmp_path / "slow", data, total_kimg=0.128, checkpoint_kimg=0.064)
    watcher = Signals(96)
    monkeypatch.setattr(checkpoint, "write_bytes", held_up(64, watcher.reached))
    outcome = run(plan, watcher)
    monkeypatch.undo()
    fair = run(small_plan(tmp_path / "fair", data, total_kimg=0.128, checkpoint_kimg=0.064))
    for images_seen in (0, 64, 128):
        assert len(files_of(fair, images_seen)) == 2
        assert files_of(outcome, images_seen) == files_of(fair, images_seen)
    # Told once it stands, in order, and never before a tick that it covers.
    assert watcher.checkpoints == [0, 64, 128]
    assert watcher.events.index(("tick", 96)) < watcher.events.index(("checkpoint", 64))
    assert watcher.events.index(("tick", 128)) < watcher.events.index(("checkpoint", 128))
    assert watcher.events[-1] == ("closed", 0)
    # The pause was told with the tick after it, while the write still went on.
    pauses = {tick.images_seen: tick.checkpoint_seconds for tick in watcher.ticks}
    assert pauses[32] > 0 and pauses[96] > 0
    assert pauses[0] == pauses[64] == pauses[128] == 0
    assert watcher.ticks[3].metrics()["timing/checkpoint_seconds"] == pauses[96]
    assert writing_threads() == []


def test_the_next_one_waits_for_the_one_that_is_written(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(tmp_path, data, total_kimg=0.128)
    watcher, at_once = Signals(64), []
    slow = held_up(32, watcher.reached)

    def write(uri: str, content: bytes, storage: StorageConfig) -> None:
        at_once.append(len(writing_threads()))
        slow(uri, content, storage)

    monkeypatch.setattr(checkpoint, "write_bytes", write)
    run(plan, watcher)
    assert set(at_once) == {1}
    assert watcher.checkpoints == [0, 32, 64, 96, 128]
    assert watcher.events.index(("tick", 64)) < watcher.events.index(("checkpoint", 32))


def test_the_last_one_stands_when_training_returns(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(tmp_path, data)
    reached, release = threading.Event(), threading.Event()

    def write(uri: str, content: bytes, storage: StorageConfig) -> None:
        if "0000000064" in uri:
            reached.set()
            assert release.wait(60)
        write_bytes(uri, content, storage)

    monkeypatch.setattr(checkpoint, "write_bytes", write)
    training = threading.Thread(target=run, args=(plan,))
    training.start()
    assert reached.wait(60)
    training.join(0.2)
    assert training.is_alive()
    release.set()
    training.join()
    assert list_checkpoints(plan.folder, plan.storage)[-1] == 64


def test_an_evaluations_result_stands_with_its_checkpoint(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and the images seen go with the copy: the ones of a later evaluation are not written under it."""

    def evaluate(generator: Generator, images_seen: int) -> dict[str, Any]:
        return {"metric": "fd_test", "value": float(images_seen), "protocol": {}}

    watcher = Signals(96)
    monkeypatch.setattr(checkpoint, "write_bytes", held_up(64, watcher.reached))
    plan = small_plan(tmp_path, data, total_kimg=0.128, checkpoint_kimg=0.064, evaluate_kimg=0.032)
    outcome = run(plan, watcher, evaluate=evaluate)
    info = checkpoint.read_info(str(Path(outcome.checkpoint).with_name("0000000064")), plan.storage)
    assert [result["value"] for result in info.results] == [64.0]


def test_after_a_failure_the_next_tick_tries_again(
    tmp_path: Path, data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint at 64 fails; there is none due at 96, but there one stands."""
    plan = small_plan(tmp_path, data, total_kimg=0.128, checkpoint_kimg=0.064, evaluate_kimg=0.032)
    (tmp_path / "checkpoints" / "0000000064" / "training.safetensors").mkdir(parents=True)

    def evaluate(generator: Generator, images_seen: int) -> dict[str, Any]:
        for thread in writing_threads():
            thread.join()
        return {"metric": "fd_test", "value": 1.0, "protocol": {}}

    watcher = Watcher()
    run(plan, watcher, evaluate=evaluate)
    assert "no checkpoint at 64 images: " in capsys.readouterr().out
    assert watcher.checkpoints == list_checkpoints(plan.folder, plan.storage) == [0, 96, 128]


class Blocks(Watcher):
    """Puts a file in the place of the folder of checkpoints, at a count of images; the good ones move aside."""

    def __init__(self, folder: Path, images_seen: int) -> None:
        super().__init__()
        self.folder, self.images_seen = folder, images_seen

    def tick(self, tick: Tick) -> None:
        super().tick(tick)
        if tick.images_seen == self.images_seen:
            for thread in writing_threads():
                thread.join()
            self.folder.rename(self.folder.with_name("aside"))
            self.folder.write_text("in the way")


def test_a_failure_at_the_end_fails_the_run(tmp_path: Path, data: DataConfig) -> None:
    plan = replace(small_plan(tmp_path, data), storage=StorageConfig(total_timeout_s=0.2))
    watcher = Blocks(tmp_path / "checkpoints", 64)
    with pytest.raises(StorageError, match="checkpoints/0000000064"):
        run(plan, watcher)
    assert watcher.checkpoints == [0, 32] and watcher.closed
    assert writing_threads() == []


def test_what_fails_at_the_end_is_tried_again(
    tmp_path: Path, data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = small_plan(tmp_path, data)
    (tmp_path / "checkpoints" / "0000000064" / "generator.safetensors").mkdir(parents=True)
    watcher = Watcher()
    run(plan, watcher)
    printed = capsys.readouterr().out
    assert "no checkpoint at 64 images: " in printed and "the last checkpoint is tried again" in printed
    assert watcher.checkpoints == list_checkpoints(plan.folder, plan.storage) == [0, 32, 64]


def test_a_checkpoint_that_stood_when_its_process_died_is_told_by_the_next(tmp_path: Path, data: DataConfig) -> None:
    plan = small_plan(tmp_path, data, total_kimg=0.096)
    with pytest.raises(Interrupted):
        run(plan, StopsAt(96))
    watcher = Watcher()
    run(plan, watcher)
    assert watcher.events[:2] == [("resumed", 64), ("checkpoint", 64)] and watcher.log == [0, 32, 64]
    assert watcher.events[2:] == [("tick", 96), ("checkpoint", 96), ("closed", 0)]


def test_a_crash_lets_the_checkpoint_that_is_written_stand(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(tmp_path, data, total_kimg=0.128, checkpoint_kimg=0.064)
    watcher = Signals(96)
    monkeypatch.setattr(checkpoint, "write_bytes", held_up(64, watcher.reached))
    with pytest.raises(Interrupted):
        run(plan, watcher, StopsAt(96))
    assert watcher.events[-3:] == [("tick", 96), ("checkpoint", 64), ("closed", 0)]
    assert list_checkpoints(plan.folder, plan.storage) == [0, 64]
    assert writing_threads() == []
    assert run(plan).resumed_from == 64


KILLED = """
import os, pickle, signal, sys, torch
from pipeline.storage import staged, write_bytes
from pipeline.training import checkpoint
from pipeline.training.local import train_here
def dies(uri, content, storage):
    if uri.endswith("0000000064/training.safetensors"):
        with staged(uri, storage) as path:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    write_bytes(uri, content, storage)
checkpoint.write_bytes = dies
torch.set_num_threads(1)
train_here(pickle.load(open(sys.argv[1], "rb")))
"""


def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path: Path, data: DataConfig) -> None:
    plan = small_plan(tmp_path / "killed", data, total_kimg=0.128)
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "plan")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == -9, done.stderr
    half = tmp_path / "killed" / "checkpoints" / "0000000064"
    assert (half / "generator.safetensors").exists() and list(half.glob(".training*"))
    assert list_checkpoints(plan.folder, plan.storage) == [0, 32]
    resumed = run(plan)
    assert resumed.resumed_from == 32
    undisturbed = run(small_plan(tmp_path / "fair", data, total_kimg=0.128))
    assert files_of(resumed) == files_of(undisturbed)
    assert files_of(resumed, 64) == files_of(undisturbed, 64)


def train_together(world: World, fair: Plan, blocked: Plan) -> list[str]:
    """What two trainings came to: one whose last checkpoint stands, one whose cannot."""
    outcome = train(fair, world, CPU)
    stands = list_checkpoints(fair.folder, fair.storage)[-1:] == [outcome.images_seen]
    try:
        train(blocked, world, CPU, [Blocks(Path(blocked.folder) / "checkpoints", 32)])
    except StorageError as error:
        return [str(stands), str(error)]
    return [str(stands), "no error"]


@pytest.mark.slow
def test_every_worker_knows_whether_the_last_one_stands(tmp_path: Path, data: DataConfig) -> None:
    fair, blocked = (small_plan(tmp_path / name, data, total_kimg=0.032) for name in ("fair", "blocked"))
    blocked = replace(blocked, storage=StorageConfig(total_timeout_s=0.2))
    first, second = on_workers(train_together, [2], tmp_path / "workers", fair, blocked)[2]
    assert first[0] == second[0] == "True"
    assert "checkpoints/0000000032" in first[1]
    assert "rank 0 could not write the last checkpoint" in second[1]
