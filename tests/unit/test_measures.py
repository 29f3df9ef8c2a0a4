"""Measures over ranks: recall, average precision, mean precision, with ties."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from spn4cir.errors import InputError
from spn4cir.measures import MEASURES, Ranks, best_ranks, macro_mean, measure_name
from spn4cir.types import Measure

Row = np.ndarray


def ranks_of(scores: Row, relevant: Row) -> Ranks:
    """(1, P, 2): ranks of each target among the non-targets of one query, counted one by one."""
    others = [s for s, is_target in zip(scores, relevant, strict=True) if not is_target]
    pairs = [
        (1 + sum(s > own for s in others), 1 + sum(s >= own for s in others))
        for own, is_target in zip(scores, relevant, strict=True) if is_target
    ]  # fmt: skip
    return np.array([pairs], dtype=np.int64)


def value(kind: str, ranks: Ranks, k: int) -> float:
    return float(MEASURES[kind].values(ranks, k)[0])


def naive(kind: str, relevant: list[bool], k: int) -> float:
    """A measure of one ranking, best first, by a loop."""
    targets = sum(relevant)
    if kind == "recall":
        return float(any(relevant[:k]))
    if kind == "mmp":
        most = min(k, targets)
        return sum(relevant[:most]) / most
    total, hits = 0.0, 0
    for place, is_target in enumerate(relevant[:k], 1):
        hits += is_target
        total += hits / place * is_target
    return total / min(targets, k)


def orders(scores: Row, relevant: Row) -> list[list[bool]]:
    """Relevance, best first, in every order that the scores allow."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            found.append([bool(relevant[n]) for n in order])
    return found


@pytest.mark.parametrize("kind", ["recall", "map", "mmp"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 100])
def test_without_ties_as_a_loop(kind: str, k: int) -> None:
    """Of random rankings with one to all items relevant."""
    draw = np.random.default_rng(k)
    for targets in (1, 2, 5, 12):
        scores, relevant = draw.permutation(12).astype(float), np.arange(12) < targets
        expected = naive(kind, [bool(relevant[n]) for n in np.argsort(-scores)], k)
        assert value(kind, ranks_of(scores, relevant), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["map", "mmp"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 9])
def test_ties_are_the_mean_over_all_orders(kind: str, k: int) -> None:
    """Equal scores among targets, among others, and between both: each order is as likely as the next."""
    draw = np.random.default_rng(k)
    for _ in range(12):
        scores, relevant = draw.integers(0, 3, 6).astype(float), draw.permutation(6) < draw.integers(1, 5)
        expected = np.mean([naive(kind, order, k) for order in orders(scores, relevant)])
        assert value(kind, ranks_of(scores, relevant), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_recall_with_ties_is_the_mean_over_orders_of_one_target(k: int) -> None:
    """The share of orders in which the target is among the first k."""
    draw = np.random.default_rng(k)
    for _ in range(12):
        scores, relevant = draw.integers(0, 3, 6).astype(float), draw.permutation(6) == 0
        expected = np.mean([naive("recall", order, k) for order in orders(scores, relevant)])
        assert value("recall", ranks_of(scores, relevant), k) == pytest.approx(expected, abs=1e-12)


def test_as_scikit_learn() -> None:
    """Average precision over the whole ranking; recall of a single target as top-k accuracy."""
    draw = np.random.default_rng(0)
    scores, targets = draw.normal(size=(40, 25)), draw.integers(1, 9, 40)
    relevant = np.stack([draw.permutation(25) < count for count in targets])
    found = [value("map", ranks_of(*pair), 25) for pair in zip(scores, relevant, strict=True)]
    expected = [average_precision_score(r, s) for r, s in zip(relevant, scores, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not np.allclose([value("map", ranks_of(*pair), 3) for pair in zip(scores, relevant, strict=True)], expected)
    one = draw.integers(0, 25, 40)
    ranks = np.concatenate([ranks_of(s, np.arange(25) == n) for s, n in zip(scores, one, strict=True)])
    accuracy = top_k_accuracy_score(one, scores, k=5, labels=range(25))
    assert MEASURES["recall"].values(ranks, 5).mean() == pytest.approx(accuracy)


def test_padding_counts_nothing() -> None:
    """Queries of different numbers of targets stand in one table."""
    ranks = np.array([[[1, 1], [3, 3], [0, 0]], [[2, 2], [2, 2], [2, 2]]])
    assert MEASURES["map"].values(ranks, 10) == pytest.approx([(1 + 2 / 4) / 2, (1 / 2 + 2 / 3 + 3 / 4) / 3])
    assert MEASURES["mmp"].values(ranks, 2) == pytest.approx([1 / 2, 1 / 2])
    assert MEASURES["recall"].values(ranks, 1) == pytest.approx([1, 0])


@pytest.mark.parametrize(("k", "share"), [(2, 0.0), (3, 0.25), (4, 0.5), (6, 1.0), (9, 1.0)])
def test_a_tie_is_shared_out(k: int, share: float) -> None:
    """A target on one of the places 3 to 6 is among the first k with that probability, never with more."""
    assert value("recall", np.array([[[3, 6]]]), k) == share


@pytest.mark.parametrize("kind", ["recall", "map", "mmp"])
@pytest.mark.parametrize("ranks", [np.zeros((0, 1, 2)), [[[0, 0]]], [[[-3, -3]]], [[[3, 2]]], [[[0, 1]]]])
def test_what_is_undefined_raises(kind: str, ranks: object) -> None:
    """No query, no ranked target, ranks below one, a last rank before the first."""
    with pytest.raises(ValueError, match=r"no queries|first rank of 1"):
        MEASURES[kind].values(np.array(ranks, dtype=np.int64), 1)


def test_the_best_target() -> None:
    """The one with the best first rank; of equal ones the best last rank."""
    assert best_ranks(np.array([[[4, 6], [2, 3], [0, 0]], [[5, 5], [0, 0], [9, 9]]])).tolist() == [[2, 3], [5, 5]]


def test_names() -> None:
    """Label, what is ranked, cut-off; an unknown kind is refused, and so is a cut-off below one."""
    measures = [
        Measure("recall", 10),
        Measure("recall", 1, "subset"),
        Measure("map", 5),
        Measure("mmp", 5, "candidates"),
    ]
    assert [measure_name(m) for m in measures] == ["R@10", "Rs@1", "mAP@5", "mMP@5"]
    with pytest.raises(InputError, match=r"unknown measure 'recal'; known: recall, map, mmp"):
        measure_name(Measure("recal", 1))
    with pytest.raises(InputError, match="k=0"):
        Measure("recall", 0)


def test_macro_mean_weights_tags_equally() -> None:
    """The mean over tags, whatever their size; only the named metrics."""
    tags = {"a": {"R@1": 10.0, "queries": 1000.0}, "b": {"R@1": 40.0, "queries": 1.0}}
    assert macro_mean(tags, ["R@1"]) == {"R@1": 25.0}
