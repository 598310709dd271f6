"""The stream of training pictures of one worker, and plain reading by index."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.data.decode import DecodeError, Decoder, DecoderName, make_decoder
from pipeline.data.manifest import DataError, Manifest
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from pipeline.schema import Section
from pipeline.storage import StorageConfig

BATCHES_AHEAD = 2
CLOSE_DEADLINE_S = 5.0

Flips = Callable[[int, Tensor], Tensor]
"""(images seen at the start of the batch, positions in the global batch) to bool: which are mirrored."""


class DataConfig(Section):
    """Which data set feeds training, and how it is read."""

    uri: str = ""
    """Folder of shards that jobs.ingest wrote: a local path or s3://."""
    decoder: DecoderName = "dali"
    """"dali" decodes on the GPU where there is one; "pillow", the reference, needs no extra package."""
    flip: bool = True
    """Mirror every other picture at random. Not for pictures with writing or a handedness of their own."""
    shuffle_row_groups: int = Field(16, ge=1)
    """Row groups shuffled together and held in memory together; another number is another order."""
    read_ahead: int = Field(16, ge=0)
    """Row groups read before they are needed, in memory beside those of the shuffle."""
    threads: int = Field(4, ge=1)
    """For reading, and as many again for decoding, in each worker."""


class DataStream:
    """Endless iterator over this worker's part of each global batch, decoded ahead by a thread of its own.

    Each `next()` gives uint8 RGB (len(positions), H, W, 3) on `device`: the pictures at `positions` of the
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
        flips: Flips | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not positions or min(positions) < 0 or max(positions) >= batch_size:
            raise ValueError(f"positions {positions} are not a part of a global batch of {batch_size}")
        if images_seen < 0:
            raise ValueError(f"images_seen is {images_seen}; expected 0 or more")
        self._order = Order(
            [group.rows for group in manifest.row_groups], manifest.digest, seed, data.shuffle_row_groups
        )
        self._data, self._batch_size, self._positions = data, batch_size, positions
        self._flips = flips if data.flip else None
        self._reader = _reader(manifest, data, storage)
        self._decoder = _decoder(manifest, data, len(positions), torch.device(device))
        self.wait_seconds = 0.0
        """Total time that `next()` had to wait for a batch."""
        self._batches: queue.Queue[Tensor | BaseException] = queue.Queue(BATCHES_AHEAD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(images_seen,), name="decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        if self._stopping.is_set():
            raise ValueError("the stream is closed; make a new one at the images_seen to go on from")
        began = time.perf_counter()
        batch = self._batches.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """End the threads and drop batches decoded ahead. A read that hangs is left to its own time limit."""
        self._stopping.set()
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

    def _run(self, images_seen: int) -> None:
        try:
            while not self._stopping.is_set():
                self._batches.put(self._batch(images_seen))
                images_seen += self._batch_size
        except BaseException as error:  # handed to whoever waits for the batch
            self._batches.put(error)
        finally:
            self._reader.close()
            self._decoder.close()

    def _batch(self, images_seen: int) -> Tensor:
        self._reader.prefetch(self._order.groups_ahead(images_seen, self._data.read_ahead))
        indices = self._order.at(images_seen, self._batch_size)[np.asarray(self._positions)]
        flips = np.zeros(len(indices), dtype=bool)
        if self._flips is not None:
            flips = self._flips(images_seen, torch.tensor(self._positions)).cpu().numpy()
        return _decode(self._reader, self._decoder, self._order, indices, flips)


def read_images(
    manifest: Manifest,
    data: DataConfig,
    storage: StorageConfig,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
) -> Iterator[Tensor]:
    """The samples with these canonical indices, in this order, unmirrored: uint8 (b, H, W, 3) on the CPU.

    All batches but the last hold `batch_size`. Sorted indices are read fastest.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= manifest.samples):
        raise ValueError(f"indices {wanted.min()} to {wanted.max()} reach beyond the {manifest.samples} samples")
    order = Order([group.rows for group in manifest.row_groups], manifest.digest, 0, 1)
    reader = _reader(manifest, data, storage)
    decoder = _decoder(manifest, data, batch_size, torch.device("cpu"))
    try:
        for start in range(0, len(wanted), batch_size):
            groups = order.group_of(wanted[start : start + 2 * batch_size])[0]
            reader.prefetch(list(dict.fromkeys(groups.tolist()))[: data.shuffle_row_groups])
            part = wanted[start : start + batch_size]
            yield _decode(reader, decoder, order, part, np.zeros(len(part), dtype=bool))
    finally:
        reader.close()
        decoder.close()


def _reader(manifest: Manifest, data: DataConfig, storage: StorageConfig) -> Reader:
    return Reader(manifest, data.uri, storage, data.shuffle_row_groups + data.read_ahead, data.threads)


def _decoder(manifest: Manifest, data: DataConfig, batch_size: int, device: torch.device) -> Decoder:
    return make_decoder(data.decoder, manifest.height, manifest.width, batch_size, data.threads, device)


def _decode(reader: Reader, decoder: Decoder, order: Order, indices: np.ndarray, flips: np.ndarray) -> Tensor:
    groups, rows = (array.tolist() for array in order.group_of(indices))
    try:
        return decoder.decode(reader.pictures(groups, rows), flips)
    except DecodeError as error:
        place = reader.describe(groups[error.position], rows[error.position])
        raise DataError(f"{place} {error.reason}; restore the file or ingest again") from error
