"""A remote file as a local one, for readers that map files into memory: one copy for all processes of a machine."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
from tqdm import tqdm

from pipeline.ingest.threads import concurrently
from pipeline.storage import MissingError, StorageConfig, StorageError, arrow_filesystem, endpoint_of, explained

PIECE_BYTES = 8 << 20
THREADS = 8


@contextlib.contextmanager
def local_copy(uri: str, storage: StorageConfig) -> Iterator[Path]:
    """A local folder that holds the file under its own name, as long as the block lasts.

    Whoever comes first copies, others wait, and the last one to leave removes it. Locks end with their process,
    so that a killed one leaves at most a copy that the next user takes over. Raises StorageError.
    """
    with explained(uri, storage):
        filesystem, path = arrow_filesystem(uri, storage)
        info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise MissingError(f"{uri}: there is no such file; check the URI")
        identity = f"{endpoint_of(storage)}\0{uri}\0{info.size}\0{info.mtime_ns}"
        folder = _own_folder() / hashlib.sha256(identity.encode()).hexdigest()[:32]
        target, lock = folder / info.base_name, folder.with_suffix(".lock")
        while True:
            held = _opened(lock)
            try:
                # Users hold the lock together; only who copies or removes holds it alone.
                fcntl.flock(held, fcntl.LOCK_SH)
                if _is_current(held, lock) and not target.exists():
                    fcntl.flock(held, fcntl.LOCK_EX)
                    if _is_current(held, lock):
                        _fill(target, uri, filesystem, path, info.size)
                    fcntl.flock(held, fcntl.LOCK_SH)
                # Between two locks another process may have come, and gone as the last one.
                if _is_current(held, lock) and target.exists():
                    break
            except BaseException:
                os.close(held)
                raise
            os.close(held)
    try:
        yield folder
    finally:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(held, lock):
                shutil.rmtree(folder)
                lock.unlink()
        os.close(held)


def _own_folder() -> Path:
    """Nobody else may put files into it."""
    folder = Path(tempfile.gettempdir(), f"picture-copies-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StorageError(f"{folder}: belongs to somebody else; remove it or set TMPDIR to another folder")
    return folder


def _opened(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _is_current(held: int, lock: Path) -> bool:
    """Whether the locked file is still the one under the name, not one that was removed while waiting."""
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(held).st_ino == lock.stat().st_ino
    return False


def _fill(target: Path, uri: str, filesystem: pafs.FileSystem, path: str, size: int) -> None:
    """Make the copy if it is not there, whole or not at all."""
    if target.exists():
        return
    shutil.rmtree(target.parent, ignore_errors=True)  # what a killed process left
    target.parent.mkdir(mode=0o700)
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise StorageError(
            f"{uri}: a local copy needs {size:,} bytes in {tempfile.gettempdir()}, where {free:,} are free; set "
            f"TMPDIR to a larger disk"
        )
    partial = target.with_name(f"{target.name}.partial")
    with (
        filesystem.open_input_file(path) as source,
        partial.open("wb") as file,
        tqdm(total=size, desc=f"copy {uri}", unit="B", unit_scale=True, disable=None) as bar,
    ):

        def copy(offset: int) -> None:
            data = source.read_at(min(PIECE_BYTES, size - offset), offset)
            os.pwrite(file.fileno(), data, offset)
            bar.update(len(data))

        for _ in concurrently(copy, range(0, size, PIECE_BYTES), THREADS):
            pass
    os.replace(partial, target)
