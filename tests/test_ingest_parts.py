"""Parts: each place in exactly one, in order, whatever the source."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.parts import Part, Parts, Piece


def places(part: Part) -> list[tuple[str, int]]:
    return [(piece.name, place) for piece in part.pieces for place in range(piece.first, piece.last)]


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    size=st.integers(1, 12),
    limit=st.none() | st.integers(1, 60),
    whole=st.booleans(),
)
def test_each_place_lies_in_one_part_in_order(counts: list[int], size: int, limit: int | None, whole: bool) -> None:
    names = tuple(f"{number}.png" for number in range(len(counts)))
    counts = [1] * len(counts) if whole else counts
    parts = Parts(names, size, limit, None if whole else np.array(counts))
    everything = [(name, place) for name, count in zip(names, counts, strict=True) for place in range(count)][:limit]
    assert parts.places == len(everything)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [place for part in parts for place in places(part)] == everything
    assert all(part.places == size for part in list(parts)[:-1])
    assert all(piece.first < piece.last for part in parts for piece in part.pieces)
    for part in parts:
        assert len({piece.name for piece in part.pieces}) == len(part.pieces), "a picture is opened once for a part"


def test_a_part_does_not_depend_on_what_follows() -> None:
    few, many = (Parts(tuple("abcdefgh"[:count]), 3) for count in (6, 8))
    assert list(few) == list(many)[:2]
    assert many[2] == Part(2, (Piece("g", 0, 1), Piece("h", 0, 1)))
    assert len(Parts((), 3)) == 0 and list(Parts((), 3)) == []
    with pytest.raises(IndexError, match="part 3 of 3"):
        many[3]


def test_parts_of_many_pictures_are_found_at_once() -> None:
    parts = Parts(("x",) * 10, 1000, places=np.full(10, 10**9))
    assert len(parts) == 10**7
    assert parts[5 * 10**6].pieces == (Piece("x", 0, 1000),)
