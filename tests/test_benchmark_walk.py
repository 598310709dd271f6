from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.benchmark.walk import Openings, epoch_batches, epoch_samples, most_open, shares_of, stream, walk
from pipeline.data.order import Order


class Case(NamedTuple):
    order: Order
    workers: int
    epoch: int

    @property
    def shares(self) -> list[range]:
        return shares_of(self.workers, self.order.batch_size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small data sets of any row groups, on up to five workers."""
    rows = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    groups = draw(st.integers(1, 5))
    order = Order(rows, "ab", draw(st.integers(0, 99)), 4 * groups, draw(st.integers(1, 3)))
    return Case(order, draw(st.integers(1, groups)), draw(st.integers(0, 3)))


def one_by_one(order: Order, shares: list[range], batches: range) -> dict[tuple[int, int, int], tuple[int, int]]:
    """(worker, epoch, row group) to its first and last batch, asking the order for one sample at a time."""
    found: dict[tuple[int, int, int], tuple[int, int]] = {}
    for batch in batches:
        for worker, share in enumerate(shares):
            for place in share:
                index = order.at(batch * order.batch_size, [place])[0]
                epoch = (batch * order.batch_size + place) // order.samples
                key = (worker, epoch, int(order.group_of(index)[0][0]))
                found[key] = (found.get(key, (batch, batch))[0], batch)
    return found


def as_dict(openings: Openings) -> dict[tuple[int, int, int], tuple[int, int]]:
    columns = (openings.worker, openings.epoch, openings.group, openings.first, openings.last)
    return {
        (worker, epoch, group): (first, last)
        for worker, epoch, group, first, last in np.stack(columns, axis=1).tolist()
    }


@settings(max_examples=50)
@given(cases(), st.integers(0, 3))
def test_openings_are_those_of_a_walk_sample_by_sample(case: Case, more: int) -> None:
    whole = epoch_batches(case.order, case.epoch)
    batches = range(whole.start, whole.stop + more)
    openings = walk(case.order, case.shares, batches)
    expected = one_by_one(case.order, case.shares, batches)
    assert as_dict(openings) == expected and len(openings) == len(expected)
    in_order = np.lexsort((openings.first, openings.worker))
    assert np.array_equal(in_order, np.arange(len(openings)))


@given(cases())
def test_all_workers_together_read_at_most_w_row_groups_twice(case: Case) -> None:
    """The bound 1 + W/R; each row group with samples is read."""
    openings = walk(case.order, case.shares, epoch_batches(case.order, case.epoch))
    openings = openings.take(openings.epoch == case.epoch)
    filled = np.flatnonzero(case.order.rows)
    assert set(openings.group.tolist()) == set(filled.tolist())
    assert len(openings) <= len(filled) + (case.workers if case.workers > 1 else 0)


@given(cases())
def test_an_epoch_is_each_sample_once(case: Case) -> None:
    samples = epoch_samples(case.order, case.epoch)
    assert sorted(samples.tolist()) == list(range(case.order.samples))
    batches = epoch_batches(case.order, case.epoch)
    first = case.order.at(batches.start * case.order.batch_size, range(case.order.batch_size))[0]
    begin = case.epoch * case.order.samples - batches.start * case.order.batch_size
    assert np.array_equal(samples[: case.order.batch_size - begin], first[begin:][: case.order.samples])


def test_a_stream_comes_in_parts_that_are_the_order() -> None:
    order = Order([64] * 300, "ab", 0, 8, 2)
    places = np.arange(4, 8)
    parts = list(stream(order, places, range(100, 2400)))
    assert len(parts) > 1 and parts[0][0] == 100
    assert np.array_equal(np.concatenate([indices for _, indices in parts]), order.at(800, places, 2300))


@given(cases())
def test_most_open_is_the_largest_of_all_batches(case: Case) -> None:
    batches = epoch_batches(case.order, 0)
    openings = walk(case.order, case.shares, batches)
    weights = openings.group + 1
    held = [
        int(weights[(openings.worker == worker) & (openings.first <= batch) & (openings.last >= batch)].sum())
        for worker in range(case.workers)
        for batch in batches
    ]
    assert most_open(openings, weights) == max(held)


def test_a_share_holds_a_row_group_for_each_stretch() -> None:
    """What `DataStream` has room for is enough where row groups are many."""
    order = Order([32] * 400, "ab", 0, 16, 2)
    openings = walk(order, shares_of(2, 16), epoch_batches(order, 0))
    assert most_open(openings, np.ones_like(openings.group)) == 8 * 2
