"""What a cluster that is not here would ask of its bucket: the real order, walked for an imagined set of workers.

The model of a worker: `threads` reads at once; each takes the latency, and all share the worker's bandwidth. Like
`DataStream` it has room for one row group per stretch of its places and `read_ahead` more, and asks for row groups
in the order of need as room becomes free. A batch begins when all workers have their pictures, and takes (largest
share) / images_per_second. Decoding costs nothing.
"""

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.benchmark.walk import GROUP, Openings, epoch_batches, most_open, shares_of, walk
from pipeline.data.order import Order
from pipeline.data.stream import PLANNED_AHEAD
from pipeline.ingest.settings import IngestConfig

MANIFEST_BYTES, FOOTERS_BYTES = 170, 360
"""Of one row group in manifest.json and in `_metadata`, about: every worker reads both before anything else."""
FOOTERS_LIMIT = 2**31 - 1
"""Bytes of `_metadata` that Parquet readers take at most: the lengths in it are 32 bits."""
PLAN_REQUESTS = 2
SAMPLED_WORKERS, SAMPLED_SAMPLES = 6, 400_000
"""How much is walked where an epoch is too large to be walked whole: workers, and samples of them all."""
BORDER_LAPS = 64
"""Batches (times the spread) at an epoch's ends in which neighbouring workers reach the row group that they share."""


@dataclass(frozen=True)
class Shape:
    """As much of a data set as its order and its reads depend on."""

    name: str
    rows: np.ndarray
    """Samples in each row group, int64 (R,)."""
    bytes: np.ndarray
    """Size of each row group, int64 (R,)."""
    digest: str = "imagined"

    @property
    def samples(self) -> int:
        return int(self.rows.sum())


@dataclass(frozen=True)
class Cluster:
    """Equal workers and their way to the bucket."""

    workers: int
    latency_s: float
    """From a request to its first byte."""
    bandwidth: float
    """Bytes per second that one worker receives."""
    images_per_second: float
    """Trained on by one worker that never waits."""
    threads: int
    """Reads at once of one worker."""
    read_ahead: int
    """Row groups that a worker asks for before it needs them."""


@dataclass(frozen=True)
class Report:
    """What one cluster would do with one data set. Counts are per epoch."""

    workers: int
    batch_size: int
    """Of the whole batch; larger than asked for where a worker would have gone without pictures."""
    walked: int
    """Workers whose reads were counted."""
    exact: bool
    """Whether all workers were walked through the whole epoch. If not, counts are projected from samples of it."""
    opened: tuple[float, float, float]
    """Row groups that a worker opens: least, mean, most."""
    read_ratio: float
    """Bytes read by all workers as a multiple of the data set."""
    ratio_bound: float
    """1 + W/R."""
    requests_per_second: float
    """To the bucket as a whole, averaged over the epoch."""
    peak_requests: float
    """In the busiest second, which lies at the beginning of a run or of an epoch."""
    buffer_bytes: int
    """Most that a worker holds: open row groups and those read ahead."""
    open_groups: int
    """Most row groups that a worker has open at a time."""
    plan_s: float
    """Measured here: making the order and finding a place far into training."""
    first_batch_s: float
    """Reading the manifest, planning, and reading the first batch's row groups."""
    waiting: float
    """Share of the time after the first batch in which training waits for data."""
    bytes_per_second: float
    """What a worker must receive in order never to wait."""


@dataclass(frozen=True)
class Timeline:
    """What happens when workers read through a list of openings."""

    issued: np.ndarray
    """When each request was sent, in seconds, sorted."""
    ready_s: float
    """When the first batch is complete."""
    waited_s: float
    """Waiting after that, in total."""
    seconds: float
    """From the first batch on to the end of the last."""
    most_held: int
    """Bytes of row groups that a worker holds or has asked for, at most."""


