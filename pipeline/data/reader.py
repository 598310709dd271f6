"""Row groups to encoded pictures: one ranged read each, checked by hash, read ahead by threads.

Where each column lies in a row group stands in the data set's `_metadata`, so a shard is never asked for its
size or its footer. Pictures are numpy views into Arrow's buffers; no byte of them is copied or touched in Python.
"""

import contextlib
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.cache import DiskCache
from pipeline.data.fetch import Fetcher
from pipeline.data.fetch_errors import ClosedError, TruncatedError
from pipeline.data.manifest import FOOTERS_NAME, REPLACE, DataError, Manifest, check_footers
from pipeline.storage import MissingError, StorageConfig, StorageError, join

RESTORE = "restore the file or ingest again"


class DamagedGroup(DataError):
    """A row group that cannot be had as it was ingested: damaged, truncated or missing."""

    def __init__(self, message: str, group: int = -1) -> None:
        super().__init__(message)
        self.group = group
        """Its number in the data set."""


@dataclass(frozen=True)
class Rows:
    """The encoded pictures of one row group."""

    values: np.ndarray
    """uint8, all pictures one after another."""
    offsets: np.ndarray
    """int32 (rows + 1,): where each begins in `values`."""

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Reader:
    """Reads row groups by number, keeping the last `capacity` of them in memory.

    One thread uses it; any thread may `close` it, which ends the reads that wait for S3, and the reading threads
    with them. A read of a local disk that hangs cannot be ended: its thread stays until the disk answers.
    """

    def __init__(
        self,
        manifest: Manifest,
        uri: str,
        storage: StorageConfig,
        capacity: int,
        threads: int,
        cache: DiskCache | None = None,
    ) -> None:
        """uri: of the data set. capacity: row groups kept. threads: reads at once. cache: looked into first."""
        self._manifest, self._uri, self._storage, self._disk = manifest, uri, storage, cache
        self._groups = manifest.row_groups
        self._sizes = {shard.file: shard.bytes for shard in manifest.shards}
        self._capacity = capacity
        self._fetcher = Fetcher(uri, storage, connections=threads)
        self._footers: pq.FileMetaData | None = None
        self._footers_lock = threading.Lock()
        self._verified: set[int] = set()
        self._kept: OrderedDict[int, Future[Rows]] = OrderedDict()
        self._kept_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._pool.submit(self._metadata)  # beside the first row groups; if it fails, the next who needs it asks again

    @property
    def bytes_read(self) -> int:
        """Bytes of row groups that came from the store, not from the cache."""
        return self._fetcher.bytes_read

    @property
    def requests(self) -> int:
        """Reads of row groups sent to the store; on S3 each retry counts."""
        return self._fetcher.requests

    def prefetch(self, groups: Iterable[int]) -> None:
        """Begin to read row groups that will be needed soon, at most `capacity`. Never drops one that is named here."""
        wanted = list(groups)[: self._capacity]
        if not self._kept.keys() >= set(wanted):  # usually all are kept; using them renews their place
            self._request(wanted)
            self._trim()

    def rows(self, group: int) -> Rows:
        """A row group, read now unless it was prefetched.

        Raises DamagedGroup, StorageError for a store that fails, ClosedError after `close`. What failed is not
        kept: asked again, it is read again.
        """
        (future,) = self._request([group])
        rows = self._result(group, future)
        self._trim()
        return rows

    def pictures(self, groups: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        """Encoded pictures (uint8 views) by row group and row."""
        once = sorted(set(groups))
        needed = {group: self._result(group, future) for group, future in zip(once, self._request(once), strict=True)}
        self._trim()
        return [needed[group][row] for group, row in zip(groups, rows, strict=True)]

    def path(self, group: int, row: int) -> str:
        """Where a sample came from, for messages about it; its row group is read again."""
        content = self._content(group)
        with self._parsing(group):
            column = self._table(group, content, "image.path").column("image")
            return str(column[row].as_py()["path"])

    def describe(self, group: int, row: int) -> str:
        """Names a sample in full, or as fully as the store allows."""
        source = ""
        with contextlib.suppress(DataError, StorageError):
            source = f" ({self.path(group, row)!r})"
        return f"{self._place(group)}, row {row}{source}"

    def close(self) -> None:
        """Drop what waits to be read, and end what is being read."""
        self._fetcher.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._kept_lock:
            self._kept.clear()

    def _request(self, groups: Sequence[int]) -> "list[Future[Rows]]":
        futures = []
        with self._kept_lock:
            for group in groups:
                future = self._kept.get(group)
                if future is None:
                    try:
                        future = self._kept[group] = self._pool.submit(self._read, group)
                    except RuntimeError as error:  # the pool takes nothing more
                        raise ClosedError(f"{self._place(group)}: the reader is closed") from error
                self._kept.move_to_end(group)
                futures.append(future)
        return futures

    def _result(self, group: int, future: "Future[Rows]") -> Rows:
        try:
            return future.result()
        except CancelledError:
            raise ClosedError(f"{self._place(group)}: the reader was closed during the read") from None
        except BaseException:
            with self._kept_lock:
                if self._kept.get(group) is future:
                    del self._kept[group]
            raise

    def _trim(self) -> None:
        with self._kept_lock:
            while len(self._kept) > self._capacity:
                _, dropped = self._kept.popitem(last=False)
                dropped.cancel()

    def _read(self, group: int) -> Rows:
        content = self._content(group)
        with self._parsing(group):
            return _views(self._table(group, content, "image.bytes"), self._groups[group].rows)

    def _content(self, group: int) -> bytes:
        """The bytes of a row group, checked: from the cache, or by one read of the store."""
        place = self._groups[group]
        data = self._disk.get(place.sha256) if self._disk else None
        if data is not None:
            return data
        data = self._fetch(group)
        if group not in self._verified or self._disk:
            # Asked for once more, for what is damaged on its way may be whole in the store.
            if _sha256(data) != place.sha256 and _sha256(data := self._fetch(group)) != place.sha256:
                raise self._damaged(group, f"damaged (its hash differs from the manifest's); {RESTORE}")
            self._verified.add(group)
        if self._disk:
            self._disk.put(place.sha256, data)
        return data

    def _fetch(self, group: int) -> bytes:
        place = self._groups[group]
        try:
            return self._fetcher.read(place.file, place.offset, place.bytes)
        except MissingError as error:
            raise self._damaged(group, f"missing, though the manifest lists the file; {RESTORE}") from error
        except TruncatedError as error:
            size = "too short" if error.size is None else f"{error.size} bytes"
            whole = self._sizes[place.file]
            raise self._damaged(group, f"truncated ({size}, the manifest says {whole}); {RESTORE}") from error

    def _table(self, group: int, content: bytes, column: str) -> pa.Table:
        place = self._groups[group]
        part = pa.PythonFile(_Part(content, place.offset, self._sizes[place.file]), mode="r")
        file = pq.ParquetFile(part, metadata=self._metadata())
        return file.read_row_group(group, columns=[column], use_threads=False)

    @contextlib.contextmanager
    def _parsing(self, group: int) -> Iterator[None]:
        """What fails inside is no table of ours, though its bytes are those that the manifest names."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise self._damaged(group, f"cannot be read as Parquet ({error}); {RESTORE}") from error

    def _metadata(self) -> pq.FileMetaData:
        with self._footers_lock:
            if self._footers is None:
                self._footers = check_footers(self._manifest, self._uri, self._fetch_footers())
            return self._footers

    def _fetch_footers(self) -> bytes:
        """`_metadata` by one read, its length being known, that `close` ends like any other."""
        place, length = join(self._uri, FOOTERS_NAME), self._manifest.footers.bytes
        try:
            return self._fetcher.read(FOOTERS_NAME, 0, length, counted=False)
        except MissingError as error:
            raise DataError(f"{place}: missing, though the manifest names it; restore it or {REPLACE}") from error
        except TruncatedError as error:
            size = "too short" if error.size is None else f"{error.size} bytes"
            raise DataError(
                f"{place}: truncated ({size}, the manifest says {length}); restore it or {REPLACE}"
            ) from error

    def _place(self, group: int) -> str:
        place = self._groups[group]
        return f"{join(self._uri, place.file)}, row group {place.index}"

    def _damaged(self, group: int, what: str) -> DamagedGroup:
        return DamagedGroup(f"{self._place(group)}: {what}", group)


class _Part(io.RawIOBase):
    """A piece of a file in memory that answers at its place in the whole file, without copying."""

    def __init__(self, data: bytes, offset: int, size: int) -> None:
        self._data, self._offset, self._size, self._at = memoryview(data), offset, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> Any:
        start = self._at - self._offset
        if start < 0 or start + size > len(self._data) or size < 0:
            raise OSError(f"bytes {self._at} to {self._at + size} lie outside of the row group")
        self._at += size
        return self._data[start : start + size]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _views(table: pa.Table, rows: int) -> Rows:
    """The picture column as views. Several chunks are joined, which copies; a row group's column is one."""
    column = table.column("image")
    array = (column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()).field("bytes")
    if len(array) != rows or array.null_count:
        raise ValueError(f"{len(array)} pictures of which {array.null_count} null, expected {rows}")
    _, offsets, values = array.buffers()
    offsets = np.frombuffer(offsets, dtype=np.int32)[array.offset : array.offset + rows + 1]
    return Rows(np.frombuffer(values, dtype=np.uint8), offsets)
