"""Pictures in Parquet files, in Hugging Face's convention: a column `image` of struct<bytes, path>, or binary."""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pyarrow import types
from tqdm import tqdm

from pipeline.data.picture import PictureError
from pipeline.ingest.listing import Listing, fingerprint, is_hidden, no_pictures
from pipeline.ingest.threads import Recent, concurrently
from pipeline.storage import MissingError, StorageConfig, StorageError, arrow_filesystem, explained, join

COLUMN = "image"
FOOTER_THREADS = 16
FILES_OPEN = 8
ROW_GROUPS_HELD = 2
"""Reading goes forward; at the border of two row groups the threads of a process need both."""
FOOTER_END_BYTES = 8
"""A Parquet file ends with the footer, its length and a magic word."""
BATCH_ROWS = 256
"""Rows decoded into one array: Arrow cannot hold more than 2 GiB of binary in one."""


def list_parquet(
    uri: str, storage: StorageConfig, files: Mapping[str, int], others: Iterable[str] = (), *, is_file: bool = False
) -> Listing:
    """Every row of the files, in their order; `files` are names and bytes. Only footers are read.

    `is_file` says that the URI is the one file itself. The fingerprint covers the files' names, sizes and
    footers. Raises StorageError for a damaged file and for one without a column of pictures.
    """

    def footer(name: str) -> tuple[int, str]:
        place = uri if is_file else join(uri, name)
        with explained(place, storage):
            opened = _open(place, storage)
            length = opened.parquet.metadata.serialized_size
            content = opened.file.read_at(length, files[name] - FOOTER_END_BYTES - length)
            return opened.starts[-1], hashlib.sha256(content).hexdigest()

    found = concurrently(footer, files, FOOTER_THREADS)
    bar = tqdm(found, "list tables", len(files), unit=" files", disable=None)
    footers = dict(zip(files, bar, strict=True))
    names = tuple(f"{name}#{row}" for name, (rows, _) in footers.items() for row in range(rows))
    ignored = tuple(sorted(name for name in others if not is_hidden(name)))
    if not names:
        raise no_pictures(uri, (*files, *ignored))
    known = ((name, f"{files[name]} {content}") for name, (_, content) in footers.items())
    return Listing(uri, "parquet", names, ignored, fingerprint(known))


@dataclass(frozen=True)
class _OpenTable:
    file: pa.NativeFile
    parquet: pq.ParquetFile
    columns: tuple[str, ...]
    """Leaf columns to read: bytes, and the path to explain where there are none."""
    starts: list[int]
    """First row of each row group, and the number of rows."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class ParquetPictures:
    """Rows of one Parquet file or of the files below a folder; a few row groups are held in memory."""

    def __init__(self, uri: str, storage: StorageConfig) -> None:
        self._uri, self._storage = uri, storage
        with explained(uri, storage):
            filesystem, path = arrow_filesystem(uri, storage)
            self._is_file = filesystem.get_file_info(path).type == pafs.FileType.File
        self._tables: Recent[str, _OpenTable] = Recent(lambda place: _open(place, storage), FILES_OPEN)
        self._groups: Recent[tuple[str, int], pa.ChunkedArray] = Recent(self._read_group, ROW_GROUPS_HELD)

    def read(self, name: str) -> bytes:
        """The bytes of row R by the name FILE#R. Raises PictureError if the row holds none."""
        file, _, row_text = name.rpartition("#")
        place = self._uri if self._is_file else join(self._uri, file)
        with explained(place, self._storage):
            starts = self._tables.get(place).starts
        row = int(row_text) if row_text.isdecimal() else -1
        if not 0 <= row < starts[-1]:
            raise MissingError(
                f"{place}: has no row {row_text!r} (rows: {starts[-1]}); it was changed while it was read, run the job "
                f"again"
            )
        group = bisect_right(starts, row) - 1
        return _picture(self._groups.get((place, group))[row - starts[group]].as_py())

    def close(self) -> None:
        """Forget files and row groups; files close as the last reader leaves them."""
        self._groups.clear()
        self._tables.clear()

    def _read_group(self, key: tuple[str, int]) -> pa.ChunkedArray:
        place, group = key
        with explained(f"{place} (row group {group})", self._storage):
            table = self._tables.get(place)
            with table.lock:
                batches = table.parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(table.columns))
                return pa.chunked_array([batch.column(0) for batch in batches])


def _picture(value: bytes | dict[str, bytes | str | None] | None) -> bytes:
    """The bytes in one cell of the column."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(content, bytes):
        return content
    if path is not None:
        raise PictureError(
            f"has no bytes, only the path {path!r}: this data set stores paths; write it again with its pictures inside"
        )
    raise PictureError("is empty: the row holds neither bytes nor a path")


def _open(place: str, storage: StorageConfig) -> _OpenTable:
    filesystem, path = arrow_filesystem(place, storage)
    file = filesystem.open_input_file(path)
    try:
        # Only what is asked for is fetched, each row group in one piece.
        parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
    except pa.ArrowInvalid as error:
        raise StorageError(f"{place}: not a readable Parquet file ({error}); write or copy it again") from error
    rows = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
    return _OpenTable(file, parquet, _leaves(parquet.schema_arrow, place), [0, *accumulate(rows)])


def _leaves(schema: pa.Schema, place: str) -> tuple[str, ...]:
    """The leaf columns of the pictures: of `image`, or of the only column that looks like one."""
    if COLUMN in schema.names and _is_binary(schema.field(COLUMN).type):
        return (COLUMN,)
    structs = [one for one in schema if types.is_struct(one.type) and _has_bytes(one.type)]
    chosen = [one for one in structs if one.name == COLUMN] or structs
    if len(chosen) != 1:
        columns = ", ".join(f"{one.name}: {one.type}" for one in schema) or "none"
        raise StorageError(
            f"{place}: has {'no' if not chosen else 'more than one'} column of pictures; expected `{COLUMN}` as "
            f"struct<bytes: binary, path: string> or binary, found {columns}; rename the column"
        )
    (column,) = chosen
    inside = [one.name for one in column.type]
    return tuple(f"{column.name}.{name}" for name in ("bytes", "path") if name in inside)


def _has_bytes(struct: pa.StructType) -> bool:
    index = struct.get_field_index("bytes")
    return index >= 0 and _is_binary(struct.field(index).type)


def _is_binary(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
