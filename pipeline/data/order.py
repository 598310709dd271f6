"""Which sample stands where in the endless stream of training pictures. Pure functions of integers.

The stream is epoch after epoch without a gap; the picture at place p of the batch that follows `images_seen`
stands at n = images_seen + p. In each epoch the row groups are permuted, and the row of samples that they make
is cut into one stretch for each place of the global batch (`spread` stretches for each). A place walks through
its own stretch, whose samples are shuffled within their row groups:

    permuted row groups   | 7     | 2     | 9     | 4     | 0     | ...
    stretches             | ---- 0 ----> | <--- 1 ---- | ---- 2 ----> | ...

So the pictures of a batch come from different row groups, but for stretches that share one on their border; a
worker reads only the row groups of its places, and holds one for each stretch. Neighbouring stretches are walked in
opposite directions: both reach the row group on their border at the same time, and it is read once. Nothing depends
on the number of workers, every epoch visits each sample once, and any place of the stream is computed without what
came before.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.ops.philox import MASK, philox4x32

GROUPS, SAMPLES, TURNS = 0, 1, 2
"""Last counter word: what is shuffled."""


class Order:
    """The order of one data set under one seed. All methods are pure; what they shuffled last is kept."""

    def __init__(self, rows: Sequence[int] | np.ndarray, digest: str, seed: int, batch_size: int, spread: int) -> None:
        """rows: samples in each row group. digest: the manifest's. batch_size: pictures of the global batch.

        spread: stretches that each place of the batch draws from in turn.
        """
        self.rows = np.asarray(rows, dtype=np.int64)
        self.samples = int(self.rows.sum())
        if self.samples <= 0 or self.rows.min() < 0:
            raise ValueError(f"a data set needs samples, got {self.samples} in {len(rows)} row groups; ingest pictures")
        if self.samples > MASK:
            raise ValueError(f"a data set holds at most {MASK} samples, got {self.samples}; split it")
        if batch_size < 1 or spread < 1:
            raise ValueError(f"batch_size is {batch_size} and spread {spread}; expected at least 1 of both")
        self.starts = np.concatenate([[0], np.cumsum(self.rows)])
        self.batch_size, self.spread = batch_size, spread
        self.key = _key(digest, seed)
        # Bounded by design: an epoch's permutation of groups, and the rows of as many groups as are open at once.
        self._groups = functools.lru_cache(maxsize=2)(self._permute_groups)
        self._rows = functools.lru_cache(maxsize=2 * batch_size * spread)(self._permute_rows)

    def at(self, images_seen: int, places: Sequence[int] | range | np.ndarray, batches: int = 1) -> np.ndarray:
        """Canonical indices of samples, int64 (batches, len(places)): these places of the global batches that follow
        `images_seen`."""
        chosen = np.asarray(places, dtype=np.int64)
        if images_seen < 0 or (len(chosen) and (chosen.min() < 0 or chosen.max() >= self.batch_size)):
            raise ValueError(
                f"images_seen is {images_seen} and the places {places}; expected 0 or more, and places of a batch of "
                f"{self.batch_size}"
            )
        begins = images_seen + self.batch_size * np.arange(batches, dtype=np.int64)
        stream = begins[:, None] + chosen
        indices = np.empty_like(stream)
        epochs = stream // self.samples
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._in_epoch(epoch, stream[here])
        return indices

    def group_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row group of each sample, and its row in it."""
        return locate(self.starts, indices)

    def _in_epoch(self, epoch: int, stream: np.ndarray) -> np.ndarray:
        """Samples at stream positions n (N,) of one epoch."""
        first, place = epoch * self.samples, stream % self.batch_size
        begin = self._places_before(first, place)
        length = self._places_before(first, place + 1) - begin
        lap, turn = np.divmod((stream - first) // self.batch_size, self.spread)
        stretch = self._stretch(epoch, place, lap, turn, length)
        # The place's part of the epoch, cut into `spread` stretches: the first ones are longer by one.
        short, longer = np.divmod(length, self.spread)
        begin += stretch * short + np.minimum(stretch, longer)
        length = short + (stretch < longer)
        backward = (place * self.spread + stretch) % 2 == 1
        return self._samples_at(epoch, begin + np.where(backward, length - 1 - lap, lap))

    def _places_before(self, first: int, place: np.ndarray) -> np.ndarray:
        """How many positions of the epoch that begins at `first` belong to places before `place` of their batch."""

        def before(end: int) -> np.ndarray:
            whole, rest = divmod(end, self.batch_size)
            return whole * place + np.minimum(place, rest)

        return before(first + self.samples) - before(first)

    def _stretch(
        self, epoch: int, place: np.ndarray, lap: np.ndarray, turn: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        """Which of a place's stretches is visited: in each lap every one once, in an order of its own."""
        if self.spread == 1:
            return np.zeros_like(place)
        stretches = np.arange(self.spread)
        items = ((lap * self.batch_size + place) * self.spread)[:, None] + stretches
        keys = _words(self.key, TURNS, epoch, items & MASK)
        left = length - lap * self.spread
        keys[stretches >= left[:, None]] = np.iinfo(np.int64).max  # the last lap has fewer stretches to visit
        return np.take_along_axis(np.argsort(keys, axis=1, kind="stable"), turn[:, None], axis=1)[:, 0]

    def _samples_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Samples at positions of the epoch's permuted row groups, laid one after another."""
        permuted, ends = self._groups(epoch)
        ranks, which = np.unique(np.searchsorted(ends, positions, side="right"), return_inverse=True)
        groups = permuted[ranks]
        shuffled = np.concatenate([self._rows(epoch, group) for group in groups.tolist()])
        begins = np.cumsum(self.rows[groups]) - self.rows[groups]  # of each group's rows in `shuffled`
        inside = positions - (ends[ranks] - self.rows[groups])[which]
        return self.starts[groups][which] + shuffled[begins[which] + inside]

    def _permute_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of row groups, and where each ends in it."""
        permuted = np.argsort(_words(self.key, GROUPS, epoch, np.arange(len(self.rows))), kind="stable")
        return permuted, np.cumsum(self.rows[permuted])

    def _permute_rows(self, epoch: int, group: int) -> np.ndarray:
        return np.argsort(
            _words(self.key, SAMPLES, epoch, np.arange(self.starts[group], self.starts[group + 1])), kind="stable"
        )


def locate(starts: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row group of each canonical index, and its row in it. starts: first index of each row group, and the end."""
    groups = np.searchsorted(starts, indices, side="right") - 1
    return groups, indices - starts[groups]


def _key(digest: str, seed: int) -> tuple[int, int]:
    word = hashlib.sha256(f"{digest} {seed}".encode()).digest()
    return int.from_bytes(word[:4], "little"), int.from_bytes(word[4:8], "little")


def _words(key: tuple[int, int], what: int, epoch: int, items: np.ndarray) -> np.ndarray:
    """63 random bits for each item: sorting by them shuffles, alike in every version of numpy."""
    # Arrays, for they wrap where Python's integers would grow.
    epoch_low, epoch_high, whats = np.array([epoch & MASK]), np.array([epoch >> 32]), np.array([what])
    high, low, _, _ = philox4x32((items.astype(np.int64), epoch_low, epoch_high, whats), key)
    return high << 31 | low >> 1
