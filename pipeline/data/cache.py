"""Row groups on a local disk: capped in size, shared by the processes of a node, trusted only by hash.

An entry is a file named by the SHA-256 of its content, written under another name first. Nothing is flushed
to the disk: what a power cut tears is found by its hash and removed. The file `lock` serialises whoever adds
or removes entries, and holds the bytes that they are given in all; reading takes no lock.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"
SPARE = 20
"""An eviction frees one part of so many beyond what is needed, so that one look through the folder pays for long."""

log = logging.getLogger(__name__)
_KEY = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{8}\.partial")


class DiskCache:
    """Bytes by their SHA-256 (hex), least recently used out first. Threads and processes may share the folder.

    Trouble with the disk (full, read-only, gone) is told in one warning; from then on the cache gives and
    takes nothing, and its user goes on without it.
    """

    def __init__(self, folder: str | os.PathLike[str], capacity_bytes: int) -> None:
        """Opens or makes the folder, and removes what crashed writers left in it."""
        if capacity_bytes < 1:
            raise ValueError(f"a cache of {capacity_bytes} bytes was asked for; expected at least 1, or no cache")
        self._folder, self._capacity = Path(os.path.abspath(os.path.expanduser(folder))), capacity_bytes
        self._usable = True
        self._counting = threading.Lock()
        self.hits = 0
        self.misses = 0
        with self._stepping_aside():
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as lock:
                self._sweep()
                _write_total(lock, sum(held for _, held, _ in self._entries()))

    def get(self, key: str) -> bytes | None:
        """The content with this hash, or None. A damaged entry is removed."""
        path, data = self._path(key), None
        if self._usable:
            with self._stepping_aside(), contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() == key:
                    _touch(path)
                else:
                    data = None
                    path.unlink()
        with self._counting:
            self.hits += data is not None
            self.misses += data is None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep the content; its hash must be `key`. Content larger than the whole cache is not kept."""
        path = self._path(key)
        if not self._usable or len(data) > self._capacity:
            return
        with self._stepping_aside():
            if path.exists():
                return
            with self._begun(key, len(data)) as (descriptor, partial):
                written = 0
                while written < len(data):
                    written += os.write(descriptor, memoryview(data)[written:])
                with contextlib.suppress(FileNotFoundError):  # the folder was emptied meanwhile
                    _touch(partial)
                    os.replace(partial, path)

    @contextlib.contextmanager
    def _begun(self, key: str, size: int) -> Iterator[tuple[int, Path]]:
        """A new file to write to, for which room was made. A lock on it says that its writer lives."""
        partial = self._folder / f"{key}.{secrets.token_hex(4)}.partial"
        with self._locked() as lock:
            _write_total(lock, self._make_room(_read_total(lock), size) + size)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            os.truncate(descriptor, size)  # so that it counts in full for whoever adds up the files
            yield descriptor, partial
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
            os.close(descriptor)

    def _make_room(self, total: int, size: int) -> int:
        """Removes the least recently used entries if `size` more bytes need it; the bytes left. Under the lock.

        The total errs upwards where a writer died or two wrote the same: before anything goes, it is counted.
        """
        if total + size <= self._capacity:
            return total
        self._sweep()
        entries = sorted(self._entries())
        total = sum(held for _, held, _ in entries)
        if total + size <= self._capacity:
            return total
        goal = max(0, self._capacity - size - self._capacity // SPARE)
        for _, held, path in entries:
            if total <= goal:
                break
            if _PARTIAL.fullmatch(path.name):  # being written: its bytes count, but it stays
                continue
            path.unlink(missing_ok=True)
            total -= held
        return total

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Last use (ns), bytes and path of every file that counts, also of those being written."""
        with os.scandir(self._folder) as found:
            for entry in found:
                if _KEY.fullmatch(entry.name) or _PARTIAL.fullmatch(entry.name):  # others' files are not touched
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        yield status.st_mtime_ns, status.st_size, self._folder / entry.name

    def _sweep(self) -> None:
        """Removes partial files whose writer is dead: nobody holds their lock. Under the folder's lock."""
        for _, _, path in self._entries():
            if not _PARTIAL.fullmatch(path.name):
                continue
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The descriptor of the lock file, locked against other processes and, opened anew, other threads."""
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _stepping_aside(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with self._counting:
                first, self._usable = self._usable, False
            if first:
                log.warning("the cache in %s is not used any more: %s; free or mend the disk", self._folder, error)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a SHA-256 in hexadecimal digits")
        return self._folder / key


def _read_total(descriptor: int) -> int:
    text = os.pread(descriptor, 32, 0)
    return int(text) if text.isdigit() else 0


def _write_total(descriptor: int, total: int) -> None:
    os.pwrite(descriptor, b"%020d" % total, 0)


def _touch(path: Path) -> None:
    now = time.time_ns()  # the kernel's own clock for this is too coarse to order uses
    os.utime(path, ns=(now, now))
