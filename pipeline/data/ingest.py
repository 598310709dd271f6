"""Pictures to a data set: Parquet shards and a manifest, the same bytes for any number of workers.

The manifest is written last. Whatever stops an ingest before leaves nothing that a reader would take for a
data set, and running it again starts over.
"""

import contextlib
import dataclasses
import functools
import json
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from tqdm import tqdm

from pipeline.data import picture
from pipeline.data.manifest import NAME, DataError, Manifest, read_manifest, write_manifest
from pipeline.data.shards import Sample, ShardWriter
from pipeline.data.sources import Source, open_source
from pipeline.schema import Section
from pipeline.storage import StorageConfig, delete, exists, join, list_names, write_bytes

REPORT_NAME = "ingest-report.json"
LEFTOVER = re.compile(r"\.?shard-\d{5,}\.parquet(\.partial-\d+)?")


class TileConfig(Section):
    """Cuts each source picture into squares, each a sample of its own."""

    size: int = Field(64, ge=8)
    """Side of a tile in pixels of the source; tiles are resized to ingest.size where that is smaller."""
    stride: int = Field(32, ge=1)
    """Step from tile to tile; below `size`, tiles overlap."""
    minimum_deviation: float = Field(12.0, ge=0)
    """Tiles with less standard deviation (grey levels, averaged over channels) are left out: ocean, sky."""
    latitude: float = Field(65.0, gt=0, le=90)
    """Takes what lies between these degrees north and south of an equirectangular picture; 90 takes all."""


class IngestConfig(Section):
    """Which pictures become samples, and in what form."""

    source: str | None = None
    """A nested folder, a zip archive or (with `tile`) one large picture, local or s3://; JPEG, PNG, WebP."""
    size: int = Field(256, ge=8)
    """Side of the stored pictures in pixels."""
    format: picture.Format = "keep"
    """"keep" stores the source's own bytes where nothing has to change, and PNG otherwise."""
    quality: int = Field(95, ge=1, le=100)
    """Of JPEG; chroma is never subsampled."""
    filter: picture.Filter = "lanczos"
    """For resizing. Published FFHQ 256 numbers need "box"."""
    crop: picture.Crop = "center"
    """Pictures that are not square lose their margins."""
    tile: TileConfig | None = None
    """Cut large pictures into tiles instead of shrinking them."""
    upscale: bool = False
    """Enlarge pictures smaller than `size`; otherwise they are skipped and reported."""
    workers: int = Field(4, ge=1)
    """Threads. The result does not depend on it."""
    strict: bool = False
    """Fail at the first picture that cannot be used, instead of skipping and reporting it."""
    row_group_bytes: int = Field(16 << 20, gt=0)
    """Most picture bytes in a row group, the unit of one read; a single larger picture gets its own."""
    row_group_rows: int = Field(512, gt=0)
    """Most pictures in a row group."""
    shard_bytes: int = Field(256 << 20, gt=0)
    """Most picture bytes in one file; 64 to 512 MB read well from S3."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many samples."""
    overwrite: bool = False
    """Replace a finished data set that was made from something else or with other settings."""

    @model_validator(mode="after")
    def _tiles_fill_samples(self) -> Self:
        if self.tile and self.tile.size < self.size and not self.upscale:
            raise ValueError(
                f"ingest.tile.size {self.tile.size} is smaller than ingest.size {self.size}; make the tiles "
                f"larger, ingest.size smaller, or set ingest.upscale=true"
            )
        return self


STORED_AS = ("size", "format", "quality", "filter", "crop", "tile", "upscale", "limit")
LAID_OUT_AS = ("row_group_bytes", "row_group_rows", "shard_bytes")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A source picture that could not be used, and why."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class IngestReport:
    """What an ingest did; stored beside the manifest."""

    uri: str
    digest: str
    samples: int
    shards: int
    bytes: int
    skipped: tuple[Skipped, ...]
    ignored: tuple[str, ...]
    """Files in the source that are no pictures by their suffix."""
    flat_tiles: int
    """Tiles left out by `minimum_deviation`."""
    seconds: float
    already_done: bool = False
    """The data set was there, made from the same source with the same settings; nothing was written."""


Outcome = Sample | Skipped | None
"""None is a tile without content."""


def ingest(config: IngestConfig, uri: str, storage: StorageConfig, progress: bool = True) -> IngestReport:
    """Make the data set at `uri` (local or s3://) from `config.source`.

    Raises DataError for a source without usable pictures, for a picture that `strict` does not forgive and
    for a finished data set that would be replaced; StorageError for places that cannot be read or written.
    """
    started = time.monotonic()
    if not config.source:
        raise DataError("ingest.source is not set; name a folder, a zip archive or a picture to cut into tiles")
    if not uri:
        raise DataError("data.uri is not set; name the folder or s3:// address to write the data set to")
    source = open_source(config.source, storage)
    _check_source(source, config)
    if done := _finished(config, source, uri, storage):
        return done
    _clear(uri, storage)
    skipped: list[Skipped] = []
    flat_tiles = 0
    layout = config.row_group_bytes, config.row_group_rows, config.shard_bytes
    total = len(source.names) if config.tile is None else None
    with (
        ShardWriter(uri, storage, config.size, *layout) as writer,
        contextlib.closing(_ordered(_tasks(source, config), config.workers)) as outcomes,
        tqdm(outcomes, "ingest", total, unit=" pictures", disable=None if progress else True) as bar,
    ):
        for outcome in bar:
            if isinstance(outcome, Sample):
                writer.add(outcome)
                if writer.samples == config.limit:
                    break
            elif outcome is None:
                flat_tiles += 1
            elif config.strict:
                raise DataError(f"{config.source}: {outcome.path} {outcome.reason} (ingest.strict is set)")
            else:
                skipped.append(outcome)
        if not writer.samples:
            raise DataError(_nothing(config.source, skipped, flat_tiles))
    manifest = Manifest(config.size, config.size, tuple(writer.shards), _parameters(config), source.fingerprint)
    report = IngestReport(
        uri=uri,
        digest=manifest.digest,
        samples=manifest.samples,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        skipped=tuple(skipped),
        ignored=source.ignored,
        flat_tiles=flat_tiles,
        seconds=round(time.monotonic() - started, 3),
    )
    write_bytes(join(uri, REPORT_NAME), json.dumps(dataclasses.asdict(report), indent=1).encode(), storage)
    write_manifest(manifest, uri, storage)
    return report


