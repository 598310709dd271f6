from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import Order

DIGEST = "ab" * 32
ROWS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
SPREADS = st.integers(1, 4)
BATCHES = st.integers(1, 24)
WORKERS = [1, 2, 3, 4, 8]


def stream_of(order: Order, images_seen: int, count: int) -> list[int]:
    """The next `count` samples of the stream, by whole batches."""
    places = range(order.batch_size)
    return order.at(images_seen, places, -(-count // order.batch_size)).ravel()[:count].tolist()


def shares(batch_size: int, workers: int) -> list[range]:
    """Contiguous places of each worker, as unequal as training deals them."""
    edges = [batch_size * rank // workers for rank in range(workers + 1)]
    return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


@given(ROWS, BATCHES, SPREADS, st.integers(0, 2**31))
def test_three_epochs_on_end_visit_every_sample_once_each(rows: list[int], batch: int, spread: int, seed: int) -> None:
    """Also where the samples are no multiple of the batch, and where they are fewer than one batch."""
    samples = sum(rows)
    stream = stream_of(Order(rows, DIGEST, seed, batch, spread), 0, 3 * samples)
    for epoch in range(3):
        assert Counter(stream[epoch * samples : (epoch + 1) * samples]) == Counter(range(samples))


@given(ROWS, BATCHES, SPREADS, st.integers(0, 2**40))
def test_an_epoch_far_away_is_whole_as_well(rows: list[int], batch: int, spread: int, epoch: int) -> None:
    samples = sum(rows)
    begin = -(-epoch * samples // batch) * batch  # the first batch that begins in the epoch
    skipped = begin - epoch * samples
    order = Order(rows, DIGEST, 1, batch, spread)
    head = order.at(begin - batch, range(batch))[0].tolist()[batch - skipped :] if skipped else []
    rest = stream_of(order, begin, samples - skipped) if skipped <= samples else []
    assert Counter((head + rest)[:samples]) == Counter(range(samples)) or skipped > samples


@pytest.mark.parametrize("workers", WORKERS)
@given(ROWS, st.integers(8, 24), SPREADS, st.integers(0, 3))
def test_every_number_of_workers_sees_the_same_batches(
    workers: int, rows: list[int], batch: int, spread: int, start: int
) -> None:
    count = 3 * sum(rows) // batch + 2
    whole = Order(rows, DIGEST, 1, batch, spread).at(start * batch, range(batch), count)
    order = Order(rows, DIGEST, 1, batch, spread)
    parts = [order.at(start * batch, share, count) for share in shares(batch, workers)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("workers", WORKERS)
@given(ROWS, st.integers(8, 24), SPREADS)
def test_resuming_at_every_batch_of_an_epoch_is_going_on(
    workers: int, rows: list[int], batch: int, spread: int
) -> None:
    """A new object, as after a restart, and each number of workers: nothing is computed from what came before."""
    count = sum(rows) // batch + 2
    whole = Order(rows, DIGEST, 1, batch, spread).at(0, range(batch), count)
    for number in range(count):
        resumed = Order(rows, DIGEST, 1, batch, spread)
        parts = [resumed.at(number * batch, share)[0] for share in shares(batch, workers)]
        assert np.array_equal(np.concatenate(parts), whole[number])


@pytest.mark.parametrize("workers", WORKERS)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(8, 24), SPREADS, st.integers(0, 5))
def test_together_workers_read_each_row_group_once_and_one_more_for_each_border(
    workers: int, rows: list[int], batch: int, spread: int, epoch: int
) -> None:
    """The bound of 1 + W/R times the data set's bytes, for a reader that holds one row group for each stretch."""
    samples = sum(rows)
    order = Order(rows, DIGEST, 1, batch, spread)
    reads = 0
    for share in shares(batch, workers):
        begin = epoch * samples // batch * batch
        stream = begin + np.arange(samples // batch + 2)[:, None] * batch + np.asarray(share)
        indices = order.at(begin, share, len(stream))
        groups = np.where(stream // samples == epoch, order.group_of(indices)[0], -1)
        reads += len(set(groups.ravel().tolist()) - {-1})
        assert_read_in_one_stretch(groups, spread)
    assert reads <= len(rows) + workers - 1 + (sum(rows) < batch) * workers * len(rows)


def assert_read_in_one_stretch(groups: np.ndarray, spread: int) -> None:
    """From its first to its last use a row group is needed at least every other lap: it may be let go after that."""
    for group in set(groups.ravel().tolist()) - {-1}:
        uses = np.flatnonzero((groups == group).any(axis=1))
        assert np.diff(uses).max(initial=0) <= 2 * spread


@given(st.integers(20, 60), st.integers(1, 3))
def test_no_more_row_groups_are_open_than_stretches(count: int, spread: int) -> None:
    order = Order([6] * count, DIGEST, 3, 8, spread)
    groups = order.group_of(order.at(0, range(8), 6 * count // 8))[0]
    first = {group: batch for batch, row in reversed(list(enumerate(groups.tolist()))) for group in row}
    last = {group: batch for batch, row in enumerate(groups.tolist()) for group in row}
    for batch in range(len(groups)):
        open_now = [group for group in first if first[group] <= batch <= last[group]]
        assert len(open_now) <= 8 * spread + 8  # one that ends and one that begins in the same batch


def test_pictures_of_a_batch_come_from_different_row_groups() -> None:
    order = Order([64] * 200, DIGEST, 3, 16, 2)
    groups = order.group_of(order.at(0, range(16), 800))[0]
    pairs = sum(len(row) - len(set(row)) for row in groups.tolist())
    assert pairs / (800 * 16) < 0.1


@given(ROWS)
def test_rows_are_found_again(rows: list[int]) -> None:
    groups, inside = Order(rows, DIGEST, 1, 4, 2).group_of(np.arange(sum(rows)))
    expected = [(group, row) for group, count in enumerate(rows) for row in range(count)]
    assert list(zip(groups.tolist(), inside.tolist(), strict=True)) == expected


def test_all_that_names_an_order_changes_it() -> None:
    rows = [10] * 10
    orders = [
        stream_of(Order(rows, DIGEST, 0, 4, 2), 0, 100),
        stream_of(Order(rows, DIGEST, 1, 4, 2), 0, 100),
        stream_of(Order(rows, "cd" * 32, 0, 4, 2), 0, 100),
        stream_of(Order(rows, DIGEST, 0, 4, 3), 0, 100),
        stream_of(Order(rows, DIGEST, 0, 5, 2), 0, 100),
        stream_of(Order(rows, DIGEST, 0, 4, 2), 100, 100),
        stream_of(Order(rows, DIGEST, 0, 4, 2), 100 << 33, 100),
        list(range(100)),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_places_are_uniform() -> None:
    """Where a sample stands in an epoch is uniform: the mean over many epochs is the middle."""
    order = Order([5] * 8, DIGEST, 3, 8, 2)
    streams = np.array(stream_of(order, 0, 400 * 40)).reshape(400, 40)
    deviation = np.argsort(streams, axis=1).mean(axis=0) - 19.5
    assert np.abs(deviation).max() < 4.5 * np.sqrt((40**2 - 1) / 12 / 400)


def test_every_pair_can_meet_in_a_batch() -> None:
    """Two samples of one row group as well, where it lies on a border of stretches."""
    order = Order([5] * 7, DIGEST, 3, 4, 1)
    batches = np.array(stream_of(order, 0, 2000 * 35)).reshape(-1, 4)
    met = np.zeros((35, 35), dtype=int)
    for one in range(4):
        for other in range(4):
            np.add.at(met, (batches[:, one], batches[:, other]), one != other)
    assert (met[~np.eye(35, dtype=bool)] > 0).all()


def test_order_is_the_same_for_ever() -> None:
    """A change here makes every running training start over on other pictures."""
    indices = Order([4, 3, 5, 2, 6], DIGEST, 7, 4, 2).at(40, range(4), 3)
    assert indices.tolist() == [[3, 8, 15, 14], [5, 4, 9, 18], [0, 6, 7, 17]]


def test_far_places_are_computed_like_near_ones() -> None:
    """No walk from the start: the last batch of a million epochs of two million samples costs what the first costs."""
    order = Order([256] * 7812, DIGEST, 0, 32, 2)
    calls: Counter[int] = Counter()
    shuffle = order._permute_rows

    def counted(epoch: int, group: int) -> np.ndarray:
        calls[epoch] += 1
        return shuffle(epoch, group)

    order._rows = counted  # type: ignore[assignment]
    far = 32 * 10**12
    order.at(far, range(4))
    assert calls == {far // order.samples: 4}


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Order([], DIGEST, 0, 4, 2), "needs samples"),
        (lambda: Order([0], DIGEST, 0, 4, 2), "needs samples"),
        (lambda: Order([2**31, 2**31], DIGEST, 0, 4, 2), "at most 4294967295"),
        (lambda: Order([3], DIGEST, 0, 4, 0), "spread 0"),
        (lambda: Order([3], DIGEST, 0, 0, 1), "batch_size is 0"),
        (lambda: Order([3], DIGEST, 0, 4, 1).at(-1, [0]), "images_seen is -1"),
        (lambda: Order([3], DIGEST, 0, 4, 1).at(0, [4]), "places of a batch of 4"),
    ],
)
def test_nonsense_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
