"""The loop: resume equals no interruption, bit for bit; bad trainings are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.manifest import DataError, read_manifest
from pipeline.data.stream import DataConfig
from pipeline.models.cips import Generator
from pipeline.storage import StorageConfig
from pipeline.training.checkpoint import CheckpointError, list_checkpoints
from pipeline.training.loop import Outcome, Plan, TrainingDiverged, train
from pipeline.training.observers import Observer, Tick, read_log
from pipeline.training.world import World
from tests.small import small_data, small_plan

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return small_data(tmp_path_factory.mktemp("data"))


class Interrupted(Exception):
    """Stands for a crash in a test."""


class StopsAt(Observer):
    """Crashes the training at a count of images, before the checkpoint there is written."""

    def __init__(self, images_seen: int) -> None:
        self.images_seen = images_seen

    def tick(self, tick: Tick) -> None:
        if tick.images_seen == self.images_seen:
            raise Interrupted


class Watcher(Observer):
    """Remembers what it was told, and in which order."""

    def __init__(self) -> None:
        self.ticks: list[Tick] = []
        self.sheets: list[tuple[str, int]] = []
        self.events: list[tuple[str, int]] = []
        self.checkpoints: list[int] = []
        self.log: list[int] = []
        self.closed = False

    def resumed(self, images_seen: int, log: list[dict[str, Any]]) -> None:
        self.log = [line["images_seen"] for line in log]
        self.events.append(("resumed", images_seen))

    def tick(self, tick: Tick) -> None:
        self.ticks.append(tick)
        self.events.append(("tick", tick.images_seen))

    def sheet(self, name: str, images_seen: int, image_HWC: np.ndarray) -> None:
        self.sheets.append((name, images_seen))

    def checkpoint(self, folder: str, images_seen: int, results: list[dict[str, Any]]) -> None:
        self.checkpoints.append(images_seen)
        self.events.append(("checkpoint", images_seen))

    def close(self) -> None:
        self.closed = True
        self.events.append(("closed", 0))


def run(plan: Plan, *observers: Observer, **options: Any) -> Outcome:
    return train(plan, World(), CPU, observers, **options)


def files_of(outcome: Outcome, images_seen: int | None = None) -> dict[str, bytes]:
    last = Path(outcome.checkpoint)
    folder = last if images_seen is None else last.with_name(f"{images_seen:010d}")
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("patch", [{}, {"patch": {"size": 8, "strides": [1, 2]}}], ids=["whole", "patches"])
def test_a_crash_costs_time_never_correctness(tmp_path: Path, data: DataConfig, patch: dict[str, Any]) -> None:
    undisturbed = run(small_plan(tmp_path / "a", data, total_kimg=0.128, **patch))
    plan = small_plan(tmp_path / "b", data, total_kimg=0.128, **patch)
    with pytest.raises(Interrupted):
        run(plan, StopsAt(96))
    assert list_checkpoints(plan.folder, plan.storage)[-1] == 64
    resumed = run(plan)
    assert (undisturbed.resumed_from, resumed.resumed_from) == (0, 64)
    assert files_of(undisturbed) == files_of(resumed)
    assert len(files_of(resumed)) == 2
    losses = [[line["scalars"] for line in read_log(str(tmp_path / name), StorageConfig())] for name in "ab"]
    assert losses[0] == losses[1]
    assert [line["images_seen"] for line in read_log(plan.folder, plan.storage)] == [0, 32, 64, 96, 128]


def test_a_longer_training_goes_on_where_the_shorter_ended(tmp_path: Path, data: DataConfig) -> None:
    run(small_plan(tmp_path / "a", data, total_kimg=0.032))
    longer = run(small_plan(tmp_path / "a", data, total_kimg=0.064))
    straight = run(small_plan(tmp_path / "b", data, total_kimg=0.064))
    assert longer.resumed_from == 32
    assert files_of(longer) == files_of(straight)


def test_a_finished_training_does_nothing_more(tmp_path: Path, data: DataConfig) -> None:
    plan = small_plan(tmp_path / "a", data)
    first, watcher = run(plan), Watcher()
    again = run(plan, watcher)
    assert again.resumed_from == again.images_seen == first.images_seen
    assert watcher.ticks == [] and watcher.closed


def test_what_is_told_and_what_lies_in_the_folder(tmp_path: Path, data: DataConfig) -> None:
    watcher = Watcher()
    outcome = run(small_plan(tmp_path, data), watcher)
    assert [tick.images_seen for tick in watcher.ticks] == [0, 32, 64]
    assert watcher.sheets == [("reals", 0), ("samples", 0), ("samples", 32), ("samples", 64)]
    assert watcher.checkpoints == [0, 32, 64]
    assert watcher.closed
    assert outcome.images_seen == 64 and outcome.checkpoint.endswith("0000000064")
    assert set(watcher.ticks[1].scalars) == {"loss/D", "loss/G", "loss/r1", "scores/real", "scores/fake"}
    assert "progress/kimg" in watcher.ticks[1].metrics() and "timing/data_wait_share" in watcher.ticks[1].metrics()
    assert 0 <= watcher.ticks[1].wait_share < 1
    with Image.open(tmp_path / "samples" / "0000000064.png") as sheet:
        assert sheet.size == (33, 33)
    with Image.open(tmp_path / "reals.png") as reals:
        assert np.asarray(reals).std() > 5


def test_distances_are_measured_where_asked_and_kept_with_the_checkpoint(tmp_path: Path, data: DataConfig) -> None:
    def evaluate(generator: Generator, images_seen: int) -> dict[str, Any]:
        assert not generator.training
        return {"metric": "fd_test", "value": 100.0 - images_seen, "protocol": {"images": 1}}

    plan = small_plan(tmp_path, data, evaluate_kimg=0.032, keep_checkpoints=1)
    outcome = run(plan, evaluate=evaluate)
    assert outcome.results == [{"metric": "fd_test", "value": 36.0, "protocol": {"images": 1}}]
    index = json.loads((Path(outcome.checkpoint) / "checkpoint.json").read_text())
    assert index["results"] == outcome.results
    assert [line["results"][0]["value"] for line in read_log(plan.folder, plan.storage)] == [100.0, 68.0, 36.0]
    assert run(plan, evaluate=evaluate).results == outcome.results


def test_pruning_spares_the_best(tmp_path: Path, data: DataConfig) -> None:
    values = iter([9.0, 1.0, 5.0, 6.0, 7.0])

    def evaluate(generator: Generator, images_seen: int) -> dict[str, Any]:
        return {"metric": "fd_test", "value": next(values), "protocol": {}}

    plan = small_plan(tmp_path, data, total_kimg=0.128, evaluate_kimg=0.032, keep_checkpoints=1)
    run(plan, evaluate=evaluate)
    assert list_checkpoints(plan.folder, plan.storage) == [32, 128]


def test_evaluation_without_the_means_is_refused(tmp_path: Path, data: DataConfig) -> None:
    with pytest.raises(ValueError, match="train.evaluate_kimg is set"):
        run(small_plan(tmp_path, data, evaluate_kimg=1.0))


def test_a_store_that_fails_for_a_while_costs_no_training(
    tmp_path: Path, data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something stands in the way of the checkpoint at 32 images: the training goes on, later ones are written."""
    plan = small_plan(tmp_path, data, total_kimg=0.128, checkpoint_kimg=0.032)
    blocked = tmp_path / "checkpoints" / "0000000032" / "generator.safetensors"

    class Weather(Observer):
        def tick(self, tick: Tick) -> None:
            if tick.images_seen == 32:
                blocked.mkdir(parents=True)

    outcome = run(plan, Weather())
    assert "no checkpoint at 32 images" in capsys.readouterr().out
    assert outcome.images_seen == 128
    assert 32 not in list_checkpoints(plan.folder, plan.storage)
    assert files_of(outcome) == files_of(run(small_plan(tmp_path / "fair", data, total_kimg=0.128)))


