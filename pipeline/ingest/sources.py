"""Where pictures come from: folders, archives, databases and tables, on disk or on S3.

`list_source` finds out what lies at a URI, once; `open_pictures` then reads by name, in as many processes and
threads as there are, without listing again.
"""

from collections.abc import Iterable
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from pipeline.data.manifest import NAME as MANIFEST
from pipeline.ingest.archives import (
    COMPRESSED_TARS,
    TarPictures,
    WebDatasetPictures,
    ZipPictures,
    compressed,
    list_tar,
    list_webdataset,
    list_zip,
)
from pipeline.ingest.databases import DATA_FILE, LmdbPictures, list_lmdb
from pipeline.ingest.listing import EXPECTED, is_hidden, is_picture, listing, no_pictures
from pipeline.ingest.listing import Kind as Kind
from pipeline.ingest.listing import Listing as Listing
from pipeline.ingest.listing import Pictures as Pictures
from pipeline.ingest.place import is_manifest
from pipeline.ingest.tables import ParquetPictures, list_parquet
from pipeline.storage import (
    MissingError,
    StorageConfig,
    StorageError,
    arrow_filesystem,
    exists,
    explained,
    join,
    read_bytes,
)

FILE_KINDS: dict[str, Kind] = {".zip": "zip", ".tar": "tar", ".parquet": "parquet"}


def list_source(uri: str, storage: StorageConfig) -> Listing:
    """What lies at the URI. Reads no pictures; archives and tables are asked for their headers.

    A folder is what its files say: data.mdb makes it an LMDB, else pictures a folder, else .parquet and then
    .tar files a collection of those. A folder with manifest.json and .parquet files is a data set of ours.
    Finished data sets of ours in folders below are no part of it. Raises MissingError where nothing is, StorageError
    for anything else than pictures and for damage.
    """
    try:
        with explained(uri, storage):
            filesystem, path = arrow_filesystem(uri, storage)
            info = filesystem.get_file_info(path)
            if info.type == pafs.FileType.Directory:
                return _list_folder(uri, storage, filesystem, path)
            if info.type == pafs.FileType.File:
                return _list_file(uri, storage, PurePosixPath(path).name, info.size)
            exists(uri, storage)  # raises where the bucket itself is what is missing
    except UnicodeError as error:
        name = getattr(error, "object", "")
        raise StorageError(f"{uri}: the name {name!r} in it is not UTF-8; rename that file, or pack it anew") from error
    raise MissingError(f"{uri}: there is nothing to ingest here; set ingest.source to {EXPECTED}")


def open_pictures(uri: str, kind: Kind, storage: StorageConfig) -> Pictures:
    """The pictures of a source that was listed, for this process alone. Raises StorageError."""
    match kind:
        case "folder":
            return FolderPictures(uri, storage)
        case "picture":
            return SinglePicture(uri, storage)
        case "zip":
            return ZipPictures(uri, storage)
        case "tar":
            return TarPictures(uri, storage)
        case "webdataset":
            return WebDatasetPictures(uri, storage)
        case "lmdb":
            return LmdbPictures(uri, storage)
        case "parquet":
            return ParquetPictures(uri, storage)


class FolderPictures:
    """Files below a folder."""

    def __init__(self, uri: str, storage: StorageConfig) -> None:
        self._uri, self._storage = uri, storage
        self._filesystem, self._root = arrow_filesystem(uri, storage)

    def read(self, name: str) -> bytes:
        """A whole file. Raises MissingError if it went away since it was listed."""
        with explained(join(self._uri, name), self._storage):
            with self._filesystem.open_input_file(f"{self._root}/{name}") as file:
                return file.read()

    def close(self) -> None:
        """Nothing is held open."""


class SinglePicture:
    """One file, whatever name is asked for."""

    def __init__(self, uri: str, storage: StorageConfig) -> None:
        self._uri, self._storage = uri, storage

    def read(self, name: str) -> bytes:
        """The whole file."""
        return read_bytes(self._uri, self._storage)

    def close(self) -> None:
        """Nothing is held open."""


def _list_file(uri: str, storage: StorageConfig, name: str, size: int) -> Listing:
    if compressed(name):
        raise StorageError(f"{uri}: a compressed tar cannot be read at any place; uncompress it to a .tar first")
    if is_picture(name):
        return listing(uri, "picture", {name: size}, single=True)
    match FILE_KINDS.get(PurePosixPath(name).suffix.lower()):
        case "zip":
            return list_zip(uri, storage)
        case "tar":
            return list_tar(uri, storage, size)
        case "parquet":
            return list_parquet(uri, storage, {name: size}, is_file=True)
    if name == DATA_FILE:
        raise StorageError(f"{uri}: is part of an LMDB; name its folder as ingest.source")
    raise StorageError(f"{uri}: is a file of no known kind; expected {EXPECTED}; set ingest.source")


def _list_folder(uri: str, storage: StorageConfig, filesystem: pafs.FileSystem, root: str) -> Listing:
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    files = {info.path[len(root) :].lstrip("/"): info.size for info in found if info.type == pafs.FileType.File}
    sizes = {name: files[name] for name in sorted(files) if not is_hidden(name)}
    if within := _data_sets(uri, storage, sizes):
        sizes = {name: size for name, size in sizes.items() if not name.startswith(within)}
        if not sizes:
            raise StorageError(
                f"{uri}: holds nothing but finished data sets in folders ({len(within)}, first {within[0]!r}); set "
                f"ingest.source to one of those, or to {EXPECTED}"
            )
    if DATA_FILE in sizes:
        return list_lmdb(uri, storage)
    tables = _with_suffix(sizes, (".parquet",))
    if any(map(is_picture, sizes)) and not (MANIFEST in sizes and tables):
        return listing(uri, "folder", sizes)
    if tables:
        return list_parquet(uri, storage, tables, others=sizes.keys() - tables.keys())
    if packed := _with_suffix(sizes, COMPRESSED_TARS):
        raise StorageError(
            f"{uri}: {min(packed)!r} is compressed ({len(packed)} such files), so its members cannot be read at "
            f"any place; uncompress it to a .tar first"
        )
    if tars := _with_suffix(sizes, (".tar",)):
        return list_webdataset(uri, storage, tars, others=sizes.keys() - tars.keys())
    raise no_pictures(uri, sizes)


def _data_sets(uri: str, storage: StorageConfig, names: Iterable[str]) -> tuple[str, ...]:
    """The folders below, each with a `/` at its end, that are finished data sets of ours."""
    shards = {name.rpartition("/")[0] for name in names if name.endswith(".parquet")}
    folders = {folder for folder, _, last in (name.rpartition("/") for name in names) if folder and last == MANIFEST}
    found = sorted(folders & shards)
    return tuple(f"{one}/" for one in found if is_manifest(read_bytes(join(uri, one, MANIFEST), storage)))


def _with_suffix(sizes: dict[str, int], suffixes: tuple[str, ...]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name.lower().endswith(suffixes)}
