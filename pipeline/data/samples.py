"""Samples by canonical index: from row groups to decoded pictures, with a rule for what is damaged.

With `on_corrupt=skip` a sample that cannot be read is replaced by the next one of its row group, and one of a
damaged row group by the same row of the next group. The rule depends on the data alone, so the order stays the
same for every number of workers and after every restart.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np
from torch import Tensor

from pipeline.data.decode import DecodeError, Decoder
from pipeline.data.manifest import DataError, Manifest
from pipeline.data.order import locate
from pipeline.data.reader import DamagedGroup, Reader
from pipeline.data.views import Views

OnCorrupt = Literal["fail", "skip"]


class Samples:
    """Reads and decodes; used by one thread. Owns its reader and decoder."""

    def __init__(self, manifest: Manifest, uri: str, reader: Reader, decoder: Decoder, on_corrupt: OnCorrupt) -> None:
        self._uri = uri
        self._rows = np.array([group.rows for group in manifest.row_groups], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._rows)])
        self._reader, self._decoder, self._skipping = reader, decoder, on_corrupt == "skip"
        self._bad_groups: set[int] = set()
        self._bad_samples: set[int] = set()
        self._first_damage: DataError | None = None

    def groups_of(self, indices: np.ndarray) -> np.ndarray:
        """Row group of each sample."""
        return locate(self._starts, indices)[0]

    def prefetch(self, groups: Iterable[int]) -> None:
        """Begin to read row groups that will be needed soon, in this order; those named are kept in memory."""
        self._reader.prefetch(group for group in groups if group not in self._bad_groups)

    def take(self, indices: np.ndarray, views: Views) -> tuple[Tensor, np.ndarray]:
        """uint8 RGB (len(indices), H, W, 3), and which of them stand in for damaged ones, bool (len(indices),).

        Raises DataError for damage that is not to be skipped, StorageError.
        """
        while True:
            chosen = self._replacements(indices)
            groups, rows = (array.tolist() for array in locate(self._starts, chosen))
            try:
                pictures = self._decoder.decode(self._reader.pictures(groups, rows), views)
            except DamagedGroup as error:
                self._skip(error)
                self._bad_groups.add(error.group)
            except DecodeError as error:
                place = self._reader.describe(groups[error.position], rows[error.position])
                damage = DataError(f"{place} {error.reason}; restore the file or ingest again")
                damage.__cause__ = error
                self._skip(damage)
                self._bad_samples.add(int(chosen[error.position]))
            else:
                return pictures, chosen != indices

    @property
    def bytes_read(self) -> int:
        """Bytes of row groups that came from the store, not from memory or the disk cache."""
        return self._reader.bytes_read

    def stop_reading(self) -> None:
        """End reads that wait for S3, in whatever thread: `take` there raises ClosedError."""
        self._reader.close()

    def close(self) -> None:
        """End the reader's threads and free the decoder."""
        self._reader.close()
        self._decoder.close()

    def _skip(self, damage: DataError) -> None:
        if not self._skipping:
            raise damage
        self._first_damage = self._first_damage or damage
        print(f"skipped from now on, since data.on_corrupt is skip: {damage}", flush=True)

    def _replacements(self, indices: np.ndarray) -> np.ndarray:
        if not self._bad_groups and not self._bad_samples:
            return indices
        return np.array([self._replacement(index) for index in indices.tolist()], dtype=np.int64)

    def _replacement(self, index: int) -> int:
        group, row = (int(one[0]) for one in locate(self._starts, np.array([index])))
        for next_group in range(group, group + len(self._rows)):
            group = next_group % len(self._rows)
            rows = int(self._rows[group])
            if group in self._bad_groups or not rows:
                continue
            for next_row in range(row, row + rows):
                candidate = int(self._starts[group]) + next_row % rows
                if candidate not in self._bad_samples:
                    return candidate
        raise DataError(
            f"{self._uri}: no sample of the data set can be read, the first because of this: {self._first_damage}"
        ) from self._first_damage
