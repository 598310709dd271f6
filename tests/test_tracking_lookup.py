"""What MLflow says of a run, or within seconds that it does not answer."""

import time
from pathlib import Path

import pytest

from pipeline.tracking.client import TrackingError, connect
from pipeline.tracking.lookup import look_up
from pipeline.tracking.runs import end_run, open_run
from tests.mlflow_server import sqlite_uri
from tests.servers import free_ports


def test_status_page_and_versions(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    run_id = open_run(uri, "cips", "demo", {})
    assert (look_up(uri, run_id).status, look_up(uri, run_id).versions) == ("RUNNING", [])
    client = connect(uri)
    client.create_registered_model("cips")
    for _ in range(2):
        client.create_model_version("cips", str(tmp_path), run_id=run_id)
    client.set_registered_model_alias("cips", "champion", "2")
    end_run(uri, run_id)
    found = look_up(uri, run_id)
    assert found.status == "FINISHED"
    assert found.versions == ["cips version 1", "cips version 2 (champion)"]
    assert uri in found.url and run_id in found.url


def test_a_server_that_is_down_is_said_soon() -> None:
    (port,) = free_ports(1)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=f"127.0.0.1:{port}"):
        look_up(f"http://127.0.0.1:{port}", "abc")
    assert time.monotonic() - began < 10


def test_what_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="only on the machine"):
        look_up(f"sqlite:///{tmp_path}/mlflow.db", "abc")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrackingError, match="looking for run abc"):
        look_up(sqlite_uri(tmp_path), "abc")
