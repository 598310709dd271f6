"""One way to reach files: a URI and a `StorageConfig` become an Arrow or an fsspec filesystem.

URIs are local paths (`~` is expanded), `file://` and `s3://bucket/key`. Filesystems are built anew by every
call, so nothing is shared between processes and credentials that were renewed in the environment take effect.
Every failure is a `StorageError` that names the place, the cause and what to do about it.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import Field

from pipeline.schema import Section
from pipeline.storage_errors import MissingError as MissingError
from pipeline.storage_errors import StorageError as StorageError
from pipeline.storage_errors import UnavailableError as UnavailableError
from pipeline.storage_errors import explain_local, explain_remote

COPY_BYTES = 8 << 20
RETRY_S = 2.0
Result = TypeVar("Result")


class StorageConfig(Section):
    """How to reach S3. Credentials come from the environment or the instance's role, never from a config."""

    endpoint: str | None = None
    """URL of an S3 service other than AWS, `http://host:port`; falls back to AWS_ENDPOINT_URL."""
    region: str | None = None
    """Falls back to AWS_REGION, then AWS_DEFAULT_REGION."""
    anonymous: bool = False
    """Read public buckets without credentials."""
    attempts: int = Field(5, ge=1)
    """Tries of one request, with growing pauses; 5 bridge an outage of about 10 seconds."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """Seconds to wait for a connection."""
    request_timeout_s: float = Field(60.0, gt=0)
    """Seconds to wait for an answer on an open connection, and for each next piece of it."""
    total_timeout_s: float = Field(300.0, gt=0)
    """Seconds until training gives up on a store that fails for now: reads of training data, the start and the last
    checkpoint are tried again until then."""


def is_remote(uri: str) -> bool:
    """Whether the URI is on S3 rather than on this machine. Raises StorageError for unknown schemes and for `s3:/`."""
    if one_slash := re.match(r"([a-z][a-z0-9]+):/(?!/)", uri):
        fixed = uri.replace(":/", ":///" if one_slash[1] == "file" else "://", 1)
        raise StorageError(f"{uri}: an address has two slashes; write {fixed}, or ./{uri} for a folder of that name")
    scheme = uri.split("://", 1)[0] if "://" in uri else ""
    if scheme not in ("", "file", "s3"):
        raise StorageError(f"{uri}: storage of kind {scheme!r} is not supported; use a local path, file:// or s3://")
    return scheme == "s3"


def join(uri: str, *parts: str) -> str:
    """The URI of something below another: `join("s3://b/k", "x", "y")` is `s3://b/k/x/y`."""
    rest = "/".join(part.strip("/") for part in parts if part)
    if not uri or not rest:
        return uri or rest
    return f"{uri.rstrip('/')}/{rest}"


def endpoint_of(storage: StorageConfig) -> str | None:
    """The S3 service's URL, or None for AWS itself."""
    environ = os.environ
    return storage.endpoint or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None


def region_of(storage: StorageConfig) -> str | None:
    """The region to ask for. A service of one's own gets AWS's default: looking one up costs time."""
    named = storage.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return named or ("us-east-1" if endpoint_of(storage) else None)


def arrow_filesystem(uri: str, storage: StorageConfig) -> tuple[pafs.FileSystem, str]:
    """An Arrow filesystem and the path in it. Threads may share it; other processes build their own."""
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(_local_path(uri))
    options: dict[str, Any] = {}
    if endpoint := endpoint_of(storage):
        options["scheme"], options["endpoint_override"] = _split_endpoint(endpoint)
    filesystem = pafs.S3FileSystem(
        anonymous=storage.anonymous,
        region=region_of(storage),
        connect_timeout=storage.connect_timeout_s,
        request_timeout=storage.request_timeout_s,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=storage.attempts),
        allow_delayed_open=True,  # a small object is one PUT, not a multipart upload
        **options,
    )
    return filesystem, _s3_path(uri)


def fsspec_filesystem(
    uri: str, storage: StorageConfig, *, attempts: int | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """An fsspec filesystem and the path in it; never one that another process or an earlier call has used.

    attempts: instead of storage.attempts, for callers that retry by themselves.
    """
    if not is_remote(uri):
        return fsspec.filesystem("file", skip_instance_cache=True), str(_local_path(uri))
    region = region_of(storage)
    filesystem = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        anon=storage.anonymous,
        endpoint_url=endpoint_of(storage),
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": storage.connect_timeout_s,
            "read_timeout": storage.request_timeout_s,
            # Both for signed addresses, which botocore would sign in an old way and for no region's own host.
            "signature_version": "s3v4",
            **({} if endpoint_of(storage) else {"s3": {"addressing_style": "virtual"}}),
            "retries": {"total_max_attempts": attempts or storage.attempts, "mode": "standard"},
        },
    )
    return filesystem, _s3_path(uri)


def read_bytes(uri: str, storage: StorageConfig) -> bytes:
    """Everything stored under the URI. Raises MissingError where there is nothing."""
    with explained(uri, storage):
        filesystem, path = arrow_filesystem(uri, storage)
        with filesystem.open_input_file(path) as file:
            return file.read()


