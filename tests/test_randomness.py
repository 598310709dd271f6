import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import randomness
from pipeline.randomness import Purpose

GOLDEN_WORDS = [2930166587, 299227513, 70584630, 4260974896, 58999338]
GOLDEN_NORMALS = [1.203775, 1.984817, 0.236427]
MANY = torch.arange(20_000)
POSITIONS = torch.arange(16)


def kolmogorov_smirnov(probabilities: Tensor) -> float:
    """Largest distance between the empirical and the uniform distribution, times the root of n.

    Of uniform draws it is below 1.95 in 999 of 1,000 cases.
    """
    ordered = probabilities.double().sort().values
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return float(distance) * len(ordered) ** 0.5


def chi_square(counts: Tensor) -> float:
    """The statistic of equal expectations, in standard deviations from its mean: of fair counts below 4."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float(((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


def test_purposes_are_what_checkpoints_and_seeds_rely_on() -> None:
    """Renumbering a purpose would change every resumed run and every user's seed."""
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "LATENT_DISCRIMINATOR": 1,
        "LATENT_GENERATOR": 2,
        "NOISE_DISCRIMINATOR": 3,
        "NOISE_GENERATOR": 4,
        "FLIP": 5,
        "CORNER": 6,
        "STRIDE": 7,
        "SAMPLE": 8,
        "SAMPLE_NOISE": 9,
        "EVALUATE": 10,
        "EVALUATE_NOISE": 11,
        "MEAN_W": 12,
        "CROP": 13,
        "TURN": 14,
        "REAL_CROP": 15,
        "REAL_TURN": 16,
    }


def test_draws_of_a_seed_never_change() -> None:
    words = randomness.words(7, Purpose.SAMPLE, 12_345_678_901, torch.tensor([3]), 5)
    assert words.tolist() == [GOLDEN_WORDS]
    normal = randomness.normal(0, Purpose.SAMPLE, 0, torch.tensor([0]), 3)
    torch.testing.assert_close(normal, torch.tensor([GOLDEN_NORMALS]))


