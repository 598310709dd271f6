"""A tracking server that dies, hangs or is locked during training delays log lines, not gradients (promise 8)."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.config import Config, load_config, to_yaml
from pipeline.tracking.observer import RunObserver
from pipeline.tracking.recording import recorded
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.loop import Outcome, train
from pipeline.training.observers import Observer, Tick, read_log
from pipeline.training.world import World
from tests.mlflow_server import MlflowServer, mlflow_server, sqlite_uri
from tests.small import SMALL_MODEL, small_data, small_train

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PROMPT_S = 1.0
"""No call of the observer takes longer: it only puts things into a queue. A request alone may take ten times that."""
STEPS = list(range(0, 161, 16))


class Trouble(Observer):
    """Begins and ends some trouble at two counts of images, and notes what the tracker's observer costs meanwhile."""

    def __init__(self, config: Config, run_id: str, stop: int, start: int) -> None:
        self.inner = RunObserver(config, run_id)
        self.stop, self.start = stop, start
        self.seen_down: list[int] = []
        self.down = False
        self.longest_call_s = self.close_s = 0.0

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    def tick(self, tick: Tick) -> None:
        if tick.images_seen == self.stop:
            self.begin()
            self.down = True
        elif tick.images_seen == self.start:
            self.end()
            self.down = False
        elif self.down:
            self.seen_down.append(tick.images_seen)
        began = time.monotonic()
        self.inner.tick(tick)
        self.longest_call_s = max(self.longest_call_s, time.monotonic() - began)

    def close(self) -> None:
        began = time.monotonic()
        self.inner.close()
        self.close_s = time.monotonic() - began


class Outage(Trouble):
    """The server is killed, and started again."""

    server: MlflowServer

    def begin(self) -> None:
        self.server.stop()

    def end(self) -> None:
        self.server.start()


class Hang(Trouble):
    """The server's processes stop answering; they hold their connections. It ends with the server."""

    server: MlflowServer

    def begin(self) -> None:
        assert self.server.process is not None
        os.killpg(self.server.process.pid, signal.SIGSTOP)


class Lock(Trouble):
    """Another process's transaction keeps the database for some seconds."""

    path: Path
    seconds = 4.0

    def begin(self) -> None:
        taken = threading.Event()
        self.holder = threading.Thread(target=self._hold, args=(taken,))
        self.holder.start()
        assert taken.wait(60), "the database could not be locked"

    def _hold(self, taken: threading.Event) -> None:
        other = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        taken.set()
        time.sleep(self.seconds)
        other.execute("COMMIT")
        other.close()


def small_config(tmp_path: Path, uri: str, *more: str) -> Config:
    data = small_data(tmp_path)
    places = [f"run.dir={tmp_path}/runs", f"tracking.uri={uri}", f"data.uri={data.uri}", "data.decoder=pillow"]
    config = load_config(None, [*places, "model.size=16", *more])
    train = small_train(total_kimg=0.16, tick_kimg=0.016)
    return config.model_copy(update={"model": SMALL_MODEL, "train": train})


def trained(config: Config, *observers: Observer) -> Outcome:
    return train(config.plan(), World(), torch.device("cpu"), observers)


def steps_of(uri: str, run_id: str, metric: str = "progress/kimg") -> list[int]:
    return [point.step for point in MlflowClient(uri).get_metric_history(run_id, metric)]


