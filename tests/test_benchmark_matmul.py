"""The measured rate of a matrix product. How fast a machine is no test asserts: others may be at work on it."""

import math
import time

import pytest
import torch

from pipeline.benchmark import matmul
from pipeline.benchmark.matmul import measured_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_rate_is_two_operations_per_multiplication_over_the_faster_librarys_time(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = iter([0.5, 0.25])
    monkeypatch.setattr(matmul, "_seconds", lambda call, device, seconds: (call(), next(took))[1])
    both = dtype == torch.float32 and torch.backends.mkldnn.is_available()
    assert measured_rate(dtype, CPU, (1024, 256), 0.1) == 2 * 1024 * 256 * 256 / (0.25 if both else 0.5)


def test_a_call_takes_the_time_that_it_takes() -> None:
    assert matmul._seconds(lambda: time.sleep(0.002), CPU, 0.05) >= 0.002


def test_this_machine_has_a_rate() -> None:
    assert 0 < measured_rate(torch.float32, CPU, (1024, 256), 0.05) < math.inf


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(ValueError, match=r"size is \(0, 512\)"):
        measured_rate(torch.float32, CPU, (0, 512))
