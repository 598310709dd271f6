"""What rank 0 says arrives in the run; what cannot arrive hurts nobody. SQLite, or a port with nobody."""

import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline.tracking.client import connect
from pipeline.tracking.logger import Point, RunLogger
from pipeline.tracking.runs import open_run
from tests.mlflow_server import sqlite_uri
from tests.servers import free_ports

DEADLINE_S = 60.0
PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return sqlite_uri(tmp_path)


@pytest.fixture
def run_id(uri: str) -> str:
    return open_run(uri, "cips", "first", {})


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return connect(uri)


def test_all_kinds_arrive(uri: str, run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    logger = RunLogger(uri, run_id)
    for step in range(0, 5000, 10):
        logger.metrics({"loss/D": step / 2, "loss/G": -step}, step)
    picture = PICTURE.copy()
    logger.image("samples/0000012800.png", picture, 12800)
    picture[:] = 0  # the caller may use its array again
    logger.image("reals.png", PICTURE)
    logger.text("notes/summary.md", "# Hello\n")
    logger.artifact(tmp_path / "table.csv", "tables")
    assert logger.close(DEADLINE_S) == 0
    history = client.get_metric_history(run_id, "loss/D")
    assert [(point.step, point.value) for point in history] == [(step, step / 2) for step in range(0, 5000, 10)]
    assert [point.timestamp for point in history] == sorted(point.timestamp for point in history)
    files = Path(client.get_run(run_id).info.artifact_uri)
    for name in ("samples/0000012800.png", "reals.png"):
        assert np.array_equal(np.asarray(Image.open(files / name)), PICTURE)
    assert (files / "notes/summary.md").read_text() == "# Hello\n"
    assert (files / "tables/table.csv").read_text() == "a,b\n"
    assert client.get_run(run_id).info.status == "FINISHED"


def test_points_are_stored_in_the_order_of_the_calls(uri: str, run_id: str, tmp_path: Path) -> None:
    logger = RunLogger(uri, run_id)
    for step in (5, 3, 9, 1):
        logger.metrics({"x": float(step)}, step)
        assert logger.flush(DEADLINE_S)
    logger.close(DEADLINE_S)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert [row[0] for row in database.execute("SELECT step FROM metrics ORDER BY rowid")] == [5, 3, 9, 1]


def test_a_step_may_be_logged_again(uri: str, run_id: str, client: MlflowClient) -> None:
    for value in (1.0, 2.0):
        logger = RunLogger(uri, run_id)
        logger.metrics({"x": value}, 100)
        assert logger.close(DEADLINE_S, status=None) == 0
    assert client.get_run(run_id).data.metrics["x"] == 2.0
    assert client.get_run(run_id).info.status == "RUNNING"


def test_what_an_earlier_process_could_not_send_is_sent_once(
    uri: str, run_id: str, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """400 points of 4 scalars: more than one request takes. The clock says which of them the run has."""
    points = [
        Point(step, 1000.0 + step, {"clock": step / 1000, **{f"m{number}": float(step) for number in range(3)}})
        for step in range(400)
    ]
    first = RunLogger(uri, run_id)
    for point in points[:50] + points[60:70]:
        first.metrics(point.values, point.step)
    assert first.close(DEADLINE_S, status=None) == 0
    for missing in (340, 0):
        again = RunLogger(uri, run_id)
        again.catch_up(points, "clock")
        again.metrics({"clock": 0.4 + missing, "m0": 400.0}, 400 + missing)
        assert again.close(DEADLINE_S, status=None) == 0
        assert (f"{missing} ticks that run {run_id} lacked were sent" in capsys.readouterr().out) == (missing > 0)
    for name in ("clock", "m0", "m1", "m2"):
        steps = [point.step for point in client.get_metric_history(run_id, name)]
        assert sorted(step for step in steps if step < 400) == list(range(400)), name
    times = {point.step: point.timestamp for point in client.get_metric_history(run_id, "m1")}
    assert times[55] == 1_055_000


def test_nothing_to_catch_up_asks_nobody(uri: str, run_id: str) -> None:
    logger = RunLogger(uri, run_id)
    logger.catch_up([], "clock")
    assert logger.undelivered == 0
    logger.close(DEADLINE_S)


def test_more_metrics_than_one_request_takes(uri: str, run_id: str, client: MlflowClient) -> None:
    logger = RunLogger(uri, run_id)
    logger.metrics({f"m{number}": 1.0 for number in range(1500)}, 0)
    assert logger.close(DEADLINE_S) == 0
    assert len(client.get_run(run_id).data.metrics) == 1500


def test_what_is_refused_is_named_and_holds_up_nothing(
    uri: str, run_id: str, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = RunLogger(uri, run_id)
    logger.metrics({"good": 1.0}, 1)
    logger.metrics({"bad?name": 1.0}, 1)
    logger.metrics({"no number": "abc", "good": 2.0}, 2)  # type: ignore[dict-item]
    logger.image("samples/0000000003.png", PICTURE.astype(np.float32), 3)
    logger.artifact("/nowhere/file.txt")
    logger.image("samples/0000000004.png", PICTURE, 4)
    assert logger.close(DEADLINE_S) == 4
    printed = capsys.readouterr().out
    for name in ("bad?name", "no number", "samples/0000000003.png", "/nowhere/file.txt"):
        assert f": {name} (" in printed
    assert "4 log entries" in printed and uri in printed
    assert [point.value for point in client.get_metric_history(run_id, "good")] == [1.0, 2.0]
    assert [file.path for file in client.list_artifacts(run_id, "samples")] == ["samples/0000000004.png"]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_broken_artifact_store_does_not_hold_up_the_curves(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file, where a folder is needed")
    run_id = open_run(uri, "broken", "first", {}, artifacts=str(tmp_path / "blocked"))
    logger = RunLogger(uri, run_id)
    logger.image("samples/0000000001.png", PICTURE, 1)
    for step in range(5):
        logger.metrics({"x": float(step)}, step)
    assert not logger.flush(1.0)
    assert [point.step for point in client.get_metric_history(run_id, "x")] == list(range(5))
    (tmp_path / "blocked").unlink()
    assert logger.close(DEADLINE_S) == 0
    assert [file.path for file in client.list_artifacts(run_id, "samples")] == ["samples/0000000001.png"]


def test_closing_without_a_server_says_what_was_lost(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    logger = RunLogger(f"http://me:secret@127.0.0.1:{port}", "run")
    for step in range(7):
        logger.metrics({"x": 1.0}, step)
    logger.image("samples/0000000000.png", PICTURE, 0)
    assert logger.close(0.1) == 9  # and the status
    assert logger.close(0.1) == 9
    logger.metrics({"x": 1.0}, 8)
    assert logger.undelivered == 9
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"9 log entries of run run were not delivered to http://me:***@127.0.0.1:{port}")


def test_a_server_that_hangs_holds_up_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        logger = RunLogger(f"http://127.0.0.1:{silent.getsockname()[1]}", "run", request_timeout_s=3600)
        for step in range(500):
            logger.metrics({"x": 1.0}, step)
        connection, _ = silent.accept()  # it has been asked
        assert logger.undelivered == 500
        assert not logger.flush(0.05)
        assert logger.close(0.05) == 501
        connection.close()


def test_a_process_ends_although_its_server_is_down() -> None:
    (port,) = free_ports(1)
    code = f"""
from pipeline.tracking.logger import Point, RunLogger
logger = RunLogger("http://127.0.0.1:{port}", "run")
logger.metrics({{"x": 1.0}}, 1)
logger.close(0.2)
print("end of the program")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "end of the program"
    assert "2 log entries" in done.stdout and done.stderr == ""


def test_threads_end_with_the_logger(uri: str, run_id: str) -> None:
    before = set(threading.enumerate())
    logger = RunLogger(uri, run_id)
    lanes = set(threading.enumerate()) - before
    assert len(lanes) == 2
    logger.close(DEADLINE_S)
    for thread in lanes:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