def test_training_goes_on_and_the_log_catches_up(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server:
        config = small_config(tmp_path, server.uri)
        with recorded(config) as run_id:
            outage = Outage(config, run_id, stop=48, start=128)
            outage.server = server
            outcome = trained(config, outage)
        assert outcome.images_seen == 160
        assert outage.seen_down == [64, 80, 96, 112]
        assert outage.longest_call_s < PROMPT_S
        assert steps_of(server.uri, run_id) == STEPS
        assert steps_of(server.uri, run_id, "loss/D") == STEPS[1:]


def test_a_server_that_hangs_costs_the_end_of_a_run_as_long_as_is_said_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mlflow_server(tmp_path) as server:
        config = small_config(tmp_path, server.uri, "tracking.flush_timeout_s=1.5")
        with recorded(config) as run_id:
            hang = Hang(config, run_id, stop=48, start=-1)
            hang.server = server
            outcome = trained(config, hang)
            assert outcome.images_seen == 160
            assert hang.seen_down == [64, 80, 96, 112, 128, 144, 160]
            assert hang.longest_call_s < PROMPT_S
            assert 1.5 <= hang.close_s < 1.5 + PROMPT_S
            assert "were not delivered to" in capsys.readouterr().out
            server.stop()
            server.start()
            # The same run started again, though it has nothing left to train, makes good what was not delivered.
            patient = config.tracking.model_copy(update={"flush_timeout_s": 60.0})
            trained(config, RunObserver(config.model_copy(update={"tracking": patient}), run_id))
        assert steps_of(server.uri, run_id) == STEPS
        assert "ticks that run" in capsys.readouterr().out


def test_a_database_that_another_writer_locks_for_seconds(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    config = small_config(tmp_path, uri)
    with recorded(config) as run_id:
        lock = Lock(config, run_id, stop=48, start=-1)
        lock.path = tmp_path / "mlflow.db"
        began = time.monotonic()
        outcome = trained(config, lock)
        took = time.monotonic() - began
        lock.holder.join()
    assert outcome.images_seen == 160
    assert lock.seen_down == [64, 80, 96, 112, 128, 144, 160]
    assert lock.longest_call_s < PROMPT_S
    assert took > 3.0, "nothing was written while the database was locked"
    assert took < config.tracking.flush_timeout_s
    assert steps_of(uri, run_id) == STEPS


DIES = """
import os, signal, sys, torch
from pathlib import Path
from pipeline.config import load_config
from pipeline.tracking.observer import RunObserver
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.loop import train
from pipeline.training.observers import Observer
from pipeline.training.world import World
from tests.test_training_checkpoint_writer import writing_threads

class Dies(Observer):
    def tick(self, tick):
        if tick.images_seen == 48:
            assert observer.logger.flush(60)
            os.killpg(int(sys.argv[3]), signal.SIGKILL)
        if tick.images_seen == 144:
            for thread in writing_threads():
                thread.join()
            assert list_checkpoints(config.run_uri, config.storage)[-1] == 128
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
config = load_config(sys.argv[1])
observer = RunObserver(config, sys.argv[2])
train(config.plan(), World(), torch.device("cpu"), [observer, Dies()])
"""


def in_another_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)


def test_what_waited_for_the_server_is_made_good_after_a_kill(tmp_path: Path) -> None:
    """The server dies after 48 images and the training after 144; resumed from 128, the run has every step once."""
    with mlflow_server(tmp_path) as server:
        config = small_config(tmp_path, server.uri)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        with recorded(config) as run_id:
            assert server.process is not None
            done = in_another_process(DIES, str(tmp_path / "config.yaml"), run_id, str(server.process.pid))
            assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
            assert list_checkpoints(config.run_uri, config.storage)[-1] == 128
            server.stop()  # what is left of it
            server.start()
            assert steps_of(server.uri, run_id) == [0, 16, 32, 48]
            outcome = trained(config, RunObserver(config, run_id))
        assert outcome.resumed_from == 128
        assert steps_of(server.uri, run_id) == STEPS
        assert steps_of(server.uri, run_id, "loss/D") == STEPS[1:]
        logged = {line["images_seen"]: line["scalars"] for line in read_log(config.run_uri, config.storage)}
        history = MlflowClient(server.uri).get_metric_history(run_id, "loss/D")
        assert [point.value for point in history] == [logged[point.step]["loss/D"] for point in history]
        times = [point.timestamp for point in history]
        assert times == sorted(times), "points that were sent late carry the time at which they were taken"


def test_a_restarted_training_goes_on_in_its_run(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server:
        config = small_config(tmp_path, server.uri)
        with recorded(config) as first:
            pass
        with recorded(config) as second:
            assert MlflowClient(server.uri).get_run(second).info.status == "RUNNING"
        assert first == second
        assert MlflowClient(server.uri).get_run(first).info.status == "FINISHED"


DIES_WITH_THE_RUN_MADE = """
import os, signal, sys
from mlflow import MlflowClient
from pipeline.config import load_config
from pipeline.tracking.recording import recorded
create_run = MlflowClient.create_run
def made_and_dead(*arguments, **options):
    print(create_run(*arguments, **options).info.run_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
MlflowClient.create_run = made_and_dead
with recorded(load_config(sys.argv[1])):
    pass
"""


def test_a_run_whose_maker_died_before_it_could_note_it_is_found_again(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    config = small_config(tmp_path, uri)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    done = in_another_process(DIES_WITH_THE_RUN_MADE, str(tmp_path / "config.yaml"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    orphan = done.stdout.split()[-1]
    note = Path(config.run_uri, "tracking.json")
    assert json.loads(note.read_text()).keys() == {"uri", "key"}
    with recorded(config) as run_id:
        assert run_id == orphan
        assert json.loads(note.read_text())["run_id"] == orphan
    client = MlflowClient(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == config.tracking.experiment]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (orphan, "FINISHED")
    assert run.data.params["train.batch_size"] == "8"
