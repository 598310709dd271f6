"""A real MLflow server over HTTP for tests: SQLite, served artifacts, the same port when it comes back."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.config import Config
from pipeline.tracking.client import connect
from tests.servers import free_ports

READY_DEADLINE_S = 90.0


@functools.cache
def empty_database() -> bytes:
    """A SQLite database with MLflow's tables: making one takes seconds, copying it takes none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mlflow.db")
        connect(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


def sqlite_uri(folder: Path) -> str:
    """The address of a fresh database in a folder."""
    path = folder / "mlflow.db"
    path.write_bytes(empty_database())
    return f"sqlite:///{path}"


class MlflowServer:
    """Can be stopped and started again; what it stores stays in its folder."""

    def __init__(self, folder: Path, host: str, entered: Sequence[str]) -> None:
        (self.port,) = free_ports(1)
        self.folder, self.host, self.entered = folder, host, entered
        self.uri = f"http://{host}:{self.port}"
        self.database_uri = sqlite_uri(folder)
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [*self.entered, sys.executable, "-m", "mlflow", "server"]
        command += ["--host", self.host, "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.database_uri]
        command += ["--serve-artifacts", "--artifacts-destination", str(self.folder / "artifacts")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        # The job runner is four more processes, which no test needs.
        environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )
        self._wait_until_ready(self.process)

    def stop(self) -> None:
        """Kills it with all its processes, as a lost machine would."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_DEADLINE_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as response:
                    if response.read().strip() == b"OK":
                        return
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = self.log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the MLflow server did not get ready: {error}\n{tail}") from error
            time.sleep(0.1)


@contextlib.contextmanager
def mlflow_server(folder: Path, host: str = "127.0.0.1", entered: Sequence[str] = ()) -> Iterator[MlflowServer]:
    """A started server that is stopped at the end.

    host, entered: its address, and what its command must begin with there, as for `s3_server`.
    """
    server = MlflowServer(folder, host, entered)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def check_one_run(config: Config, steps: Iterable[int]) -> Run:
    """The training is one MLflow run, here returned, which ended well and has the losses of all steps (images seen)."""
    client = MlflowClient(config.tracking_uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == config.tracking.experiment]
    named = f"attributes.run_name = '{config.run.name}'"
    (run,) = client.search_runs([experiment.experiment_id], named)
    assert run.info.status == "FINISHED"
    assert {metric.step for metric in client.get_metric_history(run.info.run_id, "loss/D")} == set(steps)
    return run
