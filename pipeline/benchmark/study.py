"""The quality of this project's order as a function of the shuffle's memory, on imagined data of equal row groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pipeline.benchmark.shuffle import Quality, expected, measure, permuted
from pipeline.benchmark.walk import epoch_batches, epoch_samples, most_open, shares_of, walk
from pipeline.data.order import Order

ROWS = 256
"""Samples in each row group."""
WORKERS = (1, 8)
"""Among how many the batch is divided when memory is counted."""
LIMIT = 1.1
"""A share of pairs up to this multiple of the full permutation's is as good as it."""
SAMPLES = 2_000_000
"""About how many samples are looked at for each order, unless a number of epochs is asked for."""


@dataclass(frozen=True)
class Setting:
    """One data set under one batch size."""

    groups: int
    batch_size: int
    epochs: int
    closed_form: Quality
    """Of a full permutation."""
    permutation: Quality
    """The same, measured."""
    permutation_errors: Quality


@dataclass(frozen=True)
class Point:
    """One order."""

    spread: int
    memory: tuple[int, ...]
    """Row groups that one worker holds at most, for each of WORKERS."""
    quality: Quality
    errors: Quality
    """Standard errors."""

    def within(self, reference: Quality) -> bool:
        """Whether pairs of one batch come from one row group, and meet again, hardly more often than there."""
        return (
            self.quality.one_group <= LIMIT * reference.one_group
            and self.quality.meet_again <= LIMIT * reference.meet_again
        )


def setting(groups: int, batch_size: int, epochs: int | None, seed: int) -> Setting:
    """What the orders of this data are compared with. epochs: to look at, 2 or more; None is enough of them."""
    rows = np.full(groups, ROWS)
    count = epochs or max(4, SAMPLES // (groups * ROWS))
    mean, errors = measure(islice(permuted(groups * ROWS, seed), count), rows, batch_size)
    return Setting(groups, batch_size, count, expected(rows, batch_size), mean, errors)


def spreads(groups: int, batch_size: int, wanted: Sequence[int] = ()) -> list[int]:
    """1, 2, 4 ... up to the first with a stretch for every row group, and `wanted` ones."""
    doubled = [1]
    while doubled[-1] * batch_size < groups:
        doubled.append(2 * doubled[-1])
    return sorted({*doubled, *wanted})


def point(case: Setting, spread: int, seed: int) -> Point:
    """Measures the order of one spread, and counts what its workers hold."""
    rows = np.full(case.groups, ROWS)
    order = Order(rows, "imagined", seed, case.batch_size, spread)
    quality, errors = measure(_epochs(order, case.epochs), rows, case.batch_size)
    memory = tuple(_memory(order, workers) for workers in WORKERS)
    return Point(spread, memory, quality, errors)


def _epochs(order: Order, epochs: int) -> Iterator[np.ndarray]:
    return (epoch_samples(order, epoch) for epoch in range(epochs))


def _memory(order: Order, workers: int) -> int:
    openings = walk(order, shares_of(workers, order.batch_size), epoch_batches(order, 0))
    return most_open(openings, np.ones_like(openings.group))
