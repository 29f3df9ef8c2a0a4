"""Measures of a ranking: pure functions of ranks (Q, P, 2) and a cut-off k of at least 1, as fractions from 0 to 1.

A new measure is one function here, or elsewhere, one line in ``MEASURES`` and one test.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spn4cir.errors import InputError
from spn4cir.types import Measure

Ranks = NDArray[np.int64]
"""(Q, P, 2): first and last rank of each target among the non-targets of equal score, from 1 on; 0 is padding.

The other targets of a query are left out of the count, so ranks of several targets may be equal.
"""
Values = NDArray[np.float64]
"""(Q,): one value per query, from 0 to 1."""


def best_ranks(ranks: Ranks) -> Ranks:
    """Ranks (Q, P, 2) of all targets → (Q, 2) of each query's best one.

    Raises ``ValueError`` if there is no query, or one of them has no ranked target, or a last rank is before the first.
    """
    ranks = np.asarray(ranks)
    if not len(ranks):
        raise ValueError("a measure over no queries is undefined")
    first, last = np.where(ranks > 0, ranks, np.iinfo(np.int64).max).min(1).T
    is_whole = (ranks > 0).all(2) | (ranks == 0).all(2)
    if not is_whole.all() or (ranks.max((1, 2)) < 1).any() or (ranks[..., 1] < ranks[..., 0]).any():
        raise ValueError("every query needs a target with a first rank of 1 or more and no last rank before it")
    return np.stack([first, last], 1)


def recall(ranks: Ranks, k: int) -> Values:
    """Whether the best target is among the first ``k``.

    Ties are shared evenly: a target that ties with three others for ranks 3 to 6 is among the first 4 with probability
    one half. So a model that gives all images the same score is right as often as chance.
    """
    first, last = best_ranks(ranks).T
    return np.asarray(np.clip((k - first + 1) / (last - first + 1), 0, 1), np.float64)


def average_precision(ranks: Ranks, k: int) -> Values:
    """``AP@k = Σ_r P(r) · rel(r) / min(P, k)`` over ranks r ≤ k, P(r) the precision of the first r.

    Its mean over queries is mAP@k; k of the gallery's size gives plain average precision. Ties are shared evenly: the
    value is the mean over all orders of equal scores.

    Source: Baldrati et al., "Zero-shot composed image retrieval with textual inversion", ICCV 2023 (mAP@k).
    """
    first, last, count = _in_order(ranks)
    place = first + np.arange(first.shape[1])  # of a target in the whole ranking, where nothing ties
    precision = (np.arange(first.shape[1]) + 1) / np.maximum(place, 1)
    hits = np.where((first > 0) & (place <= k), precision, 0.0)
    values = hits.sum(1)
    for row in np.flatnonzero((last > first).any(1)):
        ties = _ties(first[row], last[row], k)
        values[row] = sum(float((hit * (before + 1 + earlier) / places).sum()) for places, hit, before, earlier in ties)
    return np.asarray(values / np.minimum(count, k), np.float64)


def precision(ranks: Ranks, k: int) -> Values:
    """Share of targets among the first ``m = min(P, k)``, P the number of targets: its mean is mMP@k.

    Ties are shared evenly. Source: modified mean precision of the Google Universal Image Embedding challenge, 2022.
    """
    first, last, count = _in_order(ranks)
    most = np.minimum(count, k)
    place = first + np.arange(first.shape[1])
    values = ((first > 0) & (place <= most[:, None])).sum(1).astype(np.float64)
    for row in np.flatnonzero((last > first).any(1)):
        values[row] = sum(float(hit.sum()) for _, hit, _, _ in _ties(first[row], last[row], int(most[row])))
    return np.asarray(values / most, np.float64)


def _in_order(ranks: Ranks) -> tuple[Ranks, Ranks, Ranks]:
    """First and last ranks (Q, P), best first and padding last, and the number of ranked targets (Q,)."""
    best_ranks(ranks)  # raises
    ranks = np.asarray(ranks)
    padded = np.where(ranks > 0, ranks, np.iinfo(np.int64).max)
    order = np.lexsort((padded[..., 1], padded[..., 0]), axis=1)
    first, last = (np.take_along_axis(ranks[..., side], order, 1) for side in (0, 1))
    return first, last, (first > 0).sum(1)


def _ties(first: Ranks, last: Ranks, k: int) -> list[tuple[Values, Values, int, Values]]:
    """Each group of equal scores that holds targets, of one query's ranks (P,).

    Returns for each group its ranks up to ``k`` in the whole ranking (n,), the probability that a target stands there
    (n,), the number of targets before the group, and the expected number of its targets before each rank, given that
    a target stands there (n,).
    """
    groups = Counter(pair for pair in zip(first.tolist(), last.tolist(), strict=True) if pair[0] > 0)
    found, before = [], 0
    for (start, end), targets in groups.items():
        size = targets + end - start
        inside = np.arange(size)
        places = start + before + inside
        earlier = inside * (targets - 1) / max(size - 1, 1)
        kept = places <= k
        chance = np.full(kept.sum(), targets / size)
        found.append((places[kept].astype(np.float64), chance, before, earlier[kept]))
        before += targets
    return found


class Kind(NamedTuple):
    """A kind of measure: what its name begins with, and its value of each query."""

    label: str
    values: Callable[[Ranks, int], Values]


MEASURES: dict[str, Kind] = {
    "recall": Kind("R", recall),
    "map": Kind("mAP", average_precision),
    "mmp": Kind("mMP", precision),
}


def measure_name(measure: Measure) -> str:
    """``R@10``, ``mAP@5``, or ``Rs@1`` over the subset. Raises ``InputError`` for an unknown kind."""
    if measure.kind not in MEASURES:
        raise InputError(f"unknown measure {measure.kind!r}; known: {', '.join(MEASURES)}")
    return f"{MEASURES[measure.kind].label}{'s' if measure.over == 'subset' else ''}@{measure.k}"


def macro_mean(tags: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Unweighted mean over tags of each named metric."""
    return {name: float(np.mean([values[name] for values in tags.values()])) for name in names}
