"""Words beside a run's log: why it was started again, and what its workers printed.

<run>/restarts.json           {"cause", "time"} of each restart, oldest first
<run>/workers/rank-0.log      the latest lines that worker 0 printed: number, time, text

Small files that are rewritten whole, as S3 wants it. All is read without Ray, by any machine that reaches the folder.
"""

import contextlib
import io
import json
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

from pipeline.storage import MissingError, StorageConfig, StorageError, is_remote, join, list_names, read_bytes
from pipeline.storage import write_bytes as store

RESTARTS, WORKERS = "restarts.json", "workers"
KEPT_LINES = 400  # of each worker: what is older is of no use, and the whole file is written each time
LONGEST_LINE = 500
PAUSE_S, PAUSE_REMOTE_S = 1.0, 5.0  # between two writes
LAST_WORDS_S = 10.0  # that the end of a worker waits for a slow store


class Word(NamedTuple):
    """A line that a worker printed."""

    rank: int
    number: int
    """Counted by each rank from 1, on over its restarts."""
    time: float
    """Unix time on the worker's clock."""
    text: str

    def line(self) -> str:
        """The line as it is kept."""
        stamp = datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds")
        return f"{self.number} {stamp} {self.text}"


def note_restart(folder: str, storage: StorageConfig, cause: str) -> None:
    """Writes down why a run is started again. A store that fails is said, not raised: the run is to be saved."""
    try:
        notes = [*read_restarts(folder, storage), {"cause": cause, "time": time.time()}]
        store(join(folder, RESTARTS), json.dumps(notes, indent=1).encode(), storage)
    except (OSError, ValueError, StorageError) as error:
        print(f"could not note the restart ({cause}): {error}", flush=True)


def read_restarts(folder: str, storage: StorageConfig) -> list[dict[str, Any]]:
    """The restarts of a run, oldest first; notes of before times were kept have no `time`."""
    try:
        return list(json.loads(read_bytes(join(folder, RESTARTS), storage)))
    except MissingError:
        return []


def read_words(folder: str, storage: StorageConfig) -> list[Word]:
    """The latest lines of every worker, rank by rank."""
    found = []
    for name in list_names(join(folder, WORKERS), storage):
        if match := re.fullmatch(r"rank-(\d+)\.log", name):
            found += _parsed(int(match[1]), read_bytes(join(folder, WORKERS, name), storage))
    return sorted(found)


@contextlib.contextmanager
def kept_words(folder: str, storage: StorageConfig, rank: int) -> Iterator[None]:
    """Keeps what this process prints meanwhile in the run's folder too; Ray shows workers' prints to nobody.

    A thread writes: printing waits for no store. While the store is away lines wait, the latest KEPT_LINES of them.
    """
    keeper = _Keeper(folder, storage, rank)
    try:
        with contextlib.redirect_stdout(_Tee(sys.stdout, keeper.add)):
            yield
    finally:
        keeper.close()


class _Keeper:
    """The file of one rank."""

    def __init__(self, folder: str, storage: StorageConfig, rank: int) -> None:
        self.uri, self.storage, self.rank = join(folder, WORKERS, f"rank-{rank}.log"), storage, rank
        self.pause = PAUSE_REMOTE_S if is_remote(folder) else PAUSE_S
        self.said: list[tuple[float, str]] = []
        self.changed, self.closed = threading.Condition(), threading.Event()
        self.thread = threading.Thread(target=self._keep, name="kept-words", daemon=True)
        self.thread.start()

    def add(self, text: str) -> None:
        with self.changed:
            self.said = [*self.said, (time.time(), one_line(text))][-KEPT_LINES:]
            self.changed.notify()

    def close(self) -> None:
        self.closed.set()
        with self.changed:
            self.changed.notify()
        self.thread.join(LAST_WORDS_S)

    def _keep(self) -> None:
        kept: list[Word] | None = None
        while said := self._taken():
            try:
                if kept is None:
                    kept = self._kept_before()
                first = kept[-1].number + 1 if kept else 1
                words = [*kept, *(Word(self.rank, first + i, *each) for i, each in enumerate(said))][-KEPT_LINES:]
                store(self.uri, "".join(f"{word.line()}\n" for word in words).encode(), self.storage)
                kept = words
            except (OSError, StorageError):  # nobody is told: telling would be one more line
                with self.changed:
                    self.said = [*said, *self.said][-KEPT_LINES:]
                if self.closed.is_set():
                    return
            self.closed.wait(self.pause)

    def _taken(self) -> list[tuple[float, str]]:
        """What was said since; waits for something. Nothing only at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.said or self.closed.is_set())
            said, self.said = self.said, []
            return said

    def _kept_before(self) -> list[Word]:
        try:
            return _parsed(self.rank, read_bytes(self.uri, self.storage))
        except (MissingError, ValueError):  # none, or a damaged one, which is of no use
            return []


class _Tee(io.TextIOBase):
    """Hands on what is written, and each line that is complete to `heard` as well."""

    def __init__(self, below: TextIO, heard: Callable[[str], None]) -> None:
        self.below, self.heard = below, heard
        # One for each thread: `print` writes a line in two pieces.
        self.begun: dict[int, str] = defaultdict(str)

    def write(self, text: str) -> int:
        thread = threading.get_ident()
        *lines, self.begun[thread] = (self.begun[thread] + text).split("\n")
        for line in lines:
            if line.strip():
                self.heard(line)
        return self.below.write(text)

    def flush(self) -> None:
        self.below.flush()

    def fileno(self) -> int:
        return self.below.fileno()

    def isatty(self) -> bool:
        return False


def _parsed(rank: int, data: bytes) -> list[Word]:
    lines: Sequence[str] = data.decode(errors="replace").splitlines()
    parts = (line.split(" ", 2) for line in lines)
    return [Word(rank, int(number), datetime.fromisoformat(stamp).timestamp(), text) for number, stamp, text in parts]


def one_line(text: str) -> str:
    """What stands on the terminal in the end (a bar's last state), without breaks, and not too long."""
    return " ".join(text.rstrip().rpartition("\r")[2].split())[:LONGEST_LINE]
