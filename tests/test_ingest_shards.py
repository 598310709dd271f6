"""Shards: laid out for ranged reads, and open to every tool that reads Parquet."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.manifest import Shard, parse_footers, read_manifest
from pipeline.ingest.ingest import IngestConfig, ingest
from pipeline.ingest.shards import Sample, ShardWriter, inspect_shard, merge_footers
from pipeline.storage import StorageConfig
from tests.pictures import encoded, make_data, picture_files, pixels, write_data_set, write_folder

STORAGE = StorageConfig()


def test_layout_is_made_for_reading(tmp_path: Path) -> None:
    make_data(tmp_path, 40, row_group_rows=6, shard_bytes=5_000, part_pictures=25, workers=1)
    uri = tmp_path / "data"
    manifest = read_manifest(str(uri), STORAGE)
    names = [shard.file for shard in manifest.shards]
    parts = {name[:20] for name in names}
    assert names == sorted(names) and sorted(part[15:] for part in parts) == ["00000", "00001"]
    assert len({part[:15] for part in parts}) == 1 and re.fullmatch("shard-[0-9a-f]{8}-", names[0][:15])
    assert [name[20:] for name in names[:2]] == ["-00.parquet", "-01.parquet"]
    for shard in manifest.shards:
        check_layout(uri, shard)


def check_layout(uri: Path, shard: Shard) -> None:
    data = (uri / shard.file).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    metadata = pq.read_metadata(uri / shard.file)
    assert metadata.num_row_groups == len(shard.row_groups) and metadata.num_rows == shard.rows
    for index, group in enumerate(shard.row_groups):
        assert (group.index, group.file) == (index, shard.file)
        assert group.rows == metadata.row_group(index).num_rows <= 6
        part = data[group.offset : group.offset + group.bytes]
        assert hashlib.sha256(part).hexdigest() == group.sha256
        for column in (metadata.row_group(index).column(i) for i in range(metadata.num_columns)):
            assert column.compression == "UNCOMPRESSED"
            assert not column.has_dictionary_page and not column.is_stats_set
            assert group.offset <= column.data_page_offset
            assert column.data_page_offset + column.total_compressed_size <= group.offset + group.bytes


def test_row_groups_are_bounded_by_bytes(tmp_path: Path) -> None:
    files = {f"{number:02d}.png": encoded(number, 16) for number in range(20)}
    limit = 3 * max(len(data) for data in files.values())
    source = str(write_folder(tmp_path / "in", files))
    for name, most in (("out", limit), ("tiny", 1)):
        config = IngestConfig(source=source, size=16, row_group_bytes=most)
        ingest(config, str(tmp_path / name), STORAGE, progress=False)
    sizes, at = [len(data) for _, data in sorted(files.items())], 0
    groups = read_manifest(str(tmp_path / "out"), STORAGE).row_groups
    for group in groups:
        assert sum(sizes[at : at + group.rows]) <= limit
        at += group.rows
    assert at == 20 and all(group.rows >= 3 for group in groups[:-1])
    assert {group.rows for group in read_manifest(str(tmp_path / "tiny"), STORAGE).row_groups} == {1}


def test_nothing_is_stored_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(str(tmp_path), STORAGE, 16, 1 << 20, 2, 1 << 20) as writer:
        for number in range(5):
            writer.add(Sample("x", encoded(number)))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_footers_are_those_of_the_files(tmp_path: Path) -> None:
    manifest = read_manifest(make_data(tmp_path, 40).uri, STORAGE)
    footers = []
    for stated in manifest.shards:
        shard, footer = inspect_shard(tmp_path / "data" / stated.file, stated.file)
        assert shard == stated
        assert parse_footers(footer).num_rows == stated.rows
        footers.append(footer)
    summary, stated_footers = merge_footers(footers)
    assert summary == (tmp_path / "data" / "_metadata").read_bytes()
    assert stated_footers == manifest.footers


# ---- other tools -----------------------------------------------------------------------------------

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in two parts and several files, with all that an ingest leaves beside them."""
    made = make_data(tmp_path_factory.mktemp("shards"), COUNT, part_pictures=25, workers=1)
    assert made.shards > 2 and made.parts == 2
    return Path(made.uri)


def expected() -> list[tuple[str, bytes]]:
    return sorted(picture_files(COUNT).items())


def test_pyarrow_dataset_reads_the_footers_or_the_files(folder: Path) -> None:
    by_footers = pyarrow.dataset.parquet_dataset(folder / "_metadata").to_table()
    by_files = pyarrow.dataset.dataset(folder, format="parquet", exclude_invalid_files=True).to_table()
    for table in (by_footers, by_files):
        images = table.column("image").to_pylist()
        assert [(image["path"], image["bytes"]) for image in images] == expected()
        assert table.column_names == ["image", "width", "height"]
        assert set(table.column("width").to_pylist()) == set(table.column("height").to_pylist()) == {16}
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert features["image"] == {"_type": "Image"} and set(features) == set(table.column_names)


HUGGING_FACE = """
import sys, datasets, numpy
folder = sys.argv[1]
for options in ({"path": "parquet", "data_files": f"{folder}/*.parquet"}, {"path": folder}):
    data = datasets.load_dataset(**options, split="train")
    assert isinstance(data.features["image"], datasets.Image), data.features
    print(len(data), data[7]["image"].size, data[7]["width"], *numpy.asarray(data[7]["image"].convert("RGB")).ravel())
stream = datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
print(sum(1 for _ in stream))
"""


def test_hugging_face_opens_the_folder_as_images(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="Hugging Face datasets is not installed: pip install datasets")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUGGING_FACE, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *opened, streamed = done.stdout.splitlines()
    values = " ".join(map(str, pixels(expected()[7][1]).ravel()))
    assert opened == [f"{COUNT} (16, 16) 16 {values}"] * 2
    assert streamed == str(COUNT)


def test_duckdb_reads_the_shards(folder: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed: pip install duckdb")
    rows = duckdb.sql(
        f"select image.path, image.bytes, width, height from read_parquet('{folder}/*.parquet') "
        f"order by filename, file_row_number"
    ).fetchall()
    assert [(path, data) for path, data, _, _ in rows] == expected()
    assert {row[2:] for row in rows} == {(16, 16)}
    with Image.open(io.BytesIO(rows[3][1])) as picture:
        assert np.asarray(picture.convert("RGB")).shape == (16, 16, 3)


def test_hand_made_data_sets_of_tests_are_as_good(tmp_path: Path) -> None:
    manifest = write_data_set(str(tmp_path), [encoded(number) for number in range(9)])
    assert read_manifest(str(tmp_path), STORAGE) == manifest and [group.rows for group in manifest.row_groups] == [
        4,
        4,
        1,
    ]
