"""Workers die, hang, and lose their driver; the run ends where the undisturbed one does, bit for bit (promise 5)."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from pipeline.cluster import training
from pipeline.cluster.evaluation import evaluate_on_ray
from pipeline.cluster.resources import await_room, one_worker
from pipeline.cluster.search import search
from pipeline.cluster.session import ClusterError, ray_session
from pipeline.cluster.training import train_on_ray
from pipeline.config import Config, load_config, replaced, to_yaml
from pipeline.data.stream import DataConfig
from pipeline.models.build import build_generator
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.notes import read_restarts
from pipeline.training.observers import read_log
from tests import ray_workers
from tests.faults import (
    alive,
    half_written,
    images_seen,
    kill_between,
    last_checkpoint,
    recovery,
    starts,
    train_during,
    wait_for_images,
    wait_for_start,
    wait_until,
)
from tests.mlflow_server import check_one_run, sqlite_uri
from tests.small import SMALL_CLUSTER_SETTINGS
from tests.without_ray import train_without_ray

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
TOTAL, TICK = 1200, 40
SETTINGS = [
    *SMALL_CLUSTER_SETTINGS,
    "train.r1_interval=4",
    f"train.total_kimg={TOTAL / 1000}",
    f"train.tick_kimg={TICK / 1000}",
    "train.checkpoint_kimg=0.08",
    f"train.evaluate_kimg={TOTAL / 2000}",
    "evaluate.images=64",
    "evaluate.input_size=32",
]
STORY_S = 180.0  # for what has to happen in a run before a fault


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config_of(folder: Path, name: str, data: DataConfig, address: str, *more: str) -> Config:
    places = [f"data.uri={data.uri}", f"run.dir={folder}", f"run.name={name}", f"cluster.address={address}"]
    return load_config(None, [*SETTINGS, *places, *more])


@pytest.fixture(scope="module")
def undisturbed(folder: Path, data: DataConfig) -> Config:
    """The run that all others are compared with."""
    config = config_of(folder, "undisturbed", data, "local", "train.evaluate_kimg=")
    train_without_ray(config, folder / "undisturbed-processes")
    return config


def check_same_end(config: Config, undisturbed: Config) -> None:
    """No tick is missing or told twice, the last checkpoint stands, and it holds the same bits."""
    ticks = [line["images_seen"] for line in read_log(config.run_uri, config.storage)]
    assert ticks == list(range(0, TOTAL + 1, TICK))
    assert list_checkpoints(config.run_uri, config.storage)[-1] == TOTAL
    assert last_checkpoint(config) == last_checkpoint(undisturbed)


def test_workers_die_and_hang(
    folder: Path,
    data: DataConfig,
    ray_address: str,
    undisturbed: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run: killed in an update, in a checkpoint's upload, standing still, killed in an evaluation."""
    patience = 8.0
    more = [f"cluster.health_check_timeout_s={patience}", "cluster.max_failures=4"]
    more += ["tracking.enabled=true", f"tracking.uri={sqlite_uri(tmp_path)}"]
    config = config_of(folder, "killed", data, ray_address, *more)
    monkeypatch.setattr(training, "worker", ray_workers.signing)
    halves, hung = [], []

    def story() -> None:
        first = wait_for_start(config, 1)
        wait_for_images(config, 4 * TICK, STORY_S)
        os.kill(first[1]["pid"], signal.SIGKILL)  # in an update, unless between two of them
        recovery(config, 2, time.time())

        second = wait_for_start(config, 2)
        looking = partial(half_written, config)
        kill_between(second[0]["pid"], "writing a checkpoint", looking, lambda: looking() is None, STORY_S)
        halves.append(looking())
        recovery(config, 3, time.time())

        third = wait_for_start(config, 3)
        os.kill(third[1]["pid"], signal.SIGSTOP)
        hung.append((third[1]["pid"], time.time()))
        recovery(config, 4, time.time())

        fourth = wait_for_start(config, 4)
        begun, ended = (ray_workers.sign(config, what, TOTAL // 2, 1) for what in ("begun", "ended"))
        kill_between(fourth[1]["pid"], "evaluating", begun.exists, ended.exists, STORY_S)
        recovery(config, 5, time.time())

    outcome = train_during(config, story)

    restarts = read_restarts(config.run_uri, config.storage)
    causes = [restart["cause"] for restart in restarts]
    assert len(causes) == 4 and len(starts(config)) == 5
    assert "worker 1: " in causes[0] and "worker 0: " in causes[1] and "worker 1: " in causes[3]
    (half,) = halves
    assert half is not None and int(half.name) > 0
    ((pid, since),) = hung
    assert causes[2] == f"worker 1: no answer for {patience:g} s (cluster.health_check_timeout_s)"
    print(f"DETECTED {config.run.name}: {restarts[2]['time'] - since:.1f} s after it hung")
    assert patience <= restarts[2]["time"] - since <= patience + 8.0
    wait_until(f"the end of process {pid}, which hung", 30.0, lambda: not alive(pid))
    assert (TOTAL // 2 - 2 * TICK) <= outcome.resumed_from <= TOTAL // 2
    assert [result["metric"] for result in outcome.results] == ["fd_efficientnet_lite0"]
    check_same_end(config, undisturbed)
    check_one_run(config, range(TICK, TOTAL + 1, TICK))


def test_the_driver_dies_and_the_same_command_goes_on(
    folder: Path, data: DataConfig, ray_address: str, undisturbed: Config, tmp_path: Path
) -> None:
    tracking = ["tracking.enabled=true", f"tracking.uri={sqlite_uri(tmp_path)}", "tracking.model_name=driver"]
    config = config_of(folder, "driver", data, ray_address, *tracking)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "jobs.train", "--config", str(tmp_path / "config.yaml")]

    def submitted(log: str) -> subprocess.Popen[bytes]:
        with (tmp_path / log).open("wb") as output:
            home = os.environ | {"HOME": str(tmp_path)}
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=home)

    with submitted("first.log") as driver:
        try:
            workers = wait_for_start(config, 1)
            wait_for_images(config, 4 * TICK, STORY_S)
        finally:
            driver.kill()
    killed = time.time()
    with submitted("second.log") as driver:  # at once, as an impatient scheduler does
        try:
            left = partial(filter, alive, [worker["pid"] for worker in workers])
            wait_until("the end of the first driver's workers", 120.0, lambda: not list(left()))
            recovery(config, 2, killed)
            code = driver.wait(300)
        finally:
            driver.kill()
    said = (tmp_path / "second.log").read_text()
    assert code == 0, said[-3000:]
    assert f"trained {TOTAL / 1000:g} kimg" in said and "registered driver version 1" in said
    assert len(starts(config)) == 2
    check_same_end(config, undisturbed)
    # Ray's controller may have seen the workers end, and noted it, before it ended too.
    causes = [restart["cause"] for restart in read_restarts(config.run_uri, config.storage)]
    assert sum(cause.startswith("jobs.train was started again, from the checkpoint at ") for cause in causes) == 1

    check_one_run(config, range(TICK, TOTAL + 1, TICK))


def test_a_cluster_that_is_too_small_is_told_in_time(
    folder: Path, data: DataConfig, ray_address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["cluster.workers=3", "train.batch_size=12", "cluster.worker_start_timeout_s=3"]
    config = config_of(folder, "too-many", data, ray_address, *few)
    began = time.monotonic()
    with pytest.raises(ClusterError) as told:
        train_on_ray(config, None)
    assert 3.0 <= time.monotonic() - began <= 60.0
    assert re.search(r"after \d+ s: ", str(told.value))
    for part in ("3 workers with 1 CPU each", "room for 2, with 2 CPU on 3 nodes", "min_workers"):
        assert part in str(told.value)
    assert "of which 2 CPU are free" in str(told.value)
    assert "waiting for machines, 3 s at most" in capfd.readouterr().out
    assert images_seen(config) == -1

    # Tasks ask for room for one worker, a search for that of a trial, before anything hangs unheard.
    large = replaced(config, {"cluster.cpus_per_worker": 2, "tune.space": {"train.learning_rate": [0.001]}})
    for asks, asked in (
        (lambda: evaluate_on_ray(large, build_generator(large.model)), "1 worker with 2 CPU each"),
        (lambda: search(large, {}), "3 workers with 2 CPU each"),
    ):
        with pytest.raises(ClusterError, match=rf"after \d+ s: asked for {asked}; there is room for 0"):
            asks()


def test_a_busy_cluster_is_told(
    folder: Path, data: DataConfig, ray_address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray waits for cores that others use, without a word; so each job says it before."""
    config = config_of(folder, "busy", data, ray_address)
    release = tmp_path / "release"

    @ray.remote(num_cpus=1)
    def hold(place: Path) -> None:
        while not place.exists():
            time.sleep(0.1)

    with ray_session(config.cluster):
        held = [hold.remote(release) for _ in range(2)]
        try:
            wait_until("two tasks that hold all cores", 60.0, lambda: not ray.available_resources().get("CPU"))
            await_room(one_worker(config.cluster))
        finally:
            release.touch()
        ray.get(held)
    told = "waiting for others to give back what they use: asked for 1 worker with 1 CPU each; there is room for 2"
    assert told in capfd.readouterr().out
