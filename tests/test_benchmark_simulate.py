import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.benchmark import simulate as simulator
from pipeline.benchmark.simulate import (
    Cluster,
    Shape,
    Timeline,
    batch_for,
    busiest_second,
    imagined,
    plan_bytes,
    sampled_workers,
    shared_borders,
    simulate,
    timeline,
)
from pipeline.benchmark.walk import Openings, epoch_batches, shares_of, walk
from pipeline.data.manifest import FOOTERS_NAME, NAME
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from pipeline.data.stream import DataConfig, DataStream
from pipeline.storage import StorageConfig
from tests.pictures import encoded, write_data_set

FAST = Cluster(workers=1, latency_s=0.0, bandwidth=1e12, images_per_second=100.0, threads=4, read_ahead=2)
EXACT = 10**9
MB = 1_000_000


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_exact_counts_are_those_of_a_walk_through_the_epoch(data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)))
    workers, spread = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    shape = Shape("small", rows, rows * 7 + 1, "ab")
    batch_size = 4 * data.draw(st.integers(workers, 5))
    report = simulate(shape, replace(FAST, workers=workers), batch_size, spread, 5, exact_samples=EXACT)

    order = Order(rows, "ab", 5, batch_size, spread)
    seen: list[set[int]] = [set() for _ in range(workers)]
    for place in range(shape.samples):  # of the first epoch
        worker = next(w for w, share in enumerate(shares_of(workers, batch_size)) if place % batch_size in share)
        batch = place // batch_size * batch_size
        seen[worker].add(int(order.group_of(order.at(batch, [place % batch_size])[0])[0][0]))
    counts = [len(groups) for groups in seen]
    read = sum(int(shape.bytes[group]) for groups in seen for group in groups)
    assert report.exact and report.walked == workers and report.batch_size == batch_size
    assert report.opened == pytest.approx((min(counts), np.mean(counts), max(counts)))
    assert report.read_ratio == pytest.approx(read / shape.bytes.sum())
    assert sum(counts) <= report.ratio_bound * len(rows) + 1e-9
    assert report.requests_per_second > 0 and report.waiting < 1e-6


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_equal_row_groups_hold_the_bound_in_bytes(workers: int) -> None:
    shape = Shape("equal", np.full(200, 32), np.full(200, 1000), "ab")
    report = simulate(shape, replace(FAST, workers=workers), 32, 2, exact_samples=EXACT)
    assert 1 <= report.read_ratio <= report.ratio_bound == 1 + workers / 200


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 16), (2, 16), (8, 32), (40, 32)])
def test_a_projection_is_near_the_exact_count(monkeypatch: pytest.MonkeyPatch, workers: int, batch_size: int) -> None:
    monkeypatch.setattr(simulator, "SAMPLED_SAMPLES", 8_000)
    shape = imagined("medium", 48_000, 500_000)  # row groups of 16
    cluster = replace(FAST, workers=workers)
    exact = simulate(shape, cluster, batch_size, 2, exact_samples=EXACT)
    sampled = simulate(shape, cluster, batch_size, 2, exact_samples=0)
    assert exact.exact and not sampled.exact and sampled.walked == min(workers, 6)
    assert sampled.opened[1] == pytest.approx(exact.opened[1], rel=0.05)
    assert sampled.opened[0] <= sampled.opened[1] + 1e-6 and sampled.opened[1] <= sampled.opened[2] + 1e-6
    assert sampled.read_ratio == pytest.approx(exact.read_ratio, abs=3 / len(shape.rows))
    assert sampled.requests_per_second == pytest.approx(exact.requests_per_second, rel=0.05)
    assert sampled.buffer_bytes == pytest.approx(exact.buffer_bytes, rel=0.2)
    assert sampled.first_batch_s - sampled.plan_s == pytest.approx(exact.first_batch_s - exact.plan_s, rel=0.05)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_all_borders_are_found_when_all_workers_are_looked_at(workers: int) -> None:
    order = Order([40] * 50, "ab", 1, 32, 2)
    shares = shares_of(workers, 32)
    openings = walk(order, shares, epoch_batches(order, 0))
    read = int((openings.epoch == 0).sum())
    assert shared_borders(order, shares, range(workers)) == read - 50


