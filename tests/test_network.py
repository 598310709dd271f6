"""The machines of tests: reached by address, silent without a cable, gone with everything that ran on them."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.network import network

pytestmark = [pytest.mark.integration]
PORT = 8000


def answers(address: str, seconds: float = 1.0) -> bool:
    """Whether something accepts a connection from this process."""
    try:
        socket.create_connection((address, PORT), seconds).close()
        return True
    except OSError:
        return False


def test_machines_reach_each_other_until_one_is_unplugged_or_killed(tmp_path: Path) -> None:
    with network() as made:
        here, there = made.machine("here"), made.machine("there")
        log = tmp_path / "server.log"
        server = there.start([sys.executable, "-m", "http.server", "--bind", there.address, str(PORT)], log)
        deadline = time.monotonic() + 30
        while not answers(there.address):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        asking = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)"
        asked = [*here.entered(), sys.executable, "-c", asking, there.address, str(PORT)]
        assert subprocess.run(asked, timeout=30).returncode == 0

        # Each has processes and a name of its own, and that name leads nowhere but to itself.
        assert any("http.server" in command for command in there.processes())
        assert not any("http.server" in command for command in here.processes())
        named = subprocess.run([*here.entered(), "getent", "hosts", "here"], capture_output=True, text=True, timeout=30)
        assert named.stdout.split() == ["127.0.1.1", "here"]

        there.unplug()
        assert not answers(there.address)
        assert server.poll() is None  # it runs on, alone
        there.plug()
        assert answers(there.address, 10)

        there.kill()
        assert server.poll() is not None
        assert not answers(there.address)
    assert here.holder.poll() is not None
    with pytest.raises(OSError):  # nothing of the network is left, this machine's cable included
        socket.socket().bind((f"{made.prefix}.1", 0))
