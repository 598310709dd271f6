"""Where pictures come from: a nested folder, a zip archive, or single files, on disk or on S3."""

import hashlib
import io
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from pipeline.data.picture import PictureError
from pipeline.storage import MissingError, StorageConfig, StorageError, arrow_filesystem, explained, join

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """Pictures by name. `read` may be called from several threads."""

    names: tuple[str, ...]
    """Sorted, relative to the source, with `/` between folders."""
    ignored: tuple[str, ...]
    """Files that are no pictures by their suffix."""
    fingerprint: str
    """Hash of names and sizes: tells another source from the same one without reading it."""
    single: bool
    """The source is one picture, not a collection."""
    read: Callable[[str], bytes]
    """Raises StorageError, and PictureError for a damaged archive member."""


def open_source(uri: str, storage: StorageConfig) -> Source:
    """List the pictures of a folder, a zip archive or a single picture. Raises StorageError."""
    with explained(uri, storage):
        filesystem, path = arrow_filesystem(uri, storage)
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            return _folder(uri, filesystem, path, storage)
        if kind == pafs.FileType.File and PurePosixPath(path).suffix.lower() == ".zip":
            return _archive(uri, filesystem, path, storage)
        if kind == pafs.FileType.File and _is_picture(path):
            return _single(uri, filesystem, path, storage)
    if kind == pafs.FileType.File:
        kinds = ", ".join(SUFFIXES)
        raise StorageError(f"{uri}: neither a folder, a .zip archive nor a picture ({kinds}); set ingest.source")
    raise MissingError(f"{uri}: there is nothing to ingest here; set ingest.source to a folder, zip or picture")


def _folder(uri: str, filesystem: pafs.FileSystem, root: str, storage: StorageConfig) -> Source:
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    sizes = {info.path[len(root) :].lstrip("/"): info.size for info in found if info.type == pafs.FileType.File}

    def read(name: str) -> bytes:
        with explained(join(uri, name), storage):
            return _read(filesystem, f"{root}/{name}")

    return _collection(sizes, read)


def _single(uri: str, filesystem: pafs.FileSystem, path: str, storage: StorageConfig) -> Source:
    name = PurePosixPath(path).name
    size = filesystem.get_file_info(path).size

    def read(name: str) -> bytes:
        with explained(uri, storage):
            return _read(filesystem, path)

    return _collection({name: size}, read, single=True)


def _archive(uri: str, filesystem: pafs.FileSystem, path: str, storage: StorageConfig) -> Source:
    raw = filesystem.open_input_file(path)
    try:
        archive = zipfile.ZipFile(io.BufferedReader(raw, READ_BUFFER_BYTES))
    except zipfile.BadZipFile as error:
        raise StorageError(f"{uri}: not a readable zip archive ({error}); pack or copy it again") from error
    members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    sizes: dict[str, int | str] = {name: f"{info.file_size} {info.CRC:08x}" for name, info in members.items()}
    lock = threading.Lock()

    def read(name: str) -> bytes:
        with lock, explained(f"{uri} ({name})", storage):
            try:
                return archive.read(members[name])
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise PictureError(f"cannot be unpacked ({error})") from error

    return _collection(sizes, read)


def _collection(sizes: dict[str, int | str], read: Callable[[str], bytes], single: bool = False) -> Source:
    visible = sorted(name for name in sizes if not _is_hidden(name))
    names = tuple(name for name in visible if _is_picture(name))
    text = "".join(f"{name}\0{sizes[name]}\n" for name in names)
    return Source(
        names=names,
        ignored=tuple(name for name in visible if not _is_picture(name)),
        fingerprint=hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest(),
        single=single,
        read=read,
    )


def _read(filesystem: pafs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_file(path) as file:
        return file.read()


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _is_hidden(name: str) -> bool:
    """Thumbnails and resource forks that desktop systems leave behind are nobody's pictures."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
