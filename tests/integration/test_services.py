"""infra/services/local.sh: three real servers, a training against them, and all of it still there the next day."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from mlflow import MlflowClient

from jobs import ingest, train
from pipeline.config import load_config
from pipeline.storage import StorageConfig, StorageError, list_names
from pipeline.tracking.registry import load_generator
from pipeline.training.checkpoint import list_checkpoints
from tests.infra import ROOT
from tests.servers import free_ports
from tests.small import SMALL_SETTINGS, small_pictures

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # MLflow makes its tables and starts twice, each time in many seconds on a busy machine
    pytest.mark.skipif(
        not list(Path("/usr/lib/postgresql").glob("*/bin")), reason="PostgreSQL is missing: apt-get install postgresql"
    ),
]

LOCAL = ROOT / "infra/services/local.sh"


class Services:
    """The script with a folder and ports of its own."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(10)
        self.folder = folder
        self.environment = os.environ | {
            "SERVICES_FOLDER": str(folder),
            "MLFLOW_PORT": str(ports[0]),
            "S3_PORT": str(ports[1]),
            "POSTGRES_PORT": str(ports[2]),
            "SEAWEEDFS_PORTS": " ".join(map(str, ports[3:])),
            "S3_BUCKET": "made-by-up",
            "MLFLOW_WORKERS": "1",
            # What the caller's shell points to is not what the servers are to use.
            "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        }

    def run(self, command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([LOCAL, command], env=self.environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def up(self) -> dict[str, str]:
        """Starts them and returns the exports."""
        return dict(re.findall(r"^export (\w+)=(\S+)$", self.run("up").stdout, re.MULTILINE))

    def processes(self) -> list[int]:
        """Processes whose working folder is one of the services', PostgreSQL's included."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cwd"):
            try:
                inside = entry.resolve(strict=True).is_relative_to(self.folder)
            except OSError:
                continue
            if inside:
                found.append(int(entry.parent.name))
        return found


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    # PostgreSQL runs as a user of its own, which cannot enter pytest's folders.
    folder = Path(tempfile.mkdtemp(prefix="services-"))
    services = Services(folder / "home")
    try:
        folder.chmod(0o711)
        yield services
    finally:
        subprocess.run([LOCAL, "down"], env=services.environment, capture_output=True, timeout=120)
        for pid in services.processes():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_is_trained_against_them_and_outlives_them(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = services.up()
    assert exports.keys() >= {"MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert services.up() == exports, "a second `up` changes nothing"
    assert services.run("status").stdout.count(" answers at ") == 3

    # Passwords are for the owner's eyes: not on a command line, not in a file that others read.
    assert (services.folder / "services.env").stat().st_mode & 0o777 == 0o600
    running = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in services.processes()]
    assert len(running) >= 3
    secret = exports["AWS_SECRET_ACCESS_KEY"]
    password = re.search(r"POSTGRES_PASSWORD=(\w+)", (services.folder / "services.env").read_text())
    assert password is not None
    assert not any(secret in line or password[1] in line for line in running)

    # Data, checkpoints, metrics and model all go to the three.
    for name, value in exports.items():
        monkeypatch.setenv(name, value)
    config = load_config(
        None,
        [
            *SMALL_SETTINGS,
            f"ingest.source={small_pictures(tmp_path / 'pictures')}",
            "data.uri=s3://made-by-up/data",
            "data.decoder=pillow",
            "run.dir=s3://made-by-up/runs",
            "run.name=served",
            "cluster.backend=local",
            f"tracking.uri={exports['MLFLOW_TRACKING_URI']}",
            "tracking.model_name=served",
            "train.precision=fp32",
            "train.total_kimg=0.064",
            "train.tick_kimg=0.032",
            "train.checkpoint_kimg=0.032",
            "train.evaluate_kimg=0.064",
            "evaluate.images=32",
            "evaluate.input_size=32",
        ],
    )
    assert ingest.run(config).samples == 40
    trained = train.run(config)
    assert trained.outcome.images_seen == 64
    assert trained.version == "1"
    assert list_checkpoints(config.run_uri, config.storage)[-1] == 64

    # The store knows one key. Strangers get nothing, and a bucket that is missing is an error.
    address = exports["AWS_ENDPOINT_URL"].removeprefix("http://")
    for keys in ({"anonymous": True}, {"access_key": exports["AWS_ACCESS_KEY_ID"], "secret_key": "guessed"}):
        stranger = pafs.S3FileSystem(endpoint_override=address, scheme="http", region="us-east-1", **keys)
        with pytest.raises(OSError):
            stranger.open_input_file("made-by-up/data/manifest.json")
    with pytest.raises(StorageError, match="no bucket"):
        list_names("s3://made-by-nobody/data", StorageConfig())

    # MLflow keeps its tables in PostgreSQL and its files in the bucket.
    tracked = MlflowClient(exports["MLFLOW_TRACKING_URI"])
    assert tracked.get_run(trained.tracking_run).info.status == "FINISHED"
    assert tracked.get_run(trained.tracking_run).info.artifact_uri.startswith("mlflow-artifacts:/")
    assert list_names("s3://made-by-up/mlflow", StorageConfig())
    assert not list(services.folder.rglob("mlflow.db")) and not list(services.folder.rglob("mlruns"))

    # A night without them, and all is still there.
    services.run("down")
    assert services.processes() == []
    assert "mlflow does not answer at" in services.run("status", code=1).stdout
    assert services.run("down").returncode == 0, "stopping what is stopped is no error"

    assert services.up() == exports
    assert {point.step for point in tracked.get_metric_history(trained.tracking_run, "loss/D")} == {32, 64}
    weights = load_generator(exports["MLFLOW_TRACKING_URI"], "models:/served/1").state_dict()
    assert weights
    assert train.run(config).version == "1", "the finished run is found, not trained again"


def test_a_server_that_was_killed_is_seen_and_started_again(services: Services) -> None:
    exports = services.up()
    leader = int((services.folder / "seaweedfs/pid").read_text())
    os.killpg(leader, signal.SIGKILL)
    told = services.run("status", code=1).stdout
    assert "seaweedfs does not answer" in told and told.count(" answers at ") == 2
    assert services.up() == exports
    assert services.run("status").stdout.count(" answers at ") == 3


def test_a_taken_port_is_named(services: Services) -> None:
    services.run("down")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may linger
        other.bind(("127.0.0.1", int(services.environment["S3_PORT"])))
        other.listen()
        told = services.run("up", code=1).stderr
    assert f"port {services.environment['S3_PORT']} is taken by another program: change S3_PORT in" in told
    services.run("down")
