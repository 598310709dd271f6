import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.threads import Recent, concurrently

WAIT_S = 60


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 4))
def test_the_keys_used_last_are_not_made_again(keys: list[int], keep: int) -> None:
    made: list[int] = []
    recent: Recent[int, list[int]] = Recent(lambda key: made.append(key) or [key], keep)  # type: ignore[func-returns-value]
    held: list[int] = []  # a plain model: the most recent last
    expected: list[int] = []
    for key in keys:
        expected += [] if key in held else [key]
        held = [*(one for one in held if one != key), key][-keep:]
        assert recent.get(key) == [key]
    assert made == expected


def test_a_key_is_made_once_however_many_want_it_and_others_do_not_wait() -> None:
    begun, go_on = threading.Event(), threading.Event()
    made = []

    def make(key: str) -> str:
        made.append(key)
        if key == "slow":
            begun.set()
            assert go_on.wait(WAIT_S)
        return key.upper()

    recent = Recent(make, 2)
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(recent.get, "slow") for _ in range(5)]
        assert begun.wait(WAIT_S)
        assert recent.get("quick") == "QUICK"
        go_on.set()
        assert [one.result() for one in slow] == ["SLOW"] * 5
    assert sorted(made) == ["quick", "slow"]


def test_an_error_of_making_is_tried_again_and_clear_forgets() -> None:
    answers: Iterator[OSError | int] = iter([OSError("down"), 1, 2])

    def make(key: str) -> int:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    recent = Recent(make, 1)
    with pytest.raises(OSError, match="down"):
        recent.get("x")
    assert (recent.get("x"), recent.get("x")) == (1, 1)
    recent.clear()
    assert recent.get("x") == 2


def test_results_come_in_order_and_an_error_ends_the_work() -> None:
    assert list(concurrently(lambda item: item * 2, range(100), 7)) == [item * 2 for item in range(100)]
    failed = threading.Event()
    tried = []

    def fail_first(item: int) -> None:
        tried.append(item)
        if item == 0:
            failed.set()
            raise OSError("item 0")
        assert failed.wait(WAIT_S)

    with pytest.raises(OSError, match="item 0"):
        list(concurrently(fail_first, range(10_000), 2))
    assert len(tried) < 10_000
