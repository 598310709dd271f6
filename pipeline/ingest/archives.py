"""Pictures in zip and tar archives, a single tar or a WebDataset of many, read member by member."""

import io
import re
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
from tqdm import tqdm

from pipeline.data.picture import PictureError
from pipeline.ingest.listing import Listing, is_picture, listing
from pipeline.ingest.threads import Recent, concurrently
from pipeline.storage import (
    MissingError,
    StorageConfig,
    StorageError,
    arrow_filesystem,
    explained,
    is_remote,
    join,
)

COMPRESSED_TARS = (
    *(f".tar.{suffix}" for suffix in ("gz", "bz2", "xz", "zst", "lz4", "lzma", "z")),
    *(".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".tlz"),
)
ZIP_BUFFER_BYTES = 1 << 20
# Headers lie one member apart: on disk only they are read; from S3 a request costs more than the bytes between.
LOCAL_BUFFER_BYTES = 16 << 10
REMOTE_BUFFER_BYTES = 4 << 20
SCAN_THREADS = 8
TARS_OPEN = 8
"""Reading goes forward, and the threads of a process are never more than a few tars apart."""
BLOCK = 512


def compressed(name: str) -> bool:
    """Whether it is a tar that cannot be read at any place."""
    return name.lower().endswith(COMPRESSED_TARS)


# ---- zip -----------------------------------------------------------------------------------------


def list_zip(uri: str, storage: StorageConfig) -> Listing:
    """By the archive's directory, in the order of names. Raises StorageError if it is damaged."""
    with explained(uri, storage), _open_zip(uri, storage) as archive:
        members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    return listing(uri, "zip", {name: f"{members[name].file_size} {members[name].CRC:08x}" for name in sorted(members)})


class ZipPictures:
    """Members of a zip archive, each checked by the CRC that the archive holds."""

    def __init__(self, uri: str, storage: StorageConfig) -> None:
        self._uri, self._storage = uri, storage
        self._lock = threading.Lock()
        with explained(uri, storage):
            self._archive = _open_zip(uri, storage)

    def read(self, name: str) -> bytes:
        """One member. Raises PictureError if it is damaged or encrypted, MissingError if there is none."""
        with self._lock, explained(f"{self._uri} ({name})", self._storage):
            try:
                return self._archive.read(name)
            except KeyError:
                raise _vanished(self._uri, name) from None
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
                raise PictureError(f"cannot be unpacked ({error})") from error

    def close(self) -> None:
        """Close the archive."""
        self._archive.close()


def _open_zip(uri: str, storage: StorageConfig) -> zipfile.ZipFile:
    filesystem, path = arrow_filesystem(uri, storage)
    buffered = io.BufferedReader(filesystem.open_input_file(path), ZIP_BUFFER_BYTES)
    try:
        return zipfile.ZipFile(buffered)
    except zipfile.BadZipFile as error:
        raise StorageError(f"{uri}: not a readable zip archive ({error}); pack or copy it again") from error


# ---- tar -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A file in a tar; the bytes of one that has none of its own (a link, a sparse file) lie nowhere."""

    name: str
    offset: int | None
    size: int


def list_tar(uri: str, storage: StorageConfig, size: int) -> Listing:
    """By the headers of its members, in their order; of members of one name the last counts, as for `tar x`."""
    with tqdm(total=size, desc="list tar", unit="B", unit_scale=True, disable=None) as bar:
        sizes, others = _sizes(_headers(uri, storage, bar.update))
    return listing(uri, "tar", sizes, others=others)


def list_webdataset(uri: str, storage: StorageConfig, tars: Mapping[str, int], others: Iterable[str]) -> Listing:
    """`tars` are names and bytes of the archives below the URI; the samples go through them in that order."""
    for name in tars:
        if any(part.lower().endswith(".tar") for part in PurePosixPath(name).parent.parts):
            raise StorageError(f"{join(uri, name)}: lies in a folder that is named like a tar; rename that folder")

    with tqdm(total=sum(tars.values()), desc="list tars", unit="B", unit_scale=True, disable=None) as bar:

        def headers(tar: str) -> tuple[dict[str, int], list[str]]:
            return _sizes(_headers(join(uri, tar), storage, bar.update))

        sizes: dict[str, int] = {}
        ignored = sorted(others)
        for tar, (inside, links) in zip(tars, concurrently(headers, tars, SCAN_THREADS), strict=True):
            sizes |= {f"{tar}/{name}": size for name, size in inside.items()}
            ignored += [f"{tar}/{name}" for name in links]
    return listing(uri, "webdataset", sizes, others=ignored)


@dataclass(frozen=True)
class _OpenTar:
    file: pa.NativeFile
    places: dict[str, tuple[int, int]]
    """Offset and size of each picture."""


class WebDatasetPictures:
    """Members of the tars below a folder; each tar's headers are read on its first use."""

    def __init__(self, uri: str, storage: StorageConfig) -> None:
        self._uri, self._storage = uri, storage
        self._tars: Recent[str, _OpenTar] = Recent(self._open, TARS_OPEN)

    def read(self, name: str) -> bytes:
        """One member by the tar's name and its own. Raises StorageError for a damaged tar."""
        if not (parts := re.match(r"(.*?\.tar)/(.+)", name, re.IGNORECASE | re.DOTALL)):
            raise _vanished(self._uri, name)
        return self._read(join(self._uri, parts[1]), parts[2])

    def close(self) -> None:
        """Forget the tars; their files close as the last reader leaves them."""
        self._tars.clear()

    def _read(self, tar_uri: str, name: str) -> bytes:
        with explained(f"{tar_uri} ({name})", self._storage):
            tar = self._tars.get(tar_uri)
            if name not in tar.places:
                raise _vanished(tar_uri, name)
            offset, size = tar.places[name]
            data = tar.file.read_at(size, offset)  # several threads may, since no position is moved
        if len(data) != size:
            raise StorageError(f"{tar_uri}: ends within {name!r}; copy or pack it again")
        return data

    def _open(self, tar_uri: str) -> _OpenTar:
        members = _headers(tar_uri, self._storage)
        places = {
            one.name: (one.offset, one.size) for one in members if one.offset is not None and is_picture(one.name)
        }
        filesystem, path = arrow_filesystem(tar_uri, self._storage)
        return _OpenTar(filesystem.open_input_file(path), places)


class TarPictures(WebDatasetPictures):
    """Members of one tar; its headers are read on first use."""

    def read(self, name: str) -> bytes:
        """One member. Raises StorageError for a damaged tar."""
        return self._read(self._uri, name)


def _sizes(members: Iterable[Member]) -> tuple[dict[str, int], list[str]]:
    """Sizes of the members with bytes in the order of the tar, and the names of the others."""
    sizes: dict[str, int] = {}
    others = []
    for member in members:
        if member.offset is None:
            others.append(member.name)
        else:
            sizes.pop(member.name, None)  # a member that comes again takes its last place
            sizes[member.name] = member.size
    return sizes, others


def _headers(
    uri: str, storage: StorageConfig, advance: Callable[[int], object] = lambda count: None
) -> Iterator[Member]:
    """All files in a tar, in their order; `advance` is told of the bytes passed. StorageError if it is damaged."""
    buffer_bytes = REMOTE_BUFFER_BYTES if is_remote(uri) else LOCAL_BUFFER_BYTES
    with explained(uri, storage):
        filesystem, path = arrow_filesystem(uri, storage)
        with filesystem.open_input_file(path) as raw, io.BufferedReader(raw, buffer_bytes) as file:
            try:
                yield from _scan(uri, file, raw.size(), advance)
            except tarfile.TarError as error:
                raise StorageError(
                    f"{uri}: not a readable tar ({error}); copy it again, or pack it again without compression"
                ) from error


def _scan(uri: str, file: io.BufferedReader, size: int, advance: Callable[[int], object]) -> Iterator[Member]:
    archive = tarfile.TarFile(fileobj=file)
    passed = 0
    while member := archive.next():
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
        if archive.offset > size:
            raise StorageError(f"{uri}: ends within {member.name!r} at byte {size}; copy or pack it again")
        advance(archive.offset - passed)
        passed = archive.offset
        name = str(PurePosixPath(member.name))  # without ./
        if member.isreg() and not member.issparse():
            yield Member(name, member.offset_data, member.size)
        elif not member.isdir():
            yield Member(name, None, 0)
    # The end is a block of zeros. tarfile takes any header that it cannot read for the end, too.
    file.seek(archive.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        what = "is cut off" if archive.offset + BLOCK > size else "is damaged"
        raise StorageError(f"{uri}: {what} at byte {archive.offset} of {size}; copy or pack it again")


def _vanished(uri: str, name: str) -> MissingError:
    return MissingError(f"{uri}: has no member {name!r} any more; it was changed while it was read, run the job again")
