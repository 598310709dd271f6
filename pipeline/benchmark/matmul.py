"""What the machine's own matrix product reaches: the yardstick for everything that is made of matrix products."""

import math
import statistics
import time
from collections.abc import Callable

import torch

from pipeline.benchmark.clock import finish
from pipeline.ops.matrix_product import convolution

STRETCHES = 5
SIZE = (16384, 512)
"""Pixels and width: four pictures of 64 x 64, or a quarter of one of 256 x 256, in the paper's width."""


def measured_rate(
    dtype: torch.dtype, device: torch.device, size: tuple[int, int] = SIZE, seconds: float = 1.0
) -> float:
    """FLOP/s (two per multiply-add) of (pixels, width) @ (width, width), the generator's product, in `dtype`.

    The median of several stretches that take about `seconds` together; on a CPU that of the faster library, the one
    behind `torch.mm` or the one behind convolutions (`pipeline.ops.matrix_product`). float32 on CUDA is the rate
    that `torch.backends.cuda.matmul.allow_tf32` allows at the moment.
    """
    pixels, width = size
    if pixels < 1 or width < 1 or not seconds > 0:
        raise ValueError(
            f"size is {size} and seconds {seconds}: expected pixels and width of at least 1, and some time"
        )
    left = torch.randn(pixels, width, device=device).to(dtype)
    right = torch.randn(width, width, device=device).to(dtype)
    out = torch.empty(pixels, width, device=device, dtype=dtype)
    calls: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=out)]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        laid_out = right.t().contiguous().t()
        calls.append(lambda: convolution(left, laid_out))
    took = min(_seconds(call, device, seconds / len(calls)) for call in calls)
    return 2.0 * pixels * width * width / took


def _seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of one call: the median of stretches."""

    def stretch(products: int) -> float:
        finish(device)
        began = time.perf_counter()
        for _ in range(products):
            call()
        finish(device)
        return (time.perf_counter() - began) / products

    stretch(3)  # libraries choose and unpack their kernels in the first
    products = max(1, math.ceil(seconds / STRETCHES / max(stretch(3), 1e-7)))
    return statistics.median(stretch(products) for _ in range(STRETCHES))
