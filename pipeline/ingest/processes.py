"""The parts of an ingest in processes of this machine.

The processes are fresh interpreters that are told their work through a socket, not forks (threads of Arrow are live
here) and not `multiprocessing`'s: those would import the caller's main module, PyTorch and all, before they begin.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import FrameType

from pipeline.data.manifest import DataError
from pipeline.ingest.making import Job, make_part
from pipeline.ingest.parts import Part
from pipeline.ingest.records import PartRecord
from pipeline.ingest.sources import open_pictures

TICK_S = 0.2
END_DEADLINE_S = 10.0
Tick = Callable[[int], object]


def run_in_processes(job: Job, parts: Iterable[Part], tick: Tick) -> Generator[PartRecord]:
    """A `Runner` of `ingest.workers` processes. A single part, or a single worker, stays in this process.

    Raises what a part raises, and DataError where a process dies. Processes end with the generator.
    """
    waiting = iter(parts)
    first = [part for _, part in zip(range(worker_count(job.config.workers)), waiting, strict=False)]
    if len(first) <= 1:
        yield from run_here(job, (part for some in (first, waiting) for part in some), tick)
        return
    with contextlib.ExitStack() as stack:
        workers = {}
        for part in first:
            worker = stack.enter_context(_worker(job))
            workers[worker.connection] = worker
            worker.give(part)
        while any(worker.part for worker in workers.values()):
            busy = [worker.connection for worker in workers.values() if worker.part]
            for connection in wait(busy):
                assert isinstance(connection, Connection)
                worker = workers[connection]
                answer = worker.answer()
                if isinstance(answer, int):
                    tick(answer)
                    continue
                worker.give(next(waiting, None))  # before the caller looks at the record
                yield answer


def run_here(job: Job, parts: Iterable[Part], tick: Tick) -> Generator[PartRecord]:
    """A `Runner` that makes the parts in this process, one after the other."""
    with contextlib.closing(open_pictures(job.source, job.kind, job.storage)) as pictures:
        for part in parts:
            yield make_part(job, part, pictures, tick)


def worker_count(asked: int) -> int:
    """`ingest.workers`; where that is 0, the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: fewer than the machine has where a scheduler says so
        return asked or len(os.sched_getaffinity(0))
    return asked or os.cpu_count() or 1


@dataclass
class _Worker:
    """A process as its parent sees it."""

    process: subprocess.Popen[bytes]
    connection: Connection
    part: Part | None = None
    """What it makes now."""

    def give(self, part: Part | None) -> None:
        """Its next part, or None to end."""
        self.part = part
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `answer` says so
            self.connection.send(part)

    def answer(self) -> int | PartRecord:
        """Places looked at, or the record of its part. Raises what it raised."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise DataError(self._death()) from None
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, int | PartRecord)
        return answer

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_DEADLINE_S)
        code = self.process.returncode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with code {code}"
        number = self.part.number if self.part else "?"
        return (
            f"process {self.process.pid} of the ingest was ended {how} while it made part {number}; SIGKILL often "
            f"means too little memory: lower ingest.workers. The same command goes on with the parts that are not done"
        )


@contextlib.contextmanager
def _worker(job: Job) -> Iterator[_Worker]:
    mine, theirs = Pipe()
    with contextlib.closing(mine):
        with contextlib.closing(theirs):
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        worker = _Worker(process, mine)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                mine.send(job)
            yield worker
        finally:
            mine.close()
            _end(process, working=worker.part is not None)


def _end(process: subprocess.Popen[bytes], working: bool) -> None:
    """A process without work ends by itself now that its socket is closed; one that works is stopped."""
    for end in (process.terminate, process.kill) if working else (lambda: None, process.terminate, process.kill):
        end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_DEADLINE_S)
            return


# ---- in the process ------------------------------------------------------------------------------


def _main(connection: Connection) -> None:
    """Makes the parts it is given until it is given None or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    signal.signal(signal.SIGTERM, _stop)
    ticker = _Ticker(connection)
    job: Job = connection.recv()
    try:
        with contextlib.closing(open_pictures(job.source, job.kind, job.storage)) as pictures:
            while (part := _next(connection)) is not None:
                record = make_part(job, part, pictures, ticker)
                ticker.flush()
                _tell(connection, record)
    except Exception as error:
        _tell(connection, _sendable(error))


def _next(connection: Connection) -> Part | None:
    try:
        part = connection.recv()
    except (EOFError, ConnectionResetError):  # the parent is gone
        return None
    assert part is None or isinstance(part, Part)
    return part


def _tell(connection: Connection, answer: int | PartRecord | Exception) -> None:
    try:
        connection.send(answer)
    except (BrokenPipeError, ConnectionResetError):  # the parent is gone: nobody waits for the rest
        raise SystemExit(1) from None


def _stop(number: int, frame: FrameType | None) -> None:
    """Leaves by way of an exception, so that files half written are removed."""
    raise SystemExit(128 + number)


class _Ticker:
    """Adds small numbers up: a message for each picture would cost more than a small picture."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._count, self._sent = connection, 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._sent > TICK_S:
            self.flush()

    def flush(self) -> None:
        _tell(self._connection, self._count)
        self._count, self._sent = 0, time.monotonic()


def _sendable(error: Exception) -> Exception:
    """Errors that this project explains go as they are; others are defects and take their traceback along."""
    if type(error).__module__.partition(".")[0] == "pipeline":
        return error
    return RuntimeError(f"in a process of the ingest:\n{traceback.format_exc()}")


if __name__ == "__main__":
    with contextlib.closing(Connection(int(sys.argv[1]))) as to_parent:
        _main(to_parent)
