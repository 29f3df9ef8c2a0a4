"""The triplet loss against its definition, query by query, with its gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.config import TrainConfig
from spn4cir.config_groups import NegativesConfig
from spn4cir.errors import InputError
from spn4cir.in_batch import InBatch, TripletMargin
from spn4cir.stages import check_stage2

IDENTITY = torch.tensor([4, 2, 4, 7, 9])  # the first and third target are equal pixels
OTHERS = torch.tensor([[9], [-1], [-1], [-1], [-1]])  # the last target also answers the first query


def rows(count: int, seed: int) -> Tensor:
    values = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return F.normalize(values, dim=-1).requires_grad_()


def naive(query: Tensor, target: Tensor, drawn: list[int], margin: float) -> Tensor:
    terms = []
    for n, other in enumerate(drawn):
        matched = 1 - query[n] @ target[n]
        terms += [(matched - (1 - one @ target[other]) + margin).clamp(min=0) for one in (query[n], target[n])]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_equals_the_definition(margin: float) -> None:
    """For negatives as they are drawn: each is one of those that are allowed, and all of these come up in time."""
    query, target = rows(5, 0), rows(5, 1)
    contrast = InBatch(IDENTITY, 0.1, OTHERS)
    allowed = [[1, 3], [0, 2, 3, 4], [1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]
    seen = [set[int]() for _ in allowed]
    for step in range(60):
        found = contrast.by_margin(query, target[:, None], TripletMargin(margin, 7), step)
        (gradient,) = torch.autograd.grad(found, target, retain_graph=True)
        chance = np.random.default_rng((7, step, 0)).random((5, 5))
        drawn = [max(choices, key=lambda n: chance[q, n].item()) for q, choices in enumerate(allowed)]
        expected = naive(query, target, drawn, margin)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, target, retain_graph=True)[0])
        for place, number in zip(seen, drawn, strict=True):
            place.add(number)
    assert [sorted(numbers) for numbers in seen] == allowed


def test_negative_control() -> None:
    """Without the known further target of the first query, that target is drawn too."""
    query, target = rows(5, 0), rows(5, 1)
    one, two = (
        [c.by_margin(query, target[:, None], TripletMargin(1.0), n).item() for n in range(20)]
        for c in (InBatch(IDENTITY, 0.1, OTHERS), InBatch(IDENTITY, 0.1))
    )
    assert one != two


def test_another_seed_draws_others() -> None:
    query, target = rows(5, 0), rows(5, 1)
    contrast = InBatch(IDENTITY, 0.1, OTHERS)
    found = [
        [contrast.by_margin(query, target[:, None], TripletMargin(1.0, seed), n).item() for n in range(9)]
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]


def test_a_query_without_a_negative_adds_nothing() -> None:
    query, target = rows(2, 0), rows(2, 1)
    alike = InBatch(torch.tensor([3, 3]), 0.1)
    assert alike.by_margin(query, target[:, None], TripletMargin(1.0), 0) == 0


def test_the_setting() -> None:
    """For stage 1 and targets alone."""
    with pytest.raises(InputError, match=r"negatives\.margin must be above 0"):
        TrainConfig(negatives=NegativesConfig(margin=0.0))
    with pytest.raises(InputError, match="draws targets as negatives"):
        NegativesConfig(["target", "query"], margin=1.0)
    with pytest.raises(InputError, match="whatever negatives"):
        NegativesConfig(margin=1.0, max_similarity=0.9)
    with pytest.raises(InputError, match=r"negatives\.margin is for stage 1"):
        check_stage2(TrainConfig(negatives=NegativesConfig(margin=1.0)))
