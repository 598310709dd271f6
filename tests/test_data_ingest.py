import hashlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.data.ingest import IngestConfig, IngestReport, TileConfig, ingest
from pipeline.data.manifest import DataError, read_manifest
from pipeline.data.picture import deviation
from pipeline.storage import StorageConfig, exists, join, list_names, read_bytes, write_bytes
from tests.pictures import (
    BLUE_MARBLE,
    earth,
    encoded,
    make_data,
    picture_files,
    pixels,
    write_folder,
    write_zip,
)
from tests.servers import S3Server

STORAGE = StorageConfig()


def run(source: Path | str, uri: Path | str, **settings: Any) -> IngestReport:
    config = IngestConfig.model_validate({"source": str(source), "size": 16} | settings)
    return ingest(config, str(uri), STORAGE, progress=False)


def stored(uri: Path | str) -> dict[str, bytes]:
    """Everything that readers of a data set see."""
    names = [name for name in list_names(str(uri), STORAGE) if name != "ingest-report.json"]
    return {name: read_bytes(join(str(uri), name), STORAGE) for name in names}


def samples(uri: Path | str) -> list[tuple[str, bytes]]:
    table = pyarrow.dataset.dataset(str(uri), exclude_invalid_files=True).to_table()
    images = table.sort_by("sample_id").column("image").to_pylist()
    return [(image["path"], image["bytes"]) for image in images]


def test_every_picture_becomes_a_sample_in_order_of_name(tmp_path: Path) -> None:
    files = picture_files(10)
    report = run(write_folder(tmp_path / "in", files | {"notes.txt": b"x"}), tmp_path / "out")
    assert samples(tmp_path / "out") == sorted(files.items())
    assert (report.samples, report.skipped, report.ignored) == (10, (), ("notes.txt",))


def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", picture_files(40, size=24))
    layout = {"row_group_rows": 7, "shard_bytes": 10_000}
    reports = [run(source, tmp_path / str(count), workers=count, **layout) for count in (1, 2, 7)]
    first = stored(tmp_path / "1")
    assert len(first) > 3
    assert stored(tmp_path / "2") == first and stored(tmp_path / "7") == first
    assert len({report.digest for report in reports}) == 1


def test_folder_and_zip_give_the_same_data_set(tmp_path: Path) -> None:
    files = picture_files(9)
    one = run(write_folder(tmp_path / "in", files), tmp_path / "one")
    two = run(write_zip(tmp_path / "in.zip", files), tmp_path / "two")
    assert one.digest == two.digest


def test_tiles_are_squares_of_the_picture_with_something_on_them(tmp_path: Path) -> None:
    tile = {"size": 64, "stride": 64}
    report = run(BLUE_MARBLE, tmp_path / "out", size=64, tile=tile)
    found = samples(tmp_path / "out")
    assert report.samples == len(found) > 500
    whole = np.asarray(earth())
    places = []
    for path, data in found:
        name, place = path.split("#")
        x, y = (int(part.split("=")[1]) for part in place.split(","))
        assert name == BLUE_MARBLE.name
        assert math.ceil(25 / 180 * 2048) <= y <= 155 / 180 * 2048 - 64
        cut = whole[y : y + 64, x : x + 64]
        assert deviation(cut) > 12
        places.append((y, x))
        if len(places) % 50 == 0:
            assert np.array_equal(pixels(data), cut)
    assert places == sorted(places)
    rows = range(math.ceil(25 / 180 * 2048 / 64) * 64, int(155 / 180 * 2048) - 63, 64)
    everywhere = [(y, x) for y in rows for x in range(0, 4096 - 63, 64)]
    assert report.samples + report.flat_tiles == len(everywhere)
    assert places == [(y, x) for y, x in everywhere if deviation(whole[y : y + 64, x : x + 64]) > 12]


def test_tiles_are_shrunk_to_the_size_asked_for(tmp_path: Path) -> None:
    run(BLUE_MARBLE, tmp_path / "out", size=16, tile={"size": 128, "stride": 512}, format="jpeg")
    manifest = read_manifest(str(tmp_path / "out"), STORAGE)
    assert (manifest.height, manifest.width) == (16, 16)
    assert all(pixels(data).shape == (16, 16, 3) for _, data in samples(tmp_path / "out"))


