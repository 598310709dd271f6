"""What a data set is: its row groups, their hashes and one digest; written last and read first.

A folder of shards without a manifest is an ingest that did not finish. With it, every worker plans its reads
without listing anything, and damage is found before a picture is decoded.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.storage import MissingError, StorageConfig, join, read_bytes, write_bytes

NAME = "manifest.json"
VERSION = 1


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
class Manifest:
    """An immutable data set of pictures of one size. Sample i is the i-th row over all shards in order."""

    height: int
    width: int
    shards: tuple[Shard, ...]
    parameters: dict[str, Any]
    """The settings of the ingest that decide what is stored."""
    source: str
    """Fingerprint of the names and sizes of the source's files."""

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
    shards = []
    for shard in manifest.shards:
        groups = [
            {"rows": group.rows, "offset": group.offset, "bytes": group.bytes, "sha256": group.sha256}
            for group in shard.row_groups
        ]
        shards.append(
            {
                "file": shard.file,
                "bytes": shard.bytes,
                "rows": shard.rows,
                "sha256": shard.sha256,
                "row_groups": groups,
            }
        )
    content = {
        "version": VERSION,
        "digest": manifest.digest,
        "height": manifest.height,
        "width": manifest.width,
        "samples": manifest.samples,
        "parameters": manifest.parameters,
        "source": manifest.source,
        "shards": shards,
    }
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
            raise DataError(f"{place}: has version {version}, this code reads {VERSION}; run jobs.ingest again")
        manifest = Manifest(
            height=content["height"],
            width=content["width"],
            shards=tuple(_shard(shard) for shard in content["shards"]),
            parameters=content["parameters"],
            source=content["source"],
        )
        stated = content["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: damaged ({error!r}); restore it or run jobs.ingest again") from error
    if stated != manifest.digest:
        raise DataError(f"{place}: its digest does not match its content; restore it or run jobs.ingest again")
    if manifest.samples == 0:
        raise DataError(f"{place}: the data set has no samples; run jobs.ingest with other settings")
    return manifest


def _shard(content: dict[str, Any]) -> Shard:
    groups = tuple(
        RowGroup(content["file"], index, group["rows"], group["offset"], group["bytes"], group["sha256"])
        for index, group in enumerate(content["row_groups"])
    )
    return Shard(content["file"], content["bytes"], content["sha256"], groups)
