"""Confidence intervals of differences between two rows of a benchmark."""

import numpy as np
from numpy.typing import NDArray


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
