import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

from pipeline.ingest.sources import Kind, Listing, list_source, open_pictures
from pipeline.storage import MissingError, StorageConfig, StorageError, join
from tests.picture_sources import write_lmdb, write_parquet_folder, write_sources, write_tar
from tests.pictures import encoded, picture_files, write_data_set, write_folder, write_zip
from tests.servers import S3Server

STORAGE = StorageConfig()
FILES = dict(sorted(picture_files(7).items()))
EXTRAS = {"notes.txt": b"x", ".hidden.png": b"x", "__MACOSX/a.png": b"x", "part-0/.thumbs/a.png": b"x"}


def contents(found: Listing) -> list[bytes]:
    """All pictures in order, each asked for several times by several threads."""
    pictures = open_pictures(found.uri, found.kind, STORAGE)
    try:
        with ThreadPoolExecutor(8) as pool:
            several = list(pool.map(pictures.read, found.names * 4))
    finally:
        pictures.close()
    assert several == several[: len(found.names)] * 4
    return several[: len(found.names)]


def test_every_kind_gives_the_same_pictures_in_the_same_order(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, FILES)
    assert {*sources, "picture"} == set(get_args(Kind))
    for kind, path in sources.items():
        found = list_source(str(path), STORAGE)
        assert found.kind == kind and not found.single
        assert len(set(found.names)) == len(found.names)
        assert contents(found) == list(FILES.values()), kind


@pytest.mark.integration
def test_every_kind_on_s3_is_the_same_source(s3: S3Server, tmp_path: Path) -> None:
    sources, bucket = write_sources(tmp_path, FILES), s3.new_bucket()
    filesystem = s3.filesystem()
    for kind, place in sources.items():
        for path in [place] if place.is_file() else filter(Path.is_file, place.rglob("*")):
            with filesystem.open_output_stream(f"{bucket}/{path.relative_to(tmp_path)}") as stream:
                stream.write(path.read_bytes())
        found = list_source(f"s3://{bucket}/{place.relative_to(tmp_path)}", STORAGE)
        local = list_source(str(place), STORAGE)
        assert (found.kind, found.names, found.fingerprint) == (kind, local.names, local.fingerprint)
        assert contents(found) == list(FILES.values()), kind
    single = list_source(f"s3://{bucket}/folder/{min(FILES)}", STORAGE)
    assert single.single and contents(single) == [FILES[min(FILES)]]
    with pytest.raises(MissingError, match="nothing to ingest"):
        list_source(f"s3://{bucket}/absent", STORAGE)
    with pytest.raises(StorageError, match="no bucket 'absent-bucket'"):
        list_source("s3://absent-bucket/x", STORAGE)


def test_hidden_files_are_nobodys_pictures(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", FILES | EXTRAS)
    archive = write_zip(tmp_path / "pictures.ZIP", FILES | EXTRAS)
    tar = write_tar(tmp_path / "pictures.TAR", FILES | EXTRAS)
    for path in (folder, archive, tar):
        found = list_source(str(path), STORAGE)
        assert found.names == tuple(FILES)
        assert found.ignored == ("notes.txt",)
        assert contents(found) == list(FILES.values())


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "webdataset", "lmdb", "parquet"])
def test_fingerprint_is_that_of_the_content_not_of_the_place(tmp_path: Path, kind: Kind) -> None:
    def fingerprint(name: str, files: dict[str, bytes]) -> str:
        return list_source(str(write_sources(tmp_path / name, files)[kind]), STORAGE).fingerprint

    first = fingerprint("one", FILES)
    assert fingerprint("two", FILES) == first
    assert fingerprint("more", FILES | {"z.png": b"1"}) != first
    assert fingerprint("longer", FILES | {min(FILES): FILES[min(FILES)] + b"1"}) != first
    names = list(FILES)
    swapped = {**FILES, names[0]: FILES[names[1]], names[1]: FILES[names[0]]}
    assert fingerprint("swapped", swapped) != first


