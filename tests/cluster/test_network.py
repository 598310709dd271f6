"""Several machines, for real: a head, two nodes of workers and an S3 server, each with an address of its own.

The same command that trains on one machine trains across them, bit for bit the same. One of them loses its power,
another its network cable; the run gets a new machine for each and ends where the undisturbed one ends.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config, load_config, to_yaml
from pipeline.ingest.ingest import IngestConfig, ingest
from pipeline.storage import StorageConfig
from pipeline.training.checkpoint import (
    GENERATOR,
    TRAINING,
    checkpoint_folder,
    list_checkpoints,
    read_info,
    read_tensors,
)
from pipeline.training.notes import read_restarts
from pipeline.training.observers import read_log
from tests.faults import starts
from tests.mlflow_server import check_one_run, mlflow_server
from tests.network import Machine, Network, network
from tests.servers import s3_server
from tests.small import SMALL_CLUSTER_SETTINGS, small_pictures
from tests.without_ray import train_without_ray

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

TOTAL, TICK, CHECKPOINT = 960, 80, 160
SMALL = [
    *SMALL_CLUSTER_SETTINGS,
    f"train.total_kimg={TOTAL / 1000}",
    f"train.tick_kimg={TICK / 1000}",
    f"train.checkpoint_kimg={CHECKPOINT / 1000}",
]
# How the head looks after its nodes: it waits so long for an answer, asks again after a pause, and gives up a node
# that was silent so often.
ANSWER_S, PAUSE_S, SILENT = 2.0, 1.0, 3
HEAD_SETTINGS = {
    "RAY_health_check_timeout_ms": str(round(ANSWER_S * 1000)),
    "RAY_health_check_period_ms": str(round(PAUSE_S * 1000)),
    "RAY_health_check_failure_threshold": str(SILENT),
}
NOTICED_S = (ANSWER_S + PAUSE_S) * SILENT + 15
"""A lost node is noticed within this; 15 seconds for two cores that start a new machine's Ray at the same time."""
RAY = str(Path(sys.executable).parent / "ray")
RAY_PORT = 6379


@dataclass
class Joining:
    """A machine whose Ray starts."""

    machine: Machine
    log: Path
    start: Callable[[], subprocess.Popen[bytes]]

    def __post_init__(self) -> None:
        self.process = self.start()

    def done(self, seconds: float = 180.0) -> Machine:
        """Returns when `ray start` says that it has."""
        deadline = time.monotonic() + seconds
        while "Ray runtime started" not in tail(self.log):
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.machine.name}: Ray did not start in {seconds:g} s\n{tail(self.log)}")
            if self.process.poll() is not None:  # it gives itself 30 s, which are too few where all cores are busy
                self.process = self.start()
            time.sleep(0.1)
        return self.machine


@dataclass
class Run:
    """A training that goes on."""

    config: Config
    log: Path
    process: subprocess.Popen[bytes]

    def ticks(self) -> list[dict[str, Any]]:
        return read_log(self.config.run_uri, self.config.storage)

    def restarts(self) -> list[dict[str, Any]]:
        return read_restarts(self.config.run_uri, self.config.storage)

    def until(self, what: str, is_true: Callable[[], bool], seconds: float = 180.0) -> None:
        """Waits for something that happens while the run goes on."""
        deadline = time.monotonic() + seconds
        while not is_true():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds:g} s, or the run ended before: {what}\n{tail(self.log)}")
            time.sleep(0.1)

    def until_in_the_middle(self) -> None:
        """Until a checkpoint stands and training has gone on from there."""
        folder, storage = self.config.run_uri, self.config.storage
        self.until("a checkpoint", lambda: max(list_checkpoints(folder, storage), default=0) >= CHECKPOINT)
        self.until("a tick after it", lambda: self.ticks()[-1]["images_seen"] > CHECKPOINT)

    def starts(self) -> list[list[str]]:
        """Of each start of the workers, the addresses of their machines by rank."""
        return [[worker["address"] for worker in start] for start in starts(self.config)]

    def recovery(self, number: int, name: str, fault: float) -> float:
        """Waits until training goes on after a restart, counted from 1.

        Returns the seconds from a fault (Unix time) until it was noticed; prints them, and those to the next tick.
        """
        self.until(f"restart {number}", lambda: len(self.restarts()) == number)
        restart = self.restarts()[number - 1]
        self.until("a tick after it", lambda: self.ticks()[-1]["time"] > restart["time"])
        first = next(tick for tick in self.ticks() if tick["time"] > restart["time"])
        assert first["images_seen"] > CHECKPOINT, "training began anew, not from its checkpoint"
        noticed, again = float(restart["time"] - fault), first["time"] - fault
        print(f"{name}: noticed after {noticed:.1f} s, trained again after {again:.1f} s ({restart['cause']})")
        return noticed

    def finish(self) -> dict[str, Any]:
        """Waits for its end, which must be a good one; returns the losses of all ticks and the last tensors."""
        code = self.process.wait(300)
        assert code == 0, tail(self.log)
        return all_of(self.config)