def test_a_crash_before_the_second_checkpoint_repeats_no_start(tmp_path: Path, data: DataConfig) -> None:
    plan = small_plan(tmp_path, data, checkpoint_kimg=0.064)
    with pytest.raises(Interrupted):
        run(plan, StopsAt(32))
    watcher = Watcher()
    run(plan, watcher)
    assert [tick.images_seen for tick in watcher.ticks] == [32, 64]
    assert [line["images_seen"] for line in read_log(plan.folder, plan.storage)] == [0, 32, 64]


def test_keys_younger_than_a_checkpoint_take_their_defaults(tmp_path: Path, data: DataConfig) -> None:
    plan = small_plan(tmp_path, data, total_kimg=0.032)
    index = Path(run(plan).checkpoint) / "checkpoint.json"
    saved = json.loads(index.read_text())
    del saved["config"]["train"]["ema_rampup"]
    index.write_text(json.dumps(saved))
    assert run(small_plan(tmp_path, data, total_kimg=0.064)).resumed_from == 32


def test_losses_that_are_not_finite_stop_the_run(tmp_path: Path, data: DataConfig) -> None:
    plan = small_plan(tmp_path, data, learning_rate=1e30)
    with pytest.raises(TrainingDiverged) as stopped:
        run(plan)
    assert "between 0 and 32 images" in str(stopped.value)
    assert "0000000000" in str(stopped.value) and "train.precision=fp32" in str(stopped.value)
    assert list_checkpoints(plan.folder, plan.storage) == [0]


def test_another_configuration_is_refused(tmp_path: Path, data: DataConfig) -> None:
    run(small_plan(tmp_path, data, total_kimg=0.032))
    with pytest.raises(CheckpointError, match=r"train.r1_gamma: 1.0 in the checkpoint, 5.0 now"):
        run(small_plan(tmp_path, data, r1_gamma=5.0))


def test_another_data_set_is_refused(tmp_path: Path, data: DataConfig) -> None:
    run(small_plan(tmp_path / "run", data, total_kimg=0.032))
    other = small_data(tmp_path / "other", count=39)
    with pytest.raises(CheckpointError, match="trained on the data set"):
        run(small_plan(tmp_path / "run", other))


def test_pictures_that_stand_in_for_damaged_ones_are_counted(tmp_path: Path) -> None:
    """One shard of the data set is lost: with data.on_corrupt=skip the run ends well, and its log says how often."""
    data = small_data(tmp_path, row_group_rows=10, shard_bytes=5_000)
    manifest = read_manifest(data.uri, StorageConfig())
    lost = manifest.shards[0]
    Path(data.uri, lost.file).unlink()
    with pytest.raises(DataError, match=f"{lost.file}, row group 0: missing"):
        run(small_plan(tmp_path / "fails", data))
    plan = small_plan(tmp_path / "skips", data.model_copy(update={"on_corrupt": "skip"}), total_kimg=0.08)
    assert run(plan).images_seen == 80  # two epochs of 40 pictures
    replaced = [line["scalars"].get("data/replaced", 0) for line in read_log(plan.folder, plan.storage)]
    assert sum(replaced) == 2 * lost.rows


def test_pictures_of_another_size_are_refused(tmp_path: Path, data: DataConfig) -> None:
    plan = small_plan(tmp_path, data)
    with pytest.raises(DataError, match="model.size is 32, but the data set holds pictures of 16x16"):
        run(Plan(**{**plan.__dict__, "model": plan.model.model_copy(update={"size": 32})}))
