import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import (
    DataError,
    Footers,
    Manifest,
    RowGroup,
    Shard,
    read_footers,
    read_manifest,
    write_manifest,
)
from pipeline.storage import StorageConfig, StorageError
from tests.pictures import make_data, picture_files, write_folder
from tests.servers import free_ports

STORAGE = StorageConfig()


def example(files: int = 2, groups: int = 3) -> Manifest:
    shards = []
    for file in range(files):
        name = f"shard-{file:05d}.parquet"
        inside = [RowGroup(name, index, 5 + index, 100 * index, 90, f"{file}{index}" * 32) for index in range(groups)]
        shards.append(Shard(name, 1000, "ab" * 32, tuple(inside)))
    return Manifest(16, 16, tuple(shards), {"size": 16, "tile": None}, "cd" * 32, Footers(123, "ef" * 32))


def test_round_trip(tmp_path: Path) -> None:
    manifest = example()
    write_manifest(manifest, str(tmp_path), STORAGE)
    read = read_manifest(str(tmp_path), STORAGE)
    assert read == manifest
    assert (read.digest, read.samples, read.row_groups) == (manifest.digest, 36, manifest.row_groups)
    stored = json.loads((tmp_path / "manifest.json").read_text())
    assert stored["digest"] == manifest.digest and stored["samples"] == 36


def test_digest_is_of_content_only() -> None:
    manifest = example()
    elsewhere = dataclasses.replace(manifest, parameters={"size": 99}, source="other", footers=Footers(1, ""))
    assert elsewhere.digest == manifest.digest
    groups = tuple(dataclasses.replace(group, file="one.parquet", offset=7) for group in manifest.row_groups)
    regrouped = dataclasses.replace(manifest, shards=(Shard("one.parquet", 5, "ff" * 32, groups),))
    assert regrouped.digest == manifest.digest
    assert dataclasses.replace(manifest, width=32).digest != manifest.digest
    for change in ({"rows": 9}, {"sha256": "12" * 32}):
        first = dataclasses.replace(groups[0], **change)
        other = dataclasses.replace(manifest, shards=(Shard("one.parquet", 5, "", (first, *groups[1:])),))
        assert other.digest != manifest.digest
    swapped = dataclasses.replace(manifest, shards=(Shard("one.parquet", 5, "", groups[::-1]),))
    assert swapped.digest != manifest.digest


def test_digest_stays_what_it_was() -> None:
    assert example().digest == "d443e4a6dd9544c6d5e5c27acf9a3886f0b7878600f949a0451de7a5efd1a9f1"


def test_digest_of_real_data_does_not_depend_on_the_number_of_files(tmp_path: Path) -> None:
    source = str(write_folder(tmp_path / "in", picture_files(20)))
    one = make_data(tmp_path, uri=str(tmp_path / "one"), source=source, shard_bytes=1 << 20)
    many = make_data(tmp_path, uri=str(tmp_path / "many"), source=source, shard_bytes=1)
    assert one.shards == 1 and many.shards == 5 and one.digest == many.digest


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: "", "damaged"),
        (lambda text: text[:100], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: text.replace('"rows": 5', '"rows": 6'), "digest does not match"),
        (lambda text: text.replace('"version": 2', '"version": 1'), "version 1, this code reads 2"),
        (lambda text: text.replace('"footers"', '"feet"'), "damaged.*footers"),
        (lambda text: text.replace('"height"', '"hight"'), "damaged.*height"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    write_manifest(example(), str(tmp_path), STORAGE)
    path = tmp_path / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=f"manifest.json: .*{words}.*ingest again"):
        read_manifest(str(tmp_path), STORAGE)


def test_absence_is_told_from_an_unreachable_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest.json at .*did not finish or data.uri is wrong"):
        read_manifest(str(tmp_path), STORAGE)
    with pytest.raises(DataError, match="data.uri is not set"):
        read_manifest("", STORAGE)
    down = StorageConfig(endpoint=f"http://127.0.0.1:{free_ports(1)[0]}", attempts=1, anonymous=True)
    with pytest.raises(StorageError, match="did not answer"):
        read_manifest("s3://bucket/data", down)


def test_a_data_set_without_samples_is_refused(tmp_path: Path) -> None:
    write_manifest(example(files=0), str(tmp_path), STORAGE)
    with pytest.raises(DataError, match="no samples"):
        read_manifest(str(tmp_path), STORAGE)


def test_footers_number_the_row_groups_of_the_whole_data_set(tmp_path: Path) -> None:
    uri = make_data(tmp_path, 40).uri
    manifest = read_manifest(uri, STORAGE)
    footers = read_footers(manifest, uri, STORAGE)
    assert len(manifest.shards) > 1 and footers.num_row_groups == len(manifest.row_groups) == 10
    for number, group in enumerate(manifest.row_groups):
        there = footers.row_group(number)
        assert (there.num_rows, there.column(0).file_path) == (group.rows, group.file)
        inside = pq.read_metadata(Path(uri, group.file)).row_group(group.index)
        for column in range(there.num_columns):
            assert there.column(column).data_page_offset == inside.column(column).data_page_offset
            assert group.offset <= there.column(column).data_page_offset < group.offset + group.bytes


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda data: None, "missing, though the manifest names it"),
        (lambda data: data[:-5], r"truncated \(\d+ bytes, the manifest says \d+\)"),
        (lambda data: data + b"x", "changed"),
        (flipped, "damaged .its hash differs"),
    ],
)
def test_damaged_footers_are_named(tmp_path: Path, change: Callable[[bytes], bytes | None], words: str) -> None:
    uri = make_data(tmp_path, 8).uri
    path = Path(uri, "_metadata")
    changed = change(path.read_bytes())
    path.unlink() if changed is None else path.write_bytes(changed)
    with pytest.raises(DataError, match=f"data/_metadata: {words}.*ingest again with ingest.overwrite=true"):
        read_footers(read_manifest(uri, STORAGE), uri, STORAGE)


def test_footers_that_are_not_the_manifests_are_refused(tmp_path: Path) -> None:
    uri = make_data(tmp_path, 40).uri
    manifest = read_manifest(uri, STORAGE)
    with pytest.raises(DataError, match="has 10 row groups, the manifest [0-9]; run jobs.ingest again"):
        read_footers(dataclasses.replace(manifest, shards=manifest.shards[:1]), uri, STORAGE)
    data = b"PAR1 but no more"
    Path(uri, "_metadata").write_bytes(data)
    stated = Footers(len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_footers(dataclasses.replace(manifest, footers=stated), uri, STORAGE)
