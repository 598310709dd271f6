"""The stream of training pictures of one worker, and plain reading by index."""

import atexit
import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipeline.data.cache import DiskCache
from pipeline.data.decode import DECODED_TOGETHER, DecoderName, make_decoder
from pipeline.data.manifest import DataError, Manifest
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from pipeline.data.samples import OnCorrupt, Samples
from pipeline.data.views import Augmentation, Views, fixed_views, training_views
from pipeline.schema import Section
from pipeline.storage import StorageConfig, is_remote

MOST_TOGETHER = 256
"""Pictures of several batches at most in one go; beyond, no decoder gains more."""
PLANNED_TOGETHER = 16
"""Batches whose samples are computed at once: numpy's overhead is paid once for all."""
PLANNED_AHEAD = 256
"""Batches whose samples are known at most."""
CLOSE_DEADLINE_S = 5.0


class DataConfig(Section):
    """Which data set feeds training, and how it is read."""

    uri: str = ""
    """Folder of shards that jobs.ingest wrote: a local path or s3://."""
    decoder: DecoderName = "dali"
    """"dali" decodes on the GPU where there is one; "turbo" (libjpeg-turbo) is the fastest on a CPU; "pillow", the
    reference, needs no extra package."""
    flip: bool = True
    """Mirror every other picture at random. Not for pictures with writing or a handedness of their own."""
    crop: bool = False
    """Look at a random square of model.size pixels of each stored picture, which may then be larger."""
    rotate: bool = False
    """Turn each picture by 0, 90, 180 or 270 degrees at random: for views from above. No pixel is interpolated."""
    shuffle_row_groups: int = Field(2, ge=1)
    """Row groups that each place of the global batch draws from in turn; another number is another order.

    A worker holds this many for each picture of its share of the batch: 64 of up to 8 MB for 32 pictures."""
    read_ahead: int = Field(8, ge=0)
    """Row groups read before they are needed, in memory beside those."""
    threads: int = Field(4, ge=1)
    """For reading, and as many again for decoding, in each worker."""
    on_corrupt: OnCorrupt = "fail"
    """"fail" stops at damaged data; "skip" takes a neighbour instead, by a fixed rule, counts and says so.

    Distances are never measured against damaged data."""
    cache_bytes: int = Field(0, ge=0)
    """Disk space for row groups read from S3, shared by all workers of a machine; 0 keeps none."""
    cache_dir: str = "~/.cache/cips-pipeline/row-groups"
    """Folder of that cache, on a local disk."""

    @field_validator("cache_dir")
    @classmethod
    def _the_same_for_every_worker(cls, folder: str) -> str:
        if not folder.startswith(("/", "~")):
            raise ValueError(
                f"data.cache_dir is {folder!r}: expected an absolute path, or one that begins with ~, since workers "
                f"have working directories of their own"
            )
        return folder


@dataclass(frozen=True)
class _Batch:
    """What is to be read for one batch."""

    images_seen: int
    """When it begins."""
    samples: np.ndarray
    """Canonical indices, int64."""
    groups: list[int]
    """The row group of each."""
    views: Views


@dataclass
class _Need:
    """A row group, and from when to when it is needed without a longer pause, by the images seen at a batch's begin."""

    group: int
    first: int
    last: int = 0


