"""Opening a run, going on with it and ending it, on SQLite."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking.client import TrackingError, connect
from pipeline.tracking.runs import TrainingData, end_run, flatten, machine_tags, open_run
from tests.mlflow_server import sqlite_uri
from tests.servers import free_ports

PARAMS = {"train": {"batch_size": 32, "betas": [0.0, 0.99]}, "model": {"widths": None}, "long": "x" * 7000}
DATA = TrainingData("blue-marble", "s3://bucket/shards", "0123456789abcdef" * 4)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return sqlite_uri(tmp_path)


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return connect(uri)


def test_a_run_carries_settings_data_and_machine(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run_id = open_run(uri, "cips", "first", PARAMS, {"a": "b"}, data=DATA, config_yaml="run: {}\n")
    run = client.get_run(run_id)
    assert run.info.run_name == "first" and run.info.status == "RUNNING"
    assert run.data.params["train.batch_size"] == "32" and run.data.params["train.betas"] == "[0.0, 0.99]"
    assert run.data.params["model.widths"] == ""
    assert len(run.data.params["long"]) == 6000 and run.data.params["long"].endswith("x...")
    assert run.data.tags["a"] == "b" and run.data.tags["dataset.digest"] == DATA.digest
    assert machine_tags().items() <= run.data.tags.items() and "environment.torch" in run.data.tags
    (entry,) = run.inputs.dataset_inputs
    assert entry.dataset.name == "blue-marble" and entry.dataset.digest == DATA.digest[:36]
    assert "s3://bucket/shards" in entry.dataset.source
    assert (entry.tags[0].key, entry.tags[0].value) == ("mlflow.data.context", "train")
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.yaml"]
    kept = list(tmp_path.rglob("config.yaml"))
    assert len(kept) == 1 and kept[0].is_relative_to(tmp_path / "mlartifacts")
    assert kept[0].read_text() == "run: {}\n"


def test_files_go_where_one_says(uri: str, tmp_path: Path) -> None:
    open_run(uri, "cips", "first", {}, config_yaml="a: 1\n", artifacts=str(tmp_path / "files"))
    (kept,) = tmp_path.rglob("config.yaml")
    assert kept.is_relative_to(tmp_path / "files")


def test_going_on_keeps_the_run_and_tells_what_changed(uri: str, client: MlflowClient) -> None:
    run_id = open_run(uri, "cips", "first", {"total": 1, "seed": 3})
    end_run(uri, run_id, "FAILED")
    assert client.get_run(run_id).info.status == "FAILED"
    again = open_run(uri, "cips", "first", {"total": 2, "seed": 3, "new": 4}, run_id=run_id)
    run = client.get_run(run_id)
    assert again == run_id and run.info.status == "RUNNING"
    assert run.data.params == {"total": "1", "seed": "3", "new": "4"}
    assert run.data.tags["resumed.total"] == "2" and "resumed.seed" not in run.data.tags
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_a_run_is_found_by_the_name_that_its_maker_gave_it(uri: str, client: MlflowClient) -> None:
    made = open_run(uri, "cips", "first", {"total": 1}, key="a1b2")
    assert client.get_run(made).data.tags["run.key"] == "a1b2"
    end_run(uri, made, "FAILED")
    assert open_run(uri, "cips", "first", {"total": 1}, key="a1b2") == made
    assert client.get_run(made).info.status == "RUNNING"
    other = open_run(uri, "cips", "first", {"total": 1}, key="c3d4")
    nameless = open_run(uri, "cips", "first", {"total": 1})
    assert len({made, other, nameless}) == 3
    client.delete_run(made)
    assert open_run(uri, "cips", "first", {"total": 1}, key="a1b2") not in {made, other, nameless}


def test_more_settings_than_one_request_takes(uri: str, client: MlflowClient) -> None:
    run_id = open_run(uri, "cips", "many", {f"key{number}": number for number in range(250)})
    assert len(client.get_run(run_id).data.params) == 250


def test_what_is_gone_is_named(uri: str, client: MlflowClient) -> None:
    with pytest.raises(TrackingError, match="no-such-run"):
        open_run(uri, "cips", "a", {}, run_id="no-such-run")
    run_id = open_run(uri, "cips", "a", {})
    client.delete_run(run_id)
    with pytest.raises(TrackingError, match=f"{run_id} .*was deleted; restore it"):
        open_run(uri, "cips", "a", {}, run_id=run_id)
    client.delete_experiment(client.get_experiment_by_name("cips").experiment_id)
    with pytest.raises(TrackingError, match="experiment 'cips' .*was deleted"):
        open_run(uri, "cips", "a", {})


def test_a_server_that_is_down_ends_it_at_the_start() -> None:
    (port,) = free_ports(1)
    with pytest.raises(TrackingError, match=rf"http://127.0.0.1:{port} .*tracking.enabled=false"):
        open_run(f"http://127.0.0.1:{port}", "cips", "a", {})


def test_ending_a_run_never_fails(uri: str, client: MlflowClient, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = open_run(uri, "cips", "a", {})
    assert end_run(uri, run_id, "KILLED") and client.get_run(run_id).info.status == "KILLED"
    (port,) = free_ports(1)
    assert not end_run(f"http://127.0.0.1:{port}", run_id)
    assert not end_run(uri, "no-such-run")
    printed = capsys.readouterr().out
    assert f"run {run_id} was not marked FINISHED" in printed and "run no-such-run was not" in printed


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1.5}}, "d": None, "e": True, "f": [], "g": {}}) == {
        "a.b.c": "1.5",
        "d": "",
        "e": "True",
        "f": "[]",
        "g": "{}",
    }
