import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage as storage_module
from pipeline.storage import (
    MissingError,
    StorageConfig,
    StorageError,
    UnavailableError,
    arrow_filesystem,
    delete,
    endpoint_of,
    exists,
    fsspec_filesystem,
    is_remote,
    join,
    list_names,
    mlflow_environment,
    patiently,
    read_bytes,
    region_of,
    staged,
    write_bytes,
)
from tests.servers import S3Server, free_ports

STORAGE = StorageConfig()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder to store things in: what holds for one kind holds for the other."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"s3://{request.getfixturevalue('s3').new_bucket()}/place"


def test_round_trip_and_overwrite(place: str) -> None:
    uri = join(place, "a", "b.bin")
    write_bytes(uri, b"first", STORAGE)
    write_bytes(uri, b"second", STORAGE)
    assert read_bytes(uri, STORAGE) == b"second"
    write_bytes(join(place, "empty"), b"", STORAGE)
    assert read_bytes(join(place, "empty"), STORAGE) == b""


def test_memory_is_written_as_it_lies(place: str) -> None:
    uri = join(place, "view.bin")
    write_bytes(uri, memoryview(bytearray(b"0123456789"))[2:6], STORAGE)
    assert read_bytes(uri, STORAGE) == b"2345"


def test_names_are_direct_children_in_order(place: str) -> None:
    for name in ("c.txt", "b/x", "b/y", "a.txt"):
        write_bytes(join(place, name), b"1", STORAGE)
    assert list_names(place, STORAGE) == ["a.txt", "b", "c.txt"]
    assert list_names(join(place, "b"), STORAGE) == ["x", "y"]
    assert list_names(join(place, "nothing"), STORAGE) == []


def test_exists_tells_files_and_folders_from_nothing(place: str) -> None:
    assert not exists(place, STORAGE)
    write_bytes(join(place, "a/b"), b"1", STORAGE)
    assert exists(place, STORAGE) and exists(join(place, "a"), STORAGE) and exists(join(place, "a/b"), STORAGE)
    assert not exists(join(place, "a/bc"), STORAGE)


def test_delete_is_recursive_and_leaves_the_rest(place: str) -> None:
    for name in ("keep/x", "drop/x", "drop/deep/y", "one"):
        write_bytes(join(place, name), b"1", STORAGE)
    delete(join(place, "drop"), STORAGE)
    delete(join(place, "one"), STORAGE)
    delete(join(place, "never-there"), STORAGE)
    assert list_names(place, STORAGE) == ["keep"]
    assert list_names(join(place, "keep"), STORAGE) == ["x"]


def test_missing_file_is_a_missing_error(place: str) -> None:
    write_bytes(join(place, "there"), b"1", STORAGE)
    with pytest.raises(MissingError, match="absent") as caught:
        read_bytes(join(place, "absent"), STORAGE)
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, StorageError)


def test_staged_file_appears_whole_or_not_at_all(place: str) -> None:
    uri = join(place, "big")
    content = os.urandom(1 << 20) * 20  # more than one part of a multipart upload
    with staged(uri, STORAGE) as path:
        path.write_bytes(content)
        assert not exists(uri, STORAGE)
    assert read_bytes(uri, STORAGE) == content
    with pytest.raises(ValueError, match="stop"), staged(uri, STORAGE) as path:
        path.write_bytes(b"half")
        raise ValueError("stop")
    assert read_bytes(uri, STORAGE) == content
    assert list_names(place, STORAGE) == ["big"]
    assert not path.exists()


def test_both_kinds_of_filesystem_see_the_same(place: str) -> None:
    uri = join(place, "x/data.bin")
    write_bytes(uri, b"0123456789", STORAGE)
    filesystem, path = fsspec_filesystem(uri, STORAGE)
    assert filesystem.cat_file(path, start=2, end=5) == b"234"
    arrow, key = arrow_filesystem(uri, STORAGE)
    with arrow.open_input_file(key) as file:
        assert file.read_at(3, 2) == b"234"
    filesystem.pipe_file(path, b"changed")
    assert read_bytes(uri, STORAGE) == b"changed"
    folder = path.rsplit("/", 1)[0]
    assert len(filesystem.ls(folder)) == 1
    write_bytes(join(place, "x/more.bin"), b"1", STORAGE)
    assert len(filesystem.ls(folder)) == 2, "a listing was remembered"


def test_filesystems_are_not_shared() -> None:
    assert fsspec_filesystem("x", STORAGE)[0] is not fsspec_filesystem("x", STORAGE)[0]
    assert fsspec_filesystem("s3://b/k", STORAGE)[0] is not fsspec_filesystem("s3://b/k", STORAGE)[0]


@pytest.mark.parametrize(
    "parts, expected",
    [
        (("s3://b/k", "x", "y/z"), "s3://b/k/x/y/z"),
        (("s3://b/", "/x/"), "s3://b/x"),
        (("folder", ""), "folder"),
        (("/", "x"), "/x"),
        (("", "x"), "x"),
        (("file:///data", "x"), "file:///data/x"),
    ],
)
def test_join(parts: tuple[str, ...], expected: str) -> None:
    assert join(*parts) == expected