def test_ignored_files_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    plain, extras = write_folder(tmp_path / "a", FILES), write_folder(tmp_path / "b", FILES | EXTRAS)
    assert list_source(str(plain), STORAGE).fingerprint == list_source(str(extras), STORAGE).fingerprint


def test_single_picture(tmp_path: Path) -> None:
    (tmp_path / "earth.JPG").write_bytes(encoded(0, 16, "JPEG"))
    found = list_source(str(tmp_path / "earth.JPG"), STORAGE)
    assert (found.kind, found.single, found.names) == ("picture", True, ("earth.JPG",))
    assert contents(found) == [encoded(0, 16, "JPEG")]


def test_what_decides_the_kind_of_a_folder(tmp_path: Path) -> None:
    assert list_source(str(write_parquet_folder(tmp_path, FILES)), STORAGE).kind == "parquet"
    write_tar(tmp_path / "a.tar", FILES)
    assert list_source(str(tmp_path), STORAGE).kind == "parquet"
    write_folder(tmp_path / "x", FILES)
    assert list_source(str(tmp_path), STORAGE).kind == "folder"
    (tmp_path / "manifest.json").write_text("{}")  # a data set of ours, with a picture of its pictures beside it
    assert list_source(str(tmp_path), STORAGE).kind == "parquet"
    write_lmdb(tmp_path, dict(FILES))
    assert list_source(str(tmp_path), STORAGE).kind == "lmdb"


def test_nothing_and_unknown_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nothing to ingest.*ingest.source"):
        list_source(join(str(tmp_path), "absent"), STORAGE)
    with pytest.raises(MissingError, match="is empty; expected pictures"):
        list_source(str(tmp_path), STORAGE)
    (tmp_path / "video.mp4").write_bytes(b"x")
    with pytest.raises(StorageError, match="video.mp4: is a file of no known kind; expected pictures.*ingest.source"):
        list_source(str(tmp_path / "video.mp4"), STORAGE)
    with pytest.raises(StorageError, match="holds no pictures, but 1 other files .first 'video.mp4'"):
        list_source(str(tmp_path), STORAGE)
    (tmp_path / "data.mdb").write_bytes(b"x")
    with pytest.raises(StorageError, match="part of an LMDB; name its folder"):
        list_source(str(tmp_path / "data.mdb"), STORAGE)


def test_finished_data_sets_below_a_source_are_no_part_of_it(tmp_path: Path) -> None:
    tables = write_parquet_folder(tmp_path, FILES)
    before = list_source(str(tables), STORAGE)
    write_data_set(str(tables / "made"), [encoded(1)])
    write_data_set(str(tables / "data" / "made"), [encoded(2)])
    assert list_source(str(tables), STORAGE) == before
    foreign = write_parquet_folder(tables / "theirs", FILES)
    (foreign / "data" / "manifest.json").write_text('{"files": []}')
    assert len(list_source(str(tables), STORAGE).names) == 2 * len(before.names), "another tool's manifest"
    write_data_set(str(tmp_path / "all" / "one"), [encoded(1)])
    with pytest.raises(StorageError, match=r"all: holds nothing but finished data sets .*'one/'.*set ingest.source"):
        list_source(str(tmp_path / "all"), STORAGE)
    assert list_source(str(tmp_path / "all" / "one"), STORAGE).kind == "parquet"


def test_a_name_that_is_not_utf8_is_explained(tmp_path: Path) -> None:
    write_folder(tmp_path, FILES)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(encoded(1))
    with pytest.raises(StorageError, match=r"the name .*caf\\xe9.png' in it is not UTF-8; rename") as caught:
        list_source(str(tmp_path), STORAGE)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    found = list_source(str(write_folder(tmp_path, FILES)), STORAGE)
    (tmp_path / found.names[0]).unlink()
    with pytest.raises(MissingError, match=found.names[0]):
        open_pictures(found.uri, found.kind, STORAGE).read(found.names[0])
