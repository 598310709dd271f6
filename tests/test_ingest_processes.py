"""Parts in processes of this machine: what they raise, and what happens when one dies."""

import os
import signal
import subprocess
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.manifest import DataError
from pipeline.ingest.ingest import IngestConfig, IngestReport, ingest
from pipeline.ingest.making import Job
from pipeline.ingest.parts import Part
from pipeline.ingest.processes import run_in_processes, worker_count
from pipeline.ingest.records import PartRecord
from pipeline.storage import StorageConfig, StorageError
from tests.pictures import picture_files, write_folder

STORAGE = StorageConfig()


def run(source: Path, uri: Path, action: Callable[[], object] = lambda: None, **settings: Any) -> IngestReport:
    """With something that happens after the first part."""

    def runner(job: Job, parts: Iterable[Part], tick: Callable[[int], object]) -> Generator[PartRecord]:
        for count, record in enumerate(run_in_processes(job, parts, tick)):
            if count == 0:
                action()
            yield record

    small = {"source": str(source), "size": 16, "part_pictures": 4, "workers": 2}
    config = IngestConfig.model_validate(small | settings)
    return ingest(config, str(uri), STORAGE, progress=False, run_parts=runner)


def children() -> list[int]:
    """Processes of an ingest that this process has started and that are there."""
    command = ["pgrep", "-P", str(os.getpid()), "-f", "pipeline.ingest.processes"]
    return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]


def test_a_process_that_dies_is_named_and_what_is_done_stays(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(60)), tmp_path / "out"

    def kill() -> None:
        assert len(children()) == 2
        for pid in children():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(DataError, match=r"process \d+ of the ingest was ended by SIGKILL while it made part \d+; .*"):
        run(source, out, kill)
    assert children() == []
    again = run(source, out)
    assert again.parts_before >= 1 and children() == []
    assert again.digest == run(source, tmp_path / "other", workers=1).digest


def test_what_a_process_raises_is_raised_here(tmp_path: Path) -> None:
    files = picture_files(12) | {"z.png": b"no picture"}
    source, out = write_folder(tmp_path / "in", files), tmp_path / "out"
    with pytest.raises(DataError, match="z.png cannot be decoded.*strict"):
        run(source, out, strict=True)
    assert children() == []
    with pytest.raises(StorageError, match="z.png: there is no such file"):
        run(write_folder(tmp_path / "lost", files), tmp_path / "b", lambda: (tmp_path / "lost" / "z.png").unlink())
    assert children() == []


def test_a_small_ingest_starts_no_process(tmp_path: Path) -> None:
    seen: list[int] = []
    source = write_folder(tmp_path / "in", picture_files(8))
    run(source, tmp_path / "one", lambda: seen.extend(children()), part_pictures=100)
    run(source, tmp_path / "two", lambda: seen.extend(children()), workers=1)
    assert seen == []


def test_progress_counts_every_place(tmp_path: Path) -> None:
    source, counts = write_folder(tmp_path / "in", picture_files(30)), list[int]()

    def runner(job: Job, parts: Iterable[Part], tick: Callable[[int], object]) -> Generator[PartRecord]:
        yield from run_in_processes(job, parts, counts.append)

    config = IngestConfig(source=str(source), size=16, part_pictures=4, workers=3)
    ingest(config, str(tmp_path / "out"), STORAGE, progress=False, run_parts=runner)
    assert sum(counts) == 30


def test_workers_by_default_are_the_cores() -> None:
    assert worker_count(3) == 3
    assert worker_count(0) == len(os.sched_getaffinity(0))
