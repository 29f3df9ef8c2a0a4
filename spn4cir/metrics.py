"""Metrics over ranks: pure functions, percentages from 0 to 100."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]


def recall_at(ranks: Ranks, k: int) -> float:
    """Percentage of queries whose best target is among the first ``k``.

    Args:
        ranks: (Q,) ranks of the target, the best place being 1.
        k: cut-off, at least 1.

    Raises:
        ValueError: if there are no ranks, or ``k`` or a rank is below 1.
    """
    ranks = np.asarray(ranks)
    if ranks.size == 0:
        raise ValueError("recall of no queries is undefined")
    if k < 1 or ranks.min() < 1:
        raise ValueError(f"ranks and k start at 1, got k={k} and a smallest rank of {ranks.min()}")
    return float(100.0 * np.mean(ranks <= k))


def recalls(ranks: Ranks, ks: Iterable[int], prefix: str = "R") -> dict[str, float]:
    """``{"R@1": …}`` for each cut-off."""
    return {f"{prefix}@{k}": recall_at(ranks, k) for k in ks}


def macro_mean(groups: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Unweighted mean over groups of each named metric, under the name ``macro <metric>``."""
    return {f"macro {name}": float(np.mean([group[name] for group in groups.values()])) for name in names}
