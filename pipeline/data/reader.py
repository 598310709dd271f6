"""Row groups to encoded pictures: one ranged read each, checked by hash, read ahead by threads.

Pictures are numpy views into Arrow's buffers; no byte of them is copied or touched in Python.
"""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import DataError, Manifest, RowGroup, Shard
from pipeline.storage import MissingError, StorageConfig, arrow_filesystem, explained, join

OPEN_FILES = 64


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
    """Reads row groups by number, keeping the last `capacity` of them in memory. Threads end with `close`."""

    def __init__(self, manifest: Manifest, uri: str, storage: StorageConfig, capacity: int, threads: int) -> None:
        """uri: of the data set. capacity: row groups kept. threads: reads at once."""
        self._groups = manifest.row_groups
        self._shards = {shard.file: shard for shard in manifest.shards}
        self._uri, self._storage = uri, storage
        self._capacity = capacity
        self._cache: OrderedDict[int, Future[Rows]] = OrderedDict()
        self._files: OrderedDict[str, tuple[pa.NativeFile, pq.FileMetaData]] = OrderedDict()
        self._files_lock = threading.Lock()
        with explained(uri, storage):
            self._filesystem, self._folder = arrow_filesystem(uri, storage)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def prefetch(self, groups: Iterable[int]) -> None:
        """Begin to read row groups that will be needed soon. Never drops one that is named here."""
        for group in groups:
            self._request(group)
        while len(self._cache) > self._capacity:
            _, dropped = self._cache.popitem(last=False)
            dropped.cancel()

    def rows(self, group: int) -> Rows:
        """A row group, read now unless it was prefetched. Raises DataError, StorageError."""
        return self._request(group).result()

    def pictures(self, groups: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        """Encoded pictures (uint8 views) by row group and row."""
        needed = {group: self.rows(group) for group in sorted(set(groups))}
        return [needed[group][row] for group, row in zip(groups, rows, strict=True)]

    def path(self, group: int, row: int) -> str:
        """Where a sample came from, for messages about it."""
        place = self._groups[group]
        file, metadata = self._open(self._shards[place.file])
        with explained(join(self._uri, place.file), self._storage):
            table = pq.ParquetFile(file, metadata=metadata).read_row_group(place.index, columns=["image.path"])
        return table.column("image")[row].as_py()["path"]

    def describe(self, group: int, row: int) -> str:
        """Names a sample in full."""
        place = self._groups[group]
        file = join(self._uri, place.file)
        return f"{file}, row group {place.index}, row {row} ({self.path(group, row)!r})"

    def close(self) -> None:
        """Drop what waits to be read; threads end with the reads that are under way."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._cache.clear()
        self._files.clear()

    def _request(self, group: int) -> "Future[Rows]":
        future = self._cache.get(group)
        if future is None or future.cancelled():
            future = self._cache[group] = self._pool.submit(self._read, self._groups[group])
        self._cache.move_to_end(group)
        return future

    def _read(self, group: RowGroup) -> Rows:
        place = f"{join(self._uri, group.file)}, row group {group.index}"
        file, metadata = self._open(self._shards[group.file])
        with explained(join(self._uri, group.file), self._storage):
            data = file.read_at(group.bytes, group.offset)
        if hashlib.sha256(data).hexdigest() != group.sha256:
            raise DataError(
                f"{place}: damaged (its hash differs from the manifest's); restore the file or ingest again"
            )
        try:
            part = pa.PythonFile(_Part(data, group.offset, self._shards[group.file].bytes), mode="r")
            table = pq.ParquetFile(part, metadata=metadata).read_row_group(
                group.index, columns=["image.bytes"], use_threads=False
            )
            return _views(table, group.rows)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{place}: cannot be read as Parquet ({error}); restore the file or ingest again"
            ) from error

    def _open(self, shard: Shard) -> tuple[pa.NativeFile, pq.FileMetaData]:
        """A shard's file, which threads may share, and its footer."""
        with self._files_lock:
            opened = self._files.get(shard.file)
        if opened is None:  # unlocked: two threads may open a file twice, none waits for another's file
            opened = self._open_new(shard)
        with self._files_lock:
            self._files[shard.file] = opened
            self._files.move_to_end(shard.file)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)  # closed when its last reader lets go
        return opened

    def _open_new(self, shard: Shard) -> tuple[pa.NativeFile, pq.FileMetaData]:
        place = join(self._uri, shard.file)
        try:
            with explained(place, self._storage):
                file = self._filesystem.open_input_file(join(self._folder, shard.file))
                size = file.size()
        except MissingError as error:
            raise DataError(f"{place}: missing, though the manifest lists it; restore it or ingest again") from error
        if size != shard.bytes:
            kind = "truncated" if size < shard.bytes else "changed"
            raise DataError(
                f"{place}: {kind} ({size} bytes, the manifest says {shard.bytes}); restore it or ingest again"
            )
        with explained(place, self._storage):
            try:
                return file, pq.read_metadata(file)
            except pa.ArrowInvalid as error:
                raise DataError(f"{place}: its footer is damaged ({error}); restore it or ingest again") from error


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


def _views(table: pa.Table, rows: int) -> Rows:
    """The picture column as views. Several chunks are joined, which copies; a row group's column is one."""
    column = table.column("image")
    array = (column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()).field("bytes")
    if len(array) != rows or array.null_count:
        raise ValueError(f"{len(array)} pictures of which {array.null_count} null, expected {rows}")
    _, offsets, values = array.buffers()
    offsets = np.frombuffer(offsets, dtype=np.int32)[array.offset : array.offset + rows + 1]
    return Rows(np.frombuffer(values, dtype=np.uint8), offsets)
