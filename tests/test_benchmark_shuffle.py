from dataclasses import astuple
from itertools import combinations, islice, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.benchmark.shuffle import NAMES, NEAR, Quality, expected, measure, permuted, ratios


def pair_by_pair(now: list[int], after: list[int], rows: list[int], batch_size: int) -> dict[str, float]:
    """The same measures, as their words say it."""
    groups = [group for group, count in enumerate(rows) for _ in range(count)]
    samples = len(now)

    def batch_of(epoch: list[int], sample: int) -> int:
        return epoch.index(sample) // batch_size

    together = [pair for pair in combinations(range(samples), 2) if batch_of(now, pair[0]) == batch_of(now, pair[1])]
    neighbours = [(sample, sample + 1) for sample in range(samples - 1)]
    steps = [abs(batch_of(now, a) - batch_of(now, b)) for a, b in neighbours]
    return {
        "one_group": float(np.mean([groups[a] == groups[b] for a, b in together])),
        "meet_again": float(np.mean([batch_of(after, a) == batch_of(after, b) for a, b in together])),
        "travel": float(np.mean([abs(now.index(one) - after.index(one)) for one in range(samples)])) / samples,
        "same_batch": float(np.mean([step == 0 for step in steps])),
        "near": float(np.mean([step <= NEAR for step in steps])),
        "apart_median": float(np.median([abs(now.index(a) - now.index(b)) for a, b in neighbours])) / samples,
    }


@given(st.data())
def test_measures_are_what_their_words_say(data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(2, 4))
    samples = batch_size * data.draw(st.integers(1, 16))
    cut = data.draw(st.integers(0, samples))
    rows = [cut, samples - cut]
    now, after = (data.draw(st.permutations(range(samples))) for _ in range(2))
    mean, errors = measure([np.array(now), np.array(after)], np.array(rows), batch_size)
    for name, value in pair_by_pair(now, after, rows, batch_size).items():
        assert getattr(mean, name) == pytest.approx(value), name
    assert all(np.isnan(error) for error in astuple(errors))


@pytest.mark.parametrize(("rows", "batch_size"), [([2, 4], 2), ([3, 2, 1], 3), ([1] * 6, 2), ([6], 6)])
def test_the_closed_form_is_the_mean_over_every_permutation(rows: list[int], batch_size: int) -> None:
    """All 720 of six samples: no chance is involved."""
    stay = np.arange(6)
    found = [measure([np.array(one), stay], np.array(rows), batch_size)[0] for one in permutations(range(6))]
    means = Quality(*np.mean([astuple(one) for one in found], axis=0).tolist())
    exact = expected(np.array(rows), batch_size)
    for name in NAMES[:5]:
        assert getattr(means, name) == pytest.approx(getattr(exact, name)), name


def test_the_closed_form_is_what_real_permutations_give() -> None:
    """Here with batches farther apart than NEAR; percentiles, too."""
    rows = np.full(30, 32)
    mean, errors = measure(islice(permuted(960, 1), 300), rows, 16)
    exact = expected(rows, 16)
    for name in NAMES:
        assert abs(getattr(mean, name) - getattr(exact, name)) < 4.5 * getattr(errors, name) + 1e-3 / 3, name
    assert 0 < exact.near < 0.5


def test_no_shuffle_at_all_is_seen() -> None:
    rows = np.full(30, 32)
    worst = ratios(measure([np.arange(960)] * 2, rows, 16)[0], expected(rows, 16))
    assert worst.one_group > 10 and worst.meet_again > 10 and worst.travel == 0 and worst.near > 1


@pytest.mark.parametrize(
    ("epochs", "batch_size", "words"),
    [
        ([np.arange(6)] * 2, 4, "a divisor of 6"),
        ([np.arange(6)] * 2, 1, "2 or more"),
        ([np.arange(6)], 3, "two epochs"),
    ],
)
def test_what_cannot_be_measured_is_refused(epochs: list[np.ndarray], batch_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure(epochs, np.array([6]), batch_size)
