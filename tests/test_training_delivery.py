"""The queue that stands between training and a tracking server: order, retries, refusals, memory."""

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from pipeline.training.delivery import Entry, Lane, RefusedError

DEADLINE_S = 30.0


def entry(step: int, weight: int = 1, size: int = 0) -> Entry:
    return Entry("metrics", f"entry {step}", None, step, 0, size, weight)


class Receiver:
    """Takes entries while it is up; what it does while down is up to the test."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.up = threading.Event()
        self.tried = threading.Semaphore(0)
        self.bad: set[int] = set()

    def __call__(self, entries: Sequence[Entry]) -> None:
        steps = [one.step for one in entries]
        self.tried.release()
        if not self.up.is_set():
            raise ConnectionError("down")
        if self.bad & set(steps):
            raise RefusedError("bad value")
        self.batches.append(steps)

    @property
    def steps(self) -> list[int]:
        return [step for batch in self.batches for step in batch]


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


def lane_to(send: Callable[[Sequence[Entry]], None], **options: int) -> Lane:
    return Lane("scalars", "the server", send, **options)


def test_all_arrive_in_order(receiver: Receiver) -> None:
    receiver.up.set()
    lane = lane_to(receiver)
    for step in range(100):
        lane.put(entry(step))
    assert lane.wait_until_empty(DEADLINE_S)
    assert receiver.steps == list(range(100)) and lane.undelivered == 0


def test_an_outage_delays_and_loses_nothing(receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    lane = lane_to(receiver, most_together=1000)
    for step in range(50):
        lane.put(entry(step))
    assert receiver.tried.acquire(timeout=DEADLINE_S) and receiver.tried.acquire(timeout=DEADLINE_S)
    assert lane.undelivered == 50 and not receiver.batches
    receiver.up.set()
    for step in range(50, 60):
        lane.put(entry(step))
    assert lane.wait_until_empty(DEADLINE_S)
    assert receiver.steps == list(range(60))
    printed = capsys.readouterr().out
    assert printed.count("fails (down); training goes on, scalars wait") == 1
    assert printed.count("the server works again") == 1


def test_entries_with_weight_travel_together_up_to_the_limit(receiver: Receiver) -> None:
    lane = lane_to(receiver, most_together=10)
    lane.put(entry(0))
    assert receiver.tried.acquire(timeout=DEADLINE_S)  # so that the rest waits together
    for step, weight in ((1, 4), (2, 6), (3, 1), (4, 0), (5, 3), (6, 30), (7, 1)):
        lane.put(entry(step, weight))
    receiver.up.set()
    assert lane.wait_until_empty(DEADLINE_S)
    assert receiver.batches == [[0], [1, 2], [3], [4], [5], [6], [7]]


def test_a_refused_entry_is_left_out_and_named_and_its_neighbours_arrive(
    receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver.bad = {3}
    lane = lane_to(receiver, most_together=1000)
    for step in range(6):
        lane.put(entry(step))
    receiver.up.set()
    assert lane.wait_until_empty(DEADLINE_S)
    assert receiver.steps == [0, 1, 2, 4, 5]
    assert lane.undelivered == 1
    assert "not logged at the server: entry 3 (bad value)" in capsys.readouterr().out


def test_putting_does_not_wait_for_a_receiver_that_hangs() -> None:
    answered = threading.Event()

    def hang(entries: Sequence[Entry]) -> None:
        answered.wait(DEADLINE_S)

    lane = lane_to(hang)
    for step in range(1000):
        lane.put(entry(step))
    assert not lane.wait_until_empty(0.05)
    assert lane.undelivered == 1000 and not answered.is_set()
    lane.stop()
    answered.set()


def test_when_too_much_waits_the_oldest_go_first(receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    lane = lane_to(receiver, most_bytes=100)
    lane.put(entry(0, size=30))
    assert receiver.tried.acquire(timeout=DEADLINE_S)  # 0 is on its way and stays
    for step in range(1, 5):
        lane.put(entry(step, size=30))
    receiver.up.set()
    assert lane.wait_until_empty(DEADLINE_S)
    assert receiver.steps == [0, 3, 4] and lane.undelivered == 2
    assert capsys.readouterr().out.count("too much waits") == 2
    for step in range(5, 8):
        lane.put(entry(step, size=30))  # what was delivered takes no room
    assert lane.wait_until_empty(DEADLINE_S)
    assert receiver.steps == [0, 3, 4, 5, 6, 7]


def test_stopping_ends_the_thread_and_keeps_count(receiver: Receiver) -> None:
    before = threading.active_count()
    lane = lane_to(receiver)
    lane.put(entry(0))
    assert receiver.tried.acquire(timeout=DEADLINE_S)
    (thread,) = [one for one in threading.enumerate() if one.name == "deliver-scalars"][-1:]
    lane.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and threading.active_count() <= before
    assert lane.undelivered == 1


def test_settling_waits_for_the_receiver_but_not_for_one_that_fails(receiver: Receiver) -> None:
    lane = lane_to(receiver)
    receiver.up.set()
    lane.put(entry(0))
    assert lane.settle(DEADLINE_S) and receiver.steps == [0]
    receiver.up.clear()
    lane.put(entry(1))
    assert not lane.settle(DEADLINE_S), "it ended because the first try failed"
    lane.put(entry(2))
    assert not lane.settle(DEADLINE_S), "the receiver is known to fail"
    receiver.up.set()
    assert lane.wait_until_empty(DEADLINE_S) and lane.settle(DEADLINE_S)
    assert receiver.steps == [0, 1, 2]


def test_settling_waits_no_longer_than_asked_for_a_receiver_that_hangs() -> None:
    answered = threading.Event()

    def hang(entries: Sequence[Entry]) -> None:
        answered.wait(DEADLINE_S)

    lane = lane_to(hang)
    lane.put(entry(0))
    began = time.monotonic()
    assert not lane.settle(0.05)
    assert time.monotonic() - began < DEADLINE_S / 2
    lane.stop()
    answered.set()
