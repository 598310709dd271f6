"""Checkpoints of a training on a real S3 server that goes away for a while: the training does not notice."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.storage import StorageConfig
from pipeline.training.checkpoint import list_checkpoints, read_info, read_tensors
from pipeline.training.observers import Tick
from tests.servers import S3Server, s3_server
from tests.small import small_data, small_plan
from tests.test_training_loop import Watcher, run

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class Outage(Watcher):
    """The server stops before the checkpoint at 32 images is begun, and is back before the one at 64."""

    def __init__(self, server: S3Server) -> None:
        super().__init__()
        self.server = server

    def tick(self, tick: Tick) -> None:
        super().tick(tick)
        if tick.images_seen == 32:
            self.server.stop()
        if tick.images_seen == 64:
            self.server.start()


def test_an_outage_costs_a_checkpoint_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path)
    with s3_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        storage = StorageConfig(attempts=1, connect_timeout_s=2)
        local = small_plan(tmp_path / "fair", data, total_kimg=0.128, keep_checkpoints=9)
        plan = replace(local, folder=f"s3://{server.new_bucket()}/run", storage=storage)
        watcher = Outage(server)
        outcome = run(plan, watcher)
        assert "no checkpoint at 32 images: s3://" in capsys.readouterr().out
        assert watcher.checkpoints == list_checkpoints(plan.folder, storage) == [0, 64, 96, 128]
        fair = run(local)
        for name in ("generator.safetensors", "training.safetensors"):
            stored = read_tensors(outcome.checkpoint, name, read_info(outcome.checkpoint, storage), storage)
            wanted = read_tensors(fair.checkpoint, name, read_info(fair.checkpoint, local.storage), local.storage)
            assert stored.keys() == wanted.keys()
            assert all(stored[key].equal(wanted[key]) for key in wanted)
        assert run(plan).resumed_from == 128
