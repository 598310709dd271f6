"""What is said to and about a cluster, without one: connections that fail, requests, how jobs ended."""

import contextlib
import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobDetails, JobStatus, JobType

from pipeline.cluster import submission
from pipeline.cluster.job_names import Name
from pipeline.cluster.session import ClusterError
from pipeline.cluster.submission import Request, chosen_environment, connect, described, exit_code, outcome
from tests.servers import free_ports


@contextlib.contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server that gives the same answer to everything; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def version(ray_version: str) -> str:
    return json.dumps({"version": "4", "ray_version": ray_version, "ray_commit": "x", "session_name": "y"})


def ended(status: JobStatus, code: int | None = None, **more: object) -> JobDetails:
    fields = {"type": JobType.SUBMISSION, "submission_id": "train-a-1", "entrypoint": "x", "start_time": 1000}
    return JobDetails(status=status, driver_exit_code=code, end_time=76_000, **(fields | more))


# ---- connecting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["10.0.0.1:8265", "head", "ray://head:10001", "auto", ""])
def test_an_address_that_is_no_dashboards_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="expected the cluster's dashboard, http://HOST:8265"):
        connect(address)


def test_where_nothing_answers_the_address_and_the_way_are_told() -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ClusterError, match=f"no Ray dashboard answers at {address}") as refused:
        connect(address)
    assert "ray dashboard ray_cluster.yaml" in str(refused.value)
    assert "Connection refused" in str(refused.value) and "HTTPConnectionPool" not in str(refused.value)


@pytest.mark.parametrize(("status", "body"), [(404, "gone"), (200, "<html>a page</html>"), (200, "{}"), (502, "x")])
def test_something_else_than_a_dashboard_is_told_apart(status: int, body: str) -> None:
    with answering(status, body) as address, pytest.raises(ClusterError, match="no Ray dashboard answers at"):
        connect(address)


@pytest.mark.parametrize(
    ("status", "text"), [(401, "wants a token and this shell has none"), (403, "has another token than this shell")]
)
def test_a_token_that_is_missing_or_wrong_is_told(status: int, text: str) -> None:
    with answering(status, "no") as address, pytest.raises(ClusterError, match=text) as refused:
        connect(address)
    assert "RAY_AUTH_TOKEN" in str(refused.value) and address in str(refused.value)


def test_another_version_of_ray_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(200, version("2.9.0")) as address:
        connect(address)
    said = capsys.readouterr().err
    assert f"runs Ray 2.9.0 and this machine {ray.__version__}" in said
    assert f"ray[default,train,tune]=={ray.__version__}" in said
    with answering(200, version(ray.__version__)) as address:
        connect(address)
    with answering(200, version(".".join([*ray.__version__.split(".")[:2], "99"]))) as address:
        connect(address)
    assert capsys.readouterr().err == ""


def test_the_address_that_is_given_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_ports(1)[0]}")
    with answering(200, version(ray.__version__)) as address:
        assert connect(address).get_address() == address


def test_a_cluster_that_stops_to_answer_is_told() -> None:
    with answering(200, version(ray.__version__)) as address:
        client = connect(address)
    with pytest.raises(ClusterError, match=f"{address} does not answer"):
        client.list_jobs()


# ---- requests ------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]))))
def test_arguments_reach_the_job_as_they_are(arguments: list[str]) -> None:
    request = Request(Name("train", "a", 1), tuple(arguments), {})
    assert shlex.split(request.entrypoint) == ["python", "-m", "jobs.train", *arguments]


def test_variables_go_along_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in submission.PASSED_ON:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert chosen_environment([]) == {"AWS_REGION": "eu-west-1"}
    assert chosen_environment(["AWS_SECRET_ACCESS_KEY"])["AWS_SECRET_ACCESS_KEY"] == "hunter2"
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ClusterError, match="--pass-env AWS_SECRET_ACCESS_KEY: this shell has no such variable"):
        chosen_environment(["AWS_SECRET_ACCESS_KEY"])


# ---- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.SUCCEEDED, None, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, None, 1),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.STOPPED, None, 130),
    ],
)
def test_the_code_is_passed_on(status: JobStatus, code: int | None, expected: int) -> None:
    assert exit_code(ended(status, code)) == expected


def test_the_end_is_told_in_a_line() -> None:
    assert outcome(ended(JobStatus.SUCCEEDED, 0)) == "train-a-1 SUCCEEDED after 1m15s"
    assert outcome(ended(JobStatus.STOPPED)) == "train-a-1 STOPPED after 1m15s"
    assert outcome(ended(JobStatus.FAILED, 3, message="a\nb")) == "train-a-1 FAILED after 1m15s with code 3"
    assert outcome(ended(JobStatus.FAILED, message="no\nenvironment")).endswith("FAILED after 1m15s: no\nenvironment")
    assert "found no `python`" in outcome(ended(JobStatus.FAILED, 127))


def test_a_description_names_variables_without_their_values() -> None:
    job = ended(JobStatus.RUNNING, runtime_env={"env_vars": {"AWS_SECRET_ACCESS_KEY": "hunter2", "A": "b"}})
    text = described(job, "http://head:8265/")
    assert "environment: A, AWS_SECRET_ACCESS_KEY\n" in text
    assert "hunter2" not in text
    assert text.endswith("http://head:8265/#/jobs/train-a-1")
