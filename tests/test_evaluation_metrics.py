"""Moments and the Frechet distance, against closed forms and an independent matrix root."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluation.metrics import Moments, frechet_distance


def gaussian(seed: int, count: int, dimension: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=random)
    return scale * torch.randn(count, dimension, generator=random) @ mix + shift


def moments_with(mean: np.ndarray, covariance: np.ndarray, count: int = 1000) -> Moments:
    """Moments that have exactly this mean and this covariance."""
    outer = covariance * (count - 1) + count * np.outer(mean, mean)
    return Moments(count, torch.from_numpy(mean * count), torch.from_numpy(outer))


def by_sqrtm(a: Moments, b: Moments) -> float:
    """The textbook form with SciPy's root of a matrix."""
    covariance_a, covariance_b = a.covariance().numpy(), b.covariance().numpy()
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b)
    difference = (a.mean() - b.mean()).numpy()
    return float(difference @ difference + np.trace(covariance_a + covariance_b - 2 * np.real(root)))


def test_commuting_covariances_have_a_closed_form() -> None:
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(12, 12)))
    values_a, values_b = random.uniform(0.1, 5, 12), random.uniform(0.1, 5, 12)
    mean_a, mean_b = random.normal(size=12), random.normal(size=12)
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(values_a) - np.sqrt(values_b)) ** 2)
    a = moments_with(mean_a, basis @ np.diag(values_a) @ basis.T)
    b = moments_with(mean_b, basis @ np.diag(values_b) @ basis.T)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_samples_of_two_gaussians_come_close_to_the_closed_form() -> None:
    random = torch.Generator().manual_seed(1)
    a = Moments.of(torch.randn(200_000, 4, generator=random))
    b = Moments.of(3 * torch.randn(200_000, 4, generator=random) + 2)
    assert frechet_distance(a, b) == pytest.approx(4 * 2**2 + 4 * (3 - 1) ** 2, rel=0.01)


@pytest.mark.parametrize("count", [400, 30])
def test_agrees_with_scipy(count: int) -> None:
    a, b = Moments.of(gaussian(2, count, 48)), Moments.of(gaussian(3, count, 48, scale=1.3, shift=0.2))
    # Below full rank SciPy's root itself is good to about 1e-7 only.
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-6)


def test_a_distance_between_covariances_of_low_rank_keeps_its_precision() -> None:
    # Three pictures in 200 dimensions, in subspaces at right angles: the roots do not overlap at all.
    random = np.random.default_rng(4)
    basis, _ = np.linalg.qr(random.normal(size=(200, 4)))
    a = moments_with(np.zeros(200), basis[:, :2] @ basis[:, :2].T)
    b = moments_with(np.zeros(200), basis[:, 2:] @ basis[:, 2:].T)
    assert frechet_distance(a, b) == pytest.approx(4.0, abs=1e-12)


def test_symmetric_and_zero_on_itself() -> None:
    a, b = Moments.of(gaussian(5, 100, 20)), Moments.of(gaussian(6, 80, 20))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert 0 <= frechet_distance(a, a) < 1e-9 * float(a.covariance().trace())


def test_mean_and_covariance_are_numpys() -> None:
    features = gaussian(7, 50, 6, shift=100.0)
    moments = Moments.of(features)
    np.testing.assert_allclose(moments.mean(), features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(features.double().numpy(), rowvar=False), rtol=1e-7)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**31))
def test_moments_of_parts_add_up_to_those_of_the_whole(parts: list[int], seed: int) -> None:
    features = gaussian(seed, sum(parts), 5)
    whole = Moments.of(features)
    merged = Moments.zeros(5)
    for part in features.split(parts):
        merged = merged.merge(Moments.of(part))
    assert merged.count == whole.count == sum(parts)
    torch.testing.assert_close(merged.sum_D, whole.sum_D, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(merged.outer_DD, whole.outer_DD, rtol=1e-12, atol=1e-11)


def test_merging_changes_neither_part() -> None:
    a, b = Moments.of(gaussian(8, 10, 3)), Moments.of(gaussian(9, 10, 3))
    before = a.outer_DD.clone()
    assert a.merge(b).count == 20
    assert a.count == 10 and torch.equal(a.outer_DD, before)


def test_one_vector_carries_all_for_a_sum_over_workers() -> None:
    a, b = Moments.of(gaussian(10, 11, 4)), Moments.of(gaussian(11, 13, 4))
    summed = Moments.from_vector(a.to_vector() + b.to_vector(), 4)
    merged = a.merge(b)
    assert summed.count == 24
    assert torch.equal(summed.sum_D, merged.sum_D) and torch.equal(summed.outer_DD, merged.outer_DD)
    with pytest.raises(ValueError, match="31 values expected"):
        Moments.from_vector(a.to_vector(), 5)


def test_arrays_and_back() -> None:
    moments = Moments.of(gaussian(12, 9, 4))
    again = Moments.from_arrays(moments.to_arrays())
    assert again.count == 9 and torch.equal(again.outer_DD, moments.outer_DD)
    with pytest.raises(ValueError, match="do not belong together"):
        Moments.from_arrays(moments.to_arrays() | {"sum": np.zeros(3)})


def test_too_few_pictures_are_refused() -> None:
    one, two = Moments.of(torch.ones(1, 3)), Moments.of(torch.eye(2, 3))
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        frechet_distance(one, two)
    with pytest.raises(ValueError, match="no features"):
        Moments.zeros(3).mean()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused_and_leave_no_trace(bad: float) -> None:
    moments = Moments.zeros(3)
    features = torch.ones(4, 3)
    features[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 4 feature vectors"):
        moments.update(features)
    assert moments.count == 0 and not moments.sum_D.any()


def test_features_of_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3\) expected, got \(2, 4\)"):
        Moments.zeros(3).update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="different networks"):
        frechet_distance(Moments.of(torch.randn(4, 3)), Moments.of(torch.randn(4, 2)))
    with pytest.raises(ValueError, match="cannot be merged"):
        Moments.zeros(3).merge(Moments.zeros(2))


def test_corrupt_moments_are_noticed() -> None:
    with pytest.raises(ValueError, match="not a covariance"):
        frechet_distance(moments_with(np.zeros(2), np.diag([1.0, -0.5])), moments_with(np.zeros(2), np.eye(2)))
