"""A tracking server that dies during training delays log lines, not gradients (promise 8)."""

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.config import Config, load_config
from pipeline.tracking.observer import RunObserver
from pipeline.tracking.recording import recorded
from pipeline.training.loop import train
from pipeline.training.observers import Observer, Tick
from pipeline.training.world import World
from tests.mlflow_server import MlflowServer, mlflow_server
from tests.small import SMALL_MODEL, small_data, small_train

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class Outage(Observer):
    """Stops the server at one count of images and starts it again at another."""

    def __init__(self, server: MlflowServer, stop: int, start: int) -> None:
        self.server, self.stop, self.start = server, stop, start
        self.seen_down: list[int] = []
        self.down = False
        self.last, self.longest_tick = 0.0, 0.0

    def tick(self, tick: Tick) -> None:
        if tick.images_seen == self.stop:
            self.server.stop()
            self.down = True
        elif tick.images_seen == self.start:
            self.server.start()
            self.down = False
        elif self.down:
            self.seen_down.append(tick.images_seen)
            self.longest_tick = max(self.longest_tick, tick.seconds - self.last)
        self.last = tick.seconds


def small_config(tmp_path: Path, uri: str) -> Config:
    data = small_data(tmp_path)
    config = load_config(
        None, [f"run.dir={tmp_path}/runs", f"tracking.uri={uri}", f"data.uri={data.uri}", "data.decoder=pillow"]
    )
    train = small_train(total_kimg=0.16, tick_kimg=0.016)
    return config.model_copy(update={"model": SMALL_MODEL, "train": train})


def test_training_goes_on_and_the_log_catches_up(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server:
        config = small_config(tmp_path, server.uri)
        with recorded(config) as run_id:
            outage = Outage(server, stop=48, start=128)
            outcome = train(config.plan(), World(), torch.device("cpu"), [outage, RunObserver(config, run_id)])
        assert outcome.images_seen == 160
        assert outage.seen_down == [64, 80, 96, 112]
        assert outage.longest_tick < 10  # the time-out of one request: nobody has waited for one
        history = MlflowClient(server.uri).get_metric_history(run_id, "loss/D")
        assert [metric.step for metric in history] == list(range(16, 161, 16))


def test_a_restarted_training_goes_on_in_its_run(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server:
        config = small_config(tmp_path, server.uri)
        with recorded(config) as first:
            pass
        with recorded(config) as second:
            assert MlflowClient(server.uri).get_run(second).info.status == "RUNNING"
        assert first == second
        assert MlflowClient(server.uri).get_run(first).info.status == "FINISHED"
