import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.ingest.databases import LmdbPictures, list_lmdb
from pipeline.packages import MissingPackageError
from pipeline.storage import MissingError, StorageConfig, StorageError
from tests.picture_sources import write_lmdb
from tests.pictures import encoded
from tests.servers import S3Server

STORAGE = StorageConfig()
# Larger than a page, as pictures are, so that values lie outside the tree of keys.
VALUES: dict[str | bytes, bytes] = {
    f"{number:040x}": encoded(number, 64, "WEBP", lossless=True) for number in range(40)
}


def test_names_are_the_keys_in_their_order(tmp_path: Path) -> None:
    folder = write_lmdb(tmp_path, VALUES | {"length": b"40", "__len__": b"40", b"\xff\x00": b"x"})
    found = list_lmdb(str(folder), STORAGE)
    assert found.names == tuple(VALUES)
    assert found.ignored == ("__len__", "length", r"b'\xff\x00'")
    pictures = LmdbPictures(str(folder), STORAGE)
    assert {name: pictures.read(name) for name in found.names} == VALUES
    with pytest.raises(MissingError, match="has no key 'absent'"):
        pictures.read("absent")
    pictures.close()


def test_listing_while_others_read_and_closing_one_of_many(tmp_path: Path) -> None:
    uri = str(write_lmdb(tmp_path, VALUES))
    first, second = LmdbPictures(uri, STORAGE), LmdbPictures(f"{uri}/.", STORAGE)
    assert list_lmdb(uri, STORAGE).names == tuple(VALUES)
    first.close()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(second.read, [*VALUES] * 5)) == [*VALUES.values()] * 5
    second.close()
    third = LmdbPictures(uri, STORAGE)
    assert third.read(next(iter(map(str, VALUES)))) == next(iter(VALUES.values()))
    third.close()


def test_the_database_is_not_written_to(tmp_path: Path) -> None:
    folder = write_lmdb(tmp_path, VALUES)
    (folder / "lock.mdb").unlink()
    before = (folder / "data.mdb").read_bytes()
    list_lmdb(str(folder), STORAGE)
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]
    assert (folder / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_an_error_and_no_crash(tmp_path: Path, kept: float) -> None:
    folder = write_lmdb(tmp_path, VALUES)
    data = (folder / "data.mdb").read_bytes()
    (folder / "data.mdb").write_bytes(data[: int(kept * len(data))])
    code = (
        "import sys; from pipeline.ingest.databases import *\n"
        "try: list_lmdb(sys.argv[1], StorageConfig())\n"
        "except StorageError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "cut off" in result.stdout or "not a readable LMDB" in result.stdout
    (folder / "data.mdb").write_bytes(data)
    assert len(list_lmdb(str(folder), STORAGE).names) == len(VALUES)  # the failed one is not kept


def test_other_files_of_that_name_and_empty_ones_are_explained(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"x" * 100_000)
    with pytest.raises(StorageError, match="not a readable LMDB.*copy or make it again"):
        list_lmdb(str(tmp_path), STORAGE)
    with pytest.raises(StorageError, match="holds no pictures.*'length'"):
        list_lmdb(str(write_lmdb(tmp_path / "empty", {"length": b"0"})), STORAGE)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'cips-pipeline\[lmdb\]'"):
        list_lmdb(str(tmp_path), STORAGE)


@pytest.mark.integration
def test_from_s3_the_file_is_copied_while_it_is_read(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder, bucket = write_lmdb(tmp_path / "lmdb", VALUES), s3.new_bucket()
    with s3.filesystem().open_output_stream(f"{bucket}/a/data.mdb") as stream:
        stream.write((folder / "data.mdb").read_bytes())
    uri = f"s3://{bucket}/a"
    assert list_lmdb(uri, STORAGE).fingerprint == list_lmdb(str(folder), STORAGE).fingerprint
    first, second = LmdbPictures(uri, STORAGE), LmdbPictures(uri, STORAGE)
    first.close()
    assert {name: second.read(str(name)) for name in VALUES} == VALUES
    assert [path.name for path in tmp_path.rglob("temporary/**/*.mdb")] == ["data.mdb"]
    second.close()
    assert not [path for path in tmp_path.rglob("temporary/**/*") if path.is_file()]
