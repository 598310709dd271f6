"""How a loader is measured: pictures, wall time and CPU time of the whole process tree, between two moments.

Needs nothing but Python, for it runs in every environment. Start-up is left out by differences: the tree's
counters are read when the loader has run for a while, and again at the end.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
SENT = 'SeaweedFS_s3_bucket_traffic_sent_bytes_total{bucket="%s"}'


@dataclass
class Stretch:
    """What happened between two moments."""

    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """User and system time of this process, its threads and all its children."""
    bytes_read: float | None = 0.0
    """From files, or from the S3 server by its own count; None where neither is known."""
    server_cpu_seconds: float | None = 0.0
    """Of the S3 server, where it runs on this machine."""


@dataclass
class Outcome:
    """What a loader's process reports."""

    stretch: Stretch
    first_batch_seconds: float
    """From the construction of the loader to its first batch; imports excluded."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """The S3 server behind the loader. Without it, bytes are counted from files."""

    bucket: str
    pid: int | None = None
    metrics: str | None = None
    """URL of its counters."""


@dataclass(frozen=True)
class _Moment:
    seconds: float
    cpu_seconds: float
    bytes_read: float | None
    server_cpu_seconds: float | None


def measure(
    batches: Iterator[Any], images: int, seconds: float, server: Server | None, longest: float = math.inf
) -> Stretch:
    """Takes batches until both `images` and `seconds` are reached, `longest` seconds are over, or none are left."""
    before = _begin(server)
    count = 0
    while (took := time.perf_counter() - before.seconds) < longest and (count < images or took < seconds):
        batch = next(batches, None)
        if batch is None:
            break
        count += len(batch)
    after = _end(server)
    return Stretch(
        images=count,
        seconds=after.seconds - before.seconds,
        cpu_seconds=after.cpu_seconds - before.cpu_seconds,
        bytes_read=_difference(after.bytes_read, before.bytes_read),
        server_cpu_seconds=_difference(after.server_cpu_seconds, before.server_cpu_seconds),
    )


def add(first: Stretch, second: Stretch) -> Stretch:
    """Both together."""

    def total(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a + b

    return Stretch(
        first.images + second.images,
        first.seconds + second.seconds,
        first.cpu_seconds + second.cpu_seconds,
        total(first.bytes_read, second.bytes_read),
        total(first.server_cpu_seconds, second.server_cpu_seconds),
    )


def first_batch(build: Callable[[], Iterator[Any]], size: int) -> tuple[Iterator[Any], float]:
    """Builds a loader and takes one batch: the rest of it, and the seconds until then.

    Raises ValueError where a batch is not uint8 (B, size, size, 3): the work must be the same for all.
    """
    began = time.perf_counter()
    batches = build()
    batch = next(batches)
    seconds = time.perf_counter() - began
    if str(batch.dtype) != "torch.uint8" or tuple(batch.shape[1:]) != (size, size, 3):
        raise ValueError(f"a batch is {batch.dtype} {tuple(batch.shape)}, expected uint8 (B, {size}, {size}, 3)")
    return batches, seconds


def endless(epoch: Callable[[int], Iterable[Any]]) -> Iterator[Any]:
    """Epoch after epoch."""
    number = 0
    while True:
        yield from epoch(number)
        number += 1


def steady(build: Callable[[], Iterator[Any]], arguments: dict[str, Any], packages: Iterable[str]) -> Outcome:
    """A loader that gives batches without end: the first batch, a warm-up, and the measured stretch."""
    server = server_of(arguments)
    batches, seconds = first_batch(build, arguments["size"])
    measure(batches, arguments["warmup"], 0.0, server, arguments["longest"])
    stretch = measure(batches, arguments["images"], arguments["seconds"], server, arguments["longest"])
    return Outcome(stretch, seconds, versions(packages))


def server_of(arguments: dict[str, Any]) -> Server | None:
    """The S3 server named in the arguments."""
    return Server(**arguments["server"]) if arguments.get("server") else None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of packages by name."""
    return {package: importlib.metadata.version(package) for package in packages}


def report(work: Callable[[dict[str, Any]], Outcome | None]) -> None:
    """The main program of a loader's script: arguments as JSON in, the outcome as the last line out."""
    outcome = work(json.loads(sys.argv[1]))
    print(json.dumps(asdict(outcome) if outcome is not None else {}), flush=True)


def cpu_seconds(root: int) -> float:
    """User and system time of a process and all below it, those that ended and were waited for included."""
    total = 0.0
    for pid in process_tree(root):
        with contextlib.suppress(OSError):  # ended meanwhile, and counted by its parent from then on
            total += _own_seconds(pid) + sum(_stat(pid)[1:]) / TICKS
    return total


def process_tree(root: int) -> list[int]:
    """A process and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                children.setdefault(_stat(int(entry))[0], []).append(int(entry))
    tree = [root]
    for pid in tree:  # grows while it is walked
        tree += children.get(pid, [])
    return tree


def _own_seconds(pid: int) -> float:
    """CPU time of one process with all its threads, to the nanosecond where /proc has ticks of 10 ms."""
    clock = ~pid << 3 | 2  # clock_getcpuclockid(3), which Python does not offer for processes
    return time.clock_gettime(clock)


def _stat(pid: int) -> tuple[int, int, int]:
    """Parent, and ticks of children that were waited for: user and system."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(words[1]), int(words[13]), int(words[14])


def _file_bytes(root: int) -> float | None:
    """Bytes that the tree asked of files (and pipes), from the page cache or the disk."""
    total = 0
    for pid in process_tree(root):
        try:
            total += int(Path(f"/proc/{pid}/io").read_text().split()[1])
        except (OSError, IndexError):
            return None
    return float(total)


def _sent_bytes(server: Server) -> float | None:
    """Bytes that the server has sent from the bucket."""
    if server.metrics is None:
        return None
    with urllib.request.urlopen(server.metrics, timeout=10) as answer:
        text = answer.read().decode()
    wanted = SENT % server.bucket
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(wanted))


def _io(server: Server | None) -> tuple[float | None, float | None]:
    """Bytes read, and the server's CPU time."""
    if server is None:
        return _file_bytes(os.getpid()), None
    return _sent_bytes(server), cpu_seconds(server.pid) if server.pid else None


# What reading the counters costs must fall outside of the stretch on both sides.
def _begin(server: Server | None) -> _Moment:
    io = _io(server)
    cpu = cpu_seconds(os.getpid())
    return _Moment(time.perf_counter(), cpu, *io)


def _end(server: Server | None) -> _Moment:
    seconds = time.perf_counter()
    cpu = cpu_seconds(os.getpid())
    return _Moment(seconds, cpu, *_io(server))


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
