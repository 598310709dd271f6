import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.fetch import Fetcher
from pipeline.data.fetch_errors import ClosedError, TruncatedError
from pipeline.storage import MissingError, StorageConfig, StorageError

STORAGE = StorageConfig()
CONTENT = os.urandom(1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fetch")
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_bytes(CONTENT)
    return folder


@given(offset=st.integers(0, 1100), length=st.integers(1, 1100))
def test_any_piece_is_whole_or_an_error(folder: Path, offset: int, length: int) -> None:
    fetcher = Fetcher(str(folder), STORAGE, 1)
    if offset + length <= len(CONTENT):
        assert fetcher.read("deep/file", offset, length) == CONTENT[offset : offset + length]
        assert (fetcher.requests, fetcher.bytes_read) == (1, length)
    else:
        with pytest.raises(
            TruncatedError, match=rf"deep/file: has 1000 bytes, fewer than the {offset + length}"
        ) as caught:
            fetcher.read("deep/file", offset, length)
        assert caught.value.size == len(CONTENT) and fetcher.bytes_read == 0


def test_a_read_that_the_kernel_cuts_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: whole(descriptor, min(length, 7), offset))
    assert Fetcher(str(folder), STORAGE, 1).read("deep/file", 3, 500) == CONTENT[3:503]


def test_missing_files_and_folders_in_the_way_are_named(folder: Path) -> None:
    fetcher = Fetcher(f"file://{folder}", STORAGE, 1)
    with pytest.raises(MissingError, match="absent: there is no such file"):
        fetcher.read("absent", 0, 1)
    with pytest.raises(StorageError, match="deep: .*directory"):
        fetcher.read("deep", 0, 1)


@pytest.mark.parametrize("offset, length", [(-1, 5), (0, 0), (3, -2)])
def test_ranges_that_mean_nothing_are_refused(folder: Path, offset: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes from {offset} on"):
        Fetcher(str(folder), STORAGE, 1).read("deep/file", offset, length)


def test_no_file_stays_open_and_nothing_is_read_after_close(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fetcher = Fetcher(str(folder), STORAGE, 1)
    for _ in range(5):
        fetcher.read("deep/file", 0, 10)
        with pytest.raises(TruncatedError):
            fetcher.read("deep/file", 990, 20)
    assert len(os.listdir("/proc/self/fd")) == before
    fetcher.close()
    with pytest.raises(ClosedError, match="closed"):
        fetcher.read("deep/file", 0, 10)


def test_local_data_do_without_the_clients_of_s3(folder: Path) -> None:
    code = (
        "import sys; from pipeline.data.fetch import Fetcher; from pipeline.storage import StorageConfig\n"
        f"assert len(Fetcher({str(folder)!r}, StorageConfig(), 4).read('deep/file', 0, 9)) == 9\n"
        "assert not {'botocore', 'aiohttp', 's3fs', 'tenacity'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
