"""What is said about trouble with files and buckets, in the words that Arrow and the kernel use for it."""

import errno
import os
import pickle
from pathlib import Path

import pytest

from pipeline.storage_errors import (
    MissingError,
    StorageError,
    UnavailableError,
    disk_of,
    explain_local,
    explain_remote,
    megabytes,
)


def remote(text: str, kind: type[Exception] = OSError) -> StorageError:
    return explain_remote(kind(text), "s3://pictures/run/x", "pictures", "http://store:8333", 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7", "http://store:8333 did not answer"),
        ("AWS Error SLOW_DOWN during PutObject operation (HTTP status 503)", "there is no room for bucket"),
        ("AWS Error INTERNAL_FAILURE during PutObject operation (HTTP status 500)", "check its logs and its disks"),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation", "overloaded"),
    ],
)
def test_what_may_pass_can_be_told_from_what_will_not(text: str, words: str) -> None:
    found = remote(text)
    assert isinstance(found, UnavailableError) and words in str(found) and text in str(found)
    assert "s3://pictures/run/x" in str(found)


def test_what_will_not_pass_is_no_reason_to_wait() -> None:
    for text in ("AWS Error ACCESS_DENIED during PutObject operation", "AWS Error NO_SUCH_BUCKET", "something else"):
        assert not isinstance(remote(text), UnavailableError), text
    assert isinstance(remote("Path does not exist", FileNotFoundError), MissingError)


def test_a_full_disk_is_named_with_what_is_wanted_and_what_is_free(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    text = str(explain_local(full, "runs/x", tmp_path / "no" / "such" / "file", 2_500_000))
    mount, free = disk_of(tmp_path)
    assert text.startswith(f"runs/x: the disk at {mount} is full: 2.5 MB were to be written, ")
    assert f"{megabytes(free)[-2:]} are free; make room there" in text
    assert "were to be written" not in str(explain_local(full, "runs/x", tmp_path, None))


def test_the_disk_of_a_file_is_a_mount_that_holds_it(tmp_path: Path) -> None:
    mount, free = disk_of(tmp_path / "not" / "there")
    assert os.path.ismount(mount) and tmp_path.is_relative_to(mount) and free > 0


def test_sizes() -> None:
    assert [megabytes(size) for size in (0, 64_000, 1_500, 2_000_000, 1_234_567_890)] == [
        "0 kB",
        "64 kB",
        "1.5 kB",
        "2 MB",
        "1,234.6 MB",
    ]


def test_the_errors_travel_between_processes() -> None:
    for kind in (StorageError, MissingError, UnavailableError):
        again = pickle.loads(pickle.dumps(kind("the disk is full")))
        assert type(again) is kind and str(again) == "the disk is full"