def test_the_workers_that_are_sampled_are_neighbours() -> None:
    assert sampled_workers(1) == [0]
    assert sampled_workers(2) == [0, 1]
    assert sampled_workers(512) == [0, 1, 255, 256, 510, 511]


@given(st.integers(1, 1000), st.integers(1, 5000))
def test_a_batch_grows_until_each_worker_has_a_minibatch_stddev_group(workers: int, batch_size: int) -> None:
    batch = batch_for(workers, batch_size)
    assert batch % 4 == 0 and batch >= max(batch_size, 4 * workers)
    assert batch - 4 < max(batch_size, 4 * workers)
    assert all(len(share) >= 4 for share in shares_of(workers, batch))


@given(st.integers(1, 100_000), st.integers(1, 20 << 20))
def test_an_imagined_data_set_has_the_row_groups_of_an_ingest(samples: int, picture_bytes: int) -> None:
    shape = imagined("x", samples, picture_bytes)
    assert shape.samples == samples and shape.bytes.sum() == samples * picture_bytes
    assert shape.rows.min() >= 1 and shape.rows.max() <= 256
    assert shape.rows.max() == 1 or shape.bytes.max() <= 8 << 20
    assert len(set(shape.rows[:-1].tolist())) <= 1


def test_the_plan_is_about_as_large_as_a_real_one(tmp_path: Path) -> None:
    """Growth of both files from 20 to 120 row groups."""

    def size(count: int) -> int:
        folder = tmp_path / str(count)
        write_data_set(str(folder), [encoded(0)] * count, rows=1)
        return sum((folder / name).stat().st_size for name in (NAME, FOOTERS_NAME))

    ones = np.ones(100, dtype=np.int64)
    assert plan_bytes(Shape("x", ones, ones)) == pytest.approx(size(120) - size(20), rel=0.2)


