"""A disk that fills up under a training: the cache steps aside, a checkpoint fails by name, nothing good is lost."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.stream import DataConfig
from pipeline.ingest.ingest import IngestConfig, ingest
from pipeline.storage import StorageConfig, StorageError
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.loop import Plan
from pipeline.training.observers import Tick, read_log
from tests.ddp import one_thread
from tests.servers import S3Server
from tests.small import small_data, small_pictures, small_plan
from tests.small_disk import fill, small_disk
from tests.test_training_checkpoint_writer import writing_threads
from tests.test_training_loop import Watcher, files_of, run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> dict[str, bytes]:
    with one_thread():  # before that of the tests: another number of threads adds up in another order
        return files_of(run(plan_in(tmp_path_factory.mktemp("fair"), data)))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        yield disk


def plan_in(folder: Path, data: DataConfig) -> Plan:
    return small_plan(folder, data, total_kimg=0.128, keep_checkpoints=9)


class Fills(Watcher):
    """Fills the disk before the checkpoint at one count of images, and makes room again before that at another."""

    def __init__(self, disk: Path, full: int, room: int | None = None) -> None:
        super().__init__()
        self.disk, self.full, self.room = disk, full, room

    def tick(self, tick: Tick) -> None:
        super().tick(tick)
        if tick.images_seen in (self.full, self.room):
            for thread in writing_threads():
                thread.join()
        if tick.images_seen == self.full:
            fill(self.disk)
        if tick.images_seen == self.room:
            (self.disk / "filler").unlink()


def test_a_full_disk_costs_a_checkpoint_and_no_training(
    disk: Path, data: DataConfig, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_in(disk / "run", data)
    outcome = run(plan, Fills(disk, full=64, room=96))
    said = r"no checkpoint at 64 images: \S+: the disk at (\S+) is full: (\S+) kB were to be written, (\S+) kB are free"
    found = re.search(said, capsys.readouterr().out)
    assert found is not None and found[1] == str(disk)
    assert float(found[2]) > float(found[3]), "what was wanted is more than what is free"
    assert list_checkpoints(plan.folder, plan.storage) == [0, 32, 96, 128]
    assert files_of(outcome) == undisturbed
    assert [line["images_seen"] for line in read_log(plan.folder, plan.storage)] == [0, 32, 64, 96, 128]
    assert not (disk / "run" / "checkpoints" / "0000000064").exists()


def test_a_disk_that_stays_full_ends_the_run_with_its_name(
    disk: Path, data: DataConfig, undisturbed: dict[str, bytes]
) -> None:
    plan = replace(plan_in(disk / "run", data), storage=StorageConfig(total_timeout_s=0.5))
    watcher = Fills(disk, full=64)
    words = rf"0000000128/\S+: the disk at {disk} is full: .* were to be written, .* are free"
    with pytest.raises(StorageError, match=words):
        run(plan, watcher)
    assert [tick.images_seen for tick in watcher.ticks] == [0, 32, 64, 96, 128], "training went on to its end"
    assert list_checkpoints(plan.folder, plan.storage) == [0, 32]
    (disk / "filler").unlink()
    again = run(plan)
    assert again.resumed_from == 32
    assert files_of(again) == undisturbed


def test_a_cache_whose_disk_is_full_steps_aside(
    s3: S3Server, disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Told once; training goes on with what the store gives, and the same pictures."""
    source = small_pictures(tmp_path / "pictures", 200)
    uri = f"s3://{s3.new_bucket()}/data"
    ingest(IngestConfig(source=str(source), size=16, row_group_rows=4), uri, StorageConfig(), progress=False)
    data = DataConfig(uri=uri, decoder="pillow", read_ahead=1, shuffle_row_groups=1)
    fair = files_of(run(plan_in(tmp_path / "fair", data)))
    cached = data.model_copy(update={"cache_bytes": 1 << 30, "cache_dir": str(disk / "cache")})
    with caplog.at_level(logging.WARNING, logger="pipeline.data.cache"):
        outcome = run(plan_in(tmp_path / "cached", cached), Fills(disk, full=0))
    told = [record.getMessage() for record in caplog.records]
    assert any(path.name != "lock" for path in (disk / "cache").iterdir()), "it was used before"
    assert len(told) == 1 and told[0].startswith(f"the cache in {disk}/cache is not used any more: "), told
    assert "No space left on device" in told[0] and "free or mend the disk" in told[0]
    assert files_of(outcome) == fair
