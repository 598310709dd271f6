"""What a data set is: its row groups, their hashes and one digest; written last and read first.

A folder of shards without a manifest is an ingest that did not finish. With it, every worker plans its reads
without listing anything, and damage is found before a picture is decoded.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import MissingError, StorageConfig, join, read_bytes, write_bytes

NAME = "manifest.json"
FOOTERS_NAME = "_metadata"
VERSION = 2
REPLACE = "run jobs.ingest again with ingest.overwrite=true"
THRIFT_LIMIT = 2**31 - 1  # of elements and bytes; the defaults guard against strangers' files, this one is hashed


class DataError(RuntimeError):
    """A data set that is absent, unfinished or damaged; the message names the part and the fix."""


@dataclass(frozen=True)
class RowGroup:
    """The unit of reading and of shuffling."""

    file: str
    index: int
    """Position in its file."""
    rows: int
    offset: int
    """Of its first byte in the file; all its columns follow without a gap."""
    bytes: int
    sha256: str
    """Of those bytes."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    file: str
    bytes: int
    sha256: str
    row_groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


@dataclass(frozen=True)
class Footers:
    """The file `_metadata`: Parquet's own summary of all shards, so that no reader asks for their footers."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """An immutable data set of pictures of one size. Sample i is the i-th row over all shards in order."""

    height: int
    width: int
    shards: tuple[Shard, ...]
    parameters: dict[str, Any]
    """The settings of the ingest that decide what is stored."""
    source: str
    """Fingerprint of the names and sizes of the source's files."""
    footers: Footers

    @cached_property
    def row_groups(self) -> tuple[RowGroup, ...]:
        return tuple(group for shard in self.shards for group in shard.row_groups)

    @cached_property
    def samples(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the content: picture size and every row group's rows and hash, in order.

        Independent of where the data set lies, how its row groups are dealt to files, and who made it when.
        """
        groups = [[group.rows, group.sha256] for group in self.row_groups]
        content = {"version": VERSION, "height": self.height, "width": self.width, "row_groups": groups}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(manifest: Manifest, uri: str, storage: StorageConfig) -> None:
    """Store it: from this moment on the data set exists."""
    content = {
        "version": VERSION,
        "digest": manifest.digest,
        "height": manifest.height,
        "width": manifest.width,
        "samples": manifest.samples,
        "parameters": manifest.parameters,
        "source": manifest.source,
        "footers": {"bytes": manifest.footers.bytes, "sha256": manifest.footers.sha256},
        "shards": [shard_to_dict(shard) for shard in manifest.shards],
    }
    content["sha256"] = _hash_of(content)
    write_bytes(join(uri, NAME), json.dumps(content, indent=1).encode(), storage)


def read_manifest(uri: str, storage: StorageConfig) -> Manifest:
    """Read and check it. Raises DataError if it is absent or damaged, StorageError where S3 fails."""
    if not uri:
        raise DataError("data.uri is not set; name the folder or s3:// address that jobs.ingest writes to")
    place = join(uri, NAME)
    try:
        text = read_bytes(place, storage)
    except MissingError as error:
        raise DataError(
            f"no {NAME} at {uri}: the ingest did not finish or data.uri is wrong; run jobs.ingest again or "
            f"correct data.uri"
        ) from error
    try:
        content = json.loads(text)
        version = content["version"]
        if version != VERSION:
            raise DataError(f"{place}: has version {version}, this code reads {VERSION}; {REPLACE}")
        manifest = Manifest(
            height=content["height"],
            width=content["width"],
            shards=tuple(shard_from_dict(shard) for shard in content["shards"]),
            parameters=content["parameters"],
            source=content["source"],
            footers=Footers(content["footers"]["bytes"], content["footers"]["sha256"]),
        )
        stated, whole = content["digest"], content["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: damaged ({error!r}); restore it or {REPLACE}") from error
    if stated != manifest.digest:
        raise DataError(f"{place}: its digest does not match its content; restore it or {REPLACE}")
    if whole != _hash_of(content):  # what the digest leaves out: settings, source, places in files
        raise DataError(f"{place}: damaged (its hash differs from its content's); restore it or {REPLACE}")
    if manifest.samples == 0:
        raise DataError(f"{place}: the data set has no samples; {REPLACE}")
    return manifest


def _hash_of(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of everything in the manifest's file except this hash, however it is laid out."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_footers(manifest: Manifest, uri: str, storage: StorageConfig) -> pq.FileMetaData:
    """The footers of all shards as one: its row group k is the data set's row group k, at its place in its shard.

    Raises DataError if `_metadata` is absent or is not what the manifest says, StorageError where S3 fails.
    """
    place = join(uri, FOOTERS_NAME)
    try:
        data = read_bytes(place, storage)
    except MissingError as error:
        raise DataError(f"{place}: missing, though the manifest names it; restore it or {REPLACE}") from error
    return check_footers(manifest, uri, data)


def check_footers(manifest: Manifest, uri: str, data: bytes) -> pq.FileMetaData:
    """What `read_footers` gives, from the bytes of `_metadata`. Raises DataError if the manifest says otherwise."""
    place, wanted = join(uri, FOOTERS_NAME), manifest.footers
    if len(data) != wanted.bytes:
        kind = "truncated" if len(data) < wanted.bytes else "changed"
        raise DataError(
            f"{place}: {kind} ({len(data)} bytes, the manifest says {wanted.bytes}); restore it or {REPLACE}"
        )
    if hashlib.sha256(data).hexdigest() != wanted.sha256:
        raise DataError(f"{place}: damaged (its hash differs from the manifest's); restore it or {REPLACE}")
    try:
        footers = parse_footers(data)
    except (pa.ArrowException, OSError) as error:  # right by its hash: nothing that this pyarrow reads
        raise DataError(f"{place}: cannot be read as Parquet ({error}); {REPLACE}") from error
    if footers.num_row_groups != len(manifest.row_groups):
        count = len(manifest.row_groups)
        raise DataError(f"{place}: has {footers.num_row_groups} row groups, the manifest {count}; {REPLACE}")
    return footers


def parse_footers(data: bytes) -> pq.FileMetaData:
    """A Parquet footer, or a summary of many, from the bytes of its file. Raises pa.ArrowException, OSError."""
    limits = {"thrift_string_size_limit": THRIFT_LIMIT, "thrift_container_size_limit": THRIFT_LIMIT}
    with pq.ParquetFile(io.BytesIO(data), **limits) as file:
        return file.metadata


def shard_to_dict(shard: Shard) -> dict[str, Any]:
    """For JSON."""
    groups = [
        {"rows": group.rows, "offset": group.offset, "bytes": group.bytes, "sha256": group.sha256}
        for group in shard.row_groups
    ]
    whole = {"file": shard.file, "bytes": shard.bytes, "rows": shard.rows, "sha256": shard.sha256}
    return {**whole, "row_groups": groups}


def shard_from_dict(content: dict[str, Any]) -> Shard:
    """Raises KeyError and TypeError for what is no shard's."""
    groups = tuple(
        RowGroup(content["file"], index, group["rows"], group["offset"], group["bytes"], group["sha256"])
        for index, group in enumerate(content["row_groups"])
    )
    return Shard(content["file"], content["bytes"], content["sha256"], groups)
