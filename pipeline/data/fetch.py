"""Ranged reads of a data set's files, from disk or S3: all the bytes that were asked for, or an error saying why.

One read is one request. On S3 what passes (slow-downs, time-outs, lost connections) is retried, see `fetch_s3`;
errors of the local disk are not.
"""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.fetch_errors import ClosedError, truncated
from pipeline.storage import StorageConfig, explained, fsspec_filesystem, is_remote, join

if TYPE_CHECKING:
    from pipeline.data.fetch_s3 import S3Ranges


class Fetcher:
    """Reads pieces of the files below one URI; threads share it. Belongs to the process that made it."""

    def __init__(self, uri: str, storage: StorageConfig, connections: int) -> None:
        """connections: to S3 at most, kept open between reads; give the number of threads that read."""
        self._source = _source(uri, storage, connections)
        self._lock = threading.Lock()
        self.bytes_read = 0
        """Delivered so far by counted reads."""

    @property
    def requests(self) -> int:
        """Counted reads sent to the store so far; on S3 each retry counts."""
        return self._source.requests

    def read(self, file: str, offset: int, length: int, *, counted: bool = True) -> bytes:
        """`length` bytes from `offset` on of a file below the URI. counted: in `requests` and `bytes_read`.

        Raises MissingError, TruncatedError if the file is too short, ClosedError after `close`, and
        StorageError for a store that refuses, or fails until storage.total_timeout_s is over.
        """
        if offset < 0 or length < 1:
            raise ValueError(f"{length} bytes from {offset} on were asked for; expected a start >= 0 and a length >= 1")
        data = self._source.read(file, offset, length, counted)
        with self._lock:
            self.bytes_read += length * counted
        return data

    def close(self) -> None:
        """End the reads that wait for S3 with ClosedError, and its connections. A local read runs to its end."""
        self._source.close()


class LocalRanges:
    """Opens the file for each read: on any disk that is cheap beside a row group, and leaves nothing to close."""

    def __init__(self, uri: str, storage: StorageConfig) -> None:
        self._uri, self._storage = uri, storage
        self._folder = Path(fsspec_filesystem(uri, storage)[1])
        self._closed = False
        self._lock = threading.Lock()
        self.requests = 0

    def read(self, file: str, offset: int, length: int, counted: bool) -> bytes:
        place = join(self._uri, file)
        if self._closed:
            raise ClosedError(f"{place}: the fetcher is closed")
        with self._lock:
            self.requests += counted
        with explained(place, self._storage):
            descriptor = os.open(self._folder / file, os.O_RDONLY)
            try:
                return _read_whole(descriptor, offset, length, place)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        self._closed = True


def _source(uri: str, storage: StorageConfig, connections: int) -> "LocalRanges | S3Ranges":
    if not is_remote(uri):
        return LocalRanges(uri, storage)
    from pipeline.data.fetch_s3 import S3Ranges  # here, for local data do without botocore's slow import

    return S3Ranges(uri, storage, connections)


def _read_whole(descriptor: int, offset: int, length: int, place: str) -> bytes:
    data = os.pread(descriptor, length, offset)
    while len(data) < length:  # the kernel may give less, 2 GiB at most
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise truncated(place, offset, length, os.fstat(descriptor).st_size)
        data += more
    return data