def test_bad_pictures_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    bad = {"b/cut.jpg": encoded(1, 16, "JPEG")[:200], "b/small.png": encoded(1, 8), "b/text.png": b"text"}
    source = write_folder(tmp_path / "in", picture_files(6) | bad)
    report = run(source, tmp_path / "out")
    assert [skip.path for skip in report.skipped] == sorted(bad)
    reasons = {skip.path: skip.reason for skip in report.skipped}
    assert "cannot be decoded" in reasons["b/cut.jpg"]
    assert "8x8, smaller than ingest.size 16" in reasons["b/small.png"]
    assert report.samples == 6
    written = json.loads((tmp_path / "out" / "ingest-report.json").read_text())
    assert [skip["path"] for skip in written["skipped"]] == sorted(bad)
    assert run(source, tmp_path / "bigger", upscale=True).samples == 7


def test_strict_fails_at_the_first_bad_picture(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", picture_files(6) | {"b.png": b"no", "a.png": b"no"})
    with pytest.raises(DataError, match="a.png cannot be decoded.*strict"):
        run(source, tmp_path / "out", strict=True)
    assert not exists(str(tmp_path / "out" / "manifest.json"), STORAGE)


@pytest.mark.parametrize(
    "files, words",
    [
        ({"x/notes.txt": b"1"}, "no JPEG, PNG or WebP.*notes.txt"),
        ({"a.png": b"1", "b.png": b"2"}, "none of its 2 pictures.*a.png, cannot be decoded"),
    ],
)
def test_sources_without_pictures_are_explained(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    with pytest.raises(DataError, match=words):
        run(write_folder(tmp_path / "in", files), tmp_path / "out")
    assert not exists(str(tmp_path / "out" / "manifest.json"), STORAGE)


def test_settings_that_make_no_sense_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="single picture; set ingest.tile"):
        run(BLUE_MARBLE, tmp_path / "out")
    with pytest.raises(DataError, match="ingest.source is not set"):
        ingest(IngestConfig(), str(tmp_path / "out"), STORAGE)
    with pytest.raises(DataError, match="data.uri is not set"):
        run(BLUE_MARBLE, "", tile={})
    with pytest.raises(ValidationError, match="tile.size 32 is smaller than ingest.size 64"):
        IngestConfig(size=64, tile=TileConfig(size=32))
    with pytest.raises(DataError, match="tiles are flat; lower ingest.tile.minimum_deviation"):
        run(BLUE_MARBLE, tmp_path / "out", tile={"stride": 256, "minimum_deviation": 255})
    with pytest.raises(DataError, match="too small for one tile of 4096"):
        run(BLUE_MARBLE, tmp_path / "out", tile={"size": 4096})


def test_limit_takes_the_first(tmp_path: Path) -> None:
    files = picture_files(10)
    source = write_folder(tmp_path / "in", files)
    report = run(source, tmp_path / "out", limit=4)
    assert report.samples == 4 and samples(tmp_path / "out") == sorted(files.items())[:4]
    assert run(source, tmp_path / "all", limit=100).samples == 10


def test_a_finished_data_set_is_kept(tmp_path: Path) -> None:
    files = picture_files(8)
    source = write_folder(tmp_path / "in", files)
    out = tmp_path / "out"
    first = run(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    moved = write_folder(tmp_path / "moved", files)
    again = run(moved, out, workers=1, strict=True)
    assert again.already_done and not first.already_done
    assert (again.digest, again.samples) == (first.digest, first.samples)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DataError, match=r"ingest.format \(there keep, asked for png\).*overwrite"):
        run(source, out, format="png")
    with pytest.raises(DataError, match="ingest.source"):
        run(write_folder(tmp_path / "moved", {"new.png": encoded(9)}), out)
    replaced = run(source, out, overwrite=True, limit=3, shard_bytes=1)
    assert replaced.samples == 3 and read_manifest(str(out), STORAGE).digest == replaced.digest
    assert run(source, out, overwrite=True).digest == first.digest
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in before)


