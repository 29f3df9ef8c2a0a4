"""The one loss."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.losses import info_nce


def l2_normalize(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def naive(
    query: Tensor, candidates: Tensor, positives: list[list[int]], t: float, ignore: tuple[tuple[int, int], ...] = ()
) -> Tensor:
    """The formula of the docstring, term by term."""
    terms = []
    for i, mine in enumerate(positives):
        scores = [(candidates[j] @ query[i]).max() / t for j in range(len(candidates))]
        for p in mine:
            others = [j for j in range(len(candidates)) if j == p or (j not in mine and (i, j) not in ignore)]
            terms.append(-scores[p] + torch.logsumexp(torch.stack([scores[j] for j in others]), 0))
    return torch.stack(terms).mean()


def test_equals_the_formula() -> None:
    """One positive each, K = 1."""
    query, candidates = l2_normalize(4, 6), l2_normalize(9, 1, 6, seed=1)
    found = info_nce(query, candidates, torch.tensor([3, 3, 0, 8]), 0.1)
    torch.testing.assert_close(found, naive(query, candidates, [[3], [3], [0], [8]], 0.1))


def test_equals_the_formula_with_several_vectors_and_positives() -> None:
    """K = 3, one to three positives, ignored pairs: the loss and the gradients of queries and candidates."""
    query, candidates = l2_normalize(4, 6).requires_grad_(), l2_normalize(9, 3, 6, seed=1).requires_grad_()
    positives = [[3], [1, 2], [0, 5, 7], [8, 4]]
    ignore = ((0, 1), (0, 3), (2, 6), (3, 8))
    padded = torch.tensor([[3, -1, -1], [-1, 1, 2], [0, 5, 7], [8, -1, 4]])
    found = info_nce(query, candidates, padded, 0.1, torch.tensor(ignore).T)
    expected = naive(query, candidates, positives, 0.1, ignore)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, (query, candidates)), torch.autograd.grad(expected, (query, candidates)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_ignored_pairs_change_the_loss() -> None:
    """The negative control: what is ignored was counted before, and no gradient reaches it now."""
    query, candidates = l2_normalize(2, 6), l2_normalize(5, 1, 6, seed=1).requires_grad_()
    label = torch.tensor([0, 1])
    without = info_nce(query, candidates, label, 0.1, torch.tensor([[0, 1], [4, 4]]))
    assert without < info_nce(query, candidates, label, 0.1)
    (gradient,) = torch.autograd.grad(without, candidates)
    assert not gradient[4].any() and gradient[3].any()


def test_a_positive_is_never_ignored() -> None:
    """Ignoring a query's own positive changes nothing: a batch may list all its duplicates."""
    query, candidates, label = l2_normalize(3, 6), l2_normalize(3, 1, 6, seed=1), torch.arange(3)
    own = torch.stack([label, label])
    torch.testing.assert_close(info_nce(query, candidates, label, 0.1, own), info_nce(query, candidates, label, 0.1))


def test_no_pairs_to_ignore() -> None:
    """An empty list of pairs is no list."""
    query, candidates, label = l2_normalize(3, 6), l2_normalize(4, 1, 6, seed=1), torch.arange(3)
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert torch.equal(info_nce(query, candidates, label, 0.1, empty), info_nce(query, candidates, label, 0.1))


def test_one_column_of_positives_is_a_vector() -> None:
    """(B,) and (B, 1) mean the same, and so do extra columns of padding."""
    query, candidates, label = l2_normalize(3, 6), l2_normalize(4, 1, 6, seed=1), torch.tensor([2, 0, 3])
    column = F.pad(label[:, None], (0, 2), value=-1)
    assert torch.equal(info_nce(query, candidates, label[:, None], 0.1), info_nce(query, candidates, label, 0.1))
    assert torch.equal(info_nce(query, candidates, column, 0.1), info_nce(query, candidates, label, 0.1))


def test_the_only_candidate_costs_nothing() -> None:
    """One candidate that is the positive: the loss is zero, and finite."""
    assert info_nce(l2_normalize(1, 6), l2_normalize(1, 1, 6, seed=1), torch.tensor([0]), 0.02).item() == 0


def test_temperature_gets_a_gradient() -> None:
    """A learned temperature trains, with the derivative that a small step measures."""
    query, candidates, label = l2_normalize(3, 6), l2_normalize(4, 1, 6, seed=1), torch.tensor([2, 0, 3])
    temperature = torch.tensor(0.2, dtype=torch.double, requires_grad=True)
    info_nce(query, candidates, label, temperature).backward()
    step = (info_nce(query, candidates, label, 0.2 + 1e-6) - info_nce(query, candidates, label, 0.2 - 1e-6)) / 2e-6
    assert temperature.grad is not None
    torch.testing.assert_close(temperature.grad, step, rtol=1e-5, atol=1e-8)


def test_half_precision_is_widened() -> None:
    """Scores of half-precision features are taken in float32, where a small temperature does not overflow."""
    query, candidates = l2_normalize(3, 6).bfloat16(), l2_normalize(4, 1, 6, seed=1).bfloat16()
    found = info_nce(query, candidates, torch.tensor([2, 0, 3]), 0.005)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, info_nce(query.float(), candidates.float(), torch.tensor([2, 0, 3]), 0.005), rtol=0, atol=0
    )


def test_small_temperatures_stay_finite() -> None:
    """At the lower bound of a learned temperature, with wrong answers on top, loss and gradient are finite."""
    query = l2_normalize(4, 6).float().requires_grad_()
    loss = info_nce(query, -query.detach()[:, None], torch.arange(4), 0.005)
    loss.backward()
    assert torch.isfinite(loss) and query.grad is not None and torch.isfinite(query.grad).all()


@pytest.mark.parametrize("row", [4, 100])
def test_a_positive_beyond_the_candidates_raises(row: int) -> None:
    """A label that no candidate has never trains silently."""
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        info_nce(l2_normalize(1, 6), l2_normalize(4, 1, 6, seed=1), torch.tensor([row]), 0.1)


@pytest.mark.parametrize("positives", [torch.tensor([-1, -1]), torch.tensor([[-1, -1], [-1, -1]])])
def test_a_loss_without_terms_is_refused(positives: Tensor) -> None:
    """No positive at all is a mistake of the caller: a ValueError, not the NaN of an empty mean."""
    with pytest.raises(ValueError, match="positive"):
        info_nce(l2_normalize(2, 6), l2_normalize(4, 1, 6, seed=1), positives, 0.1)
