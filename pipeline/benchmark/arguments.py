"""Numbers and words on the command line of `jobs.benchmark`, for argparse: what does not fit is refused, with why."""

import argparse
from collections.abc import Sequence


def whole(text: str, least: int = 0) -> int:
    """A whole number from `least` on."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} on")
    return value


def count(text: str) -> int:
    """A whole number from 1 on."""
    return whole(text, 1)


def counts(text: str) -> list[int]:
    """Whole numbers from 1 on, with commas."""
    return [count(part) for part in text.split(",")]


def wholes(text: str) -> list[int]:
    """Whole numbers from 0 on, with commas."""
    return [whole(part) for part in text.split(",")]


def amount(text: str, most: float = float("inf"), expected: str = "a number above 0") -> float:
    """A finite number above 0, and at most `most`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (0 < value <= most and value < float("inf")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    return amount(text, 1.0, "a share above 0 and at most 1, such as 0.55")


def words(text: str, known: Sequence[str]) -> list[str]:
    """Some of the known words, with commas."""
    found = text.split(",")
    if unknown := [word for word in found if word not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected {', '.join(known)}, several with commas")
    return found
