"""Peak memory that can be counted anew."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from pipeline.benchmark.memory import current_bytes, peak_bytes, reset_peak

MB = 1 << 20


def test_the_peak_is_that_of_what_followed_the_reset() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # one whose allocator nobody has changed
        pool.submit(peaks).result()


def peaks() -> None:
    large = torch.ones(96 * MB, dtype=torch.uint8)
    del large
    assert reset_peak()
    base = current_bytes()
    assert abs(peak_bytes() - base) < 16 * MB  # the large one is forgotten
    small = torch.ones(48 * MB, dtype=torch.uint8)
    del small
    assert 40 * MB < peak_bytes() - base < 64 * MB
    assert current_bytes() - base < 16 * MB


def test_memory_is_told_in_bytes() -> None:
    assert MB < current_bytes() <= peak_bytes()