def test_layout_is_made_for_reading(tmp_path: Path) -> None:
    make_data(tmp_path, 40, row_group_rows=6, shard_bytes=5_000)
    uri = tmp_path / "data"
    manifest = read_manifest(str(uri), STORAGE)
    assert len(manifest.shards) > 2
    names = [f"shard-{index:05d}.parquet" for index in range(len(manifest.shards))]
    assert [shard.file for shard in manifest.shards] == names
    for shard in manifest.shards:
        data = (uri / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        metadata = pq.read_metadata(uri / shard.file)
        assert metadata.num_row_groups == len(shard.row_groups) and metadata.num_rows == shard.rows
        for index, group in enumerate(shard.row_groups):
            assert (group.index, group.file) == (index, shard.file)
            assert group.rows == metadata.row_group(index).num_rows
            part = data[group.offset : group.offset + group.bytes]
            assert hashlib.sha256(part).hexdigest() == group.sha256
            assert group.rows <= 6
            for column in (metadata.row_group(index).column(i) for i in range(metadata.num_columns)):
                assert column.compression == "UNCOMPRESSED" and not column.has_dictionary_page
                assert column.is_stats_set == (column.path_in_schema == "sample_id")
                assert group.offset <= column.data_page_offset
                assert column.data_page_offset + column.total_compressed_size <= group.offset + group.bytes
    table = pyarrow.dataset.dataset(str(uri), exclude_invalid_files=True).to_table()
    assert table.column("sample_id").to_pylist() == list(range(40))
    assert set(table.column("width").to_pylist()) == set(table.column("height").to_pylist()) == {16}
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["sample_id"] == {"dtype": "int64", "_type": "Value"}
    assert set(features) == set(table.column_names)


def test_row_groups_are_bounded_by_bytes(tmp_path: Path) -> None:
    files = {f"{number:02d}.png": encoded(number, 16) for number in range(20)}
    limit = 3 * max(len(data) for data in files.values())
    run(write_folder(tmp_path / "in", files), tmp_path / "out", row_group_bytes=limit)
    sizes = [len(data) for _, data in samples(tmp_path / "out")]
    at = 0
    groups = read_manifest(str(tmp_path / "out"), STORAGE).row_groups
    for group in groups:
        assert sum(sizes[at : at + group.rows]) <= limit
        at += group.rows
    assert at == 20 and all(group.rows >= 3 for group in groups[:-1])
    run(write_folder(tmp_path / "in", files), tmp_path / "tiny", row_group_bytes=1)
    assert {group.rows for group in read_manifest(str(tmp_path / "tiny"), STORAGE).row_groups} == {1}


KILLED = """
import sys
from pipeline.data.ingest import *
config = IngestConfig.model_validate_json(sys.argv[1])
ingest(config, sys.argv[2], StorageConfig(), progress=False)
"""


@pytest.mark.parametrize("shard", [0, 3])
def test_a_killed_ingest_leaves_nothing_that_looks_finished(tmp_path: Path, shard: int) -> None:
    tile = TileConfig(size=32, stride=32)
    config = IngestConfig(source=str(BLUE_MARBLE), size=32, tile=tile, shard_bytes=200_000, row_group_rows=64)
    undisturbed = ingest(config, str(tmp_path / "undisturbed"), STORAGE, progress=False)
    out, seen = tmp_path / "out", tmp_path / "out" / f"shard-{shard:05d}.parquet"
    command = [sys.executable, "-c", KILLED, config.model_dump_json(), str(out)]
    process = subprocess.Popen(command, cwd=BLUE_MARBLE.parents[3])
    deadline = time.monotonic() + 60
    while not seen.exists():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(DataError, match="no manifest.json at .*out: the ingest did not finish.*ingest again"):
        read_manifest(str(out), STORAGE)
    mine = b"none of the ingest's business"
    (out / "mine.txt").write_bytes(mine)
    (out / ".shard-00007.parquet.partial-123").write_bytes(b"left by a kill in the middle of a file")
    (out / "shard-99999.parquet").write_bytes(b"left by an ingest with more shards")
    again = ingest(config, str(out), STORAGE, progress=False)
    assert again.digest == undisturbed.digest and not again.already_done
    assert stored(out) == stored(tmp_path / "undisturbed") | {"mine.txt": mine}


def test_a_failed_overwrite_does_not_leave_the_old_manifest(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", picture_files(6))
    run(source, tmp_path / "out")
    write_folder(source, {"z.png": b"no picture"})
    with pytest.raises(DataError):
        run(source, tmp_path / "out", overwrite=True, strict=True, row_group_rows=1, shard_bytes=1)
    assert not exists(str(tmp_path / "out" / "manifest.json"), STORAGE)


@pytest.mark.integration
def test_ingest_from_s3_to_s3(s3: S3Server, tmp_path: Path) -> None:
    files = picture_files(30)
    bucket = s3.new_bucket()
    for name, data in files.items():
        write_bytes(f"s3://{bucket}/in/{name}", data, STORAGE)
    layout = {"row_group_rows": 4, "shard_bytes": 8_000}
    remote = run(f"s3://{bucket}/in", f"s3://{bucket}/out", **layout)
    local = run(write_folder(tmp_path / "in", files), tmp_path / "out", **layout)
    assert remote.digest == local.digest
    assert stored(f"s3://{bucket}/out") == stored(tmp_path / "out")
    assert run(f"s3://{bucket}/in", f"s3://{bucket}/out", **layout).already_done
    assert run(f"s3://{bucket}/in", f"s3://{bucket}/out", overwrite=True, **layout).digest == local.digest