def _tasks(source: Source, config: IngestConfig) -> Iterator[Callable[[], Outcome]]:
    """All tasks, in the order of the samples. Large pictures are decoded here, once; workers cut them."""
    for name in source.names:
        if config.tile is None:
            yield functools.partial(_whole, source, name, config)
            continue
        try:
            pixels_HWC = _open_large(source.read(name))
        except picture.PictureError as error:
            yield functools.partial(Skipped, name, str(error))
            continue
        height, width = pixels_HWC.shape[:2]
        corners = picture.tile_corners(width, height, config.tile.size, config.tile.stride, config.tile.latitude)
        if not corners:
            reason = f"is {width}x{height}, too small for one tile of {config.tile.size} pixels"
            yield functools.partial(Skipped, name, reason)
        for x, y in corners:
            yield functools.partial(_tile, pixels_HWC, name, x, y, config.tile, config)


def _whole(source: Source, name: str, config: IngestConfig) -> Outcome:
    try:
        encoded = picture.fit_bytes(
            source.read(name), config.size, config.format, config.quality, config.filter, config.upscale
        )
    except picture.PictureError as error:
        return Skipped(name, str(error))
    return Sample(name, encoded)


def _open_large(encoded: bytes) -> np.ndarray:
    """Pixels of a picture that is meant to be large: Pillow's guard against such is lifted."""
    guard, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return np.asarray(picture.open_rgb(encoded)[0])
    finally:
        Image.MAX_IMAGE_PIXELS = guard


def _tile(pixels_HWC: np.ndarray, name: str, x: int, y: int, tile: TileConfig, config: IngestConfig) -> Outcome:
    cut = pixels_HWC[y : y + tile.size, x : x + tile.size]
    if picture.deviation(cut) <= tile.minimum_deviation:
        return None
    square = picture.fit(Image.fromarray(cut), config.size, config.filter, config.upscale)
    encoded = picture.encode(square, "jpeg" if config.format == "jpeg" else "png", config.quality)
    return Sample(f"{name}#x={x},y={y}", encoded)


def _ordered(tasks: Iterable[Callable[[], Outcome]], workers: int) -> Generator[Outcome]:
    """Results in the order of the tasks, few under way at a time. Pillow works outside Python's lock."""
    waiting: deque[Future[Outcome]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ingest")
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _parameters(config: IngestConfig) -> dict[str, Any]:
    keys = {*STORED_AS, *LAID_OUT_AS} - (set() if config.format == "jpeg" else {"quality"})
    return config.model_dump(mode="json", include=keys)


def _check_source(source: Source, config: IngestConfig) -> None:
    if source.single and config.tile is None:
        raise DataError(
            f"ingest.source {config.source} is a single picture; set ingest.tile to cut it, or name a folder "
            f"or a zip archive"
        )
    if not source.names:
        others = f" ({len(source.ignored)} other files, first {source.ignored[0]!r})" if source.ignored else ""
        raise DataError(f"ingest.source {config.source} has no JPEG, PNG or WebP pictures{others}")


def _finished(config: IngestConfig, source: Source, uri: str, storage: StorageConfig) -> IngestReport | None:
    """The report of a finished data set that is what this ingest would make; an error if it differs."""
    if config.overwrite or not exists(join(uri, NAME), storage):
        return None
    manifest = read_manifest(uri, storage)
    wanted = _parameters(config)
    differing = [
        f"ingest.{key} (there {manifest.parameters.get(key)}, asked for {value})"
        for key, value in wanted.items()
        if manifest.parameters.get(key) != value
    ]
    if manifest.source != source.fingerprint:
        differing.append("ingest.source (other files, or files of other sizes)")
    if differing:
        raise DataError(
            f"{uri} already holds a data set that differs in {'; '.join(differing)}; choose another data.uri "
            f"or set ingest.overwrite=true"
        )
    return IngestReport(
        uri=uri,
        digest=manifest.digest,
        samples=manifest.samples,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        skipped=(),
        ignored=source.ignored,
        flat_tiles=0,
        seconds=0.0,
        already_done=True,
    )


def _clear(uri: str, storage: StorageConfig) -> None:
    """Remove what an earlier ingest left; its manifest first, so that no half of it looks finished."""
    delete(join(uri, NAME), storage)
    for name in list_names(uri, storage):
        if LEFTOVER.fullmatch(name):
            delete(join(uri, name), storage)


def _nothing(source: str, skipped: list[Skipped], flat_tiles: int) -> str:
    if skipped:
        first = skipped[0]
        count = len(skipped)
        return f"{source}: none of its {count} pictures can be used; the first, {first.path}, {first.reason}"
    return f"{source}: all {flat_tiles} tiles are flat; lower ingest.tile.minimum_deviation"
