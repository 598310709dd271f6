"""The measured rate of a matrix product."""

import time
from functools import partial

import pytest
import torch

from pipeline.benchmark.matmul import measured_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rate_is_that_of_a_product_timed_by_hand(dtype: torch.dtype) -> None:
    left, right = torch.randn(1024, 256).to(dtype), torch.randn(256, 256).to(dtype)
    picture, kernel = (
        left.t()[None, :, :, None].contiguous(memory_format=torch.channels_last),
        right.t()[:, :, None, None],
    )
    torch.testing.assert_close(torch.conv2d(picture, kernel)[0, :, :, 0].t(), left @ right, rtol=2e-2, atol=2e-1)
    best = float("inf")
    for _ in range(20):
        for call in (partial(torch.mm, left, right), partial(torch.conv2d, picture, kernel)):
            began = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - began)
    rate = measured_rate(dtype, CPU, (1024, 256), 0.1)
    assert 0.05 < rate / (2 * 1024 * 256 * 256 / best) < 4  # other work on the machine only slows it down


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(ValueError, match=r"size is \(0, 512\)"):
        measured_rate(torch.float32, CPU, (0, 512))
