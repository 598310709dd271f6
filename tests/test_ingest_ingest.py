import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.data.manifest import DataError, read_manifest
from pipeline.data.picture import deviation
from pipeline.ingest.ingest import IngestConfig, IngestReport, Preview, TileConfig, ingest, preview
from pipeline.ingest.verify import verify
from pipeline.storage import StorageConfig, StorageError, exists, join, list_names, read_bytes, write_bytes
from tests.picture_sources import write_tar
from tests.pictures import (
    BLUE_MARBLE,
    earth,
    encoded,
    land,
    picture_files,
    pixels,
    write_data_set,
    write_folder,
    write_zip,
)
from tests.servers import S3Server

STORAGE = StorageConfig()


def land_bytes(number: int, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    land(number, width, height).save(buffer, "PNG")
    return buffer.getvalue()


def run(source: Path | str, uri: Path | str, **settings: Any) -> IngestReport:
    config = IngestConfig.model_validate({"source": str(source), "size": 16} | settings)
    return ingest(config, str(uri), STORAGE, progress=False)


def stored(uri: Path | str) -> dict[str, bytes]:
    """Everything that readers of a data set see."""
    names = [name for name in list_names(str(uri), STORAGE) if name not in ("ingest-report.json", ".ingest")]
    return {name: read_bytes(join(str(uri), name), STORAGE) for name in names}


def samples(uri: Path | str) -> list[tuple[str, bytes]]:
    shards = read_manifest(str(uri), STORAGE).shards
    images = [image for shard in shards for image in pq.read_table(Path(uri, shard.file)).column("image").to_pylist()]
    return [(image["path"], image["bytes"]) for image in images]


def test_every_picture_becomes_a_sample_in_order_of_name(tmp_path: Path) -> None:
    files = picture_files(10)
    report = run(write_folder(tmp_path / "in", files | {"notes.txt": b"x"}), tmp_path / "out")
    assert samples(tmp_path / "out") == sorted(files.items())
    assert (report.samples, report.skipped, report.ignored) == (10, (), ("notes.txt",))


def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", picture_files(40, size=24))
    layout = {"part_pictures": 9, "row_group_rows": 4, "shard_bytes": 4_000}
    reports = [run(source, tmp_path / str(count), workers=count, **layout) for count in (1, 2, 3)]
    first = stored(tmp_path / "1")
    shards = [name for name in first if name.startswith("shard-")]
    assert len(shards) > len({name[:20] for name in shards}) == 5, "five parts, some of several files"
    assert stored(tmp_path / "2") == first and stored(tmp_path / "3") == first
    assert len({report.digest for report in reports}) == 1 and {report.parts for report in reports} == {5}


def test_parts_are_independent_of_each_other(tmp_path: Path) -> None:
    files = picture_files(24)
    source = write_folder(tmp_path / "in", files)
    run(source, tmp_path / "all", part_pictures=8, workers=1)
    run(source, tmp_path / "first", part_pictures=8, limit=16, workers=1)
    both, first = (
        [data for name, data in stored(tmp_path / which).items() if name.startswith("shard-")]
        for which in ("all", "first")
    )
    assert len(first) == 2 and len(both) == 3 and both[:2] == first
    assert samples(tmp_path / "all") == sorted(files.items())


def test_tiles_of_large_pictures_are_cut_into_parts_too(tmp_path: Path) -> None:
    """Several large pictures, one of them too small for a tile and one that is none: places run through all."""
    files = {f"{n}.png": land_bytes(n, 96, 64 + 32 * n) for n in range(3)}
    cut = encoded(9, 96, "JPEG")[:-500]  # its header promises 25 tiles
    source = write_folder(tmp_path / "in", files | {"1b.png": encoded(1, 16), "2b.png": b"no picture", "2c.jpg": cut})
    tile = {"size": 32, "stride": 16, "minimum_deviation": 0, "latitude": 90}
    one = run(source, tmp_path / "one", tile=tile, part_pictures=1000)
    many = run(source, tmp_path / "many", tile=tile, part_pictures=7, workers=2)
    assert samples(tmp_path / "one") == samples(tmp_path / "many")
    assert (one.parts, many.parts) == (1, -(-(15 + 25 + 35 + 2 + 25) // 7))
    bad = ["1b.png", "2b.png", "2c.jpg"]
    assert [skip.path for skip in one.skipped] == [skip.path for skip in many.skipped] == bad
    assert one.samples == many.samples == 15 + 25 + 35
    for path, data in samples(tmp_path / "many")[::9]:
        name, place = path.split("#")
        x, y = (int(part.split("=")[1]) for part in place.split(","))
        square = Image.fromarray(pixels(files[name])[y : y + 32, x : x + 32])
        assert np.array_equal(pixels(data), np.asarray(square.resize((16, 16), Image.Resampling.LANCZOS)))


def test_what_the_pictures_lie_in_makes_no_difference(tmp_path: Path) -> None:
    files = dict(sorted(picture_files(20).items()))
    first = run(write_folder(tmp_path / "in", files), tmp_path / "0")
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name in files:
            archive.add(tmp_path / "in" / name, name)
    in_processes = {"part_pictures": 5, "workers": 2}
    sources = [write_zip(tmp_path / "in.zip", files), tmp_path / "in.tar"]
    assert {run(source, tmp_path / source.suffix).digest for source in sources} == {first.digest}
    again = run(tmp_path / "0", tmp_path / "again", **in_processes)
    assert again.samples == 20, "a data set of ours is a source too"
    assert [data for _, data in samples(tmp_path / "again")] == list(files.values())


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
        ({"x/notes.txt": b"1"}, "holds no pictures, but 1 other files .*notes.txt.*set ingest.source"),
        ({"a.png": b"1", "b.png": b"2"}, "none of its 2 pictures.*a.png, cannot be decoded"),
    ],
)
def test_sources_without_pictures_are_explained(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    with pytest.raises((DataError, StorageError), match=words):
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


def test_limit_looks_at_the_first(tmp_path: Path) -> None:
    files = picture_files(10)
    source = write_folder(tmp_path / "in", files | {"part-0/0001.png": b"no picture"})
    report = run(source, tmp_path / "out", limit=4)
    assert samples(tmp_path / "out") == sorted(files.items())[:1] + sorted(files.items())[1:3]
    assert [skip.path for skip in report.skipped] == ["part-0/0001.png"]
    assert run(source, tmp_path / "all", limit=100).samples == 10
    tile = {"size": 16, "stride": 16, "minimum_deviation": 0, "latitude": 90}
    assert (
        run(write_folder(tmp_path / "large", {"a.png": land_bytes(1, 64, 64)}), tmp_path / "b", tile=tile).samples == 16
    )
    assert run(tmp_path / "large", tmp_path / "c", tile=tile, limit=5).samples == 5


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


@pytest.mark.parametrize("damage", ["one", "all"])
def test_a_failed_overwrite_leaves_the_old_data_set_whole(tmp_path: Path, damage: str) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(6)), tmp_path / "out"
    digest = run(source, out, part_pictures=2).digest
    before = stored(out)
    if damage == "one":
        write_folder(source, {"z.png": b"no picture"})
    other = source if damage == "one" else write_folder(tmp_path / "other", {"a.png": b"no picture"})
    with pytest.raises(DataError, match="a.png, cannot be decoded" if damage == "all" else "z.png cannot be decoded"):
        run(other, out, overwrite=True, strict=damage == "one", part_pictures=2, row_group_rows=1, shard_bytes=1)
    assert before.items() <= stored(out).items()
    assert verify(str(out), STORAGE, progress=False).problems == ()
    (source / "z.png").unlink(missing_ok=True)
    assert run(source, out, part_pictures=2).already_done, "and what was begun of the other is left to go on"
    assert exists(str(out / ".ingest"), STORAGE) and read_manifest(str(out), STORAGE).digest == digest
    assert run(source, out, part_pictures=2, overwrite=True).digest == digest
    assert stored(out) == before


@pytest.mark.parametrize("place", ["", "below", "deep/below"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_source_and_a_data_set_that_overlap_are_refused(tmp_path: Path, place: str, turned: bool) -> None:
    """Before anything is read, cleared or written, however the place is spelled."""
    folder = tmp_path / "pictures"
    inner = folder / place
    write_folder(inner, picture_files(3))
    (tmp_path / "link").symlink_to(folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for outer in (str(folder), f"{folder}/", f"file://{folder}", f"{tmp_path}/x/../pictures", str(tmp_path / "link")):
        source, uri = (outer, str(inner)) if turned else (str(inner), outer)
        with pytest.raises(DataError) as caught:
            run(source, uri, overwrite=True)
        for words in (f"ingest.source {source}", f"data.uri {uri}", "set data.uri to a folder of its own"):
            assert words in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_overlaps_on_s3_are_refused_without_asking_it() -> None:
    for source, uri in [("s3://b/k", "s3://b/k/"), ("s3://b/k/x", "s3://b/k"), ("s3://b", "s3://b/k")]:
        with pytest.raises(DataError, match="set data.uri to a folder of its own"):
            run(source, uri)


def test_a_data_set_beside_the_source_is_not_an_overlap(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", picture_files(3))
    assert run(source, tmp_path / "in-2").samples == 3, "a name that only begins alike"


def test_overwriting_removes_only_what_an_ingest_made(tmp_path: Path) -> None:
    """Also a data set whose shards had other names, which its manifest tells."""
    source, out = write_folder(tmp_path / "in", picture_files(8)), tmp_path / "out"
    mine = {
        "shard-00000.parquet": b"mine",
        "shard-00000-00.parquet": b"of other days",
        "shard-00009-00.parquet": b"mine too",
        "shard-a.parquet": b"mine",
        "notes.txt": b"mine",
        "deep/shard-0123abcd-00000-00.parquet": b"mine",
    }
    write_folder(out, mine)
    first = run(source, out)
    write_data_set(str(tmp_path / "before"), [encoded(1)])
    (made,) = (tmp_path / "before").glob("shard-*")
    assert made.name == "shard-00000-00.parquet"
    assert run(source, out, format="png", overwrite=True).digest != first.digest
    assert {name: (out / name).read_bytes() for name in mine} == mine
    assert len(list(out.glob("shard-????????-*.parquet"))) == 1
    for path in (tmp_path / "before").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    run(source, out, overwrite=True)
    del mine["shard-00000-00.parquet"]  # the manifest that stood there named it
    assert not (out / "shard-00000-00.parquet").exists()
    assert {name: (out / name).read_bytes() for name in mine} == mine


@pytest.mark.parametrize("name", ["_metadata", "ingest-report.json", "manifest.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_strangers_file_in_the_way_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(3)), tmp_path / "out"
    theirs = {name: b'{"version": 1, "files": []}', "part-0.parquet": b"theirs"}
    write_folder(out, theirs)
    with pytest.raises(DataError, match=f"{name}: would be replaced, but nothing says that jobs.ingest"):
        run(source, out, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == theirs


def test_a_damaged_manifest_of_ours_can_be_replaced(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(3)), tmp_path / "out"
    digest = run(source, out).digest
    (out / "manifest.json").write_bytes((out / "manifest.json").read_bytes()[:200])
    assert run(source, out, overwrite=True).digest == digest


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A tar has them as they were; what is stored says which bytes they were."""
    source = tmp_path / "in.tar"
    files = {
        b"caf\xe9.png".decode(errors="surrogateescape"): encoded(1),
        "\udce9.png": b"no picture",
        "z.png": encoded(2),
    }
    write_tar(source, files)
    report = run(source, tmp_path / "out", workers=1)
    assert [path for path, _ in samples(tmp_path / "out")] == [r"caf\udce9.png", "z.png"]
    assert [skipped.path for skipped in report.skipped] == [r"\udce9.png"]
    assert verify(str(tmp_path / "out"), STORAGE, progress=False).problems == ()
    with pytest.raises(DataError, match=r"\\udce9.png cannot be decoded") as caught:
        run(source, tmp_path / "strict", workers=1, strict=True)
    str(caught.value).encode()


def looked(source: Path, uri: Path, **settings: Any) -> Preview:
    config = IngestConfig.model_validate({"source": str(source), "size": 16, "part_pictures": 2} | settings)
    return preview(config, str(uri), STORAGE, progress=False)


def test_a_preview_says_what_would_happen_and_writes_nothing(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in", picture_files(7)), tmp_path / "out"
    assert looked(source, out) == Preview("folder", 7, 4, "a new data set") and not out.exists()
    run(source, out, part_pictures=2)
    before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    assert looked(source, out).outcome == "nothing to do: the data set is there already"
    differing = looked(source, out, format="png")
    assert differing.refused and "ingest.format (there keep, asked for png); choose another" in differing.outcome
    assert looked(source, out, overwrite=True).outcome == "a new data set; then replaces the data set that is there"
    assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before
    with pytest.raises(DataError, match="lie one inside the other"):
        looked(source, source / "out")
    tile = {"size": 16, "stride": 16, "latitude": 90}
    large = write_folder(tmp_path / "large", {"a.png": land_bytes(1, 64, 64)})
    assert looked(large, tmp_path / "b", tile=tile).parts == 8
    write_folder(tmp_path / "c", {"_metadata": b"theirs"})
    assert looked(source, tmp_path / "c").refused


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
