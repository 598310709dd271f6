"""One part of an ingest: its pictures read, fitted and stored as shards. What every process and every task runs."""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data import picture
from pipeline.ingest.listing import printable
from pipeline.ingest.parts import Part, Piece
from pipeline.ingest.records import DataError, PartRecord, Skipped, check_plan, shard_prefix, write_record
from pipeline.ingest.settings import IngestConfig, TileConfig
from pipeline.ingest.shards import Sample, ShardWriter
from pipeline.ingest.sources import Kind, Pictures
from pipeline.storage import StorageConfig

THREADS = 4  # in each process: they hide the time that a read from S3 takes

Outcome = Sample | Skipped | None
"""None is a tile without content."""


@dataclass(frozen=True)
class Job:
    """All that a process elsewhere needs to make parts of one ingest."""

    source: str
    kind: Kind
    uri: str
    config: IngestConfig
    storage: StorageConfig
    plan: bytes


Runner = Callable[[Job, Iterable[Part], Callable[[int], object]], Generator[PartRecord]]
"""Makes parts somewhere and gives their records in any order; tells how many places were looked at as it goes."""


def make_part(job: Job, part: Part, pictures: Pictures, tick: Callable[[int], object]) -> PartRecord:
    """Store the part's shards, then its record. tick: is told the number of places that were looked at since.

    Raises DataError for a picture that `strict` does not forgive and where another ingest took the place over.
    """
    config, flat_tiles = job.config, 0
    skipped: dict[Skipped, None] = {}  # a picture of many tiles is named once
    check_plan(job.plan, job.uri, job.storage)
    layout = config.row_group_bytes, config.row_group_rows, config.shard_bytes
    with (
        ShardWriter(
            job.uri, job.storage, config.size, *layout, part=part.number, prefix=shard_prefix(job.plan)
        ) as writer,
        closing(_ordered(_tasks(part, pictures, config))) as outcomes,
    ):
        for outcome in outcomes:
            tick(1)
            if isinstance(outcome, Sample):
                writer.add(outcome)
            elif outcome is None:
                flat_tiles += 1
            else:
                refuse_if_strict(config, [outcome])
                skipped[outcome] = None
    record = PartRecord(
        part.number, part.places, tuple(writer.shards), tuple(writer.footers), tuple(skipped), flat_tiles
    )
    write_record(record, job.plan, job.uri, job.storage)
    return record


def refuse_if_strict(config: IngestConfig, skipped: Iterable[Skipped]) -> None:
    """Raises DataError about the first picture that cannot be used, where the config asks for that."""
    for one in skipped:
        if config.strict:
            raise DataError(f"{config.source}: {one.path} {one.reason} (ingest.strict is set)")


def places_of(encoded: bytes, config: IngestConfig) -> int:
    """How many places of tiles a picture has; at least one, so that a picture that has none is looked at."""
    try:
        return max(1, len(_corners(*picture.upright_size(encoded), config.tile or TileConfig())))
    except picture.PictureError:
        return 1


def _tasks(part: Part, pictures: Pictures, config: IngestConfig) -> Iterator[Callable[[], Outcome]]:
    """In the order of the samples. Large pictures are decoded here, one at a time; threads cut them."""
    for piece in part.pieces:
        if config.tile is None:
            yield functools.partial(_whole, pictures, piece.name, config)
        else:
            yield from _tiles(pictures, piece, config.tile, config)


def _whole(pictures: Pictures, name: str, config: IngestConfig) -> Outcome:
    try:
        encoded = picture.fit_bytes(
            pictures.read(name), config.size, config.format, config.quality, config.filter, config.upscale
        )
    except picture.PictureError as error:
        return _skipped(name, str(error))
    return Sample(name, encoded)


def _skipped(name: str, reason: str) -> Skipped:
    return Skipped(printable(name), reason)


def _tiles(pictures: Pictures, piece: Piece, tile: TileConfig, config: IngestConfig) -> Iterator[Callable[[], Outcome]]:
    places = range(piece.first, piece.last)
    try:
        pixels_HWC = _open_large(pictures.read(piece.name))
    except picture.PictureError as error:
        yield from (functools.partial(_skipped, piece.name, str(error)) for _ in places)
        return
    height, width = pixels_HWC.shape[:2]
    corners = _corners(width, height, tile)
    if not corners:
        yield functools.partial(
            _skipped, piece.name, f"is {width}x{height}, too small for one tile of {tile.size} pixels"
        )
    for x, y in corners[piece.first : piece.last]:
        yield functools.partial(_tile, pixels_HWC, piece.name, x, y, tile, config)


def _tile(pixels_HWC: np.ndarray, name: str, x: int, y: int, tile: TileConfig, config: IngestConfig) -> Outcome:
    cut = pixels_HWC[y : y + tile.size, x : x + tile.size]
    if picture.deviation(cut) <= tile.minimum_deviation:
        return None
    square = picture.fit(Image.fromarray(cut), config.size, config.filter, config.upscale)
    encoded = picture.encode(square, "jpeg" if config.format == "jpeg" else "png", config.quality)
    return Sample(f"{name}#x={x},y={y}", encoded)


def _corners(width: int, height: int, tile: TileConfig) -> list[tuple[int, int]]:
    return picture.tile_corners(width, height, tile.size, tile.stride, tile.latitude)


def _open_large(encoded: bytes) -> np.ndarray:
    with picture.any_size():
        return np.asarray(picture.open_rgb(encoded)[0])


def _ordered(tasks: Iterable[Callable[[], Outcome]]) -> Generator[Outcome]:
    """Results in the order of the tasks, few under way at a time. Pillow works outside Python's lock."""
    waiting: deque[Future[Outcome]] = deque()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ingest")
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 4 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
