"""How the pictures of a source are cut into parts: the same parts for any number of workers. Pure arithmetic.

Places are counted through the whole source: a picture is one place, or with tiles as many as it has tiles. Part k is
the places from k to k + 1 times `part_pictures`; what it becomes depends on nothing outside of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Consecutive places of one source picture."""

    name: str
    first: int
    last: int
    """One past the last; a whole picture is 0 to 1."""


@dataclass(frozen=True)
class Part:
    """What one task turns into shards of its own."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def places(self) -> int:
        return sum(piece.last - piece.first for piece in self.pieces)


class Parts:
    """The parts of a source, made when they are asked for: lists of millions of pictures stay lists of names."""

    def __init__(
        self, names: tuple[str, ...], size: int, limit: int | None = None, places: np.ndarray | None = None
    ) -> None:
        """size: places in a part. limit: places in all. places: int (names,), of each picture; None is one each."""
        self._names, self._size = names, size
        self._ends = None if places is None else np.cumsum(places, dtype=np.int64)
        available = len(names) if self._ends is None else int(self._ends[-1]) if len(names) else 0
        self.places = available if limit is None else min(limit, available)
        """Of all parts together."""

    def __len__(self) -> int:
        return -(-self.places // self._size)

    def __getitem__(self, number: int) -> Part:
        if not 0 <= number < len(self):
            raise IndexError(f"part {number} of {len(self)}")
        first = number * self._size
        return Part(number, tuple(self._pieces(first, min(first + self._size, self.places))))

    def __iter__(self) -> Iterator[Part]:
        return (self[number] for number in range(len(self)))

    def _pieces(self, first: int, last: int) -> Iterator[Piece]:
        if self._ends is None:
            yield from (Piece(name, 0, 1) for name in self._names[first:last])
            return
        at = int(np.searchsorted(self._ends, first, side="right"))
        while first < last:
            begin = int(self._ends[at - 1]) if at else 0
            end = min(int(self._ends[at]), last)
            if end > first:
                yield Piece(self._names[at], first - begin, end - begin)
            first, at = max(first, end), at + 1
