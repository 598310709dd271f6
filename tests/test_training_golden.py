"""Fifty updates against losses kept as text: numerics never change in silence."""

from typing import Any

import pytest

from tests.write_golden import (
    COLUMNS,
    FOLDER,
    UPDATES,
    VARIANTS,
    Row,
    first_difference,
    from_text,
    pictures,
    record,
    to_text,
)

HINT = "if training was meant to change, `python -m tests.write_golden` and say why in the commit"


def golden(name: str) -> list[Row]:
    return from_text((FOLDER / f"{name}.txt").read_text())


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_losses_are_the_golden_ones(name: str) -> None:
    problem = first_difference(record(**VARIANTS[name]), golden(name))
    assert problem is None, f"{problem}; {HINT}"


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_files_are_whole(name: str) -> None:
    rows, text = golden(name), (FOLDER / f"{name}.txt").read_text()
    assert len(rows) == UPDATES
    assert [number for number, row in enumerate(rows) if "loss/r1" in row] == list(range(0, UPDATES, 4))
    assert to_text(name, rows) == text  # the header is the one that is written today, and no digit is lost


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.002 * (1 + 1e-4)},
        {"r1_gamma": 1 + 1e-4},
        {"betas": (0.0, 0.99 * (1 + 1e-4))},
        {"ema_kimg": 0.1 * (1 + 1e-4)},
        {"lazy_rescale": False},
        {"patch": {"size": 8, "strides": [1]}},
    ],
    ids=str,
)
def test_a_small_change_of_a_constant_is_noticed(change: dict[str, Any]) -> None:
    rows = record(10, **VARIANTS["patches"] | change)
    assert first_difference(rows, golden("patches")[:10]) is not None


def test_a_difference_is_told_by_update_and_name() -> None:
    rows = [dict(row) for row in golden("whole")]
    rows[7]["scores/fake"] *= 1 + 2e-6
    problem = first_difference(rows, golden("whole"))
    assert problem is not None and problem.startswith("update 7: scores/fake is ") and "2.0e-06 apart" in problem
    rows = [dict(row) for row in golden("whole")]
    del rows[4]["loss/r1"]
    problem = first_difference(rows, golden("whole"))
    assert problem is not None and problem.startswith("update 4 has ")
    rows[4]["loss/r1"] = float("nan")
    assert first_difference(rows, golden("whole")) is not None
    assert set(COLUMNS) >= rows[4].keys()


def test_the_pictures_are_integers_that_never_change() -> None:
    batch = pictures(8)
    assert batch.shape == (8, 16, 16, 3)
    assert batch.float().std() > 30
    assert int(batch.long().sum()) == 794229
