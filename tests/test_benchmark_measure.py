"""The meter of loaders: what counts, from when to when."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.benchmark.peers import _measure
from pipeline.benchmark.peers._measure import Server, Stretch


def test_cpu_time_of_threads_children_and_ended_children_counts() -> None:
    before = _measure.cpu_seconds(os.getpid())
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)  # ended and waited for
    waits = subprocess.Popen(
        [sys.executable, "-c", f"{spin}\nprint(1, flush=True)\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert waits.stdout is not None
    waits.stdout.readline()  # has spun, and is alive
    assert waits.pid in _measure.process_tree(os.getpid())
    assert _measure.cpu_seconds(os.getpid()) - before >= 0.57  # ticks of 10 ms for what ended
    waits.communicate(b"\n")
    assert _measure.cpu_seconds(os.getpid()) - before >= 0.57


def test_a_stretch_counts_pictures_and_their_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(3)]
    for path in paths:
        path.write_bytes(os.urandom(5000))

    def batches() -> Iterator[list[bytes]]:
        while True:
            yield [Path(path).read_bytes() for path in paths[:3]]

    stretch = _measure.measure(batches(), images=898, seconds=0.0, server=None)
    assert stretch.images == 900
    total = sum(Path(path).stat().st_size for path in paths[:3]) * 300
    assert stretch.bytes_read is not None
    assert total <= stretch.bytes_read < 1.2 * total  # the meter reads /proc
    assert stretch.seconds > 0


def test_a_stretch_ends_with_the_batches_and_lasts_as_long_as_asked() -> None:
    assert _measure.measure(iter([[1, 2], [3]]), images=100, seconds=0.0, server=None).images == 3
    assert _measure.measure(_measure.endless(lambda _: [[1]]), images=1, seconds=0.05, server=None).seconds >= 0.05


def test_stretches_add_up_and_what_is_unknown_stays_so() -> None:
    both = _measure.add(Stretch(1, 2.0, 3.0, 4.0, None), Stretch(10, 20.0, 30.0, 40.0, 50.0))
    assert both == Stretch(11, 22.0, 33.0, 44.0, None)


@pytest.mark.parametrize("batch", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3)])
def test_a_loader_that_does_other_work_is_refused(batch: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(B, 8, 8, 3\)"):
        _measure.first_batch(lambda: iter([batch]), 8)


@given(st.integers(0, 40), st.integers(1, 7))
def test_an_endless_loader_goes_through_its_epochs(taken: int, length: int) -> None:
    batches = _measure.endless(lambda epoch: [(epoch, number) for number in range(length)])
    assert [next(batches) for _ in range(taken)] == [(n // length, n % length) for n in range(taken)]


def test_without_counters_of_the_server_bytes_are_unknown() -> None:
    stretch = _measure.measure(iter([[1]]), images=1, seconds=0.0, server=Server("bucket"))
    assert (stretch.bytes_read, stretch.server_cpu_seconds) == (None, None)
