"""info_nce against a double loop written from its formula."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.losses import info_nce

T = 0.07


def loop(query: Tensor, candidates: Tensor, positives: Tensor, ignore: set[tuple[int, int]]) -> Tensor:
    """The formula, term by term: -s(q, p)/t + log of the sum over p and all that is neither ignored nor positive."""
    terms = []
    for i, q in enumerate(query):
        scores = [torch.stack([q @ vector for vector in c]).max() / T for c in candidates]
        own = [int(p) for p in positives.view(len(query), -1)[i] if p >= 0]
        for p in own:
            negatives = [s for j, s in enumerate(scores) if j not in own and (i, j) not in ignore]
            terms.append(torch.stack([scores[p], *negatives]).exp().sum().log() - scores[p])
    return torch.stack(terms).mean()


def l2_normalize(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def value_and_gradients(loss, query: Tensor, candidates: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    query, candidates = query.clone().requires_grad_(), candidates.clone().requires_grad_()
    value = loss(query, candidates)
    value.backward()
    return [value.detach(), query.grad, candidates.grad]


ONE = torch.tensor([2, 0, 5, 5, 8])
SEVERAL = torch.tensor([[2, 4, -1], [0, -1, -1], [5, 1, 3], [5, -1, -1], [8, 7, -1]])
IGNORE = {(0, 1), (0, 2), (1, 6), (2, 5), (2, 0), (4, 3)}  # (0, 2) and (2, 5) are the positives themselves: they stay


@pytest.mark.parametrize("ignore", [set(), IGNORE], ids=["all", "ignore"])
@pytest.mark.parametrize("positives", [ONE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_loss_equals_the_loop(vectors: int, positives: Tensor, ignore: set[tuple[int, int]]) -> None:
    """Values and gradients in float64; candidates 5 and 6 are equal."""
    torch.manual_seed(0)
    query, candidates = l2_normalize(5, 7), l2_normalize(9, vectors, 7)
    candidates[6] = candidates[5]
    pairs = torch.tensor(sorted(ignore)).view(-1, 2).T if ignore else None
    fast = value_and_gradients(lambda q, c: info_nce(q, c, positives, T, pairs), query, candidates)
    slow = value_and_gradients(lambda q, c: loop(q, c, positives, ignore), query, candidates)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_ignored_pairs_matter() -> None:
    """Negative control: without the ignored pairs the loss and its gradient differ."""
    torch.manual_seed(0)
    query, candidates = l2_normalize(5, 7), l2_normalize(9, 1, 7)
    pairs = torch.tensor(sorted(IGNORE)).T
    masked = value_and_gradients(lambda q, c: info_nce(q, c, ONE, T, pairs), query, candidates)
    whole = value_and_gradients(lambda q, c: info_nce(q, c, ONE, T), query, candidates)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(masked, whole, strict=True))
    assert whole[0] > masked[0]


def test_ignored_candidate_gets_no_gradient() -> None:
    """A candidate that all queries ignore moves nothing, whatever it is."""
    torch.manual_seed(0)
    query, candidates = l2_normalize(5, 7), l2_normalize(9, 1, 7)
    pairs = torch.stack([torch.arange(5), torch.full((5,), 6)])
    before = value_and_gradients(lambda q, c: info_nce(q, c, ONE, T, pairs), query, candidates)
    candidates[6] *= -1
    after = value_and_gradients(lambda q, c: info_nce(q, c, ONE, T, pairs), query, candidates)
    assert torch.equal(before[0], after[0]) and not after[2][6].any()


def test_a_learned_temperature_gets_the_gradient_of_the_loop() -> None:
    """d loss / d temperature by central differences of the loop."""
    torch.manual_seed(0)
    query, candidates = l2_normalize(5, 7), l2_normalize(9, 1, 7)
    temperature = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    info_nce(query, candidates, ONE, temperature).backward()
    up, down = (float(info_nce(query, candidates, ONE, T + step)) for step in (1e-6, -1e-6))
    assert math.isclose(float(temperature.grad), (up - down) / 2e-6, rel_tol=1e-5)  # type: ignore[arg-type]


def test_scores_stay_wide_under_mixed_precision() -> None:
    """The docstring's promise of float32 scores holds inside autocast, where a plain product would be bfloat16."""
    torch.manual_seed(0)
    query, candidates = l2_normalize(5, 64).float(), l2_normalize(9, 1, 64).float()
    plain = info_nce(query, candidates, ONE, T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = info_nce(query, candidates, ONE, T)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=1e-6, atol=0)
    assert abs(info_nce(query.bfloat16(), candidates.bfloat16(), ONE, T) - plain) > 1e-5  # such rounding would show
