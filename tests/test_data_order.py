from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import Order, batch_indices

DIGEST = "ab" * 32
ROWS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
WINDOWS = st.integers(1, 5)


@given(ROWS, WINDOWS, st.integers(0, 2**40), st.integers(0, 2**31))
def test_every_epoch_is_a_permutation(rows: list[int], window: int, seed: int, epoch: int) -> None:
    samples = sum(rows)
    order = Order(rows, DIGEST, seed, window)
    assert sorted(order.at(epoch * samples, samples).tolist()) == list(range(samples))


@given(ROWS, WINDOWS, st.data())
def test_batches_are_slices_of_one_stream(rows: list[int], window: int, data: st.DataObject) -> None:
    order = Order(rows, DIGEST, 1, window)
    stream = order.at(0, 3 * sum(rows))
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    assert np.array_equal(order.at(start, count), stream[start : start + count])
    assert np.array_equal(batch_indices(rows, DIGEST, 1, count, start, window), stream[start : start + count])


@given(ROWS, WINDOWS, st.data())
def test_workers_cut_the_same_stream(rows: list[int], window: int, data: st.DataObject) -> None:
    """Another split, another batch size: picture n stays picture n."""
    stream = Order(rows, DIGEST, 1, window).at(0, 40)
    cuts = sorted(data.draw(st.sets(st.integers(1, 39))))
    order = Order(rows, DIGEST, 1, window)
    parts = [order.at(start, stop - start) for start, stop in zip([0, *cuts], [*cuts, 40], strict=True)]
    assert np.array_equal(np.concatenate(parts), stream)


@given(ROWS, WINDOWS, st.integers(0, 500), st.integers(0, 6))
def test_the_row_groups_ahead_are_those_that_are_needed_next(
    rows: list[int], window: int, position: int, more: int
) -> None:
    order = Order(rows, DIGEST, 1, window)
    now, ahead = order.groups_ahead(position, 0), order.groups_ahead(position, more)
    assert ahead[: len(now)] == now and len(now) <= window and len(ahead) == len(now) + more
    upcoming = order.group_of(order.at(position, 20))[0].tolist()
    assert upcoming[0] in now
    assert upcoming[1] in order.groups_ahead(position, window)
    for step, group in enumerate(upcoming):  # what is in hand stays in hand until its window ends
        if order.groups_ahead(position + step, 0) != now:
            break
        assert group in now


@given(ROWS, WINDOWS)
def test_a_window_holds_few_row_groups(rows: list[int], window: int) -> None:
    """What a reader must hold: each row group is read in one stretch of the epoch, beside `window` - 1
    others."""
    order = Order(rows, DIGEST, 5, window)
    groups = order.group_of(order.at(0, sum(rows)))[0].tolist()
    seen: list[set[int]] = [set()]
    for group in groups:
        if group not in seen[-1]:
            if len(seen[-1]) == window and all(groups.count(one) == rows[one] for one in seen[-1]):
                seen.append(set())
            seen[-1].add(group)
    assert all(len(together) <= window for together in seen)
    assert sum(len(together) for together in seen) == len(rows)


@given(ROWS)
def test_rows_are_found_again(rows: list[int]) -> None:
    order = Order(rows, DIGEST, 1, 2)
    groups, inside = order.group_of(np.arange(sum(rows)))
    expected = [(group, row) for group, count in enumerate(rows) for row in range(count)]
    assert list(zip(groups.tolist(), inside.tolist(), strict=True)) == expected


def test_seed_digest_and_epoch_change_the_order() -> None:
    rows = [10] * 10
    orders = [
        Order(rows, DIGEST, 0, 4).at(0, 100),
        Order(rows, DIGEST, 1, 4).at(0, 100),
        Order(rows, "cd" * 32, 0, 4).at(0, 100),
        Order(rows, DIGEST, 0, 3).at(0, 100),
        Order(rows, DIGEST, 0, 4).at(100, 100),
        Order(rows, DIGEST, 0, 4).at(100 << 33, 100),
        np.arange(100),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


def test_positions_are_uniform() -> None:
    """Where a sample stands in an epoch is uniform: the mean over many epochs is the middle."""
    order = Order([5] * 8, DIGEST, 3, 3)
    places = np.stack([np.argsort(order.at(epoch * 40, 40)) for epoch in range(400)])
    deviation = places.mean(axis=0) - 19.5
    assert np.abs(deviation).max() < 4.5 * np.sqrt((40**2 - 1) / 12 / 400)


def test_order_is_the_same_for_ever() -> None:
    """A change here makes every running training start over on other pictures."""
    indices = batch_indices([4, 3, 5], DIGEST, 7, 14, 20, window=2)
    assert indices.tolist() == [1, 2, 0, 3, 3, 0, 5, 4, 6, 1, 2, 11, 10, 8]


def test_fewer_samples_than_a_batch() -> None:
    indices = batch_indices([2, 1], DIGEST, 0, 8, images_seen=4)
    assert len(indices) == 8 and set(indices.tolist()) == {0, 1, 2}
    assert batch_indices([1], DIGEST, 0, 3, images_seen=2**45).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Order([], DIGEST, 0, 4), "needs samples"),
        (lambda: Order([0], DIGEST, 0, 4), "needs samples"),
        (lambda: Order([2**31, 2**31], DIGEST, 0, 4), "at most 4294967295"),
        (lambda: Order([3], DIGEST, 0, 0), "window is 0"),
        (lambda: Order([3], DIGEST, 0, 1).at(-1, 2), "not negative"),
    ],
)
def test_nonsense_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