@dataclass
class Site:
    """The machines, and what runs on them."""

    network: Network
    head: Machine
    bucket: str
    tracking_uri: str
    environment: dict[str, str]
    """Of every process: the cluster's token, the store's address and keys."""
    folder: Path
    nodes: list[Machine] = field(default_factory=list)
    """Those that work, the oldest first."""

    @property
    def address(self) -> str:
        return f"{self.head.address}:{RAY_PORT}"

    def start_head(self) -> Joining:
        """A head that runs drivers, and no work."""
        where = [f"--node-ip-address={self.head.address}", f"--port={RAY_PORT}"]
        return self._start(self.head, ["--head", *where, "--num-cpus=0", "--include-dashboard=false"], HEAD_SETTINGS)

    def join(self) -> Joining:
        """Switches on a new machine, whose Ray begins to join the cluster with one CPU."""
        machine = self.network.machine(f"node-{len(self.network.machines) - 1}")
        self.nodes.append(machine)
        return self._start(machine, [f"--address={self.address}", "--num-cpus=1"], {})

    def lose(self, address: str) -> Machine:
        """The node with this address, which from now on is not one of those that work."""
        (lost,) = [node for node in self.nodes if node.address == address]
        self.nodes.remove(lost)
        return lost

    def _start(self, machine: Machine, options: list[str], settings: dict[str, str]) -> Joining:
        log = self.folder / f"{machine.name}.log"
        command = [RAY, "start", "--block", "--object-store-memory=100000000", *options]
        return Joining(machine, log, lambda: machine.start(command, log, self.environment | settings))

    def config(self, name: str, address: str) -> Config:
        places = [f"data.uri=s3://{self.bucket}/data", f"run.dir=s3://{self.bucket}/runs", f"run.name={name}"]
        places += [f"cluster.address={address}", f"tracking.uri={self.tracking_uri}", "tracking.model_name=network"]
        return load_config(None, [*SMALL, "tracking.enabled=true", *places])

    @contextlib.contextmanager
    def training(self, name: str) -> Iterator[Run]:
        """`jobs.train` as a user starts it on the head, with two nodes; it is killed if it has not ended."""
        while len(self.nodes) < 2:
            self.join().done()
        config, log = self.config(name, self.address), self.folder / f"{name}.log"
        process = self.head.start(command_of(config, self.folder), log, self.environment)
        try:
            yield Run(config, log, process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def command_of(config: Config, folder: Path) -> list[str]:
    path = folder / f"{config.run.name}.yaml"
    path.write_text(to_yaml(config))
    return [sys.executable, "-m", "jobs.train", "--config", str(path)]


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def workers_on(machine: Machine) -> int:
    """How many of Ray Train's workers run on a machine: Ray names their processes by class."""
    return sum("RayTrainWorker" in command for command in machine.processes())


def all_of(config: Config) -> dict[str, Any]:
    """What a finished run came to: the losses of each tick, and each tensor of the last checkpoint."""
    ticks = read_log(config.run_uri, config.storage)
    assert [tick["images_seen"] for tick in ticks] == list(range(0, TOTAL + 1, TICK))
    folder = checkpoint_folder(config.run_uri, TOTAL)
    info = read_info(folder, config.storage)
    tensors = [read_tensors(folder, name, info, config.storage) for name in (GENERATOR, TRAINING)]
    return {"losses": [tick["scalars"] for tick in ticks], "tensors": tensors[0] | tensors[1]}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == expected["losses"]
    mine, theirs = found["tensors"], expected["tensors"]
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The head, and a machine with the pictures in S3 and MLflow; `training` adds two nodes."""
    folder = tmp_path_factory.mktemp("site")
    with network() as made, pytest.MonkeyPatch.context() as patch:
        head, store = made.machine("head"), made.machine("store")
        with (
            s3_server(store.address, store.entered()) as s3,
            mlflow_server(folder, store.address, store.entered()) as tracker,
        ):
            for name, value in s3.environment().items():
                patch.setenv(name, value)  # the test looks into the same bucket
            patch.delenv("RAY_ADDRESS", raising=False)
            environment = os.environ | {
                "HOME": "/tmp/ray",  # each machine's own
                "PYTHONUNBUFFERED": "1",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            }
            source = IngestConfig(source=str(small_pictures(folder / "pictures")), size=16)
            ingest(source, f"s3://{s3.bucket}/data", StorageConfig(), progress=False)
            found = Site(made, head, s3.bucket, tracker.uri, environment, folder)
            found.start_head().done()
            yield found


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> dict[str, Any]:
    """The same training with two workers on this machine alone, without Ray."""
    config = site.config("undisturbed", "local")
    train_without_ray(config, site.folder / "undisturbed")
    return all_of(config)


def test_machines_train_as_one_though_one_dies_and_one_is_cut_off(site: Site, undisturbed: dict[str, Any]) -> None:
    """Each time the one of rank 0, which writes the log and the checkpoints; each time a new machine joins."""
    with site.training("faults") as run:
        run.until_in_the_middle()
        assert [workers_on(machine) for machine in (site.head, *site.nodes)] == [0, 1, 1]
        assert sorted(run.starts()[0]) == sorted(machine.address for machine in site.nodes)
        assert run.restarts() == []
        dead = site.lose(run.starts()[0][0])
        died = time.time()
        dead.kill()
        first_replacement = site.join().done()
        assert run.recovery(1, "a node killed", died) < NOTICED_S

        cut = site.lose(run.starts()[-1][0])
        separated = time.time()
        cut.unplug()
        second_replacement = site.join().done()
        assert run.recovery(2, "a node cut off", separated) < NOTICED_S
        assert workers_on(cut) == 1  # it knows of nothing and waits for the other
        found = run.finish()
    first, second, third = run.starts()
    assert dead.address in first and dead.address not in second and first_replacement.address in second
    assert cut.address in second and cut.address not in third and second_replacement.address in third
    assert_same(found, undisturbed)

    # Back on the network it learns that it was given up, and ends; it has written over nothing.
    cut.plug()
    deadline = time.monotonic() + 180  # as long as TCP may pause before it tries again
    while workers_on(cut):
        assert time.monotonic() < deadline, f"the node still works for a run that ended\n{cut.processes()}"
        time.sleep(0.2)
    assert_same(all_of(run.config), undisturbed)
    check_one_run(run.config, range(TICK, TOTAL + 1, TICK))