def test_a_real_stream_reads_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`DataStream` over an epoch: each row group that is counted, and what it has room for of the next epoch."""
    manifest = write_data_set(str(tmp_path), [encoded(number) for number in range(40)] * 50, rows=4)
    readers: list[Reader] = []

    class Recorded(Reader):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            readers.append(self)

    monkeypatch.setattr("pipeline.data.stream.Reader", Recorded)
    data = DataConfig(uri=str(tmp_path), decoder="pillow", read_ahead=0)
    order = Order([group.rows for group in manifest.row_groups], manifest.digest, 3, 16, data.shuffle_row_groups)
    for share in shares_of(2, 16):
        batches = epoch_batches(order, 0)
        counted = len(walk(order, [share], batches))
        with DataStream(manifest, data, StorageConfig(), seed=3, batch_size=16, positions=share) as stream:
            for _ in batches:
                next(stream)
            asked = readers[-1].requests
        assert 250 <= counted <= asked <= counted + len(share) * data.shuffle_row_groups


# ---- time ----------------------------------------------------------------------------------------


def one_reader(
    firsts: list[int], lasts: list[int], cluster: Cluster, capacity: int, batches: int, step_s: float, size: int = MB
) -> Timeline:
    """One worker that reads equal row groups."""
    count = np.arange(len(firsts))
    openings = Openings(0 * count, 0 * count, count, np.array(firsts), np.array(lasts))
    return timeline(openings, np.full(len(count), size), [capacity], batches, step_s, cluster)


def test_the_first_batch_takes_the_latency_and_the_bytes() -> None:
    cluster = replace(FAST, latency_s=0.5, bandwidth=10 * MB)
    one = one_reader([0], [9], cluster, 4, 10, 1.0)
    assert (one.ready_s, one.waited_s, one.seconds, one.most_held) == (pytest.approx(0.6), 0, 10, MB)
    assert one_reader([0, 0, 0], [9, 9, 9], cluster, 4, 10, 1.0).ready_s == pytest.approx(0.8)  # latencies overlap
    slow = replace(cluster, threads=1)
    assert one_reader([0, 0, 0], [9, 9, 9], slow, 4, 10, 1.0).ready_s == pytest.approx(1.8)  # one after another


def test_reading_ahead_hides_the_latency() -> None:
    cluster = replace(FAST, latency_s=2.5, bandwidth=1e12)
    firsts, lasts = list(range(50)), list(range(50))
    assert one_reader(firsts, lasts, cluster, 4, 50, 1.0).waited_s == pytest.approx(0, abs=1e-3)
    assert one_reader(firsts, lasts, cluster, 1, 50, 1.0).waited_s == pytest.approx(49 * 2.5, rel=1e-3)


@given(st.integers(1, 50), st.integers(1, 40), st.integers(1, 8))
def test_too_little_bandwidth_is_waited_for(need: int, have: int, capacity: int) -> None:
    """Row groups of 1 MB, one a second wanted at `need` MB/s."""
    cluster = replace(FAST, bandwidth=have * MB)
    found = one_reader(list(range(400)), list(range(400)), cluster, capacity, 400, 1 / need)
    hidden = max(0.0, 1 / have - 1 / need) * 399
    if need > have and capacity > 1:
        assert found.waited_s / found.seconds == pytest.approx(1 - have / need, abs=0.03)
        assert found.waited_s == pytest.approx(hidden, rel=0.05, abs=8 / have)
    elif capacity > 1:
        assert found.waited_s == pytest.approx(0, abs=1e-9)


def test_a_worker_never_holds_more_than_it_has_room_for() -> None:
    firsts = [batch // 2 for batch in range(100)]
    lasts = [first + 3 for first in firsts]
    for capacity in (8, 10, 20):
        assert one_reader(firsts, lasts, FAST, capacity, 60, 1.0).most_held == capacity * MB
    assert one_reader(firsts, lasts, FAST, 1, 60, 1.0).most_held == 8 * MB  # what a batch needs is read anyway


def test_no_worker_goes_on_before_the_slowest() -> None:
    """Two workers, of which one reads at twice the time: both wait for it."""
    batches = np.arange(100)
    worker = np.repeat([0, 1], 100)
    openings = Openings(
        worker, 0 * worker, np.concatenate([0 * batches, 1 + 0 * batches]), *([np.tile(batches, 2)] * 2)
    )
    cluster = replace(FAST, bandwidth=MB)
    found = timeline(openings, np.array([MB, 2 * MB]), [3, 3], 100, 0.5, cluster)
    assert found.seconds == pytest.approx(200, rel=0.03)
    assert found.most_held == 6 * MB and len(found.issued) == 200


def test_too_small_a_bandwidth_shows_in_the_report() -> None:
    shape = imagined("slow", 4000, 100_000)
    cluster = replace(FAST, workers=2, images_per_second=100.0, bandwidth=5 * MB, latency_s=0.03)
    report = simulate(shape, cluster, 32, 2, exact_samples=EXACT)
    assert report.bytes_per_second == pytest.approx(100 * 100_000, rel=0.1)  # and what is read twice
    assert 0.4 < report.waiting < 0.65
    fast = simulate(shape, replace(cluster, bandwidth=1000 * MB), 32, 2, exact_samples=EXACT)
    assert fast.waiting < 0.05 and fast.first_batch_s < report.first_batch_s
    assert fast.requests_per_second > 1.7 * report.requests_per_second
    assert report.buffer_bytes <= (16 * 2 + cluster.read_ahead) * int(shape.bytes.max())


@given(st.lists(st.floats(0, 20), min_size=1, max_size=40))
def test_the_busiest_second_has_the_most_events(times: list[float]) -> None:
    issued = np.sort(times)
    assert busiest_second(issued) == max(sum(begin <= time < begin + 1 for time in times) for begin in times)


def test_the_peak_is_that_of_the_beginning() -> None:
    """Eight workers, each of which asks at once for what it has room for, where no two stretches share a row group."""
    shape = imagined("peak", 200_000, 30_000)
    report = simulate(shape, replace(FAST, workers=8), 32, 2, exact_samples=EXACT)
    assert 0.8 < report.peak_requests / (8 * (4 * 2 + FAST.read_ahead)) <= 1
    assert report.peak_requests > 5 * report.requests_per_second


def test_planning_does_not_depend_on_how_far_training_is() -> None:
    shape = imagined("plan", 50_000, 30_000)
    report = simulate(shape, FAST, 32, 2, exact_samples=EXACT)
    assert 0 < report.plan_s < report.first_batch_s
    assert math.isfinite(report.first_batch_s)
