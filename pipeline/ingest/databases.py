"""Pictures in an LMDB as LSUN publishes them: a folder with data.mdb, whose values are encoded pictures."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tqdm import tqdm

from pipeline.ingest.listing import Listing, fingerprint, no_pictures
from pipeline.ingest.local_copy import local_copy
from pipeline.packages import MissingPackageError
from pipeline.storage import MissingError, StorageConfig, StorageError, arrow_filesystem, is_remote, join

if TYPE_CHECKING:
    import lmdb

DATA_FILE = "data.mdb"
NO_PICTURES = ("length", "__len__", "__keys__")
"""Keys that some writers of LMDBs add for themselves."""


def list_lmdb(uri: str, storage: StorageConfig) -> Listing:
    """By keys and the sizes of values, in the order of keys; values are not read, and from S3 the file is copied.

    Names are the keys, which say nothing about the format of a picture. Raises StorageError for a damaged
    database and MissingPackageError where the package lmdb is not installed.
    """
    sizes: dict[str, int] = {}
    ignored = []
    with _environment(uri, storage, forward=False) as environment, _explained(uri):
        with environment.begin(buffers=True) as transaction:
            entries = environment.stat()["entries"]
            for key, value in tqdm(transaction.cursor(), "list keys", entries, unit=" keys", disable=None):
                try:
                    name = bytes(key).decode()
                except UnicodeDecodeError:
                    ignored.append(repr(bytes(key)))
                    continue
                if name in NO_PICTURES:
                    ignored.append(name)
                else:
                    sizes[name] = len(value)  # stands beside the key
    if not sizes:
        raise no_pictures(uri, ignored)
    return Listing(uri, "lmdb", tuple(sizes), tuple(ignored), fingerprint(sizes.items()))


class LmdbPictures:
    """Values by key. From S3, the file is copied once for all processes of the machine."""

    def __init__(self, uri: str, storage: StorageConfig) -> None:
        self._uri = uri
        with contextlib.ExitStack() as stack:
            self._environment = stack.enter_context(_environment(uri, storage, forward=True))
            self._held = stack.pop_all()

    def read(self, name: str) -> bytes:
        """One value. Raises MissingError where there is no such key."""
        with _explained(f"{self._uri} ({name})"), self._environment.begin() as transaction:
            value = transaction.get(name.encode())
        if value is None:
            raise MissingError(
                f"{self._uri}: has no key {name!r} any more; it was changed while it was read, run the job again"
            )
        return bytes(value)

    def close(self) -> None:
        """Close the database, and remove its copy if nobody else reads it."""
        self._held.close()


class _Open:
    """A database that is open in this process, which LMDB allows only once."""

    def __init__(self, environment: "lmdb.Environment") -> None:
        self.environment = environment
        self.users = 0


_OPEN: dict[str, _Open] = {}  # by the folder; a forked process reads on from its parent's
_LOCK = threading.Lock()


@contextlib.contextmanager
def _environment(uri: str, storage: StorageConfig, *, forward: bool) -> Iterator["lmdb.Environment"]:
    """The database, shared by its users in this process. `forward` lets the system read ahead of the reader."""
    lmdb = _lmdb(uri)
    with contextlib.ExitStack() as stack:
        if is_remote(uri):
            folder = stack.enter_context(local_copy(join(uri, DATA_FILE), storage))
        else:
            folder = Path(arrow_filesystem(uri, storage)[1])
        key = os.path.realpath(folder)
        with _LOCK:
            if key not in _OPEN:
                _OPEN[key] = _Open(_opened(lmdb, uri, folder, forward))
            _OPEN[key].users += 1
        try:
            yield _OPEN[key].environment
        finally:
            with _LOCK:
                _OPEN[key].users -= 1
                if not _OPEN[key].users:
                    _OPEN.pop(key).environment.close()


def _lmdb(uri: str) -> ModuleType:
    """The package, which only this kind of source needs."""
    try:
        import lmdb
    except ImportError as error:
        raise MissingPackageError(
            f"{uri}: reading an LMDB needs the package lmdb; run pip install 'cips-pipeline[lmdb]'"
        ) from error
    return lmdb


def _opened(lmdb: ModuleType, uri: str, folder: Path, forward: bool) -> "lmdb.Environment":
    with _explained(uri):
        environment = lmdb.open(str(folder), readonly=True, lock=False, create=False, readahead=forward)
        # The file is mapped into memory: a page past its end would end the process instead of raising an error.
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if (size := (folder / DATA_FILE).stat().st_size) < expected:
        environment.close()
        raise StorageError(f"{uri}: {DATA_FILE} is cut off ({size:,} of {expected:,} bytes); copy it again")
    return environment


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turns LMDB's errors inside the block into StorageErrors about `uri`."""
    import lmdb

    try:
        yield
    except lmdb.Error as error:
        raise StorageError(f"{uri}: not a readable LMDB ({error}); copy or make it again") from error
