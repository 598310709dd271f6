"""How well an order shuffles, against a full permutation of all samples in each epoch. Pure functions of arrays.

An epoch is an int64 array (N,) of samples in the order in which they are trained on, cut into batches of equal
size. Pairs are counted exactly, not sampled.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from itertools import pairwise

import numpy as np

NEAR = 10
"""Batches within which stored neighbours count as still near each other."""
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Quality:
    """Means over epochs, and for a full permutation what is expected."""

    one_group: float
    """Share of the pairs in a batch that come from one row group."""
    meet_again: float
    """Share of the pairs in a batch that are together in a batch of the next epoch, too."""
    travel: float
    """How far a sample's place is from that of the epoch before, as a share of the epoch."""
    same_batch: float
    """Share of stored neighbours (samples i and i + 1) that are in one batch."""
    near: float
    """Share of stored neighbours that are at most NEAR batches apart."""
    apart_low: float
    """Distance of stored neighbours as a share of the epoch: the 5th percentile,"""
    apart_median: float
    """the median,"""
    apart_high: float
    """and the 95th percentile."""


def measure(epochs: Iterable[np.ndarray], rows: np.ndarray, batch_size: int) -> tuple[Quality, Quality]:
    """Means over successive epochs (two or more), and their standard errors (nan from a single pair of epochs).

    rows: samples in each row group. Raises ValueError if the batch does not divide the epoch.
    """
    groups = np.repeat(np.arange(len(rows)), rows)
    if len(groups) % batch_size or batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; expected 2 or more, and a divisor of {len(groups)} samples")
    found = np.array([_measure(now, after, groups, batch_size) for now, after in pairwise(epochs)])
    if not len(found):
        raise ValueError("expected two epochs or more")
    errors = found.std(axis=0, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.full(found.shape[1], np.nan)
    return Quality(*found.mean(axis=0).tolist()), Quality(*errors.tolist())


def permuted(samples: int, seed: int) -> Iterable[np.ndarray]:
    """Full permutations without end, one for each epoch."""
    generator = np.random.default_rng(seed)
    while True:
        yield generator.permutation(samples)


def expected(rows: np.ndarray, batch_size: int) -> Quality:
    """What full permutations, one independent of the other, give on average; percentiles in the limit of many samples.

    rows: samples in each row group; the batch divides their sum N, and N is at least 2.
    """
    rows = np.asarray(rows, dtype=np.float64)
    samples = rows.sum()
    pairs = samples * (samples - 1)
    batches = samples / batch_size
    within = batches * batch_size * (batch_size - 1)
    steps = np.arange(1, min(NEAR, int(batches) - 1) + 1)
    low, median, high = (1 - np.sqrt(1 - np.array(QUANTILES))).tolist()  # of |x - y|, both uniform in [0, 1]
    return Quality(
        one_group=float((rows * (rows - 1)).sum() / pairs),
        meet_again=(batch_size - 1) / (samples - 1),
        travel=(1 - samples**-2) / 3,
        same_batch=within / pairs,
        near=(within + 2 * float((batches - steps).sum()) * batch_size**2) / pairs,
        apart_low=low,
        apart_median=median,
        apart_high=high,
    )


def ratios(quality: Quality, reference: Quality) -> Quality:
    """Each measure as a multiple of the reference's."""
    return Quality(
        *(mine / its if its else np.nan for mine, its in zip(astuple(quality), astuple(reference), strict=True))
    )


NAMES = tuple(field.name for field in fields(Quality))


def _measure(now: np.ndarray, after: np.ndarray, groups: np.ndarray, batch_size: int) -> tuple[float, ...]:
    samples = len(now)
    place, place_after = _inverse(now), _inverse(after)
    batch, batch_after = place // batch_size, place_after // batch_size
    batches = samples // batch_size
    pairs = batches * batch_size * (batch_size - 1) // 2
    apart = np.abs(np.diff(place))
    return (
        _equal_pairs(batch * (groups[-1] + 1) + groups) / pairs,
        _equal_pairs(batch * batches + batch_after) / pairs,
        float(np.abs(place_after - place).mean() / samples),
        float((np.diff(batch) == 0).mean()),
        float((np.abs(np.diff(batch)) <= NEAR).mean()),
        *(np.quantile(apart, QUANTILES) / samples).tolist(),
    )


def _inverse(permutation: np.ndarray) -> np.ndarray:
    places = np.empty_like(permutation)
    places[permutation] = np.arange(len(permutation))
    return places


def _equal_pairs(keys: np.ndarray) -> int:
    counts = np.unique(keys, return_counts=True)[1]
    return int((counts * (counts - 1)).sum() // 2)
