"""Confidence intervals of means over queries, and paired tests of differences: pure functions of values by query."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
RESAMPLES = 1_000
FLIPS = 10_000  # random signs of each difference, where not all are tried
EXACT = 13  # differences of which all signs are tried: 2 ** 13 < FLIPS
CELLS = 500_000  # random numbers in memory at once


def bootstrap_interval(
    values: Array,
    groups: Sequence[Rows] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Array:
    """Percentile interval of each metric's mean over queries, by resampling queries with replacement.

    Args:
        values: (M, Q), value of each query in each of M metrics.
        groups: column indices of each group of queries, such as the queries of a tag: the statistic is then the
            unweighted mean of the groups' means. Each group is resampled by itself and keeps its number of queries
            (stratified bootstrap). A query of several groups is drawn in each of them independently. None for the mean
            over all queries.
        resamples: number of resamples; the same ones for all metrics.
        seed: of the draws.
        confidence: share of the resamples between both ends.

    Returns:
        (M, 2): lower and upper end.

    Raises:
        ValueError: if there is no query.

    Sources: Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13 (percentile interval); Davison
    and Hinkley, "Bootstrap methods and their application", 1997, section 3.2 (resampling within each stratum).

    Example:
        >>> import numpy as np
        >>> bootstrap_interval(np.array([[1.0, 0.0, 0.0, 1.0]])).tolist()
        [[0.0, 1.0]]
    """
    parts = [np.arange(values.shape[1])] if groups is None else groups
    means = bootstrap_means(values, parts, resamples, seed).mean(1)  # (R, M)
    tail = 50 * (1 - confidence)
    return np.asarray(np.percentile(means, [tail, 100 - tail], axis=0).T)


def bootstrap_means(values: Array, groups: Sequence[Rows], resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Mean of each metric over each group of queries, in each resample of that group.

    Args:
        values: (M, Q).
        groups: G arrays of column indices, none empty. Groups are drawn one after another, so the draws of the first
            ones do not depend on those that follow.
        resamples: R, the number of resamples.
        seed: of the draws.

    Returns:
        (R, G, M).

    Raises:
        ValueError: if there is no query, or a group is empty.
    """
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"values have the shape (metrics, queries) with at least one query, got {values.shape}")
    if not all(map(len, groups)):
        raise ValueError("every group holds at least one query, got an empty one")
    means, chance = np.empty((resamples, len(groups), len(values))), np.random.default_rng(seed)
    for place, rows in enumerate(groups):
        columns, start = np.ascontiguousarray(values[:, rows].T), 0  # (g, M)
        for counts in _counts(len(rows), resamples, chance):
            means[start : start + len(counts), place] = counts @ columns / len(rows)
            start += len(counts)
    return means


