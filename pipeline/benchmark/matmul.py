"""What the machine's own matrix product reaches: the yardstick for everything that is made of matrix products."""

import math
import statistics
import time

import torch

from pipeline.benchmark.clock import finish

STRETCHES = 5
SIZE = (16384, 512)
"""Pixels and width: four pictures of 64 x 64, or a quarter of one of 256 x 256, in the paper's width."""


def measured_rate(
    dtype: torch.dtype, device: torch.device, size: tuple[int, int] = SIZE, seconds: float = 1.0
) -> float:
    """FLOP/s (two per multiply-add) of (pixels, width) @ (width, width), the generator's product, in `dtype`.

    The median of several stretches that take about `seconds` together. float32 on CUDA is the rate that
    `torch.backends.cuda.matmul.allow_tf32` allows at the moment.
    """
    pixels, width = size
    if pixels < 1 or width < 1 or not seconds > 0:
        raise ValueError(
            f"size is {size} and seconds {seconds}: expected pixels and width of at least 1, and some time"
        )
    left = torch.randn(pixels, width, device=device).to(dtype)
    right = torch.randn(width, width, device=device).to(dtype)
    out = torch.empty(pixels, width, device=device, dtype=dtype)

    def stretch(products: int) -> float:
        finish(device)
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right, out=out)
        finish(device)
        return time.perf_counter() - began

    stretch(3)  # libraries choose and unpack their kernels in the first
    products = max(1, math.ceil(seconds / STRETCHES / max(stretch(3) / 3, 1e-7)))
    took = statistics.median(stretch(products) for _ in range(STRETCHES))
    return 2.0 * pixels * width * width * products / took
