"""Reads a whole data set again and compares it with its manifest: files, row groups, footers, headers of pictures."""

import contextlib
import io
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from pipeline.data.manifest import FOOTERS_NAME, DataError, Manifest, Shard, read_footers, read_manifest
from pipeline.data.picture import READABLE
from pipeline.ingest.shards import inspect_shard, merge_footers
from pipeline.storage import StorageConfig, arrow_filesystem, explained, is_remote, join

COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Verified:
    """What was checked, and everything that is wrong."""

    files: int
    row_groups: int
    pictures: int
    """Whose header was read."""
    bytes: int
    digest: str
    problems: tuple[str, ...]
    """In the order of the data set; each names the place."""


def verify(uri: str, storage: StorageConfig, threads: int = 4, progress: bool = True) -> Verified:
    """Check the data set at `uri`. threads: shards read at once; those on S3 are copied to a local disk meanwhile.

    Raises DataError for a manifest that cannot be used at all, StorageError for a store that fails.
    """
    manifest = read_manifest(uri, storage)
    bar = tqdm(desc="verify", total=manifest.samples, unit=" pictures", disable=None if progress else True)
    lock = threading.Lock()

    def tick(count: int) -> None:
        with lock:
            bar.update(count)

    with bar, ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        checked = list(pool.map(lambda shard: _check_shard(shard, manifest, uri, storage, tick), manifest.shards))
    problems = [problem for shard in checked for problem in shard.problems]
    footers = [shard.footer for shard in checked if shard.footer is not None]
    problems += _check_footers(manifest, footers, uri, storage)
    return Verified(
        files=len(manifest.shards) + 2,
        row_groups=len(manifest.row_groups),
        pictures=sum(shard.pictures for shard in checked),
        bytes=sum(shard.bytes for shard in manifest.shards),
        digest=manifest.digest,
        problems=tuple(problems),
    )


@dataclass(frozen=True)
class _Checked:
    problems: list[str]
    footer: bytes | None
    pictures: int


def _check_shard(
    shard: Shard, manifest: Manifest, uri: str, storage: StorageConfig, tick: Callable[[int], None]
) -> _Checked:
    place = join(uri, shard.file)
    try:
        with _as_local(place, storage) as path:
            return _check_file(path, place, shard, manifest, tick)
    except FileNotFoundError:
        return _Checked([f"{place}: missing"], None, 0)


def _check_file(path: Path, place: str, shard: Shard, manifest: Manifest, tick: Callable[[int], None]) -> _Checked:
    size = path.stat().st_size
    problems = [] if size == shard.bytes else [f"{place}: has {size} bytes, the manifest says {shard.bytes}"]
    try:
        found, footer = inspect_shard(path, shard.file)
    except (pa.ArrowException, OSError) as error:  # Arrow says OSError of a footer that makes no sense
        return _Checked([*problems, f"{place}: its footer cannot be read ({error})"], None, 0)
    if len(found.row_groups) != len(shard.row_groups):
        count = len(shard.row_groups)
        problems.append(f"{place}: has {len(found.row_groups)} row groups, the manifest says {count}")
    inside = len(problems)
    for there, stated in zip(found.row_groups, shard.row_groups, strict=False):
        where = f"{place}, row group {stated.index}"
        if there.rows != stated.rows:
            problems.append(f"{where}: has {there.rows} rows, the manifest says {stated.rows}")
        if (there.offset, there.bytes) != (stated.offset, stated.bytes):
            problems.append(f"{where}: lies elsewhere in the file than the manifest says")
        if there.sha256 != stated.sha256:
            problems.append(f"{where}: damaged (its hash differs from the manifest's)")
    if found.sha256 != shard.sha256 and len(problems) == inside:
        problems.append(f"{place}: damaged outside of its row groups (the file's hash differs from the manifest's)")
    looked_at = 0
    with pq.ParquetFile(path) as file:
        for index in range(len(found.row_groups)):
            where = f"{place}, row group {index}"
            try:
                table = file.read_row_group(index)
                problems += (f"{where}, {problem}" for problem in _check_pictures(table, manifest))
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                problems.append(f"{where}: cannot be read as Parquet ({error})")
                continue
            looked_at += table.num_rows
            tick(table.num_rows)
    return _Checked(problems, footer, looked_at)


def _check_pictures(table: pa.Table, manifest: Manifest) -> Iterator[str]:
    """Problems of single rows. Only headers are read: what the bytes are is the hash's business."""
    images = table.column("image").combine_chunks()
    encoded, paths = images.field("bytes"), images.field("path")
    widths, heights = table.column("width").to_pylist(), table.column("height").to_pylist()
    stated = (manifest.width, manifest.height)
    for row in range(table.num_rows):
        name = f"row {row} ({paths[row].as_py()!r})"
        if (widths[row], heights[row]) != stated:
            yield f"{name}: its columns say {widths[row]}x{heights[row]}, the manifest {stated[0]}x{stated[1]}"
        try:
            with Image.open(io.BytesIO(encoded[row].as_buffer()), formats=READABLE) as picture:
                size = picture.size
        except Exception as error:  # Pillow's plugins raise nearly any kind on damaged input
            yield f"{name}: its header cannot be read as JPEG, PNG or WebP ({type(error).__name__})"
            continue
        if size != stated:
            yield f"{name}: is {size[0]}x{size[1]}, the manifest says {stated[0]}x{stated[1]}"


def _check_footers(manifest: Manifest, footers: list[bytes], uri: str, storage: StorageConfig) -> list[str]:
    """`_metadata` has to be right by its hash, and to be what the shards' footers give."""
    try:
        read_footers(manifest, uri, storage)
    except DataError as error:
        return [str(error)]
    if len(footers) == len(manifest.shards) and merge_footers(footers)[1] != manifest.footers:
        return [f"{join(uri, FOOTERS_NAME)}: differs from the footers of the shards"]
    return []


@contextlib.contextmanager
def _as_local(place: str, storage: StorageConfig) -> Iterator[Path]:
    """A local file as it is, one on S3 as a copy that goes with the block. Raises FileNotFoundError, StorageError."""
    with explained(place, storage):
        filesystem, path = arrow_filesystem(place, storage)
    if not is_remote(place):
        if not Path(path).is_file():
            raise FileNotFoundError(path)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        copy = Path(folder, "shard.parquet")
        with explained(place, storage), filesystem.open_input_file(path) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
        yield copy
