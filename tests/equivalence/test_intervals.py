"""The paired bootstrap against a twin without arrays, and its coverage on data whose mean difference is known."""

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from spn4cir.intervals import paired_bootstrap


def slow_bootstrap(
    hits_a: list[list[float]], hits_b: list[list[float]], resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean and percentiles by loops over the same draws."""
    seeds, queries = len(hits_a), len(hits_a[0])
    chance = np.random.default_rng(seed)
    means: list[float] = []
    for _ in range(resamples):
        rows = chance.integers(seeds, size=seeds).tolist()
        columns = chance.integers(queries, size=queries).tolist()
        total = sum(hits_a[row][column] - hits_b[row][column] for row in rows for column in columns)
        means.append(total / (seeds * queries))
    means.sort()

    def percentile(share: float) -> float:
        place = share * (resamples - 1)
        below = int(place)
        above = min(below + 1, resamples - 1)
        return means[below] + (place - below) * (means[above] - means[below])

    every = sum(hits_a[row][column] - hits_b[row][column] for row in range(seeds) for column in range(queries))
    return every / (seeds * queries), percentile(0.025), percentile(0.975)


def make_hits(seeds: int, queries: int, share: float, key: str) -> NDArray[np.float64]:
    chance = random.Random(key)
    return np.array([[float(chance.random() < share) for _ in range(queries)] for _ in range(seeds)])


@pytest.mark.parametrize(("seeds", "queries"), [(1, 7), (3, 11), (5, 30)])
def test_bootstrap_equals_its_slow_twin(seeds: int, queries: int) -> None:
    a, b = make_hits(seeds, queries, 0.6, "a"), make_hits(seeds, queries, 0.4, "b")
    fast = paired_bootstrap(a, b, resamples=203, seed=5)
    np.testing.assert_allclose(fast, slow_bootstrap(a.tolist(), b.tolist(), 203, 5), atol=1e-12)
    assert fast[1] <= fast[0] <= fast[2]


def test_interval_depends_on_which_queries_are_paired() -> None:
    """The control: the same hits in another order have the same difference and another interval."""
    a = make_hits(3, 200, 0.5, "a")
    difference, low, high = paired_bootstrap(a, a, resamples=300)
    assert (difference, low, high) == (0.0, 0.0, 0.0)
    difference, low, high = paired_bootstrap(a, np.roll(a, 1, axis=1), resamples=300)
    assert difference == 0.0 and low < -0.03 and high > 0.03


def test_seeds_are_resampled_too() -> None:
    a = np.repeat([[1.0], [0.0]], 500, axis=1)  # (2, 500): one seed hits everything, the other nothing
    assert paired_bootstrap(a, np.zeros_like(a), resamples=500) == (0.5, 0.0, 1.0)


def test_interval_covers_the_mean_difference_in_19_of_20_samples() -> None:
    covered = 0
    for sample in range(200):
        a, b = make_hits(1, 100, 0.6, f"a{sample}"), make_hits(1, 100, 0.4, f"b{sample}")
        _, low, high = paired_bootstrap(a, b, resamples=400, seed=sample)
        covered += low <= 0.2 <= high
    assert 180 <= covered <= 199


def test_hits_that_are_not_paired_raise() -> None:
    for a, b in ((np.ones((2, 3)), np.ones((1, 3))), (np.ones(3), np.ones(3)), (np.ones((0, 3)), np.ones((0, 3)))):
        with pytest.raises(ValueError, match="one shape"):
            paired_bootstrap(a, b)
