from pathlib import Path

import pytest

from pipeline.data.picture import PictureError
from pipeline.data.sources import open_source
from pipeline.storage import MissingError, StorageConfig, StorageError, join, write_bytes
from tests.pictures import encoded, picture_files, write_folder, write_zip
from tests.servers import S3Server

STORAGE = StorageConfig()
FILES = picture_files(5)
EXTRAS = {"notes.txt": b"x", ".hidden.png": b"x", "__MACOSX/a.png": b"x", "part-0/.thumbs/a.png": b"x"}


def test_folder_and_zip_give_the_same_pictures_in_order_of_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", FILES | EXTRAS)
    archive = write_zip(tmp_path / "pictures.ZIP", FILES | EXTRAS)
    for source in (open_source(str(folder), STORAGE), open_source(str(archive), STORAGE)):
        assert source.names == tuple(sorted(FILES))
        assert source.ignored == ("notes.txt",)
        assert not source.single
        assert {name: source.read(name) for name in source.names} == FILES


@pytest.mark.integration
def test_sources_on_s3(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.new_bucket()
    for name, data in FILES.items():
        write_bytes(f"s3://{bucket}/pictures/{name}", data, STORAGE)
    archive = write_zip(tmp_path / "x.zip", FILES)
    write_bytes(f"s3://{bucket}/x.zip", archive.read_bytes(), STORAGE)
    for uri in (f"s3://{bucket}/pictures", f"s3://{bucket}/x.zip"):
        source = open_source(uri, STORAGE)
        assert {name: source.read(name) for name in source.names} == FILES
    single = open_source(f"s3://{bucket}/pictures/{min(FILES)}", STORAGE)
    assert single.single and single.read(single.names[0]) == FILES[min(FILES)]


def test_fingerprint_is_that_of_names_and_sizes_not_of_the_place(tmp_path: Path) -> None:
    def fingerprint(name: str, files: dict[str, bytes]) -> str:
        return open_source(str(write_folder(tmp_path / name, files)), STORAGE).fingerprint

    first = fingerprint("one", FILES)
    assert fingerprint("two", FILES) == first
    assert fingerprint("ignored", FILES | EXTRAS) == first
    assert fingerprint("more", FILES | {"z.png": b"1"}) != first
    assert fingerprint("longer", FILES | {min(FILES): FILES[min(FILES)] + b"1"}) != first


def test_single_picture(tmp_path: Path) -> None:
    (tmp_path / "earth.JPG").write_bytes(encoded(0, 16, "JPEG"))
    source = open_source(str(tmp_path / "earth.JPG"), STORAGE)
    assert source.single and source.names == ("earth.JPG",)
    assert source.read("earth.JPG") == encoded(0, 16, "JPEG")


def test_nothing_and_unknown_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nothing to ingest.*ingest.source"):
        open_source(join(str(tmp_path), "absent"), STORAGE)
    (tmp_path / "video.mp4").write_bytes(b"x")
    with pytest.raises(StorageError, match="video.mp4: neither a folder"):
        open_source(str(tmp_path / "video.mp4"), STORAGE)


def test_damaged_archives_are_explained(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "x.zip", FILES)
    data = bytearray(archive.read_bytes())
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match="x.zip: not a readable zip"):
        open_source(str(archive), STORAGE)
    name = sorted(FILES)[2]
    start = data.index(FILES[name])
    data[start + 10 : start + 20] = b"\0" * 10
    archive.write_bytes(data)
    source = open_source(str(archive), STORAGE)
    with pytest.raises(PictureError, match="cannot be unpacked"):
        source.read(name)
    assert source.read(sorted(FILES)[3]) == FILES[sorted(FILES)[3]]


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path, FILES)), STORAGE)
    (tmp_path / source.names[0]).unlink()
    with pytest.raises(MissingError, match=source.names[0]):
        source.read(source.names[0])
