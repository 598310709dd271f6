from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline.data import reader as reader_module
from pipeline.data.manifest import DataError, Manifest, read_manifest
from pipeline.data.reader import Reader, Rows
from pipeline.storage import StorageConfig
from tests.pictures import make_data

STORAGE = StorageConfig()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    make_data(tmp_path, 40, shard_bytes=5_000)
    return str(tmp_path / "data")


@pytest.fixture
def manifest(uri: str) -> Manifest:
    return read_manifest(uri, STORAGE)


@pytest.fixture
def reader(uri: str, manifest: Manifest) -> Iterator[Reader]:
    one = Reader(manifest, uri, STORAGE, capacity=3, threads=2)
    yield one
    one.close()


def stored(uri: str) -> list[dict[str, object]]:
    table = pyarrow.dataset.dataset(uri, exclude_invalid_files=True).to_table()
    return table.column("image").to_pylist()


def test_pictures_are_the_bytes_that_were_stored(uri: str, manifest: Manifest, reader: Reader) -> None:
    assert len(manifest.shards) > 2 and len(manifest.row_groups) > len(manifest.shards)
    places = [(number, row) for number, group in enumerate(manifest.row_groups) for row in range(group.rows)]
    found = reader.pictures(*zip(*places, strict=True))
    expected = stored(uri)
    assert [one.tobytes() for one in found] == [one["bytes"] for one in expected]
    assert [reader.path(*place) for place in places] == [one["path"] for one in expected]
    again = reader.pictures([5, 0, 5], [1, 2, 0])
    assert [one.tobytes() for one in again] == [found[places.index(at)].tobytes() for at in ((5, 1), (0, 2), (5, 0))]


def test_pictures_are_views_not_copies(reader: Reader) -> None:
    rows = reader.rows(0)
    for picture in (rows[0], rows[len(rows) - 1]):
        assert picture.dtype == np.uint8 and np.shares_memory(picture, rows.values)


def test_views_respect_offsets_and_chunks() -> None:
    pictures = [b"one", b"three", b"", b"seven", b"eleven"]
    struct = pa.array([{"bytes": one} for one in pictures])
    sliced = pa.table({"image": struct}).slice(1, 3)
    joined = pa.table({"image": pa.chunked_array([struct.slice(1, 1), struct.slice(2, 2)])})
    for table in (sliced, joined):
        rows: Rows = reader_module._views(table, 3)
        assert [rows[index].tobytes() for index in range(len(rows))] == pictures[1:4]


def test_memory_is_bounded(manifest: Manifest, reader: Reader) -> None:
    for group in range(len(manifest.row_groups)):
        reader.prefetch([group])
        reader.rows(group)
        assert len(reader._cache) <= 3
    reader.prefetch([0, 1, 2])
    kept = [reader.rows(group) for group in (0, 1, 2)]
    reader.prefetch([0, 1, 2])
    assert [reader.rows(group) for group in (0, 1, 2)] == kept, "what is still needed was read again"


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found_and_named(uri: str, manifest: Manifest, reader: Reader) -> None:
    group = manifest.row_groups[-1]
    damage(Path(uri, group.file), group.offset + group.bytes // 2)
    words = rf"{group.file}, row group {group.index}: damaged.*restore the file or ingest again"
    with pytest.raises(DataError, match=words):
        reader.rows(len(manifest.row_groups) - 1)
    assert len(reader.rows(0)) == manifest.row_groups[0].rows


def test_truncated_grown_and_missing_shards_are_named(uri: str, manifest: Manifest) -> None:
    path = Path(uri, manifest.shards[0].file)
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], rf"truncated \({len(whole) - 1} bytes, the manifest says {len(whole)}\)"),
        (b"", "truncated"),
        (whole + b"x", "changed"),
        (None, "missing, though the manifest lists it"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        reader = Reader(manifest, uri, STORAGE, capacity=2, threads=1)
        with pytest.raises(DataError, match=rf"{path.name}: {words}.*restore it or ingest again"):
            reader.rows(0)
        reader.close()


def test_a_damaged_footer_is_named(uri: str, manifest: Manifest, reader: Reader) -> None:
    path = Path(uri, manifest.shards[0].file)
    damage(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=f"{path.name}: its footer is damaged"):
        reader.rows(0)


def test_a_file_of_another_layout_is_named(uri: str, manifest: Manifest, reader: Reader) -> None:
    """Right size and right hashes, but not our table: its footer was replaced by one that names other
    columns."""
    path = Path(uri, manifest.shards[0].file)
    path.write_bytes(path.read_bytes().replace(b"bytes", b"bites"))
    assert "bites" in pq.read_schema(path).field("image").type.field(0).name
    with pytest.raises(DataError, match=f"{path.name}, row group 0: cannot be read as Parquet"):
        reader.rows(0)


def test_a_closed_reader_has_no_threads_left(uri: str, manifest: Manifest) -> None:
    reader = Reader(manifest, uri, STORAGE, capacity=8, threads=4)
    reader.prefetch(range(8))
    reader.close()
    for thread in reader._pool._threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
