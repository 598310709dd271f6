"""Reaching MLflow: what is wrong is said at once, with the address and what to do."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from mlflow.exceptions import MlflowException

from pipeline.tracking.client import (
    TrackingError,
    connect,
    explained,
    require_reachable,
    wait_until_reachable,
    without_password,
)
from tests.servers import free_ports


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers everything with one status and one text."""

    status, text = 200, b"OK"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(request: pytest.FixtureRequest) -> Iterator[str]:
    status, text = request.param
    handler = type("Handler", (Answers,), {"status": status, "text": text})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("web", [(200, b"OK"), (401, b"who are you"), (403, b"not for you")], indirect=True)
def test_a_server_that_answers_is_reachable(web: str) -> None:
    require_reachable(web)
    require_reachable(f"{web}/")


@pytest.mark.parametrize("web", [(200, b"<html>hello</html>"), (500, b"broken"), (404, b"")], indirect=True)
def test_something_else_that_answers_is_not(web: str) -> None:
    with pytest.raises(TrackingError, match=web):
        require_reachable(web)


def test_a_server_that_is_down_is_named_with_the_fix() -> None:
    (port,) = free_ports(1)
    for uri in (f"http://127.0.0.1:{port}", f"postgresql+psycopg2://me:secret@127.0.0.1:{port}/mlflow"):
        with pytest.raises(TrackingError) as error:
            require_reachable(uri)
        text = str(error.value)
        assert f"127.0.0.1:{port}" in text and "tracking.uri" in text and "tracking.enabled=false" in text
        assert "secret" not in text


def test_a_server_that_hangs_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        with pytest.raises(TrackingError, match="timed out"):
            require_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)


def test_at_the_end_of_a_run_a_server_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    with pytest.raises(TrackingError, match=uri):
        wait_until_reachable(uri, 0.5)
    assert 0.5 <= time.monotonic() - began < 10
    assert f"waiting for the tracking server, 0.5 s at most: no tracking server answers at {uri}" in (
        capsys.readouterr().out
    )
    handler = type("Handler", (Answers,), {})
    opened: list[http.server.HTTPServer] = []
    opener = threading.Timer(0.5, lambda: opened.append(http.server.HTTPServer(("127.0.0.1", port), handler)))
    opener.start()
    waiting = threading.Thread(target=wait_until_reachable, args=(uri, 60))
    waiting.start()
    opener.join()
    opened[0].handle_request()
    waiting.join(30)
    opened[0].server_close()
    assert not waiting.is_alive()


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "databricks", ""])
def test_other_stores_are_refused(uri: str) -> None:
    with pytest.raises(TrackingError, match="expected a server"):
        require_reachable(uri)


def test_limits_are_set_before_a_client_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, "unset")
    connect("http://127.0.0.1:1", {"MLFLOW_S3_ENDPOINT_URL": "http://s3"}, request_timeout_s=7, retries=0)
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (7, 0)


def test_errors_are_explained() -> None:
    with pytest.raises(TrackingError, match="opening a run at http://me:[*]{3}@host failed: .*401.*MLFLOW_TRACKING_"):
        with explained("http://me:secret@host", "opening a run"):
            raise MlflowException("API request failed with error code 401 != 200")


def test_passwords_are_not_printed() -> None:
    assert without_password("postgresql://a:b@h:1/x") == "postgresql://a:***@h:1/x"
    assert without_password("http://h:5000") == "http://h:5000"
    assert without_password("sqlite:////tmp/a.db") == "sqlite:////tmp/a.db"
