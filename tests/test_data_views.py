import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.views import Augmentation, Views, fixed_views, training_views, turned_

KIND = Augmentation(height=48, width=40, size=32, crop=True, rotate=True, flip=True)
PLACES = torch.arange(64)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_any_split_draws_the_same_views(seed: int, images_seen: int) -> None:
    whole = training_views(KIND, seed, images_seen, PLACES)
    part = training_views(KIND, seed, images_seen, PLACES[20:24])
    for all_of_them, few in zip(vars(whole).values(), vars(part).values(), strict=True):
        assert np.array_equal(all_of_them[20:24], few)


def test_several_batches_are_drawn_like_one_after_another() -> None:
    seen = torch.tensor([0, 64, 2**33]).repeat_interleave(64)
    together = training_views(KIND, 3, seen, PLACES.repeat(3))
    for number, images_seen in enumerate((0, 64, 2**33)):
        alone = training_views(KIND, 3, images_seen, PLACES)
        part = together.part(slice(64 * number, 64 * number + 64))
        for mine, theirs in zip(vars(part).values(), vars(alone).values(), strict=True):
            assert np.array_equal(mine, theirs)
    assert Views().part(slice(1, 2)) == Views() == Views.joined([Views(), Views()])
    halves = Views.joined([together.part(slice(0, 70)), together.part(slice(70, 192))])
    for mine, theirs in zip(vars(halves).values(), vars(together).values(), strict=True):
        assert np.array_equal(mine, theirs)


def test_squares_lie_inside_and_views_change_with_images_seen() -> None:
    one, other = training_views(KIND, 0, 0, PLACES), training_views(KIND, 0, 64, PLACES)
    assert one.corners_B2 is not None and one.turns_B is not None and one.flips_B is not None
    assert one.corners_B2.dtype == np.int32 and one.corners_B2.min() >= 0
    assert one.corners_B2[:, 0].max() <= 8 and one.corners_B2[:, 1].max() <= 16
    assert set(one.turns_B) == {0, 1, 2, 3} and 16 < one.flips_B.sum() < 48
    for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True):
        assert not np.array_equal(mine, theirs)


def test_turns_squares_and_flips_share_no_draw() -> None:
    views = training_views(KIND, 0, 0, torch.arange(4096))
    assert views.corners_B2 is not None and views.turns_B is not None and views.flips_B is not None
    columns = np.stack([*views.corners_B2.T, views.turns_B, views.flips_B]).astype(float)
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 4 / np.sqrt(4096)


def test_a_real_picture_has_one_view_for_ever_and_is_not_mirrored() -> None:
    indices = torch.tensor([7, 3, 100, 3])
    views = fixed_views(KIND, indices)
    assert views.corners_B2 is not None and views.turns_B is not None and views.flips_B is None
    assert views.corners_B2[1].tolist() == views.corners_B2[3].tolist()
    again = fixed_views(KIND, indices.flip(0))
    assert again.corners_B2 is not None
    assert np.array_equal(again.corners_B2[::-1], views.corners_B2)


def test_nothing_is_drawn_that_is_not_asked_for() -> None:
    plain = Augmentation(32, 32, 32, crop=False, rotate=False, flip=False)
    assert training_views(plain, 0, 0, PLACES) == Views() == fixed_views(plain, PLACES)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6))
def test_turned_pictures_are_those_of_numpy(moves: list[tuple[int, bool]]) -> None:
    pictures = torch.randint(
        0, 256, (len(moves), 5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    before = pictures.numpy().copy()
    turns, flips = (np.array(column) for column in zip(*moves, strict=True))
    turned_(pictures, Views(None, turns, flips))
    for after, one, turn, flip in zip(pictures.numpy(), before, turns, flips, strict=True):
        expected = np.rot90(one, turn)
        assert np.array_equal(after, expected[:, ::-1] if flip else expected)


def test_a_protocol_names_what_is_looked_at() -> None:
    assert KIND.describe() == "random 32 of 40x48, quarter turns"
    assert Augmentation(32, 32, 32, crop=False, rotate=False, flip=True).describe() == "whole"
