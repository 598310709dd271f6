"""A training whose store dies, is overloaded, refuses or is full: it goes on, and ends as if nothing had happened."""

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from jobs import train
from pipeline.config import load_config
from pipeline.data.stream import DataConfig
from pipeline.ingest.ingest import IngestConfig, ingest
from pipeline.storage import StorageConfig, StorageError
from pipeline.tracking.recording import register_best
from pipeline.training.checkpoint import (
    GENERATOR,
    TRAINING,
    checkpoint_folder,
    list_checkpoints,
    read_info,
    read_tensors,
)
from pipeline.training.loop import Outcome, Plan
from pipeline.training.observers import Tick, read_log
from tests.ddp import one_thread
from tests.mlflow_server import sqlite_uri
from tests.proxy import Fault, FaultProxy, Request, fault_proxy
from tests.servers import S3Server, s3_server
from tests.small import SMALL_SETTINGS, small_data, small_pictures, small_plan
from tests.small_disk import fill, small_disk
from tests.test_training_checkpoint_writer import writing_threads
from tests.test_training_loop import Watcher, run

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

AWAY_S = 4.0
TICKS = [0, 32, 64, 96, 128]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return small_data(tmp_path_factory.mktemp("data"), row_group_rows=4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> dict[str, str]:
    """The hashes of what every training here must end with."""
    plan = small_plan(tmp_path_factory.mktemp("fair"), data, total_kimg=0.128)
    with one_thread():  # before that of the tests: another number of threads adds up in another order
        return hashes(run(plan).checkpoint, plan.storage)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """One that a test may kill, fill or lock, and that this process's environment points to."""
    with s3_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.endpoint) as proxy:
        yield proxy


def hashes(folder: str, storage: StorageConfig) -> dict[str, str]:
    """Of all tensors of a checkpoint."""
    files = read_info(folder, storage).files
    return {name: files[name]["sha256"] for name in (GENERATOR, TRAINING)}


def plan_on(server: S3Server, folder: Path, data: DataConfig, **storage: object) -> Plan:
    """A training of 128 images whose run lies in a bucket of its own; every tick has a checkpoint, and all stay."""
    plan = small_plan(folder, data, total_kimg=0.128, keep_checkpoints=9)
    settings = {"attempts": 2, "connect_timeout_s": 2.0, "total_timeout_s": 60.0} | storage
    return replace(plan, folder=f"s3://{server.new_bucket()}/run", storage=StorageConfig.model_validate(settings))


def is_write_to(text: str) -> Callable[[Request], bool]:
    return lambda request: request.method in ("PUT", "POST") and text in request.path


class DiesAtARequest:
    """Kills the server in the middle of a certain upload, and starts it again some seconds later."""

    def __init__(self, server: S3Server, proxy: FaultProxy, matches: Callable[[Request], bool], seconds: float) -> None:
        self.server, self.matches = server, matches
        self.away = threading.Event()
        self.restart = threading.Timer(seconds, self._start)
        proxy.plan([Fault("status")], self._look)

    def _look(self, request: Request) -> bool:
        if self.matches(request) and not self.away.is_set() and not self.restart.ident:
            self.server.stop()
            self.away.set()
            self.restart.start()
        return False  # no answer is spoiled: there is nobody left to give one

    def _start(self) -> None:
        self.server.start()
        self.away.clear()


class NotesOutage(Watcher):
    """Remembers which ticks were told while the store was away."""

    def __init__(self, outage: DiesAtARequest) -> None:
        super().__init__()
        self.outage, self.told_meanwhile = outage, [-1]

    def tick(self, tick: Tick) -> None:
        super().tick(tick)
        if tick.images_seen == 96:
            assert self.outage.away.wait(60), "nobody wrote the checkpoint at 64 images"
        if self.outage.away.is_set():
            self.told_meanwhile.append(tick.images_seen)


def check_whole(plan: Plan, outcome: Outcome, undisturbed: dict[str, str]) -> None:
    """The run came to its end, with the weights of one that nothing disturbed and a log without gaps."""
    assert outcome.images_seen == 128
    assert hashes(outcome.checkpoint, plan.storage) == undisturbed
    assert [line["images_seen"] for line in read_log(plan.folder, plan.storage)] == TICKS


