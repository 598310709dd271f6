"""Tracking against a real MLflow server over HTTP, which dies and comes back (promise 8)."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.evaluation.protocol import EvaluateConfig, Result, make_protocol
from pipeline.models.build import ModelConfig, build_generator
from pipeline.tracking.client import TrackingError, connect
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.registry import load, load_generator, log_model, promote, register
from pipeline.tracking.runs import TrainingData, open_run
from tests.mlflow_server import MlflowServer, mlflow_server

pytestmark = pytest.mark.integration

DEADLINE_S = 90.0
PICTURE = np.full((8, 8, 3), 200, dtype=np.uint8)
MODEL = ModelConfig(size=16, width=8, latent=8, mapping_layers=2)
PROTOCOL = make_protocol(EvaluateConfig(images=100), "a" * 64, "d" * 64, 1000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.fixture
def run_id(server: MlflowServer, tmp_path: Path) -> str:
    data = TrainingData("data", "s3://bucket/shards", "d" * 64)
    return open_run(server.uri, "cips", tmp_path.name, {"a": 1}, data=data, config_yaml="a: 1\n")


def test_files_go_through_the_server(server: MlflowServer, run_id: str) -> None:
    client = connect(server.uri)
    assert client.get_run(run_id).info.artifact_uri.startswith("mlflow-artifacts:/")
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.yaml"]
    (kept,) = (server.folder / "artifacts").rglob(f"{run_id}/**/config.yaml")
    assert kept.read_text() == "a: 1\n"


def test_a_server_that_dies_delays_log_lines_and_nothing_else(
    server: MlflowServer, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = RunLogger(server.uri, run_id)
    for step in range(10):
        logger.metrics({"loss/D": step + 0.5, "loss/G": -step}, step)
    assert logger.flush(DEADLINE_S)

    server.stop()
    for step in range(10, 200):
        logger.metrics({"loss/D": step + 0.5, "loss/G": -step}, step)
    logger.image("samples/0000000100.png", PICTURE, 100)
    # All calls are back and nobody was there to answer.
    assert logger.undelivered == 191
    assert not logger.flush(1.0) and logger.undelivered == 191
    with pytest.raises(TrackingError, match=server.uri):
        open_run(server.uri, "cips", "another", {})

    server.start()
    assert logger.close(DEADLINE_S) == 0
    client = connect(server.uri)
    for name, value in (("loss/D", lambda step: step + 0.5), ("loss/G", lambda step: -step)):
        history = client.get_metric_history(run_id, name)
        assert [(point.step, point.value) for point in history] == [(step, value(step)) for step in range(200)]
    assert [file.path for file in client.list_artifacts(run_id, "samples")] == ["samples/0000000100.png"]
    assert client.get_run(run_id).info.status == "FINISHED"
    query = "SELECT step FROM metrics WHERE run_uuid = ? AND key = 'loss/D' ORDER BY rowid"
    with sqlite3.connect(server.folder / "mlflow.db") as database:
        assert [row[0] for row in database.execute(query, (run_id,))] == list(range(200))
    printed = capsys.readouterr().out
    assert f"the tracking server {server.uri} fails (" in printed and "training goes on, scalars wait" in printed
    assert "works again after" in printed


def test_a_model_travels_through_the_server(server: MlflowServer, run_id: str) -> None:
    torch.manual_seed(0)
    generator = build_generator(MODEL).eval()
    weights = safetensors.torch.save(generator.state_dict())
    versions = []
    for value in (10.0, 5.0):
        results = [Result(value, PROTOCOL)]
        logged = log_model(server.uri, run_id, weights, MODEL.model_dump(mode="json"), results, 1000)
        versions.append(register(server.uri, logged, "cips"))
        promote(server.uri, "cips", versions[-1])
    aliases = connect(server.uri).get_registered_model("cips").aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {
        "champion": versions[1],
        "previous": versions[0],
    }
    images = load(server.uri, "cips").predict(None, params={"n": 2})
    assert images.shape == (2, 16, 16, 3)
    assert np.array_equal(images, load(server.uri, "models:/cips@previous").predict(None, params={"n": 2}))
    loaded = load_generator(server.uri, "cips").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in generator.state_dict().items())
