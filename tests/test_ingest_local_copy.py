import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.ingest import local_copy as module
from pipeline.ingest.local_copy import local_copy
from pipeline.storage import MissingError, StorageConfig, StorageError, write_bytes
from tests.servers import S3Server

pytestmark = pytest.mark.integration
STORAGE = StorageConfig()
DATA = bytes(range(256)) * 40_000
HOLD = """
import sys
from pipeline.ingest.local_copy import local_copy
from pipeline.storage import StorageConfig
with local_copy(sys.argv[1], StorageConfig()) as folder:
    print((folder / "x.bin").stat().st_ino, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def uri(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A remote file; the machine's folder for temporary files is the test's own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(module, "PIECE_BYTES", 1 << 20)
    uri = f"s3://{s3.new_bucket()}/x.bin"
    write_bytes(uri, DATA, STORAGE)
    yield uri


def left_over(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("*") if path.is_file()]


def other_process(uri: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def inode(process: "subprocess.Popen[str]") -> int:
    """Of the copy that another process holds; waits until it has it."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_threads_and_processes_share_one_copy_and_the_last_removes_it(uri: str, tmp_path: Path) -> None:
    first, second = other_process(uri), other_process(uri)
    try:
        seen = {inode(first), inode(second)}

        def read(_: int) -> tuple[int, bytes]:
            with local_copy(uri, STORAGE) as folder:
                return (folder / "x.bin").stat().st_ino, (folder / "x.bin").read_bytes()

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(read, range(8)))
        assert {content for _, content in results} == {DATA}
        assert len(seen | {number for number, _ in results}) == 1
        first.communicate()
        assert left_over(tmp_path)
        second.communicate()
        assert not left_over(tmp_path)
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_the_copy_of_a_killed_process_is_taken_over(uri: str, tmp_path: Path) -> None:
    process = other_process(uri)
    copy = inode(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with local_copy(uri, STORAGE) as folder:
        assert (folder / "x.bin").stat().st_ino == copy
    assert not left_over(tmp_path)


def test_half_a_copy_is_made_again(uri: str, tmp_path: Path) -> None:
    with local_copy(uri, STORAGE) as folder:
        name = folder.relative_to(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.bin.partial").write_bytes(DATA[:1000])
    with local_copy(uri, STORAGE) as folder:
        assert folder == tmp_path / name
        assert (folder / "x.bin").read_bytes() == DATA
    assert not left_over(tmp_path)


def test_another_content_is_another_copy(uri: str) -> None:
    with local_copy(uri, STORAGE) as old:
        write_bytes(uri, DATA + b"more", STORAGE)
        with local_copy(uri, STORAGE) as new:
            assert (old / "x.bin").read_bytes() == DATA
            assert (new / "x.bin").read_bytes() == DATA + b"more"


def test_a_copy_that_has_no_room_or_no_source_is_explained(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingError, match="absent.bin: there is no such file"):
        with local_copy(uri.replace("x.bin", "absent.bin"), STORAGE):
            pass
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(StorageError, match=r"needs 10,240,000 bytes in .*, where 5 are free; set TMPDIR"):
        with local_copy(uri, STORAGE):
            pass


def test_a_folder_of_somebody_else_is_refused(uri: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"picture-copies-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="belongs to somebody else"):
        with local_copy(uri, STORAGE):
            pass
