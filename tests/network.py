"""Several machines on this one: each with an address, processes, a host name and a /tmp/ray of its own.

A machine is a set of Linux namespaces whose network is joined to the others' by a cable (a veth pair) and a switch
(a bridge, in a namespace of its own, so that no rule of this machine's firewall applies). This machine has a cable
too, so a test reaches them all. Every namespace lives as long as the process that holds it, and that process dies
with the test's: nothing is left behind, whatever happens.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NEEDED = {"ip": "iproute2", "nsenter": "util-linux", "setpriv": "util-linux", "unshare": "util-linux"}
OWN = ("--net", "--pid", "--mount", "--uts")
DEADLINE_S = 30.0

# As Debian sets up a machine: its own name stands for an address that no other machine reaches.
BOOT = """\
mkdir -p /tmp/ray
mount -t tmpfs ray /tmp/ray
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /tmp/ray/hosts
mount --bind /tmp/ray/hosts /etc/hosts
hostname {name}
ip link set lo up"""
SWITCH = """\
ip link add switch type bridge
ip link set switch up"""


class NetworkError(RuntimeError):
    """A machine or its network could not be set up."""


@dataclass
class Machine:
    """One machine of a `Network`."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    """Ends when every process of the machine has."""
    first: int
    """Process 1 of the machine, by its number here."""
    switch: int
    port: str
    """The switch's end of the cable."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ
    ) -> subprocess.Popen[bytes]:
        """Starts a command on the machine, in this working directory and in a process group of its own.

        log: gets what the command prints.
        """
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.entered(), *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def entered(self) -> list[str]:
        """What a command must begin with to run on the machine."""
        return ["nsenter", f"--target={self.first}", *OWN, "--", "env", f"--chdir={Path.cwd()}"]

    def processes(self) -> list[str]:
        """The command lines of all that runs on the machine."""
        mine, found = os.readlink(f"/proc/{self.first}/ns/pid"), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if os.readlink(path / "ns/pid") == mine:
                    found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
        return found

    def unplug(self) -> None:
        """Takes the cable's link down: nothing comes in or goes out, and nobody is told."""
        _run("nsenter", f"--target={self.switch}", "--net", "ip", "link", "set", self.port, "down")

    def plug(self) -> None:
        """Undoes `unplug`."""
        _run("nsenter", f"--target={self.switch}", "--net", "ip", "link", "set", self.port, "up")

    def kill(self) -> None:
        """Ends every process of the machine at once (SIGKILL), and the machine with them."""
        if self.holder.poll() is None:  # else the number may be another process's by now
            os.kill(self.first, signal.SIGKILL)
        for process in (*self.started, self.holder):
            process.wait(DEADLINE_S)
        if self.holder.stdout:
            self.holder.stdout.close()


class Network:
    """A switch and the machines on it."""

    def __init__(self, prefix: str, switch: int) -> None:
        self.prefix, self.switch = prefix, switch
        self.machines: list[Machine] = []

    def machine(self, name: str) -> Machine:
        """A new machine with an address of its own; nothing runs on it yet."""
        number = len(self.machines) + 2
        holder = _held(BOOT.format(name=name), *OWN, "--fork", "--kill-child", "--mount-proc")
        machine = Machine(name, f"{self.prefix}.{number}", holder, _child(holder.pid), self.switch, f"port{number}")
        self.machines.append(machine)
        _run(
            *("ip", "link", "add", machine.port, "netns", str(self.switch)),
            *("type", "veth", "peer", "name", "eth0", "netns", str(machine.first)),
        )
        _run("nsenter", f"--target={self.switch}", "--net", "ip", "link", "set", machine.port, "master", "switch", "up")
        _run(*machine.entered(), "ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
        _run(*machine.entered(), "ip", "link", "set", "eth0", "up")
        return machine


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network without machines; those that it is given are killed with it. Skips where it cannot be made."""
    _require_namespaces()
    switch, cable = _held(SWITCH, "--net"), f"test{secrets.token_hex(4)}"
    made = Network(_free_prefix(), switch.pid)
    try:
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "port1", "netns", str(switch.pid))
        _run("nsenter", f"--target={switch.pid}", "--net", "ip", "link", "set", "port1", "master", "switch", "up")
        _run("ip", "address", "add", f"{made.prefix}.1/24", "dev", cable)
        _run("ip", "link", "set", cable, "up")
        yield made
    finally:
        for machine in made.machines:
            machine.kill()
        subprocess.run(["ip", "link", "delete", cable], capture_output=True, timeout=DEADLINE_S)
        switch.kill()
        switch.communicate(timeout=DEADLINE_S)


def _require_namespaces() -> None:
    if os.geteuid() != 0:
        pytest.skip("machines on a network of their own are Linux namespaces, which only root may make")
    missing = [command for command in NEEDED if shutil.which(command) is None]
    if missing:
        pytest.skip(f"the command `{missing[0]}` is missing (Debian: apt install {NEEDED[missing[0]]})")
    probe = "ip link add switch type bridge && ip link add end1 type veth peer name end2 && mount -t tmpfs probe /tmp"
    tried = subprocess.run(["unshare", *OWN, "--fork", "sh", "-c", probe], capture_output=True, timeout=DEADLINE_S)
    if tried.returncode:
        reason = tried.stderr.decode(errors="replace").strip()
        pytest.skip(f"this machine lets root make no namespaces, bridges and veth pairs (a container?): {reason}")


def _held(script: str, *namespaces: str) -> subprocess.Popen[bytes]:
    """A process that has run a script in new namespaces and then waits to be killed; it is, if this thread ends."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "--", "sh", "-ec"]
    holder = subprocess.Popen(
        [*command, f"{script}\necho ready\nexec sleep infinity"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert holder.stdout is not None
    said = holder.stdout.readline()
    if said != b"ready\n":
        holder.kill()
        rest, _ = holder.communicate(timeout=DEADLINE_S)
        raise NetworkError(f"a namespace could not be set up: {(said + rest).decode(errors='replace')}\n{script}")
    return holder


def _child(parent: int) -> int:
    """The only child of a process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                return int(path.parent.name)
    raise NetworkError(f"process {parent}, which holds a machine, has no child")


def _free_prefix() -> str:
    """The first three numbers of a private /24 that this machine has no route to but its default one."""
    while True:
        prefix = f"10.{1 + secrets.randbelow(254)}.{secrets.randbelow(256)}"
        routes = _run("ip", "-4", "route", "show", "table", "all", "to", "match", f"{prefix}.0/24")
        if all(route.startswith("default") for route in routes.splitlines()):
            return prefix


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
