"""Metrics over ranks."""

import numpy as np
import pytest

from spn4cir.measures import Ranks, macro_mean, recall_at, recalls


def places(*ranks: int) -> Ranks:
    """Ranks without ties: first and last place are the same."""
    return np.array([(rank, rank) for rank in ranks], dtype=np.int64).reshape(-1, 2)


RANKS = places(1, 2, 3, 11)


@pytest.mark.parametrize(("k", "percent"), [(1, 25.0), (2, 50.0), (3, 75.0), (10, 75.0), (11, 100.0), (10**9, 100.0)])
def test_recall(k: int, percent: float) -> None:
    """Percent of ranks up to k, k included; a k beyond any gallery is all."""
    assert recall_at(RANKS, k) == percent


def test_recall_of_one() -> None:
    """Edges: nothing found, all found."""
    assert recall_at(places(2), 1) == 0.0
    assert recall_at(places(1), 1) == 100.0


@pytest.mark.parametrize(("ranks", "k"), [([], 1), ([1, 2], 0), ([1, 2], -1), ([0, 1], 1), ([-3], 5)])
def test_what_is_undefined_raises(ranks: list[int], k: int) -> None:
    """No ranks, and ranks or cut-offs below one, are ValueErrors: a rank counted from 0 never passes for good."""
    with pytest.raises(ValueError, match=r"recall|ranks"):
        recall_at(places(*ranks), k)


def test_recalls_are_named() -> None:
    """One metric per cut-off, in order, with the prefix."""
    assert list(recalls(RANKS, (1, 10)).items()) == [("R@1", 25.0), ("R@10", 75.0)]
    assert recalls(RANKS, (2,), "Rs") == {"Rs@2": 50.0}


def test_macro_mean_weights_groups_equally() -> None:
    """The mean over groups, whatever their size; only the named metrics."""
    groups = {"a": {"R@1": 10.0, "queries": 1000.0}, "b": {"R@1": 40.0, "queries": 1.0}}
    assert macro_mean(groups, ["R@1"]) == {"R@1": 25.0}


@pytest.mark.parametrize(("k", "percent"), [(2, 0.0), (3, 25.0), (4, 50.0), (6, 100.0), (9, 100.0)])
def test_a_tie_is_shared_out(k: int, percent: float) -> None:
    """A target on one of the places 3 to 6 is among the first k with that probability, never with more."""
    assert recall_at(np.array([[3, 6]]), k) == percent


def test_a_last_place_before_the_first_raises() -> None:
    """Such a pair is no rank."""
    with pytest.raises(ValueError, match="ranks"):
        recall_at(np.array([[3, 2]]), 1)
