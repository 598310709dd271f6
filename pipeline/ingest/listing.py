"""What a source of pictures is, whatever it is stored in: names, a fingerprint, and a way to read one."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Protocol

from pipeline.storage import MissingError, StorageError

Kind = Literal["folder", "zip", "tar", "webdataset", "lmdb", "parquet", "picture"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
EXPECTED = (
    f"pictures ({', '.join(SUFFIXES)}) in a folder, a .zip or a .tar, a folder of .tar files (WebDataset), a folder "
    f"with data.mdb (LSUN's LMDB), or .parquet files with a column `image` of bytes and path"
)


@dataclass(frozen=True)
class Listing:
    """What lies at a source. Made once; every process that reads from it gets names out of it."""

    uri: str
    kind: Kind
    names: tuple[str, ...]
    """Of the pictures, in the order of the samples; unique. Relative to the source, with `/` between folders."""
    ignored: tuple[str, ...]
    """Visible files or members that are no pictures."""
    fingerprint: str
    """Hash of names and sizes: tells another source from the same one without reading a picture."""
    single: bool = False
    """The source is one picture, not a collection."""


class Pictures(Protocol):
    """Encoded pictures by the names of a `Listing`. Several threads may read at once."""

    def read(self, name: str) -> bytes:
        """The file's own bytes. Raises StorageError, and PictureError for one damaged member."""

    def close(self) -> None:
        """Give back files and temporary copies; nothing is read afterwards."""


def listing(
    uri: str, kind: Kind, sizes: Mapping[str, object], *, others: Iterable[str] = (), single: bool = False
) -> Listing:
    """The pictures among `sizes` (name to size, in the order of the samples) by their suffix.

    `others` are names that hold no bytes of their own (links). Raises StorageError where no picture is left.
    """
    visible = [name for name in sizes if not is_hidden(name)]
    names = tuple(name for name in visible if is_picture(name))
    ignored = (*(name for name in visible if not is_picture(name)), *(name for name in others if not is_hidden(name)))
    if not names:
        raise no_pictures(uri, ignored)
    return Listing(uri, kind, names, ignored, fingerprint((name, sizes[name]) for name in names), single)


def fingerprint(parts: Iterable[tuple[str, object]]) -> str:
    """SHA-256 (hex) of names and what is known of each without reading it."""
    digest = hashlib.sha256()
    for name, known in parts:
        digest.update(f"{name}\0{known}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def no_pictures(uri: str, found: Iterable[str]) -> StorageError:
    """The error that says what is there instead."""
    files = sorted(found)
    if not files:
        return MissingError(f"{uri}: is empty; expected {EXPECTED}; set ingest.source")
    first = ", ".join(repr(name) for name in files[:3])
    return StorageError(
        f"{uri}: holds no pictures, but {len(files)} other files (first {first}); expected {EXPECTED}; set "
        f"ingest.source"
    )


def printable(name: str) -> str:
    """The name as valid Unicode: archives hold names in other encodings, whose bytes Python keeps as surrogates."""
    return name.encode(errors="backslashreplace").decode()


def is_picture(name: str) -> bool:
    """By its suffix."""
    return name.lower().endswith(SUFFIXES)


def is_hidden(name: str) -> bool:
    """Thumbnails and resource forks that desktop systems leave behind are nobody's pictures."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
