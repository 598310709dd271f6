"""Stamps of time that suit a device, and a clock of the phases of an update."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import torch

Stamp = float | torch.cuda.Event


def stamp(device: torch.device) -> Stamp:
    """This moment: the host's (CPU), or the place in the device's queue of work (CUDA), without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(began: Stamp, ended: Stamp) -> float:
    """Seconds from one stamp to another of the same device; on CUDA it must have passed both."""
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
    return began.elapsed_time(ended) / 1e3


def finish(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Sums up the seconds of each phase; of nested phases the outermost counts. One thread only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inside = False
        self._spans: list[tuple[str, Stamp, Stamp]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside = True
        began = stamp(self.device)
        try:
            yield
        finally:
            self._spans.append((name, began, stamp(self.device)))
            self._inside = False

    def seconds(self) -> dict[str, float]:
        """Total seconds of each phase so far, in the order in which they first came."""
        finish(self.device)
        totals: dict[str, float] = {}
        for name, began, ended in self._spans:
            totals[name] = totals.get(name, 0.0) + seconds_between(began, ended)
        return totals

    def visits(self) -> Counter[str]:
        """How often each phase was gone through."""
        return Counter(name for name, _, _ in self._spans)

    def reset(self) -> None:
        """Forgets everything so far."""
        self._spans.clear()