def test_no_two_draws_are_shared() -> None:
    """Purposes, seeds, positions, and images seen on both sides of 2^32 all give other words."""
    drawn = [
        randomness.words(seed, purpose, images, POSITIONS, 6)
        for seed, purpose, images in itertools.product((0, 1), Purpose, (0, 32, (1 << 32), (1 << 32) + 32))
    ]
    words = torch.cat(drawn).flatten()
    # Birthday bound: of n words in 2^32, n^2 / 2^33 = 0.02 pairs are expected to be equal.
    assert len(words) == 12288
    assert len(words.unique()) == len(words)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, (1 << 32) - 1),
    images=st.integers(0, (1 << 64) - 1),
    cuts=st.lists(st.integers(0, 16), max_size=4),
    count=st.integers(1, 9),
)
def test_draws_do_not_depend_on_how_positions_are_split(seed: int, images: int, cuts: list[int], count: int) -> None:
    whole = randomness.words(seed, Purpose.FLIP, images, POSITIONS, count)
    assert whole.shape == (16, count) and whole.dtype == torch.int64
    assert whole.min() >= 0 and whole.max() < 1 << 32
    edges = [0, *sorted(cuts), 16]
    parts = [randomness.words(seed, Purpose.FLIP, images, POSITIONS[a:b], count) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(randomness.words(seed, Purpose.FLIP, images, POSITIONS[order], count), whole[order])
    assert torch.equal(randomness.words(seed, Purpose.FLIP, images, POSITIONS, count + 3)[:, :count], whole)
    normal = randomness.normal(seed, Purpose.FLIP, images, POSITIONS, count)
    assert torch.equal(randomness.normal(seed, Purpose.FLIP, images, POSITIONS, count + 1)[:, :count], normal)


def test_uniform_is_uniform() -> None:
    uniform = randomness.uniform(1, Purpose.MEAN_W, 0, MANY, 3)
    assert uniform.dtype == torch.float32
    assert uniform.min() >= 0.0 and uniform.max() < 1.0
    for column in uniform.t():
        assert kolmogorov_smirnov(column) < 1.95


def test_normal_is_normal_and_independent() -> None:
    normal = randomness.latents(1, Purpose.LATENT_GENERATOR, 64, MANY, 4)
    assert normal.dtype == torch.float32 and normal.shape == (20_000, 4)
    assert normal.isfinite().all() and normal.abs().max() < 5.8
    for column in normal.t():
        assert kolmogorov_smirnov(torch.special.ndtr(column.double())) < 1.95
    # Five standard deviations of a correlation of 20,000 independent pairs; squares catch a shared radius.
    for values in (normal, normal.square()):
        correlation = torch.corrcoef(values.t()) - torch.eye(4)
        assert correlation.abs().max() < 5 / 20_000**0.5


def test_box_muller_of_extreme_words_is_finite() -> None:
    extremes = torch.tensor([0, 1, 255, 256, (1 << 31), (1 << 32) - 1])
    for word_0, word_1 in itertools.product(extremes, extremes):
        assert all(value.isfinite() and value.abs() < 5.8 for value in randomness.normal_from_words(word_0, word_1))


def test_quarter_turns_are_fair() -> None:
    turns = randomness.quarter_turns(3, randomness.Purpose.TURN, 0, MANY)
    counts = torch.bincount(turns, minlength=4)
    assert len(counts) == 4 and (counts - 5_000).abs().max() < 4 * 61  # standard deviations


def test_crop_corners_are_uniform_over_all_valid_places() -> None:
    corners = randomness.crop_corners(5, randomness.Purpose.CROP, 0, MANY, height=12, width=10, size=8)
    assert corners.min(dim=0).values.tolist() == [0, 0] and corners.max(dim=0).values.tolist() == [2, 4]
    counts = torch.bincount(corners[:, 1] * 3 + corners[:, 0], minlength=15)
    expected = 20_000 / 15
    assert float(((counts - expected) ** 2 / expected).sum()) < 36.1  # chi-square, 14 degrees, 0.1%
    with pytest.raises(ValueError, match="a square of 11 pixels does not fit into pictures of 10x12"):
        randomness.crop_corners(0, randomness.Purpose.CROP, 0, MANY, height=12, width=10, size=11)


def test_flips_are_fair() -> None:
    flips = randomness.flips(3, 0, MANY)
    assert flips.dtype == torch.bool and flips.shape == (20_000,)
    assert abs(int(flips.sum()) - 10_000) < 4 * 71  # standard deviations


@pytest.mark.parametrize(("size", "patch", "stride"), [(12, 4, 1), (12, 4, 3), (16, 2, 7), (8, 8, 1)])
def test_corners_are_uniform_over_all_valid_places(size: int, patch: int, stride: int) -> None:
    choices = size - (patch - 1) * stride
    corners = randomness.corners(5, 0, MANY, size, patch, stride)
    assert corners.dtype == torch.int64 and corners.shape == (20_000, 2)
    assert corners.min() == 0 and corners.max() == choices - 1
    counts = torch.bincount(corners[:, 1] * choices + corners[:, 0], minlength=choices**2)
    if choices > 1:
        assert chi_square(counts) < 4


def test_strides_are_uniform_over_batches() -> None:
    strides = [1, 2, 4]
    drawn = torch.tensor([randomness.stride(5, images, strides) for images in range(0, 96_000, 32)])
    counts = torch.stack([(drawn == stride).sum() for stride in strides])
    assert counts.sum() == 3000
    assert chi_square(counts) < 4


def test_noise_keys_are_two_words() -> None:
    keys = randomness.noise_keys(5, Purpose.NOISE_GENERATOR, 0, POSITIONS)
    assert keys.shape == (16, 2) and keys.dtype == torch.int64
    assert torch.equal(keys, randomness.words(5, Purpose.NOISE_GENERATOR, 0, POSITIONS, 2))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: randomness.words(-1, Purpose.FLIP, 0, POSITIONS, 1),
            r"seed must be in \[0, 2\^32\), got -1",
        ),
        (lambda: randomness.words(1 << 32, Purpose.FLIP, 0, POSITIONS, 1), "seed must be in"),
        (lambda: randomness.words(0, Purpose.FLIP, -32, POSITIONS, 1), "images_seen must be in"),
        (lambda: randomness.words(0, Purpose.FLIP, 1 << 64, POSITIONS, 1), "images_seen must be in"),
        (lambda: randomness.words(0, Purpose.FLIP, 0, POSITIONS - 1, 1), "positions must be in"),
        (lambda: randomness.words(0, Purpose.FLIP, 0, POSITIONS + (1 << 32), 1), "positions must be in"),
        (
            lambda: randomness.words(0, Purpose.FLIP, 0, POSITIONS.int(), 1),
            "positions must be an int64 tensor",
        ),
        (
            lambda: randomness.words(0, Purpose.FLIP, 0, POSITIONS[None], 1),
            "positions must be an int64 tensor",
        ),
        (lambda: randomness.words(0, Purpose.FLIP, 0, POSITIONS, 0), "count must be at least 1"),
        (lambda: randomness.corners(0, 0, POSITIONS, 8, 5, 2), "spans 9 pixels and does not fit in size 8"),
        (lambda: randomness.corners(0, 0, POSITIONS, 8, 4, 0), "both must be at least 1"),
        (lambda: randomness.stride(0, 0, []), "strides must name at least one"),
    ],
)
def test_values_out_of_range_are_named(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_no_positions_give_no_draws() -> None:
    assert randomness.words(0, Purpose.FLIP, 0, torch.arange(0), 3).shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same() -> None:
    words = randomness.words(5, Purpose.FLIP, 1 << 40, POSITIONS.cuda(), 7)
    assert words.is_cuda
    assert torch.equal(words.cpu(), randomness.words(5, Purpose.FLIP, 1 << 40, POSITIONS, 7))
    normal = randomness.normal(5, Purpose.FLIP, 1 << 40, MANY.cuda(), 3)
    torch.testing.assert_close(normal.cpu(), randomness.normal(5, Purpose.FLIP, 1 << 40, MANY, 3))
