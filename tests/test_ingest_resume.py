"""An ingest that is stopped, disturbed or doubled: what is done stays, and nothing wrong looks finished."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.manifest import DataError, read_manifest
from pipeline.ingest.ingest import IngestConfig, IngestReport, TileConfig, ingest, preview
from pipeline.ingest.making import Job
from pipeline.ingest.parts import Part
from pipeline.ingest.processes import run_here
from pipeline.ingest.records import PartRecord, Superseded
from pipeline.ingest.verify import verify
from pipeline.storage import StorageConfig, StorageError, exists
from tests.pictures import BLUE_MARBLE, encoded, picture_files, write_folder
from tests.servers import S3Server

STORAGE = StorageConfig()
ROOT = BLUE_MARBLE.parents[3]
DEADLINE_S = 60.0
KILLED = """
import sys
from pipeline.ingest.ingest import *
config = IngestConfig.model_validate_json(sys.argv[1])
ingest(config, sys.argv[2], StorageConfig(), progress=False)
"""


def run(source: Path, uri: Path | str, **settings: Any) -> IngestReport:
    """In this process, in parts of four pictures."""
    small = {"source": str(source), "size": 16, "part_pictures": 4, "workers": 1}
    return ingest(IngestConfig.model_validate(small | settings), str(uri), STORAGE, progress=False)


def interrupted(
    source: Path, uri: Path | str, action: Callable[[], object], after: int = 1, **settings: Any
) -> IngestReport:
    """The same, with something that happens after so many parts."""

    def parts_with_action(job: Job, parts: Iterable[Part], tick: Callable[[int], object]) -> Generator[PartRecord]:
        for count, record in enumerate(run_here(job, parts, tick), 1):
            if count == after:
                action()
            yield record

    small = {"source": str(source), "size": 16, "part_pictures": 4}
    config = IngestConfig.model_validate(small | settings)
    return ingest(config, str(uri), STORAGE, progress=False, run_parts=parts_with_action)


def stop() -> None:
    raise KeyboardInterrupt


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Identity and time of each shard: a shard that was written again has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("shard-*")}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "ingest-report.json"}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be disturbed"
        time.sleep(0.001)


def tiles(workers: int) -> IngestConfig:
    """Twelve parts that take a while each, since each decodes the Blue Marble."""
    tile = TileConfig(size=32, stride=64)
    return IngestConfig(
        source=str(BLUE_MARBLE), size=32, tile=tile, part_pictures=125, row_group_rows=64, workers=workers
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> IngestReport:
    folder = tmp_path_factory.mktemp("undisturbed")
    return ingest(tiles(1), str(folder), STORAGE, progress=False)


def wait_for_the_end_of_session(number: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            os.killpg(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError(f"processes of session {number} outlive the ingest")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_ingest_goes_on_where_it_was(
    tmp_path: Path, workers: int, undisturbed: IngestReport, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiles(workers)
    assert undisturbed.parts == 12
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, config.model_dump_json(), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    wait_until(lambda: len(list(out.glob(".ingest/part-*.json"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_for_the_end_of_session(process.pid)  # its processes notice that nobody listens any more
    with pytest.raises(DataError, match="no manifest.json at .*out: the ingest did not finish.*ingest again"):
        read_manifest(str(out), STORAGE)
    done = {re.findall(r"\d+", path.name)[0] for path in out.glob(".ingest/part-*.json")}
    before = {name: identity for name, identity in files(out).items() if name[15:20] in done}
    assert 2 <= len(before) < 12
    prefix = min(before)[:14]
    mine = b"none of the ingest's business"
    (out / "mine.txt").write_bytes(mine)
    (out / f".{prefix}-00007-00.parquet.partial-123").write_bytes(b"left by a kill in the middle of a file")
    (out / f"{prefix}-99999-00.parquet").write_bytes(b"left by an ingest with more shards")
    capsys.readouterr()
    again = ingest(config, str(out), STORAGE, progress=False)
    assert again.digest == undisturbed.digest and again.parts_before >= len(done) and not again.already_done
    assert f"goes on: {again.parts_before} of 12 parts are done" in capsys.readouterr().out
    after = files(out)
    assert {name: after[name] for name in before} == before, "what was done was not done again"
    assert content(out) == content(Path(undisturbed.uri)) | {"mine.txt": mine}


def test_a_stopped_ingest_of_other_pictures_or_settings_is_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupted(source, out, stop, after=3)
    assert len(files(out)) == 3 and capsys.readouterr().out == ""
    with pytest.raises(KeyboardInterrupt):
        interrupted(source, out, stop, format="png")
    assert "unfinished ingest is cleared, since it differs in ingest.format (there keep, asked for png)" in (
        capsys.readouterr().out
    )
    assert len(files(out)) == 1
    write_folder(source, {"part-0/0000.png": encoded(7)})
    report = run(source, out, format="png")
    assert "differs in ingest.source" in capsys.readouterr().out
    assert report.parts_before == 0
    assert verify(str(out), STORAGE, progress=False).problems == ()
    assert run(source, tmp_path / "other", format="png").digest == report.digest
    assert not (out / ".ingest").exists()


def test_a_part_whose_shard_is_gone_is_made_again(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupted(source, out, stop, after=3)
    next(out.glob("shard-*-00001-00.parquet")).unlink()
    assert run(source, out).parts_before == 2
    assert verify(str(out), STORAGE, progress=False).problems == ()


def test_an_interrupted_overwrite_goes_on(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"
    first = run(source, out)
    before = content(out)
    with pytest.raises(KeyboardInterrupt):
        interrupted(source, out, stop, after=3, overwrite=True, format="png")
    assert before.items() <= {path.name: path.read_bytes() for path in out.glob("[!.]*")}.items()
    assert verify(str(out), STORAGE, progress=False).problems == ()
    config = IngestConfig(source=str(source), size=16, part_pictures=4, overwrite=True, format="png")
    foreseen = preview(config, str(out), STORAGE).outcome
    assert foreseen == "goes on: 3 of 5 parts are done; then replaces the data set that is there"
    report = run(source, out, overwrite=True, format="png")
    assert report.parts_before == 3 and report.digest != first.digest
    assert run(source, out, overwrite=True).digest == first.digest


def test_a_killed_overwrite_leaves_the_old_data_set(tmp_path: Path, undisturbed: IngestReport) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"
    old = run(source, out)
    before = content(out)
    config = tiles(2).model_copy(update={"overwrite": True})
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, config.model_dump_json(), str(out)], cwd=ROOT, start_new_session=True
    )
    wait_until(lambda: len(list(out.glob(".ingest/part-*.json"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_for_the_end_of_session(process.pid)
    assert before.items() <= {path.name: path.read_bytes() for path in out.glob("[!.]*")}.items()
    checked = verify(str(out), STORAGE, progress=False)
    assert (checked.problems, checked.digest) == ((), old.digest)
    again = ingest(config, str(out), STORAGE, progress=False)
    assert again.digest == undisturbed.digest and again.parts_before >= 2
    assert content(out) == content(Path(undisturbed.uri)), "nothing of the old one is left"


def test_a_store_that_fails_an_overwrite_is_not_hidden_by_the_old_data_set(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"
    run(source, out)

    def fail() -> None:
        raise StorageError("no space left")

    others: list[dict[str, Any]] = [{}, {"format": "png"}]
    for settings in others:
        with pytest.raises(StorageError, match="no space left"):
            interrupted(source, out, fail, overwrite=True, **settings)
    assert verify(str(out), STORAGE, progress=False).problems == ()


def test_strict_is_not_forgotten_by_going_on(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(8) | {"a.png": b"none"}), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupted(source, out, stop)
    with pytest.raises(DataError, match="a.png cannot be decoded.*strict"):
        run(source, out, strict=True)
    assert [skipped.path for skipped in run(source, out).skipped] == ["a.png"]


def test_a_kill_after_the_manifest_leaves_a_finished_data_set(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(8)), tmp_path / "out"
    first = run(source, out)
    (out / ".ingest").mkdir()
    (out / ".ingest" / "plan.json").write_text("{}")
    again = run(source, out)
    assert again.already_done and again.digest == first.digest and not (out / ".ingest").exists()


def test_two_ingests_of_the_same_at_once_make_one_data_set(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"
    inner: list[IngestReport] = []
    outer = interrupted(source, out, lambda: inner.append(run(source, out)), after=2)
    assert inner[0].parts_before == 2 and outer.already_done
    assert outer.digest == inner[0].digest
    assert verify(str(out), STORAGE, progress=False).problems == ()


def test_of_two_different_ingests_at_once_the_later_wins_and_the_other_says_so(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"
    with pytest.raises(DataError, match="already holds a data set that differs in ingest.format"):
        interrupted(source, out, lambda: run(source, out, format="png"), after=2)
    assert verify(str(out), STORAGE, progress=False).problems == ()
    assert read_manifest(str(out), STORAGE).parameters["format"] == "png"


def test_an_ingest_whose_place_is_taken_stops(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"

    def other() -> None:
        with pytest.raises(KeyboardInterrupt):
            interrupted(source, out, stop, format="png")

    with pytest.raises(Superseded, match="another ingest has begun at the same place.*ingest.format"):
        interrupted(source, out, other, after=2)
    assert not exists(str(out / "manifest.json"), STORAGE)


def test_a_shard_that_changed_while_the_ingest_ran_is_not_listed(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(20)), tmp_path / "out"
    with pytest.raises(DataError, match=r"-00000-00.parquet: missing or of another size.*\(1 such shards\)"):
        interrupted(source, out, lambda: min(out.glob("shard-*")).write_bytes(b"x"), after=2)
    assert not exists(str(out / "manifest.json"), STORAGE)
    assert run(source, out).parts_before == 4
    assert verify(str(out), STORAGE, progress=False).problems == ()


def test_ctrl_c_ends_all_processes_and_keeps_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.ingest", "--config", "demo", f"data.uri={out}", "ingest.part_pictures=100"]
    process = subprocess.Popen(
        [*command, "ingest.workers=2"], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: bool(list(out.glob(".ingest/part-*.json"))), process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, said
    assert said.splitlines()[-1].endswith("interrupted; the same command goes on where it was")
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):  # nobody of its session is left
        os.killpg(process.pid, 0)
    names = [path.name for path in out.iterdir()]
    assert ".ingest" in names and not [name for name in names if "partial" in name or name == "manifest.json"]


@pytest.mark.integration
def test_an_ingest_on_s3_goes_on(tmp_path: Path, s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    source, uri = write_folder(tmp_path / "in", picture_files(20)), f"s3://{s3.new_bucket()}/some/where"
    with pytest.raises(KeyboardInterrupt):
        interrupted(source, uri, stop, after=3)
    report = run(source, uri)
    assert report.parts_before == 3 and "goes on: 3 of 5" in capsys.readouterr().out
    assert verify(uri, STORAGE, progress=False).problems == ()
    assert report.digest == run(source, tmp_path / "local").digest
    assert not exists(f"{uri}/.ingest", STORAGE)
