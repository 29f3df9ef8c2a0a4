"""Metrics over ranks: pure functions, percentages from 0 to 100."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]
"""(Q, 2): first and last place of each query's best target among images of equal score, the best place being 1."""


def recall_at(ranks: Ranks, k: int) -> float:
    """Percentage of queries whose best target is among the first ``k``.

    Ties are shared out evenly: a target that stands on places 3 to 6 with three others is among the first 4 with a
    probability of one half. So a model that gives all images the same score is right as often as chance.

    Args:
        ranks: (Q, 2) first and last place that the target can take; equal where no score ties with its own.
        k: cut-off, at least 1.

    Raises:
        ValueError: if there are no ranks, or ``k`` or a place is below 1, or a last place before the first.
    """
    first, last = np.asarray(ranks).reshape(-1, 2).T
    if first.size == 0:
        raise ValueError("recall of no queries is undefined")
    if k < 1 or first.min() < 1 or (last < first).any():
        raise ValueError(f"ranks and k start at 1, got k={k} and a smallest rank of {first.min()}")
    return float(100.0 * np.mean(np.clip((k - first + 1) / (last - first + 1), 0, 1)))


def recalls(ranks: Ranks, ks: Iterable[int], prefix: str = "R") -> dict[str, float]:
    """``{"R@1": …}`` for each cut-off."""
    return {f"{prefix}@{k}": recall_at(ranks, k) for k in ks}


def macro_mean(groups: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Unweighted mean over groups of each named metric."""
    return {name: float(np.mean([group[name] for group in groups.values()])) for name in names}
