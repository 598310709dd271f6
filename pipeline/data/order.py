"""Which sample stands where in the endless stream of training pictures. Pure functions of integers.

The stream is epoch after epoch without a gap; the picture at position p of the batch that follows
`images_seen` stands at n = images_seen + p. In each epoch row groups are permuted, and samples are shuffled
within windows of consecutive permuted row groups, so a reader holds one window at a time. Nothing depends on
the number of workers, and every epoch visits each sample once.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.ops.philox import MASK, philox4x32

GROUPS, SAMPLES = 0, 1
"""Last counter word: what is shuffled."""


class Order:
    """The order of one data set under one seed. All methods are pure; the last few windows are kept."""

    def __init__(self, rows: Sequence[int], digest: str, seed: int, window: int) -> None:
        """rows: samples in each row group. digest: the manifest's. window: row groups shuffled together."""
        if sum(rows) <= 0 or min(rows) < 0:
            raise ValueError(f"a data set needs samples, got {sum(rows)} in {len(rows)} row groups; ingest pictures")
        if sum(rows) > MASK:
            raise ValueError(f"a data set holds at most {MASK} samples, got {sum(rows)}; split it")
        if window < 1:
            raise ValueError(f"the shuffle window is {window} row groups; expected at least 1")
        self.rows = np.asarray(rows, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.rows)])
        self.samples = int(self.starts[-1])
        self.window = window
        self.key = _key(digest, seed)
        # Bounded by design: an epoch's permutation is small, a window holds some thousand samples.
        self._groups = functools.lru_cache(maxsize=3)(self._permute_groups)
        self._samples = functools.lru_cache(maxsize=3)(self._shuffle_window)

    def at(self, start: int, count: int) -> np.ndarray:
        """Canonical indices (int64) of the samples at stream positions start .. start + count - 1."""
        if start < 0 or count < 0:
            raise ValueError(f"stream positions are not negative, got start {start} and count {count}")
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            epoch, offset = divmod(start, self.samples)
            window, skip = self._locate(epoch, offset)
            part = self._samples(epoch, window)[skip : skip + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def groups_ahead(self, position: int, count: int) -> list[int]:
        """Row groups in the order of their need: those of the window at `position`, then `count` more."""
        epoch, offset = divmod(position, self.samples)
        window, _ = self._locate(epoch, offset)
        first = window * self.window
        wanted = min(self.window, len(self.rows) - first) + count
        ahead = self._groups(epoch)[0][first : first + wanted].tolist()
        while len(ahead) < wanted:
            epoch += 1
            ahead += self._groups(epoch)[0][: wanted - len(ahead)].tolist()
        return ahead

    def group_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row group of each sample, and its row in it."""
        groups = np.searchsorted(self.starts, indices, side="right") - 1
        return groups, indices - self.starts[groups]

    def _locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """The window that holds an offset into an epoch, and how far into the window it lies."""
        _, ends = self._groups(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        return window, offset - (int(ends[window - 1]) if window else 0)

    def _permute_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of row groups, and the offset at which each window ends."""
        permuted = np.argsort(_words(self.key, GROUPS, epoch, np.arange(len(self.rows))), kind="stable")
        ends = np.cumsum(self.rows[permuted])
        last = np.minimum(np.arange(self.window, len(ends) + self.window, self.window), len(ends)) - 1
        return permuted, ends[last]

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        permuted, _ = self._groups(epoch)
        groups = permuted[window * self.window : (window + 1) * self.window]
        indices = np.concatenate([np.arange(self.starts[group], self.starts[group + 1]) for group in groups])
        return indices[np.argsort(_words(self.key, SAMPLES, epoch, indices), kind="stable")]


def batch_indices(
    rows: Sequence[int], digest: str, seed: int, batch_size: int, images_seen: int, window: int = 16
) -> np.ndarray:
    """Canonical indices (int64) of the global batch that follows `images_seen`, by position in it."""
    return Order(rows, digest, seed, window).at(images_seen, batch_size)


def _key(digest: str, seed: int) -> tuple[int, int]:
    word = hashlib.sha256(f"{digest} {seed}".encode()).digest()
    return int.from_bytes(word[:4], "little"), int.from_bytes(word[4:8], "little")


def _words(key: tuple[int, int], what: int, epoch: int, items: np.ndarray) -> np.ndarray:
    """63 random bits for each item: sorting by them shuffles, alike in every version of numpy."""
    # Arrays, for they wrap where Python's integers would grow.
    epoch_low, epoch_high, whats = np.array([epoch & MASK]), np.array([epoch >> 32]), np.array([what])
    high, low, _, _ = philox4x32((items.astype(np.int64), epoch_low, epoch_high, whats), key)
    return high << 31 | low >> 1