def test_local_uris_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_bytes("~/deep/x", b"1", STORAGE)
    assert read_bytes(f"file://{tmp_path}/deep/x", STORAGE) == read_bytes("deep/x", STORAGE) == b"1"
    write_bytes("./s3:/b", b"2", STORAGE)
    assert (tmp_path / "s3:" / "b").read_bytes() == b"2" and not is_remote("C:/x")
    assert not is_remote("~/deep") and not is_remote("file:///x") and is_remote("s3://b/k")


@pytest.mark.parametrize(
    "uri, word",
    [
        ("gs://b/k", "gs"),
        ("http://b/k", "http"),
        ("", "empty"),
        ("s3://", "bucket"),
        ("s3:///k", "bucket"),
        ("s3:/b/k", "two slashes; write s3://b/k, or ./s3:/b/k"),
        ("file:/b/k", "write file:///b/k,"),
    ],
)
def test_addresses_that_mean_nothing_are_explained(uri: str, word: str) -> None:
    with pytest.raises(StorageError, match=word):
        read_bytes(uri, STORAGE)


def test_a_disk_or_bucket_is_never_deleted_whole() -> None:
    for uri in ("/", "s3://bucket", "s3://bucket/"):
        with pytest.raises(StorageError, match="refusing"):
            delete(uri, STORAGE)


def test_a_file_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file/below"):
        write_bytes(str(tmp_path / "file" / "below"), b"1", STORAGE)


Operation = Callable[[str, StorageConfig], object]
OPERATIONS: list[Operation] = [
    lambda uri, storage: read_bytes(uri, storage),
    lambda uri, storage: write_bytes(uri, b"x", storage),
    lambda uri, storage: exists(uri, storage),
    lambda uri, storage: list_names(uri, storage),
    lambda uri, storage: delete(uri, storage),
]


@pytest.mark.integration
@pytest.mark.parametrize("operation", OPERATIONS)
def test_missing_bucket(s3: S3Server, operation: Operation) -> None:
    with pytest.raises(StorageError, match="no bucket 'no-such-bucket'.*create it") as caught:
        operation("s3://no-such-bucket/key", STORAGE)
    assert not isinstance(caught.value, MissingError)
    assert s3.endpoint in str(caught.value)


@pytest.mark.integration
@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch, operation: Operation) -> None:
    uri = f"s3://{s3.bucket}/key"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageError, match="refused access.*check AWS_ACCESS_KEY_ID") as caught:
        operation(uri, STORAGE)
    assert s3.bucket in str(caught.value) and "not-the-secret" not in str(caught.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="refused access.*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        operation(uri, STORAGE)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unreachable_endpoint(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    storage = StorageConfig(endpoint=f"http://127.0.0.1:{free_ports(1)[0]}", attempts=1)
    with pytest.raises(StorageError, match="did not answer.*storage.endpoint"):
        operation("s3://bucket/key", storage)


def test_endpoint_that_never_answers_takes_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        storage = StorageConfig(endpoint=endpoint, attempts=1, request_timeout_s=1)
        began = time.monotonic()
        with pytest.raises(StorageError, match="did not answer"):
            read_bytes("s3://bucket/key", storage)
        assert time.monotonic() - began < 10


def test_endpoint_without_scheme_is_explained() -> None:
    with pytest.raises(StorageError, match="http://host:port"):
        read_bytes("s3://bucket/key", StorageConfig(endpoint="localhost:9000"))


def test_environment_fills_what_the_config_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert endpoint_of(STORAGE) is None and region_of(STORAGE) is None and mlflow_environment(STORAGE) == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one:1")
    assert endpoint_of(STORAGE) == "http://one:1" and region_of(STORAGE) == "us-east-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two:2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert endpoint_of(STORAGE) == "http://two:2" and region_of(STORAGE) == "eu-west-1"
    chosen = StorageConfig(endpoint="http://three:3", region="ap-south-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert mlflow_environment(chosen) == {
        "MLFLOW_S3_ENDPOINT_URL": "http://three:3",
        "AWS_DEFAULT_REGION": "ap-south-1",
    }


@pytest.mark.integration
def test_parquet_reads_through_the_filesystem(s3: S3Server, tmp_path: Path) -> None:
    uri = f"s3://{s3.bucket}/tables/t.parquet"
    with staged(uri, STORAGE) as path:
        pq.write_table(pa.table({"x": list(range(1000))}), path)
    filesystem, key = arrow_filesystem(uri, STORAGE)
    assert pq.read_table(key, filesystem=filesystem).column("x").to_pylist() == list(range(1000))


def test_a_store_that_is_away_is_waited_for_and_no_longer_than_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage_module, "RETRY_S", 0.05)
    answers = iter([UnavailableError("away"), UnavailableError("still away"), None])

    def reading() -> str:
        if (error := next(answers)) is not None:
            raise error
        return "content"

    assert patiently(reading, "reading x", StorageConfig(total_timeout_s=60)) == "content"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "reading x: waiting for the store, 60 s at most (away)" and len(printed) == 2

    def away() -> None:
        raise UnavailableError("away for good")

    began = time.monotonic()
    with pytest.raises(UnavailableError, match="away for good"):
        patiently(away, "reading x", StorageConfig(total_timeout_s=0.2))
    assert 0.2 <= time.monotonic() - began < 5


def test_what_will_not_pass_is_not_waited_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        patiently(lambda: read_bytes(str(tmp_path / "absent"), STORAGE), "reading", STORAGE)
    assert capsys.readouterr().out == ""
