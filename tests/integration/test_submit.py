"""Jobs handed to a running cluster with token authentication: log followed, exit code passed on."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import free_ports
from tests.small import small_pictures

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head with dashboard, as `ray start` makes it; yields its address and the submitter's environment."""
    home = tmp_path_factory.mktemp("home")
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "HOME": str(home),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    port, dashboard, agent, client = free_ports(4)
    head = [
        str(binaries / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=2",
        f"--temp-dir={tmp_path_factory.mktemp('r')}",
    ]  # fmt: skip
    with (home / "head.log").open("wb") as log:
        process = subprocess.Popen(head, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_until_open(dashboard, process)
            yield f"http://127.0.0.1:{dashboard}", environment
        finally:
            process.terminate()
            process.wait(30)


def wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns once somebody listens on the port; fails if the process ends first or a minute passes."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the head's dashboard did not open port {port}")


def submit(
    cluster: tuple[str, dict[str, str]], *arguments: str, token: str | None = None
) -> subprocess.CompletedProcess[str]:
    address, environment = cluster
    if token is not None:
        environment = environment | {"RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "jobs.submit", *arguments, "--address", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)


def test_a_job_runs_on_the_cluster_and_its_log_comes_here(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    pictures = small_pictures(tmp_path / "pictures")
    settings = ["--config", "demo", f"ingest.source={pictures}", "ingest.tile=", f"data.uri={tmp_path}/data"]
    settings += ["model.size=16", "ingest.size=16", f"run.dir={tmp_path}/runs"]
    done = submit(cluster, "ingest", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote 40 pictures" in done.stdout and "SUCCEEDED" in done.stdout
    assert (tmp_path / "data" / "manifest.json").exists()


def test_a_failing_jobs_code_is_passed_on(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    done = submit(
        cluster, "ingest", "--config", "demo", f"ingest.source={tmp_path}/nowhere", f"data.uri={tmp_path}/data"
    )
    assert done.returncode == 1
    assert "nowhere" in done.stdout and "FAILED" in done.stdout


def test_without_the_token_nothing_runs(cluster: tuple[str, dict[str, str]]) -> None:
    refused = submit(cluster, "ingest", "--config", "demo", token=secrets.token_hex(32))
    assert refused.returncode == 1
    assert "token" in refused.stderr