def test_the_store_dies_in_the_middle_of_a_checkpoint(
    server: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    data: DataConfig,
    undisturbed: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training goes on to its end without a store, and then waits for it with the last checkpoint."""
    plan = plan_on(server, tmp_path, data, endpoint=proxy.endpoint)
    outage = DiesAtARequest(server, proxy, is_write_to("0000000064/training"), AWAY_S)
    watcher = NotesOutage(outage)
    outcome = run(plan, watcher)
    outage.restart.join()
    assert watcher.told_meanwhile == [-1, 96, 128]
    printed = capsys.readouterr().out
    assert f"no checkpoint at 64 images: {checkpoint_folder(plan.folder, 64)}/training" in printed
    assert "training goes on, log lines wait" in printed
    check_whole(plan, outcome, undisturbed)
    assert list_checkpoints(plan.folder, plan.storage) == [0, 32, 128]
    # What the failed ones left is gone.
    names = server.filesystem().get_file_info(pafs.FileSelector(f"{plan.folder.removeprefix('s3://')}/checkpoints"))
    assert sorted(info.base_name for info in names) == ["0000000000", "0000000032", "0000000128"]

    # A worker that is started while the store is away waits for it, and says so.
    server.stop()
    back = threading.Timer(2.0, server.start)
    back.start()
    assert run(plan).resumed_from == 128
    back.join()
    assert "looking for checkpoints: waiting for the store, " in capsys.readouterr().out


def test_the_store_of_the_pictures_dies_too(server: S3Server, proxy: FaultProxy, tmp_path: Path) -> None:
    """Pictures, run and all in one store: training waits for the next pictures and loses none."""
    source = small_pictures(tmp_path / "pictures", 120)
    uri = f"s3://{server.new_bucket()}/data"
    ingest(IngestConfig(source=str(source), size=16, row_group_rows=4), uri, StorageConfig(), progress=False)
    data = DataConfig(uri=uri, decoder="pillow", read_ahead=1, shuffle_row_groups=1)
    fair = replace(small_plan(tmp_path, data, total_kimg=0.128), folder=str(tmp_path / "fair"))
    expected = hashes(run(fair).checkpoint, fair.storage)

    plan = plan_on(server, tmp_path, data, endpoint=proxy.endpoint)
    outage = DiesAtARequest(server, proxy, is_write_to("0000000064/generator"), AWAY_S)
    outcome = run(plan)
    outage.restart.join()
    check_whole(plan, outcome, expected)


@pytest.mark.parametrize("attempts", [5, 1], ids=["bridged", "failed"])
def test_a_store_that_is_overloaded_during_a_checkpoint(
    server: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    data: DataConfig,
    undisturbed: dict[str, str],
    attempts: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A few answers of 503 pass within the tries of a request; with one try the next checkpoint stands in for it."""
    plan = plan_on(server, tmp_path, data, endpoint=proxy.endpoint, attempts=attempts)
    proxy.plan([Fault("status")] * 3, is_write_to("0000000064/training"))
    outcome = run(plan)
    check_whole(plan, outcome, undisturbed)
    printed = capsys.readouterr().out
    if attempts == 5:
        assert proxy.pending == 0 and "no checkpoint" not in printed
        assert list_checkpoints(plan.folder, plan.storage) == TICKS
    else:
        assert "no checkpoint at 64 images: " in printed and "SLOW_DOWN" in printed
        assert "it is overloaded, or there is no room for bucket" in printed
        assert list_checkpoints(plan.folder, plan.storage) == [0, 32, 96, 128]


class At64(Watcher):
    """Does something to the store before the checkpoint at 64 images."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__()
        self.action = action

    def tick(self, tick: Tick) -> None:
        super().tick(tick)
        if tick.images_seen == 64:
            for thread in writing_threads():  # the checkpoint before it is not to be hit
                thread.join()
            self.action()


def test_a_bucket_that_may_only_be_read_from_some_moment_on(
    server: S3Server,
    tmp_path: Path,
    data: DataConfig,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = {"name": "reader", "credentials": [{"accessKey": "reader", "secretKey": "readers-secret"}]}
    identities = server.log.with_name("s3.json")
    known = json.loads(identities.read_text())
    known["identities"].append(reader | {"actions": ["Read", "List"]})
    server.stop()
    identities.write_text(json.dumps(known))
    server.start()

    def lock() -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "readers-secret")

    plan = plan_on(server, tmp_path, data, total_timeout_s=1.0)
    watcher = At64(lock)
    with pytest.raises(StorageError) as ended:
        run(plan, watcher)
    assert [tick.images_seen for tick in watcher.ticks] == TICKS, "training went on to its end"
    bucket = plan.folder.split("/")[2]
    assert str(ended.value).startswith(f"{checkpoint_folder(plan.folder, 128)}/{GENERATOR}: ")
    assert f"refused access to bucket '{bucket}'" in str(ended.value)
    assert "check AWS_ACCESS_KEY_ID" in str(ended.value) and "what that key may do in the bucket" in str(ended.value)
    assert f"no checkpoint at 64 images: {checkpoint_folder(plan.folder, 64)}" in capsys.readouterr().out

    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    assert list_checkpoints(plan.folder, plan.storage) == [0, 32]
    again = run(plan)
    assert again.resumed_from == 32
    check_whole(plan, again, undisturbed)


def test_a_job_waits_for_the_store_at_its_start_and_end(
    server: S3Server, tmp_path: Path, data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SMALL_SETTINGS, "train.precision=fp32", "train.total_kimg=0.016", "cluster.backend=local"]
    places = [f"data.uri={data.uri}", "data.decoder=pillow", f"run.dir=s3://{server.new_bucket()}", "run.name=patient"]
    patience = ["storage.attempts=2", "storage.connect_timeout_s=2", "storage.total_timeout_s=60"]
    tracking = [f"tracking.uri={sqlite_uri(tmp_path)}", "tracking.model_name=patient"]
    config = load_config(None, [*settings, *places, *patience, *tracking])

    def away() -> threading.Timer:
        server.stop()
        comeback = threading.Timer(AWAY_S, server.start)
        comeback.start()
        return comeback

    comeback = away()
    trained = train.run(config)
    comeback.join()
    assert "looking at data and checkpoints: waiting for the store, " in capsys.readouterr().out
    assert list_checkpoints(config.run_uri, config.storage)[-1] == trained.outcome.images_seen == 16

    assert trained.tracking_run is not None
    comeback = away()
    assert register_best(config, trained.tracking_run) == trained.version == "1"
    comeback.join()
    assert "the record of the run: waiting for the store, " in capsys.readouterr().out


def test_a_store_without_room(
    tmp_path: Path,
    data: DataConfig,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk under the store fills up: training goes on to its end, and the last good checkpoint is there."""
    with small_disk(tmp_path / "disk", megabytes=1000) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with s3_server() as server:
            monkeypatch.setattr(tempfile, "tempdir", None)
            for name, value in server.environment().items():
                monkeypatch.setenv(name, value)
            plan = plan_on(server, tmp_path, data, total_timeout_s=1.0)
            fillers = list[Path]()
            watcher = At64(lambda: fillers.append(fill(disk)))
            with pytest.raises(StorageError) as ended:
                run(plan, watcher)
            assert [tick.images_seen for tick in watcher.ticks] == TICKS
            bucket = plan.folder.split("/")[2]
            assert f"no room for bucket '{bucket}': check its logs and its disks" in str(ended.value)
            printed = capsys.readouterr().out
            assert "no checkpoint at 64 images: " in printed
            assert list_checkpoints(plan.folder, plan.storage) == [0, 32], printed
            info = read_info(checkpoint_folder(plan.folder, 32), plan.storage)
            for name in (GENERATOR, TRAINING):
                assert read_tensors(checkpoint_folder(plan.folder, 32), name, info, plan.storage), "it is whole"

            fillers[0].unlink()  # somebody makes room, and gives the same command again
            server.stop()  # part of this server's index refuses to write until it is started again
            server.start()
            patient = replace(plan, storage=plan.storage.model_copy(update={"total_timeout_s": 60.0}))
            again = run(patient)
            assert again.resumed_from == 32
            check_whole(patient, again, undisturbed)