class DataStream:
    """Endless iterator over this worker's part of each global batch, decoded ahead by a thread of its own.

    Each `next()` gives uint8 RGB (len(positions), size, size, 3) on `device`: the pictures at `positions` of the
    global batch that follows `images_seen`, which then grows by `batch_size`. Raises in `next()` what went
    wrong in the thread: DataError for damaged data, StorageError for a store that fails.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        storage: StorageConfig,
        *,
        seed: int,
        batch_size: int,
        positions: range,
        images_seen: int = 0,
        size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """size: side of the pictures, for data.crop; the stored size unless given."""
        if not positions or min(positions) < 0 or max(positions) >= batch_size:
            raise ValueError(f"positions {positions} are not a part of a global batch of {batch_size}")
        if images_seen < 0:
            raise ValueError(f"images_seen is {images_seen}; expected 0 or more")
        rows = [group.rows for group in manifest.row_groups]
        self._row_groups = sum(count > 0 for count in rows)
        self._order = Order(rows, manifest.digest, seed, batch_size, data.shuffle_row_groups)
        self._kind = augmentation(manifest, data, size)
        self._seed, self._batch_size, self._positions = seed, batch_size, positions
        self._device = torch.device(device)
        # One row group for each stretch; two stretches may share one, and one may end where the next begins.
        self._capacity = len(positions) * data.shuffle_row_groups + data.read_ahead
        # A stretch is visited at least every other lap; after that its row group is done with until the next epoch.
        self._pause = 2 * data.shuffle_row_groups * batch_size
        batch_bytes = 3 * len(positions) * (self._kind.size**2 if self._kind.crop else manifest.height * manifest.width)
        self._together = max(1, min(DECODED_TOGETHER[data.decoder] // batch_bytes, MOST_TOGETHER // len(positions)))
        most = len(positions) * self._together
        self._samples = _samples(manifest, data, storage, self._kind, self._capacity, most, self._device)
        self.wait_seconds = 0.0
        """Total time that `next()` had to wait for a batch."""
        self._given: deque[tuple[Tensor, Any]] = deque()
        self.replaced = 0
        """How often data.on_corrupt=skip has put another picture in the place of a damaged one."""
        self._batches: queue.Queue[tuple[Tensor, int] | BaseException] = queue.Queue(2 * self._together)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(images_seen,), name="decode", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # DALI aborts a process that ends while it decodes

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the store so far, not from memory or the disk cache."""
        return self._samples.bytes_read

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        if self._stopping.is_set():
            raise ValueError("the stream is closed; make a new one at the images_seen to go on from")
        self._let_go()
        began = time.perf_counter()
        item = self._batches.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, replaced = item
        self.replaced += replaced
        if batch.is_cuda:
            self._given.append((batch, None))
        return batch

    def close(self) -> None:
        """End the threads and drop batches decoded ahead. A local disk that hangs is left to itself."""
        self._stopping.set()
        atexit.unregister(self.close)
        self._samples.stop_reading()
        deadline = time.monotonic() + CLOSE_DEADLINE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._batches.get_nowait()  # makes room for a thread that waits to deliver
            self._thread.join(timeout=0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _let_go(self) -> None:
        """Keeps a CUDA batch, whose memory is DALI's, until the kernels that use it have run."""
        if self._given and self._given[-1][1] is None:
            used = torch.cuda.Event()
            used.record()
            self._given[-1] = (self._given[-1][0], used)
        while self._given and self._given[0][1].query():
            self._given.popleft()

    def _run(self, images_seen: int) -> None:
        try:
            count = len(self._positions)
            for batches in self._planned(images_seen):
                samples = np.concatenate([batch.samples for batch in batches])
                views = Views.joined([batch.views for batch in batches])
                pictures, replaced = self._samples.take(samples, views)
                for part, stand_ins in zip(pictures.split(count), replaced.reshape(-1, count), strict=True):
                    if self._stopping.is_set():
                        return
                    self._batches.put((part, int(stand_ins.sum())))
        except BaseException as error:  # handed to whoever waits for the batch
            self._batches.put(error)
        finally:
            self._samples.close()

    def _planned(self, images_seen: int) -> Iterator[list[_Batch]]:
        """Batches to decode in one go, the first one alone; what later ones need is being read meanwhile."""
        planned: deque[_Batch] = deque()
        needs: deque[_Need] = deque()  # of planned batches, by first need
        latest: dict[int, _Need] = {}
        planned_to, count = images_seen, 1
        enough = min(self._capacity, self._row_groups)
        while True:
            while len(planned) < count or (len(needs) < enough and len(planned) < PLANNED_AHEAD):
                for batch in self._plan(planned_to):
                    for group in batch.groups:
                        need = latest.get(group)
                        if need is None or batch.images_seen - need.last > self._pause:
                            need = latest[group] = _Need(group, batch.images_seen)
                            needs.append(need)
                        need.last = batch.images_seen
                    planned.append(batch)
                    planned_to += self._batch_size
            begin = planned[0].images_seen
            needs = deque(need for need in needs if need.last >= begin)
            latest = {need.group: need for need in needs}
            # Where an epoch ends all stretches change their row groups: what is decoded in one go must fit.
            beyond = next((need.first for need in itertools.islice(needs, self._capacity, None)), None)
            batches = [planned.popleft()]
            while len(batches) < count and (beyond is None or planned[0].images_seen < beyond):
                batches.append(planned.popleft())
            self._samples.prefetch(need.group for need in itertools.islice(needs, self._capacity))
            yield batches
            count = self._together

    def _plan(self, images_seen: int) -> Iterator[_Batch]:
        """The next batches, drawn together."""
        samples = self._order.at(images_seen, self._positions, PLANNED_TOGETHER)
        groups = self._samples.groups_of(samples).tolist()
        begins = images_seen + self._batch_size * torch.arange(PLANNED_TOGETHER)
        positions, count = torch.tensor(self._positions), len(self._positions)
        views = training_views(
            self._kind, self._seed, begins.repeat_interleave(count), positions.repeat(PLANNED_TOGETHER)
        )
        for number, begin in enumerate(begins.tolist()):
            part = slice(number * count, (number + 1) * count)
            yield _Batch(begin, samples[number], groups[number], views.part(part))


def read_images(
    manifest: Manifest,
    data: DataConfig,
    storage: StorageConfig,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    size: int | None = None,
) -> Iterator[Tensor]:
    """The samples with these canonical indices, in this order: uint8 (b, size, size, 3) on the CPU.

    They are not mirrored; with data.crop or data.rotate each has one view for ever. All batches but the last hold
    `batch_size`. Sorted indices are read fastest.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= manifest.samples):
        raise ValueError(f"indices {wanted.min()} to {wanted.max()} reach beyond the {manifest.samples} samples")
    kind = augmentation(manifest, data, size)
    capacity = 1 + data.read_ahead
    samples = _samples(manifest, data, storage, kind, capacity, batch_size, torch.device("cpu"))
    try:
        for start in range(0, len(wanted), batch_size):
            ahead = samples.groups_of(wanted[start : start + 2 * batch_size])
            samples.prefetch(list(dict.fromkeys(ahead.tolist()))[:capacity])
            part = wanted[start : start + batch_size]
            yield samples.take(part, fixed_views(kind, torch.from_numpy(part)))[0]
    finally:
        samples.close()


def augmentation(manifest: Manifest, data: DataConfig, size: int | None = None) -> Augmentation:
    """How pictures of this data set are looked at, at this size. Raises DataError where they do not fit."""
    stored = (manifest.height, manifest.width)
    size = size or min(stored)
    if stored != (size, size) and (not data.crop or size > min(stored)):
        fix = f"ingest with ingest.size={size}" + (", or set data.crop=true" if size < min(stored) else "")
        raise DataError(
            f"model.size is {size}, but the data set holds pictures of {manifest.width}x{manifest.height}; set "
            f"model.size={min(stored)}, or {fix}"
        )
    crop = stored != (size, size)
    return Augmentation(manifest.height, manifest.width, size, crop, data.rotate, data.flip)


def _samples(
    manifest: Manifest,
    data: DataConfig,
    storage: StorageConfig,
    kind: Augmentation,
    capacity: int,
    batch_size: int,
    device: torch.device,
) -> Samples:
    cached = data.cache_bytes and is_remote(data.uri)  # a local data set is its own cache
    cache = DiskCache(data.cache_dir, data.cache_bytes) if cached else None
    decoder = make_decoder(data.decoder, kind, batch_size, data.threads, device)
    reader = Reader(manifest, data.uri, storage, capacity, data.threads, cache)
    return Samples(manifest, data.uri, reader, decoder, data.on_corrupt)