def _counts(queries: int, resamples: int, chance: np.random.Generator) -> Iterator[Array]:
    """How often each query is drawn in each resample, (r, queries) at a time."""
    size = max(1, CELLS // queries)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        drawn = chance.integers(queries, size=(count, queries), dtype=np.int32)
        cells = drawn + queries * np.arange(count)[:, None]  # one count of all resamples at once
        yield np.bincount(cells.ravel(), minlength=count * queries).reshape(count, queries).astype(np.float64)


def paired_test(differences: Array, flips: int = FLIPS, seed: int = 0) -> Array:
    """Two-sided p-value of each metric's mean difference between two models on the same queries.

    The null hypothesis is that a query's difference has either sign with equal probability. So the p-value is the share
    of all assignments of signs whose mean is at least as far from 0. It is

    - exact where all differences of a metric other than 0 have one size, as for recall: the number of positive ones is
      then binomial, which is McNemar's exact test;
    - exact by trying all signs, where at most 13 differences are not 0;
    - else ``(1 + hits) / (1 + flips)`` over random signs.

    No distribution of the values is assumed, and queries without a difference have no say.

    Args:
        differences: (M, Q), of each metric and query.
        flips: number of random assignments of signs, the same ones for all metrics.
        seed: of the draws.

    Returns:
        (M,): p-values; 1 for a metric without any difference.

    Sources: Fisher, "The design of experiments", 1935 (permutation of signs); McNemar, "Note on the sampling error of
    the difference between correlated proportions", 1947; Phipson and Smyth, "Permutation p-values should never be
    zero", 2010.

    Example:
        >>> import numpy as np
        >>> paired_test(np.array([[1.0, 1.0, 1.0, 1.0, 1.0, -1.0]])).tolist()
        [0.21875]
    """
    found = np.ones(len(differences))
    random = []
    for number, row in enumerate(differences):
        sizes = np.abs(row[row != 0])
        if not len(sizes):
            continue
        if np.allclose(sizes, sizes[0]):
            found[number] = mcnemar(int((row > 0).sum()), int((row < 0).sum()))
        elif len(sizes) <= EXACT:
            signs = 1 - 2 * ((np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1)  # (2^n, n)
            found[number] = _as_far(signs @ sizes, abs(row.sum())).mean()
        else:
            random.append(number)
    if random:
        kept = differences[random][:, differences[random].any(0)]  # (m, n)
        observed, hits = np.abs(kept.sum(1)), np.zeros(len(random))
        chance = np.random.default_rng(seed)
        size = max(1, CELLS // kept.shape[1])
        for start in range(0, flips, size):
            bits = chance.integers(2, size=(min(size, flips - start), kept.shape[1]), dtype=np.int8)
            hits += _as_far((1.0 - 2.0 * bits) @ kept.T, observed).sum(0)
        found[random] = (1 + hits) / (1 + flips)
    return found


def _as_far(sums: Array, observed: Array | float) -> NDArray[np.bool_]:
    """Whether sums are at least as far from 0 as the observed one; rounding must not part equal ones."""
    return np.abs(sums) >= observed - 1e-9 * np.maximum(1, observed)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value of McNemar's test, of the numbers of queries that changed each way.

    Example:
        >>> mcnemar(5, 1)
        0.21875
    """
    changed, fewer = better + worse, min(better, worse)
    term, total = 1, 0  # binomial coefficients
    for count in range(fewer + 1):  # whole numbers: 2 ** changed overflows a float
        total += term
        term = term * (changed - count) // (count + 1)
    return min(1.0, 2 * total / (1 << changed))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, so that the chance of any false difference among all stays below the level.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
        >>> holm([0.5, 0.01, 0.02])
        [0.5, 0.03, 0.04]
    """
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def paired_bootstrap(
    hits_a: NDArray[np.float64], hits_b: NDArray[np.float64], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of two methods and its 95 % percentile interval, paired by seed and by query.

    Each resample draws S seeds and Q queries with replacement, independently of each other and the same for both
    methods. So the interval covers other training seeds as well as other queries.

    Args:
        hits_a: (S, Q), value of each query after training with each seed, such as 1 for a hit at rank 1 and 0 for none.
        hits_b: (S, Q), the same of the other method. Repeat the row of a method without a seed.
        resamples: number of resamples.
        seed: of the draws.

    Returns:
        The mean of ``hits_a - hits_b``, and the 2.5th and the 97.5th percentile of its resamples.

    Raises:
        ValueError: if the shapes differ, or there is no seed or no query.

    Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13 (percentile interval).

    Example:
        >>> import numpy as np
        >>> paired_bootstrap(np.array([[1.0, 1.0, 0.0, 1.0]]), np.array([[0.0, 0.0, 0.0, 1.0]]))
        (0.5, 0.0, 1.0)
    """
    if hits_a.shape != hits_b.shape or hits_a.ndim != 2 or not hits_a.size:
        raise ValueError(f"paired hits have one shape (seeds, queries), got {hits_a.shape} and {hits_b.shape}")
    differences = hits_a.astype(np.float64) - hits_b  # (S, Q)
    seeds, queries = differences.shape
    chance = np.random.default_rng(seed)
    means = np.empty(resamples)
    for number in range(resamples):
        drawn = differences[chance.integers(seeds, size=seeds)].mean(0)  # (Q,)
        means[number] = drawn[chance.integers(queries, size=queries)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)
