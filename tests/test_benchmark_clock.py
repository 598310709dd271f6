"""The clock of phases."""

import threading

import pytest
import torch

from pipeline.benchmark.clock import Clock, finish, seconds_between, stamp

CPU = torch.device("cpu")


def wait() -> None:
    threading.Event().wait(0.01)


def test_phases_add_up_and_the_outermost_counts() -> None:
    clock = Clock(CPU)
    for _ in range(2):
        with clock("a"):
            wait()
            with clock("b"):
                wait()
        with clock("b"):
            wait()
    seconds = clock.seconds()
    assert list(seconds) == ["a", "b"] and clock.visits() == {"a": 2, "b": 2}
    assert seconds["a"] > 0.04 and seconds["b"] > 0.02 and seconds["a"] > seconds["b"]


def test_a_phase_that_fails_counts_too() -> None:
    clock = Clock(CPU)
    with pytest.raises(RuntimeError), clock("a"):
        raise RuntimeError
    with clock("b"):
        pass
    assert clock.visits() == {"a": 1, "b": 1}


def test_a_reset_forgets() -> None:
    clock = Clock(CPU)
    with clock("a"):
        pass
    clock.reset()
    assert clock.seconds() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")
def test_stamps_of_a_gpu_measure_its_work() -> None:
    device = torch.device("cuda", 0)
    large = torch.randn(8192, 8192, device=device)
    large @ large
    finish(device)
    began = stamp(device)
    for _ in range(10):
        large @ large
    ended = stamp(device)
    finish(device)
    assert seconds_between(began, ended) > 10 * 2 * 8192**3 / 1e15
