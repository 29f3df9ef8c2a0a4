"""Bootstrap intervals, paired tests and Holm's correction: against scipy, and against loops."""

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from spn4cir.intervals import bootstrap_interval, bootstrap_means, holm, mcnemar, paired_test


def draws(sizes: list[int], resamples: int, seed: int) -> list[list[list[int]]]:
    """Places drawn in each resample of each group, as ``bootstrap_means`` draws them where one part holds a group."""
    chance = np.random.default_rng(seed)
    return [chance.integers(size, size=(resamples, size), dtype=np.int32).tolist() for size in sizes]


@pytest.mark.parametrize("queries", [1, 9, 40])
def test_bootstrap_equals_a_loop(queries: int) -> None:
    """The same draws, by lists: of all queries, and of a mean over tags, each resampled by itself, one of one query."""
    values = np.random.default_rng(queries).random((2, queries))
    groups = [np.arange(queries), np.arange(0, queries, 2), np.array([0])]
    for used in (None, groups):
        found = bootstrap_interval(values, used, resamples=57, seed=3)
        parts = [one.tolist() for one in used or groups[:1]]
        drawn = draws([len(one) for one in parts], 57, 3)
        for row, ends in zip(values.tolist(), found, strict=True):
            means = []
            for number in range(57):
                of_groups = [
                    sum(row[part[place]] for place in places[number]) / len(part)
                    for part, places in zip(parts, drawn, strict=True)
                ]
                means.append(sum(of_groups) / len(of_groups))
            np.testing.assert_allclose(ends, np.percentile(means, [2.5, 97.5]), atol=1e-12)


def test_a_small_tag_stays_in_every_resample() -> None:
    """Two right queries of one tag, 20 of another of which two are right: never below half of the first tag."""
    values = np.array([[1.0] * 4 + [0.0] * 18])
    groups = [np.arange(2), np.arange(2, 22)]
    low, high = bootstrap_interval(values, groups)[0]
    assert 0.5 <= low < 0.55 < high <= 0.65
    means = bootstrap_means(values, groups)
    assert set(means[:, 0, 0]) == {1.0} and means[:, 1].std() == pytest.approx(np.sqrt(0.09 / 20), rel=0.1)


def test_large_samples_are_drawn_in_parts() -> None:
    """More random numbers than are held at once: the same mean and deviation as theory gives."""
    values = np.random.default_rng(0).random((1, 2_000))
    means = bootstrap_means(values, [np.arange(2_000), np.arange(1_000)])
    for place, rows in enumerate((values, values[:, :1_000])):
        assert means[:, place].mean() == pytest.approx(rows.mean(), abs=0.002)
        assert means[:, place].std() == pytest.approx(rows.std() / np.sqrt(rows.size), rel=0.1)


def test_bootstrap_agrees_with_scipy() -> None:
    """Other draws, so within the noise of 5,000 resamples; and narrower where there are more queries."""
    values = np.random.default_rng(0).beta(1, 3, 300)
    found = bootstrap_interval(values[None], resamples=5_000)[0]
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5_000, random_state=1)
    np.testing.assert_allclose(found, other.confidence_interval, atol=0.003)
    few = bootstrap_interval(values[None, :30])[0]
    assert few[1] - few[0] > 2 * (found[1] - found[0])


def test_bootstrap_without_queries() -> None:
    """Neither a sample nor a group of it may be empty."""
    with pytest.raises(ValueError, match="at least one query"):
        bootstrap_interval(np.zeros((1, 0)))
    with pytest.raises(ValueError, match="got an empty one"):
        bootstrap_means(np.zeros((1, 3)), [np.arange(3), np.arange(0)])


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 1), (1, 5), (7, 7), (40, 61), (900, 1000)])
def test_mcnemar_equals_scipy(better: int, worse: int) -> None:
    """The two-sided binomial test of the queries that changed; no size overflows."""
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)
    row = np.array([[1.0] * better + [-1.0] * worse + [0.0] * 5])
    assert paired_test(row)[0] == pytest.approx(expected, rel=1e-9)
    assert 0 < mcnemar(20_000, 19_000) < 1e-6


def test_permutation_test_equals_scipy() -> None:
    """Exactly where all signs are tried; within its noise where they are drawn."""
    few = np.random.default_rng(0).normal(0.4, 1, (3, 11))
    for row, p in zip(few, paired_test(few), strict=True):
        exact = stats.permutation_test(
            (row,), np.mean, permutation_type="samples", n_resamples=math.inf, vectorized=False
        )
        assert p == pytest.approx(exact.pvalue, rel=1e-9)
    many = np.random.default_rng(1).normal(0.15, 1, (2, 150))
    for row, p in zip(many, paired_test(many), strict=True):
        drawn = stats.permutation_test((row,), np.mean, permutation_type="samples", n_resamples=9_999, random_state=0)
        assert p == pytest.approx(drawn.pvalue, abs=0.015)


def test_permutation_test_equals_a_loop() -> None:
    """The random signs of the same seed, by a loop; queries without a difference have no say."""
    row = np.random.default_rng(5).normal(0.3, 1, 20)
    bits = np.random.default_rng(7).integers(2, size=(200, 20), dtype=np.int8)
    hits = sum(abs(sum(-v if bit else v for v, bit in zip(row, line, strict=True))) >= abs(row.sum()) for line in bits)
    assert paired_test(np.r_[row, np.zeros(9)][None], flips=200, seed=7)[0] == (1 + hits) / 201


def test_p_values_are_uniform_without_a_difference() -> None:
    """Of 400 tests of noise about a twentieth is below 0.05; with a difference far more."""
    chance = np.random.default_rng(2)
    noise = paired_test(chance.normal(0, 1, (400, 40)), flips=400)
    assert (
        0.02 < (noise < 0.05).mean() < 0.09 < (paired_test(chance.normal(0.5, 1, (400, 40)), flips=400) < 0.05).mean()
    )


def test_holm_equals_its_definition() -> None:
    """Reject while p(i) ≤ level / (m - i), step by step, at many levels and in any order."""
    p_values = [0.01, 0.04, 0.03, 0.005]
    for order in permutations(p_values):
        adjusted = holm(order)
        for level in np.linspace(0.001, 0.2, 150):
            rejected, left = set(), len(order)
            for p in sorted(order):
                if p > level / left:
                    break
                rejected.add(p)
                left -= 1
            assert {p for p, own in zip(order, adjusted, strict=True) if own <= level} == rejected
    assert holm([]) == []
