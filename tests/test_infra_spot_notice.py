"""infra/spot_notice.sh against a server that speaks as AWS's instance metadata does, and against a real Ray node."""

import http.server
import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.infra import ROOT
from tests.ray_nodes import ray_nodes

SCRIPT = ROOT / "infra/spot_notice.sh"
NOTICE = '{"action": "terminate", "time": "2026-11-21T12:02:00Z"}'


class Metadata(http.server.ThreadingHTTPServer):
    """Version 2 of the service: a token first; 404 until the machine's end is announced, here at the third question."""

    asked = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        server: "Metadata"

        def do_PUT(self) -> None:
            lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            self._answer(200 if self.path == "/latest/api/token" and lifetime else 400, "a-token")

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") != "a-token":
                self._answer(401, "")
                return
            assert self.path == "/latest/meta-data/spot/instance-action"
            self.server.asked += 1
            self._answer(*((200, NOTICE) if self.server.asked > 2 else (404, "")))

        def _answer(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), Metadata.Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_node_is_drained_once_the_end_is_announced(metadata: Metadata, tmp_path: Path) -> None:
    # A stand-in for `ray` writes its call down. The first fails, as it does while the head is restarting.
    lines = [
        "#!/bin/sh",
        f'printf "%s\\n" "$@" > {tmp_path}/call',
        f"if mkdir {tmp_path}/failed 2>&-; then exit 1; fi",
        "",
    ]
    (tmp_path / "ray").write_text("\n".join(lines))
    (tmp_path / "ray").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "METADATA": f"http://127.0.0.1:{metadata.server_port}/latest",
        "PAUSE_S": "0.05",
    }
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert metadata.asked == 3
    assert NOTICE in done.stdout
    assert (tmp_path / "failed").is_dir()

    # Ray itself takes the call for one of its own.
    command, *arguments = (tmp_path / "call").read_text().splitlines()
    assert command == "drain-node"
    understood = (
        importlib.import_module("ray.scripts.scripts")
        .cli.get_command(None, command)
        .make_context(command, arguments)
        .params
    )
    assert understood["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert understood["node_id"] is None, "the node that the script runs on"
    assert 60 < understood["deadline_remaining_seconds"] < 120


@pytest.mark.integration
@pytest.mark.cluster
@pytest.mark.slow
def test_ray_knows_that_the_node_will_end(metadata: Metadata) -> None:
    with ray_nodes(0, cpus=0, num_cpus=1) as address:
        ray.init(address, log_to_driver=False)
        busy = ray.remote(num_cpus=1)(threading.Event).remote()  # an idle node would be gone before one could look
        ray.get(busy.is_set.remote())
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "METADATA": f"http://127.0.0.1:{metadata.server_port}/latest",
            "PAUSE_S": "0.05",
            "RAY_ADDRESS": address,
        }
        done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        (deadline_ms,) = ray._private.state.state.get_draining_nodes().values()
        assert 0 < deadline_ms / 1000 - time.time() < 110