def imagined(name: str, samples: int, picture_bytes: int) -> Shape:
    """A data set of equal pictures, with row groups as jobs.ingest would cut them."""
    ingest = IngestConfig()
    full = max(1, min(ingest.row_group_rows, ingest.row_group_bytes // picture_bytes))
    rows = np.full(math.ceil(samples / full), full, dtype=np.int64)
    rows[-1] = samples - full * (len(rows) - 1)
    return Shape(name, rows, rows * picture_bytes)


def batch_for(workers: int, batch_size: int) -> int:
    """The least batch of whole minibatch-stddev groups, from `batch_size` up, that gives each worker one."""
    return max(math.ceil(batch_size / GROUP), workers) * GROUP


def simulate(
    shape: Shape,
    cluster: Cluster,
    batch_size: int,
    spread: int,
    seed: int = 0,
    *,
    exact_samples: int,
    show: bool = False,
) -> Report:
    """Counts the reads of an epoch: of all of it up to `exact_samples` samples, of samples of it beyond."""
    batch_size = batch_for(cluster.workers, batch_size)
    shares = shares_of(cluster.workers, batch_size)
    began = time.perf_counter()
    order = Order(shape.rows, shape.digest, seed, batch_size, spread)
    order.at(1000 * shape.samples + shape.samples // 3, shares[0])
    plan_s = time.perf_counter() - began

    bar = f"{shape.name}, {cluster.workers} workers" if show else ""
    exact = shape.samples <= exact_samples
    chosen = list(range(cluster.workers)) if exact else sampled_workers(cluster.workers)
    walked = [shares[rank] for rank in chosen]
    step_s = max(len(share) for share in shares) / cluster.images_per_second
    if exact:
        whole = epoch_batches(order, 0)
        batches = range(whole.stop + 4 * spread)  # and into the next epoch, which opens everything anew
        openings = walk(order, walked, batches, bar)
        counts = np.bincount(openings.worker[openings.epoch == 0], minlength=len(chosen)).astype(float)
        read_bytes = float(shape.bytes[openings.group[openings.epoch == 0]].sum())
        read_ratio = read_bytes / int(shape.bytes.sum())
    else:
        batches = range(max(SAMPLED_SAMPLES // sum(map(len, walked)), 4 * spread))
        openings = walk(order, walked, batches, bar)
        shared = shared_borders(order, shares, chosen)
        counts = projected(openings, len(chosen), order, len(batches)) + shared / cluster.workers
        read_ratio = 1 + shared / len(shape.rows)

    capacity = [len(share) * spread + cluster.read_ahead for share in walked]
    times = timeline(openings, shape.bytes, capacity, len(batches), step_s, cluster)
    waiting = times.waited_s / times.seconds
    requests = counts.sum() if exact else len(shape.rows) * read_ratio
    epoch_s = shape.samples / batch_size * step_s
    plan_read_s = PLAN_REQUESTS * cluster.latency_s + plan_bytes(shape) / cluster.bandwidth
    return Report(
        workers=cluster.workers,
        batch_size=batch_size,
        walked=len(chosen),
        exact=exact,
        opened=(float(counts.min()), float(counts.mean()), float(counts.max())),
        read_ratio=read_ratio,
        ratio_bound=1 + cluster.workers / len(shape.rows),
        requests_per_second=float(requests) / epoch_s * (1 - waiting),
        peak_requests=busiest_second(times.issued) * cluster.workers / len(chosen),
        buffer_bytes=times.most_held,
        open_groups=most_open(openings, np.ones_like(openings.group)),
        plan_s=plan_s,
        first_batch_s=plan_read_s + plan_s + times.ready_s,
        waiting=waiting,
        bytes_per_second=float(shape.bytes.mean() * counts.max()) / epoch_s,
    )


def plan_bytes(shape: Shape) -> int:
    """About the size of the manifest and the footers."""
    return (MANIFEST_BYTES + FOOTERS_BYTES) * len(shape.rows)


def sampled_workers(workers: int) -> list[int]:
    """Neighbours in pairs, from the beginning, the middle and the end."""
    pairs = np.linspace(0, max(0, workers - 2), SAMPLED_WORKERS // 2).astype(int).tolist()
    return sorted({rank for first in pairs for rank in (first, first + 1) if rank < workers})


def projected(openings: Openings, workers: int, order: Order, batches: int) -> np.ndarray:
    """Row groups that each worker would open in an epoch if it shared none with others, float (workers,).

    Projected from its first batches, without those of the first lap (`spread` batches visit every stretch once): what
    is open then makes up for the ends of the epoch, where neighbouring stretches meet in one row group.
    """
    later = np.bincount(openings.worker[openings.first >= order.spread], minlength=workers)
    return later * order.samples / order.batch_size / (batches - order.spread)


def shared_borders(order: Order, shares: Sequence[range], chosen: Sequence[int]) -> float:
    """Row groups read once more in an epoch because two neighbouring workers share them, from the chosen workers.

    Looks where neighbours meet: at the beginning and at the end of an epoch. The last worker is next to the first.
    """
    workers = len(shares)
    pairs = {frozenset((rank, (rank + 1) % workers)) for rank in chosen if (rank + 1) % workers in chosen}
    pairs = {pair for pair in pairs if len(pair) == 2}
    if not pairs:
        return 0.0
    whole, length = epoch_batches(order, 0), BORDER_LAPS * order.spread
    seen: dict[int, set[int]] = {rank: set() for rank in chosen}
    for batches in (range(min(length, len(whole))), range(max(0, len(whole) - length), len(whole))):
        found = walk(order, [shares[rank] for rank in chosen], batches)
        for place, rank in enumerate(chosen):
            seen[rank] |= set(found.group[(found.worker == place) & (found.epoch == 0)].tolist())
    shared = sum(len(set.intersection(*(seen[rank] for rank in pair))) for pair in pairs)
    return shared / len(pairs) * (workers if workers > 2 else 1)


def timeline(
    openings: Openings, sizes: np.ndarray, capacity: Sequence[int], batches: int, step_s: float, cluster: Cluster
) -> Timeline:
    """Plays the reads of workers that take each of the first `batches` batches together, from an empty start.

    sizes: bytes of each row group of the data set. capacity: row groups that each worker has room for. step_s: time
    for a batch whose pictures are there.
    """
    edges = np.searchsorted(openings.worker, np.arange(len(capacity) + 1))
    readers = [
        _Reader(openings.take(np.arange(begin, end)), sizes, room, cluster)
        for begin, end, room in zip(edges, edges[1:], capacity, strict=False)
    ]
    # A worker has something to do when it needs a row group, may forget one, or comes in sight of one.
    when = np.concatenate([openings.first, openings.last + 1, np.maximum(openings.first - PLANNED_AHEAD + 1, 0)])
    events = np.unique(np.stack([when, np.tile(openings.worker, 3)], axis=1)[when < batches], axis=0)
    begins = np.flatnonzero(np.diff(events[:, 0], prepend=-1))
    now, waited, ready, before = 0.0, 0.0, 0.0, 0
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(events)], strict=True):
        batch = int(events[begin, 0])
        now += step_s * (batch - before)
        complete = max(now, *(readers[worker].reach(batch, now) for worker in events[begin:end, 1].tolist()))
        if batch == 0:
            ready = complete
        else:
            waited += complete - now
        now, before = complete, batch
    issued = np.sort(np.concatenate([reader.issued for reader in readers]))
    return Timeline(issued, ready, waited, batches * step_s + waited, max(reader.most_held for reader in readers))


def busiest_second(issued: np.ndarray) -> int:
    """Most events within a second; times in seconds, sorted."""
    return int((np.searchsorted(issued, issued + 1.0) - np.arange(len(issued))).max())


class _Reader:
    """One worker's reads, in the order of need."""

    def __init__(self, openings: Openings, sizes: np.ndarray, capacity: int, cluster: Cluster) -> None:
        self._cluster, self._capacity = cluster, capacity
        self._firsts = openings.first.tolist()
        self._sizes = sizes[openings.group].tolist()
        by_end = np.argsort(openings.last, kind="stable")
        self._ends, self._freed = openings.last[by_end].tolist(), sizes[openings.group[by_end]].tolist()
        self._threads = [0.0] * cluster.threads  # a heap: when each is free
        self._link_free = 0.0
        self._needed = self._ended = self._held = 0
        self._done: list[float] = []
        self.issued: list[float] = []
        self.most_held = 0

    def reach(self, batch: int, now: float) -> float:
        """Asks for what a batch needs and for more as far as there is room; when what it needs is there (seconds)."""
        while self._ended < len(self._ends) and self._ends[self._ended] < batch:
            self._held -= self._freed[self._ended]
            self._ended += 1
        begin = self._needed
        while self._needed < len(self._firsts) and self._firsts[self._needed] <= batch:
            self._needed += 1
        while self._may_ask(batch):
            self._ask(self._sizes[len(self._done)], now)
        return max(self._done[begin : self._needed], default=now)

    def _may_ask(self, batch: int) -> bool:
        asked = len(self._done)
        room = asked - self._ended < self._capacity
        return asked < self._needed or (
            room and asked < len(self._firsts) and self._firsts[asked] < batch + PLANNED_AHEAD
        )

    def _ask(self, size: int, now: float) -> None:
        issued = max(now, heapq.heappop(self._threads))
        self._link_free = max(issued + self._cluster.latency_s, self._link_free) + size / self._cluster.bandwidth
        heapq.heappush(self._threads, self._link_free)
        self._done.append(self._link_free)
        self.issued.append(issued)
        self._held += size
        self.most_held = max(self.most_held, self._held)
