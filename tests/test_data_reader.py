import hashlib
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest

from pipeline.data import reader as reader_module
from pipeline.data.cache import DiskCache
from pipeline.data.fetch import Fetcher
from pipeline.data.fetch_errors import ClosedError
from pipeline.data.manifest import DataError, Manifest, read_manifest
from pipeline.data.reader import DamagedGroup, Reader, Rows
from pipeline.storage import StorageConfig, StorageError, delete, read_bytes, write_bytes
from tests.pictures import make_data
from tests.proxy import Fault, FaultProxy, Request, fault_proxy, is_shard
from tests.servers import S3Server

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
        assert len(reader._kept) <= 3
    reader.pictures(range(5), [0] * 5)
    assert len(reader._kept) <= 3
    reader.prefetch(range(5))
    assert list(reader._kept) == [0, 1, 2], "what is needed first was dropped for what is needed later"


def test_what_is_still_needed_is_not_read_again(manifest: Manifest, reader: Reader) -> None:
    reader.prefetch([0, 1, 2])
    kept = [reader.rows(group) for group in (0, 1, 2)]
    reader.prefetch([3, 0, 1])
    assert [reader.rows(group) for group in (0, 1)] == kept[:2]
    reader.rows(3)
    lengths = [manifest.row_groups[group].bytes for group in range(4)]
    assert (reader.requests, reader.bytes_read) == (4, sum(lengths))


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found_and_named(uri: str, manifest: Manifest, reader: Reader) -> None:
    number = len(manifest.row_groups) - 1
    group = manifest.row_groups[number]
    damage(Path(uri, group.file), group.offset + group.bytes // 2)
    words = rf"{group.file}, row group {group.index}: damaged.*restore the file or ingest again"
    with pytest.raises(DamagedGroup, match=words) as caught:
        reader.pictures([0, number], [0, 0])
    assert caught.value.group == number
    assert len(reader.rows(0)) == manifest.row_groups[0].rows


def test_what_failed_is_read_again_when_asked_again(uri: str, manifest: Manifest, reader: Reader) -> None:
    group = manifest.row_groups[0]
    at = group.offset + 5
    damage(Path(uri, group.file), at)
    reader.prefetch([0, 1])
    for _ in range(2):
        with pytest.raises(DamagedGroup):
            reader.rows(0)
    damage(Path(uri, group.file), at)  # flips the bit back
    assert len(reader.rows(0)) == group.rows


def test_truncated_and_missing_shards_are_named(uri: str, manifest: Manifest) -> None:
    path = Path(uri, manifest.shards[0].file)
    whole = path.read_bytes()
    last = len(manifest.shards[0].row_groups) - 1
    for content, words in (
        (whole[: manifest.row_groups[last].offset + 9], rf"truncated \(\d+ bytes, the manifest says {len(whole)}\)"),
        (b"", rf"truncated \(0 bytes, the manifest says {len(whole)}\)"),
        (None, "missing, though the manifest lists the file"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        reader = Reader(manifest, uri, STORAGE, capacity=2, threads=1)
        with pytest.raises(DamagedGroup, match=rf"{path.name}, row group {last}: {words}; restore the file") as caught:
            reader.rows(last)
        assert caught.value.group == last
        assert len(reader.rows(last + 1)) == manifest.row_groups[last + 1].rows, "another shard suffered"
        reader.close()


def test_a_footer_s_damage_hurts_nobody(uri: str, reader: Reader) -> None:
    """The shards' own footers are for other tools; where the columns lie stands in `_metadata`."""
    path = Path(uri, read_manifest(uri, STORAGE).shards[0].file)
    damage(path, path.stat().st_size - 1)
    assert len(reader.rows(0))


def test_damaged_metadata_is_named_and_asked_for_again(uri: str, manifest: Manifest) -> None:
    damage(Path(uri, "_metadata"), 100)
    reader = Reader(manifest, uri, STORAGE, capacity=1, threads=1)
    for _ in range(2):
        with pytest.raises(DataError, match="_metadata: damaged") as caught:
            reader.rows(0)
        assert not isinstance(caught.value, DamagedGroup), "no row group is to blame"
    damage(Path(uri, "_metadata"), 100)
    assert len(reader.rows(0)) == manifest.row_groups[0].rows
    reader.close()


def test_bytes_that_are_no_table_are_named(uri: str, manifest: Manifest) -> None:
    """Right length and right hash, but not what the footer describes."""
    group = manifest.row_groups[0]
    noise = os.urandom(group.bytes)
    path = Path(uri, group.file)
    path.write_bytes(path.read_bytes()[: group.offset] + noise + path.read_bytes()[group.offset + group.bytes :])
    shard = manifest.shards[0]
    wrong = replace(group, sha256=hashlib.sha256(noise).hexdigest())
    shards = (replace(shard, row_groups=(wrong, *shard.row_groups[1:])), *manifest.shards[1:])
    reader = Reader(replace(manifest, shards=shards), uri, STORAGE, 1, 1)
    with pytest.raises(DamagedGroup, match=f"{path.name}, row group 0: cannot be read as Parquet"):
        reader.rows(0)
    reader.close()


def test_a_sample_is_described_also_where_its_name_cannot_be_read(uri: str, manifest: Manifest, reader: Reader) -> None:
    group = manifest.row_groups[1]
    place = f"{uri}/{group.file}, row group {group.index}, row 2"
    assert reader.describe(1, 2) == f"{place} ({reader.path(1, 2)!r})"
    Path(uri, group.file).unlink()
    assert reader.describe(1, 2) == place


def test_the_hash_is_checked_on_the_first_read(uri: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    sha256 = reader_module._sha256

    def counted(data: bytes) -> str:
        checks.append(len(data))
        return sha256(data)

    monkeypatch.setattr(reader_module, "_sha256", counted)
    reader = Reader(manifest, uri, STORAGE, capacity=1, threads=1)
    for group in (0, 1, 0, 1):
        reader.rows(group)
    assert checks == [manifest.row_groups[group].bytes for group in (0, 1)] and reader.requests == 4
    reader.close()


def test_the_cache_saves_reading_and_is_filled_with_checked_bytes_only(
    uri: str, manifest: Manifest, tmp_path: Path
) -> None:
    everything = range(len(manifest.row_groups))

    def pictures() -> tuple[list[bytes], int]:
        reader = Reader(manifest, uri, STORAGE, 2, 2, DiskCache(tmp_path / "cache", 1 << 20))
        found = [reader.rows(group)[row].tobytes() for group in everything for row in range(3)]
        again = [reader.rows(group)[row].tobytes() for group in everything for row in range(3)]
        assert found == again
        reader.close()
        return found, reader.requests

    first, requests = pictures()
    assert requests == len(everything)
    second, requests = pictures()
    assert second == first and requests == 0
    damage(tmp_path / "cache" / manifest.row_groups[0].sha256, 7)
    damage(Path(uri, manifest.row_groups[1].file), manifest.row_groups[1].offset + 7)
    third, requests = pictures()  # the copy of row group 1 outlives the original
    assert third == first and requests == 1


def test_a_closed_reader_has_no_threads_left(uri: str, manifest: Manifest) -> None:
    reader = Reader(manifest, uri, STORAGE, capacity=8, threads=4)
    reader.prefetch(range(8))
    reader.close()
    reader.close()
    no_threads(reader)
    with pytest.raises(ClosedError, match="row group 0: the reader is closed"):
        reader.rows(0)


def no_threads(reader: Reader) -> None:
    for thread in reader._pool._threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_closing_ends_the_wait_of_another_thread(uri: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow(fetcher: Fetcher, file: str, offset: int, length: int, *, counted: bool = True) -> bytes:
        begun.set()
        ended.wait(timeout=60)
        raise StorageError("late")

    monkeypatch.setattr(Fetcher, "read", slow)
    reader = Reader(manifest, uri, STORAGE, capacity=2, threads=1)
    with ThreadPoolExecutor(1) as pool:
        reader.prefetch([0])
        waiting = pool.submit(reader.rows, 1)  # queued behind the read that hangs
        assert begun.wait(timeout=20)
        while 1 not in reader._kept:
            pass
        reader.close()
        with pytest.raises(ClosedError):
            waiting.result(timeout=10)
    ended.set()
    no_threads(reader)


def test_the_error_keeps_its_group_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedGroup("shard 3: damaged", 7)))
    assert str(error) == "shard 3: damaged" and error.group == 7


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def remote(s3: S3Server, tmp_path: Path) -> str:
    uri = f"s3://{s3.new_bucket()}/data"
    make_data(tmp_path, 40, uri=uri, shard_bytes=5_000)
    return uri


@pytest.mark.integration
def test_one_get_for_each_row_group(remote: str, proxy: FaultProxy) -> None:
    manifest = read_manifest(remote, STORAGE)
    reader = Reader(manifest, remote, StorageConfig(endpoint=proxy.endpoint), capacity=99, threads=4)
    reader.prefetch(range(len(manifest.row_groups)))
    rows = [len(reader.rows(group)) for group in range(len(manifest.row_groups))]
    assert rows == [group.rows for group in manifest.row_groups]
    asked = sorted((one.path.rsplit("/", 1)[1], one.range) for one in proxy.requests)
    ranges = [(one.file, f"bytes={one.offset}-{one.offset + one.bytes - 1}") for one in manifest.row_groups]
    assert asked == sorted([*ranges, ("_metadata", f"bytes=0-{manifest.footers.bytes - 1}")])
    assert {one.method for one in proxy.requests} == {"GET"}
    assert (reader.requests, reader.bytes_read) == (len(ranges), sum(one.bytes for one in manifest.row_groups))
    reader.close()


@pytest.mark.integration
def test_damage_on_the_way_is_healed_and_damage_in_the_store_is_named(remote: str, proxy: FaultProxy) -> None:
    manifest = read_manifest(remote, STORAGE)
    reader = Reader(manifest, remote, StorageConfig(endpoint=proxy.endpoint), capacity=1, threads=1)
    proxy.plan([Fault("flip")], is_shard)
    assert len(reader.rows(0)) == manifest.row_groups[0].rows and reader.requests == 2
    for group in (1, 2, 3):
        place = manifest.row_groups[group]
        file = f"{remote}/{place.file}"
        if group == 1:
            whole = read_bytes(file, STORAGE)
            write_bytes(file, whole[: place.offset + 3], STORAGE)
            with pytest.raises(
                DamagedGroup, match=rf"{place.file}, row group {place.index}: truncated \({place.offset + 3} "
            ):
                reader.rows(group)
            write_bytes(file, whole[: place.offset], STORAGE)  # S3 answers 416
            with pytest.raises(
                DamagedGroup, match=rf"{place.file}, row group {place.index}: truncated \({place.offset} "
            ):
                reader.rows(group)
            delete(file, STORAGE)
            with pytest.raises(DamagedGroup, match=f"{place.file}, row group {place.index}: missing"):
                reader.rows(group)
            write_bytes(file, whole, STORAGE)
        assert len(reader.rows(group)) == place.rows
    reader.close()


@pytest.mark.integration
def test_a_failing_store_is_no_damage_and_close_ends_what_hangs(remote: str, proxy: FaultProxy) -> None:
    manifest = read_manifest(remote, STORAGE)
    reader = Reader(manifest, remote, StorageConfig(endpoint=proxy.endpoint, total_timeout_s=3), 1, 1)
    proxy.plan([Fault("status")] * 50, is_shard)
    with pytest.raises(StorageError, match="attempts.*(503 SlowDown|TimeoutError)") as caught:
        reader.rows(0)
    assert not isinstance(caught.value, DamagedGroup)
    reader.close()
    patient = Reader(manifest, remote, StorageConfig(endpoint=proxy.endpoint), 4, 2)
    proxy.plan([Fault("stall")] * 50, is_shard)
    with ThreadPoolExecutor(1) as pool:
        patient.prefetch(range(4))
        waiting = pool.submit(patient.rows, 3)
        assert proxy.stalled.wait(timeout=20)
        patient.close()
        with pytest.raises(ClosedError):
            waiting.result(timeout=10)
    no_threads(patient)


def is_metadata(request: Request) -> bool:
    return request.path.endswith("/_metadata")


@pytest.mark.integration
def test_the_metadata_are_fetched_as_row_groups_are(remote: str, proxy: FaultProxy) -> None:
    """Its faults are survived, and neither these nor a store that fails are taken for damage."""
    manifest = read_manifest(remote, STORAGE)
    reader = Reader(manifest, remote, StorageConfig(endpoint=proxy.endpoint), 1, 1)
    proxy.plan([Fault("status"), Fault("reset"), Fault("truncate"), Fault("short")], is_metadata)
    assert len(reader.rows(0)) == manifest.row_groups[0].rows
    assert proxy.pending == 0 and reader.requests == 1
    reader.close()
    hasty = Reader(manifest, remote, StorageConfig(endpoint=proxy.endpoint, total_timeout_s=0.5), 1, 1)
    proxy.plan([Fault("status")] * 50, is_metadata)
    with pytest.raises(StorageError, match="data/_metadata.*attempts"):
        hasty.rows(0)
    hasty.close()


@pytest.mark.integration
@pytest.mark.parametrize("share", [0, 0.5])
def test_close_ends_a_stalling_read_of_the_metadata(remote: str, proxy: FaultProxy, share: float) -> None:
    manifest = read_manifest(remote, STORAGE)
    proxy.plan([Fault("stall", share=share)] * 50, is_metadata)
    reader = Reader(manifest, remote, StorageConfig(endpoint=proxy.endpoint), 4, 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.rows, 0)
        assert proxy.stalled.wait(timeout=20)
        reader.close()
        with pytest.raises(ClosedError):
            waiting.result(timeout=10)
    no_threads(reader)


@pytest.mark.integration
def test_metadata_that_are_cut_or_gone_are_named(remote: str) -> None:
    manifest = read_manifest(remote, STORAGE)
    place = f"{remote}/_metadata"
    whole = read_bytes(place, STORAGE)
    for content, words in (
        (whole[:-5], rf"truncated \({len(whole) - 5} bytes, the manifest says {len(whole)}\)"),
        (b"", rf"truncated \(0 bytes, the manifest says {len(whole)}\)"),
        (None, "missing, though the manifest names it"),
    ):
        delete(place, STORAGE) if content is None else write_bytes(place, content, STORAGE)
        reader = Reader(manifest, remote, STORAGE, 1, 1)
        with pytest.raises(DataError, match=f"data/_metadata: {words}; restore it or run jobs.ingest") as caught:
            reader.rows(0)
        assert not isinstance(caught.value, DamagedGroup)
        reader.close()
