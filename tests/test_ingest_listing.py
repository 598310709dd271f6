import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.listing import fingerprint, is_hidden, is_picture, listing
from pipeline.storage import MissingError, StorageError

NAMES = st.lists(st.text("ab/._", min_size=1, max_size=8), unique=True, max_size=5)


@given(NAMES, st.lists(st.integers(0, 9), min_size=5, max_size=5))
def test_every_visible_name_is_a_picture_or_ignored(stems: list[str], sizes: list[int]) -> None:
    files = {f"{stem}{'.JPG' if index % 2 else '.txt'}": size for index, (stem, size) in enumerate(zip(stems, sizes))}  # noqa: B905
    visible = [name for name in files if not is_hidden(name)]
    if not any(map(is_picture, visible)):
        with pytest.raises(StorageError, match="expected pictures"):
            listing("x", "folder", files)
        return
    found = listing("x", "folder", files)
    assert sorted(found.names + found.ignored) == sorted(visible)
    assert [name for name in files if name in found.names] == list(found.names)


@given(st.permutations([("a.png", 1), ("b.png", 2), ("c.png", 3)]))
def test_the_fingerprint_knows_order_names_and_sizes(parts: list[tuple[str, int]]) -> None:
    first = fingerprint([("a.png", 1), ("b.png", 2), ("c.png", 3)])
    assert (fingerprint(parts) == first) == (parts == sorted(parts))
    assert fingerprint([("a.png", 1), ("b.png", 2), ("c.png", 4)]) != first
    assert fingerprint([("a.png", 1), ("b.png", 2), ("d.png", 3)]) != first


def test_what_was_found_instead_is_said() -> None:
    with pytest.raises(
        StorageError, match=r"x: holds no pictures, but 4 other files \(first 'a.txt', 'b.txt', 'c.txt'\)"
    ):
        listing("x", "zip", {"b.txt": 1, "a.txt": 1, "c.txt": 1}, others=["d.txt"])
    with pytest.raises(MissingError, match=r"x: is empty; expected pictures.*LMDB.*parquet"):
        listing("x", "zip", {})
