"""Which row groups workers open and when, counted by walking through the real order."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from pipeline.data.order import Order
from pipeline.training.world import World, share_of

GROUP = 4
"""Pictures in a minibatch-stddev group: the least that a worker computes."""
SAMPLES_A_CALL = 8192
SAMPLES_A_STRETCH = 16
"""Fewer, and the order spends its time on going from one row group to the next."""
KEYS_A_CALL = 4 << 20
"""Bounds the memory of a call: the order draws one key for each sample and stretch of its place."""


@dataclass(frozen=True)
class Openings:
    """One entry, int64 (n,), for each row group that a worker opens in an epoch; sorted by worker, then by first use.

    A reader that keeps a row group from its first to its last use reads it once for each entry.
    """

    worker: np.ndarray
    """Position in the shares that were walked."""
    epoch: np.ndarray
    group: np.ndarray
    first: np.ndarray
    """The batch that uses it first, counted from the beginning of training."""
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.group)

    def take(self, chosen: np.ndarray) -> "Openings":
        """The entries under a mask or at positions."""
        return Openings(*(part[chosen] for part in (self.worker, self.epoch, self.group, self.first, self.last)))


def shares_of(workers: int, batch_size: int) -> list[range]:
    """Places of the global batch that each worker computes, as training deals them."""
    return [share_of(World(rank, workers), batch_size, GROUP) for rank in range(workers)]


def epoch_batches(order: Order, epoch: int) -> range:
    """Numbers of the batches that hold samples of an epoch, the first and the last perhaps only a few."""
    return range(epoch * order.samples // order.batch_size, math.ceil((epoch + 1) * order.samples / order.batch_size))


def stream(order: Order, places: np.ndarray, batches: range) -> Iterator[tuple[int, np.ndarray]]:
    """Canonical indices at these places of these batches: number of the first batch and int64 (b, P), part by part."""
    stretches = len(places) * order.spread
    samples = min(max(SAMPLES_A_CALL, SAMPLES_A_STRETCH * stretches), KEYS_A_CALL // order.spread)
    step = max(1, samples // len(places))
    for begin in range(batches.start, batches.stop, step):
        yield begin, order.at(begin * order.batch_size, places, min(step, batches.stop - begin))


def epoch_samples(order: Order, epoch: int) -> np.ndarray:
    """All samples of an epoch, int64 (samples,), in the order in which they are trained on."""
    batches = epoch_batches(order, epoch)
    parts = [indices.ravel() for _, indices in stream(order, np.arange(order.batch_size), batches)]
    skipped = epoch * order.samples - batches.start * order.batch_size
    return np.concatenate(parts)[skipped : skipped + order.samples]


def walk(order: Order, shares: Sequence[range], batches: range, show: str = "") -> Openings:
    """The row groups that workers open in these batches.

    shares: places of the global batch that each worker computes. show: names the progress bar; "" shows none.
    """
    places = np.concatenate([np.asarray(share, dtype=np.int64) for share in shares])
    workers = np.repeat(np.arange(len(shares)), [len(share) for share in shares])
    groups = len(order.rows)
    epoch_begin = batches.start * order.batch_size // order.samples
    keys: list[np.ndarray] = []
    firsts: list[np.ndarray] = []
    lasts: list[np.ndarray] = []
    with tqdm(total=len(batches), desc=show, disable=not show, leave=False, unit="batch") as bar:
        for begin, indices in stream(order, places, batches):
            numbers = begin + np.arange(len(indices))
            epochs = (numbers[:, None] * order.batch_size + places) // order.samples - epoch_begin
            used = (epochs * len(shares) + workers) * groups + order.group_of(indices)[0]
            when = np.broadcast_to(numbers[:, None], used.shape)
            for found, part in zip(
                _spans(used.ravel(), when.ravel(), when.ravel()), (keys, firsts, lasts), strict=True
            ):
                part.append(found)
            bar.update(len(indices))
    key, first, last = _spans(np.concatenate(keys), np.concatenate(firsts), np.concatenate(lasts))
    rest, group = np.divmod(key, groups)
    epoch, worker = np.divmod(rest, len(shares))
    openings = Openings(worker, epoch + epoch_begin, group, first, last)
    return openings.take(np.lexsort((first, worker)))


def most_open(openings: Openings, weights: np.ndarray) -> int:
    """The most that one worker holds at a time, by the weight (int64, one for each entry) of what it has open."""
    most = 0
    for worker in np.unique(openings.worker).tolist():
        mine = openings.worker == worker
        # Given back only after its last batch; what is given back goes first among the events of one batch.
        when = np.concatenate([openings.last[mine] + 1, openings.first[mine]])
        change = np.concatenate([-weights[mine], weights[mine]])
        most = max(most, int(np.cumsum(change[np.argsort(when, kind="stable")]).max()))
    return most


def _spans(keys: np.ndarray, firsts: np.ndarray, lasts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each key once, with the first and the last of its times; times of a key stand in ascending order."""
    by_key = np.argsort(keys, kind="stable")
    ordered = keys[by_key]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    ends = np.append(begins[1:], len(ordered)) - 1
    return ordered[begins], firsts[by_key[begins]], lasts[by_key[ends]]