def write_bytes(uri: str, data: bytes | memoryview, storage: StorageConfig) -> None:
    """Store the bytes whole or not at all: readers see the old content or the new, never a part."""
    size = memoryview(data).nbytes
    if not is_remote(uri):
        with staged(uri, storage) as path, explained(uri, storage, size):
            try:
                path.write_bytes(data)
            except OSError:
                path.unlink(missing_ok=True)  # its room counts as free, as the next try will find it
                raise
        return
    with explained(uri, storage):
        filesystem, key = arrow_filesystem(uri, storage)
        with filesystem.open_output_stream(key) as stream:
            stream.write(data)


@contextlib.contextmanager
def staged(uri: str, storage: StorageConfig) -> Iterator[Path]:
    """A local path to write a large file to; it appears under the URI, whole, if the block succeeds."""
    if is_remote(uri):
        with tempfile.TemporaryDirectory(prefix="staged-") as folder:
            path = Path(folder, "file")
            yield path
            with explained(uri, storage):
                _upload(path, uri, storage)
        return
    target = _local_path(uri)
    path = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with explained(uri, storage):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield path
        with explained(uri, storage):
            _flush(path)
            os.replace(path, target)
            _flush(target.parent)
    finally:
        path.unlink(missing_ok=True)


def exists(uri: str, storage: StorageConfig) -> bool:
    """Whether a file, or a folder with something in it, is stored under the URI."""
    with explained(uri, storage):
        filesystem, path = arrow_filesystem(uri, storage)
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            return True
        _check_bucket(filesystem, path)
        return False


def list_names(uri: str, storage: StorageConfig) -> list[str]:
    """Sorted names of the files and folders directly below the URI; [] where there is nothing."""
    with explained(uri, storage):
        filesystem, path = arrow_filesystem(uri, storage)
        children = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        if not children:
            _check_bucket(filesystem, path)
        return sorted(child.base_name for child in children)


def delete(uri: str, storage: StorageConfig) -> None:
    """Remove a file, or a folder and all below it; nothing happens where there is nothing."""
    with explained(uri, storage):
        filesystem, path = arrow_filesystem(uri, storage)
        if len(Path(path).parts) < 2:
            raise StorageError(f"{uri}: refusing to delete a whole bucket or disk; name a folder in it")
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)
        else:
            _check_bucket(filesystem, path)


def mlflow_environment(storage: StorageConfig) -> dict[str, str]:
    """Environment variables that let MLflow's client reach the same S3; secrets are there already."""
    environment = {}
    if endpoint := endpoint_of(storage):
        environment["MLFLOW_S3_ENDPOINT_URL"] = endpoint
    if region := region_of(storage):
        environment["AWS_DEFAULT_REGION"] = region
    return environment


@contextlib.contextmanager
def explained(uri: str, storage: StorageConfig, size: int | None = None) -> Iterator[None]:
    """Turns the errors of filesystems inside the block into StorageErrors about `uri`.

    size: bytes that the block writes, for the message where a disk is full.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise _explain(error, uri, storage, size) from error


def patiently(action: Callable[[], Result], doing: str, storage: StorageConfig) -> Result:
    """What the action returns; while the store is unavailable it is tried again, for storage.total_timeout_s."""
    deadline = time.monotonic() + storage.total_timeout_s
    while True:
        try:
            return action()
        except UnavailableError as cause:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            print(f"{doing}: waiting for the store, {left:.0f} s at most ({cause})", flush=True)
            time.sleep(min(RETRY_S, left))


def _explain(error: Exception, uri: str, storage: StorageConfig, size: int | None = None) -> StorageError:
    if not is_remote(uri):
        return explain_local(error, uri, _local_path(uri), size)
    bucket, endpoint, attempts = urlsplit(uri).netloc, endpoint_of(storage), storage.attempts
    found = explain_remote(error, uri, bucket, endpoint, attempts)
    if isinstance(found, MissingError):
        filesystem, path = arrow_filesystem(uri, storage)
        try:
            _check_bucket(filesystem, path)
        except OSError as cause:
            return explain_remote(cause, uri, bucket, endpoint, attempts)
    return found


def _check_bucket(filesystem: pafs.FileSystem, path: str) -> None:
    """Called where a path was not found: an error if it is the bucket itself that is missing."""
    if isinstance(filesystem, pafs.S3FileSystem):
        bucket = path.split("/", 1)[0]
        if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
            raise OSError(f"NO_SUCH_BUCKET: {bucket}")


def _local_path(uri: str) -> Path:
    path = uri.removeprefix("file://")
    if not path:
        raise StorageError("an empty path was given; name a local path, file:// or s3://bucket/key")
    return Path(os.path.abspath(os.path.expanduser(path)))


def _s3_path(uri: str) -> str:
    path = uri.removeprefix("s3://").strip("/")
    if not path or uri.startswith("s3:///"):
        raise StorageError(f"{uri}: names no bucket; write s3://bucket/key")
    return path


def _split_endpoint(endpoint: str) -> tuple[str, str]:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise StorageError(f"storage.endpoint is {endpoint!r}; expected http://host:port or https://host:port")
    return parts.scheme, parts.netloc


def _upload(path: Path, uri: str, storage: StorageConfig) -> None:
    filesystem, key = arrow_filesystem(uri, storage)
    with path.open("rb") as source, filesystem.open_output_stream(key) as stream:
        shutil.copyfileobj(source, stream, COPY_BYTES)


def _flush(path: Path) -> None:
    """Forces a file, or a folder's entries, to the disk, so that a name never outlives its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
