import argparse
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.benchmark.arguments import amount, count, counts, share, whole, wholes, words


@given(st.integers(1, 10**9))
def test_numbers_are_read_as_they_are_written(number: int) -> None:
    assert whole(str(number)) == count(str(number)) == number
    assert counts(f"{number},1") == wholes(f"{number},1") == [number, 1]
    assert amount(f"{number}") == number and share(str(1 / number)) == 1 / number


def test_zero_is_a_whole_number_and_no_count() -> None:
    assert whole("0") == 0 and wholes("0,2") == [0, 2]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (whole, "-1", "a whole number from 0 on"),
        (whole, "1.5", "a whole number from 0 on"),
        (count, "0", "a whole number from 1 on"),
        (counts, "1,", "a whole number from 1 on"),
        (wholes, "x", "a whole number from 0 on"),
        (amount, "0", "a number above 0"),
        (amount, "nan", "a number above 0"),
        (amount, "inf", "a number above 0"),
        (share, "1.01", "a share above 0 and at most 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(
    kind: Callable[[str], Any], text: str, expected: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected {expected}"):
        kind(text)


def test_words_are_known() -> None:
    assert words("b,a", ("a", "b")) == ["b", "a"]
    with pytest.raises(argparse.ArgumentTypeError, match="'c': expected a, b, several with commas"):
        words("a,c", ("a", "b"))
