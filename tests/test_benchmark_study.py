from dataclasses import replace

import numpy as np
import pytest

from pipeline.benchmark.shuffle import measure
from pipeline.benchmark.study import ROWS, Point, point, setting, spreads
from pipeline.data.stream import DataConfig


@pytest.mark.parametrize("batch_size", [32, 64])
def test_the_default_order_is_within_a_tenth_of_the_full_permutation(batch_size: int) -> None:
    """At 100 row groups, at a memory that one worker has: pairs from one row group, and pairs that meet again."""
    case = setting(100, batch_size, epochs=12, seed=0)
    spread = DataConfig().shuffle_row_groups
    found = point(case, spread, seed=0)
    assert found.within(case.closed_form)
    assert found.memory[0] <= batch_size * spread and found.memory[1] <= batch_size // 8 * spread + 1
    assert found.quality.travel == pytest.approx(1 / 3, rel=0.1)
    # The measured mean is sure enough to say so.
    assert found.errors.meet_again < 0.03 * case.closed_form.meet_again
    assert case.permutation.meet_again == pytest.approx(case.closed_form.meet_again, rel=0.05)


def test_a_shuffle_of_few_row_groups_together_is_not() -> None:
    """The criterion can fail: eight neighbouring row groups shuffled among themselves."""
    case = setting(100, 32, epochs=4, seed=0)
    generator = np.random.default_rng(0)
    window = 8 * ROWS
    blocks = [np.arange(begin, min(begin + window, 100 * ROWS)) for begin in range(0, 100 * ROWS, window)]
    epochs = [np.concatenate([generator.permutation(block) for block in blocks]) for _ in range(3)]
    quality, errors = measure(epochs, np.full(100, ROWS), 32)
    assert not Point(1, (8, 8), quality, errors).within(case.closed_form)
    fair = replace(quality, one_group=1.09 * case.closed_form.one_group, meet_again=case.closed_form.meet_again)
    assert Point(1, (8, 8), fair, errors).within(case.closed_form)
    for name in ("one_group", "meet_again"):
        one_bad = replace(fair, **{name: 1.11 * getattr(case.closed_form, name)})
        assert not Point(1, (8, 8), one_bad, errors).within(case.closed_form)


def test_more_memory_takes_stored_neighbours_apart() -> None:
    case = setting(100, 32, epochs=2, seed=0)
    points = [point(case, spread, seed=0) for spread in spreads(100, 32)]
    near = [found.quality.near for found in points]
    memory = [found.memory for found in points]
    assert near == sorted(near, reverse=True)
    assert memory == sorted(memory) and memory[-1][0] == 100


def test_memory_is_doubled_until_it_holds_everything() -> None:
    assert spreads(100, 32) == [1, 2, 4]
    assert spreads(100, 32, [3, 2]) == [1, 2, 3, 4]
    assert spreads(10, 32) == [1]
