"""Samples to Parquet shards laid out for reading: uncompressed, small row groups, no statistics on bytes."""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import Footers, RowGroup, Shard, parse_footers
from pipeline.ingest.listing import printable
from pipeline.storage import StorageConfig, explained, join, staged

HASH_BYTES = 8 << 20


@dataclass(frozen=True)
class Sample:
    """An encoded picture and where it came from, relative to the source."""

    path: str
    encoded: bytes


def file_name(prefix: str, part: int, index: int) -> str:
    """Of the index-th shard of a part of the ingest."""
    return f"{prefix}-{part:05d}-{index:02d}.parquet"


def shard_schema() -> pa.Schema:
    """The columns, with the metadata by which Hugging Face's `datasets` decodes `image`."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": image, "width": pa.int32(), "height": pa.int32()}
    features: dict[str, dict[str, str]] = {"image": {"_type": "Image"}}
    features |= {name: {"dtype": str(kind), "_type": "Value"} for name, kind in columns.items() if name != "image"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(list(columns.items()), metadata=metadata)


@dataclass
class ShardWriter:
    """Takes samples in order, and stores a shard whenever one is full. Holds one row group in memory.

    Use as a context manager: the last shard is stored on leaving without an error, and dropped otherwise.
    """

    uri: str
    storage: StorageConfig
    size: int
    row_group_bytes: int
    row_group_rows: int
    shard_bytes: int
    part: int = 0
    """Number of the part of the ingest that the shards are named after."""
    prefix: str = "shard"
    """What their names begin with."""
    shards: list[Shard] = field(default_factory=list)
    footers: list[bytes] = field(default_factory=list)
    """Of each shard, as `merge_footers` takes them."""
    samples: int = 0
    _rows: list[Sample] = field(default_factory=list)
    _row_bytes: int = 0
    _file_bytes: int = 0
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _path: Path | None = None
    _writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._write_row_group()
            self._finish_shard()

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        full = self._row_bytes + len(sample.encoded) > self.row_group_bytes
        if self._rows and (full or len(self._rows) == self.row_group_rows):
            self._write_row_group()
        self._rows.append(sample)
        self._row_bytes += len(sample.encoded)
        self.samples += 1

    def _write_row_group(self) -> None:
        if not self._rows:
            return
        if self._file_bytes and self._file_bytes + self._row_bytes > self.shard_bytes:
            self._finish_shard()
        with explained(self._target(), self.storage):
            self._open_shard().write_table(self._table(), row_group_size=len(self._rows))
        self._file_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0

    def _table(self) -> pa.Table:
        count = len(self._rows)
        columns = {
            "image": [{"bytes": row.encoded, "path": printable(row.path)} for row in self._rows],
            "width": [self.size] * count,
            "height": [self.size] * count,
        }
        return pa.table(columns, schema=shard_schema())

    def _name(self) -> str:
        return file_name(self.prefix, self.part, len(self.shards))

    def _target(self) -> str:
        return join(self.uri, self._name())

    def _open_shard(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._path = self._stack.enter_context(staged(self._target(), self.storage))
            self._writer = self._stack.enter_context(
                pq.ParquetWriter(
                    self._path,
                    shard_schema(),
                    compression="none",
                    use_dictionary=False,
                    write_statistics=False,
                )
            )
        return self._writer

    def _finish_shard(self) -> None:
        if self._writer is None or self._path is None:
            return
        with explained(self._target(), self.storage):
            self._writer.close()
            shard, footer = inspect_shard(self._path, self._name())
        self._stack.close()  # stores the file under its name
        self.shards.append(shard)
        self.footers.append(footer)
        self._writer, self._path, self._file_bytes = None, None, 0


def inspect_shard(path: Path, name: str) -> tuple[Shard, bytes]:
    """What lies in a local Parquet file: row groups and hashes, and its footer for `merge_footers`.

    name: of the shard in its data set. Raises pa.ArrowException or OSError where the footer is damaged.
    """
    metadata = pq.read_metadata(path)
    groups = []
    with path.open("rb") as file:
        for index in range(metadata.num_row_groups):
            offset, length = region(metadata.row_group(index))
            file.seek(offset)
            sha256 = hashlib.sha256(file.read(length)).hexdigest()
            groups.append(RowGroup(name, index, metadata.row_group(index).num_rows, offset, length, sha256))
        file.seek(0)
        whole = hashlib.sha256()
        for block in _blocks(file):
            whole.update(block)
    metadata.set_file_path(name)
    return Shard(name, path.stat().st_size, whole.hexdigest(), tuple(groups)), _as_file(metadata)


def region(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """Offset and length of the bytes of all columns of a row group (written without dictionaries)."""
    columns = [group.column(index) for index in range(group.num_columns)]
    start = min(column.data_page_offset for column in columns)
    end = max(column.data_page_offset + column.total_compressed_size for column in columns)
    return start, end - start


def merge_footers(footers: Sequence[bytes]) -> tuple[bytes, Footers]:
    """Parquet's summary file (`_metadata`) of shards, in their order, and what the manifest says of it."""
    merged = parse_footers(footers[0])
    for data in footers[1:]:
        merged.append_row_groups(parse_footers(data))
    summary = _as_file(merged)
    return summary, Footers(len(summary), hashlib.sha256(summary).hexdigest())


def _as_file(metadata: pq.FileMetaData) -> bytes:
    buffer = io.BytesIO()
    metadata.write_metadata_file(buffer)
    return buffer.getvalue()


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(HASH_BYTES):
        yield block
