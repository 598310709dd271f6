"""The dealing of the global batch: whole groups, all of them, to every worker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.world import World, parts_of, share_of


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 9), st.data())
def test_shares_are_whole_contiguous_groups_of_the_batch(
    groups: int, group: int, workers: int, data: st.DataObject
) -> None:
    workers = min(workers, groups)
    shares = [share_of(World(rank, workers), groups * group, group) for rank in range(workers)]
    assert [position for share in shares for position in share] == list(range(groups * group))
    assert all(share.start % group == 0 and len(share) % group == 0 and len(share) > 0 for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= group
    accumulation = data.draw(st.integers(1, 12))
    for share in shares:
        parts = parts_of(share, group, accumulation)
        assert len(parts) == min(accumulation, len(share) // group)
        assert [index for part in parts for index in range(part.start, part.stop)] == list(range(len(share)))
        assert all((part.stop - part.start) % group == 0 for part in parts)


def test_a_batch_that_is_no_multiple_of_the_group_is_named() -> None:
    with pytest.raises(ValueError, match="train.batch_size is 30, no multiple .* group of 4; use 28 or 32"):
        share_of(World(), 30, 4)


def test_fewer_groups_than_workers_are_named() -> None:
    with pytest.raises(
        ValueError,
        match="2 minibatch-stddev groups of 4 for 3 workers; use at most 2 workers or a batch of at least 12",
    ):
        share_of(World(0, 3), 8, 4)
