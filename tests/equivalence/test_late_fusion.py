"""Late fusion against its definition: the maximum of two softmaxes, ranked one query at a time."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spn4cir.ranking import rank_fused
from spn4cir.search import fuse_scores, rank_scores, rank_targets
from spn4cir.types import Benchmark, Measure, Query, recall_measures

GALLERY = tuple(f"g{n}" for n in range(23))


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("k", [1, 3])
def test_ranks_by_definition(k: int) -> None:
    """Over the gallery without the reference, and over a subset; a query of one part has that part alone."""
    queries = tuple(
        Query(
            GALLERY[n],
            "so",
            (GALLERY[(n + 5) % 23], GALLERY[(n + 9) % 23]),
            candidates=GALLERY[n : n + 10] + GALLERY[-3:],
        )
        if n < 10
        else Query(
            GALLERY[n],
            "so",
            (GALLERY[(n + 5) % 23],),
            candidates=tuple(dict.fromkeys((*GALLERY[:8], GALLERY[(n + 5) % 23]))),
        )
        for n in range(13)
    )
    queries = tuple(
        Query(q.reference, q.text, q.targets, candidates=tuple(dict.fromkeys((*q.candidates, *q.targets))))
        for q in queries
    )
    measures = (*recall_measures(1), Measure("recall", 1, over="subset"))
    benchmark = Benchmark("x", GALLERY, queries, True, measures)
    image, text, target = unit(13, 8, seed=0), unit(13, 8, seed=1), unit(23, k, 8, seed=2)
    text[4] = 0
    image[6] = 0
    found = rank_fused(benchmark, image, text, target)
    for n, query in enumerate(queries):
        parts = [part[n].double() for part in (image, text) if part[n].any()]
        scores = [(target.double() @ part).amax(1) * 100 for part in parts]
        for over, pool in (("gallery", GALLERY), ("subset", query.candidates)):
            ranked = torch.tensor([i in pool and i != query.reference for i in GALLERY])  # in the softmax too
            fused = torch.stack(
                [(s - s.max()).exp() * ranked / ((s - s.max()).exp() * ranked).sum() for s in scores]
            ).amax(0)
            rivals = [i for i in pool if i not in (query.reference, *query.targets)]
            for place, wanted in enumerate(query.targets):
                if wanted == query.reference:
                    continue
                own = fused[GALLERY.index(wanted)]
                rank = 1 + sum(bool(fused[GALLERY.index(i)] > own) for i in rivals)
                assert found[over][n, place].tolist() == [rank, rank]


def test_a_reference_is_in_no_softmax() -> None:
    """Of an image that is its own reference nearly all of the softmax would be the reference's."""
    target = unit(9, 1, 8, seed=0)
    image, text = target[:4, 0].clone(), unit(4, 8, seed=1)
    hidden = torch.eye(4, 9, dtype=torch.bool)
    shown, whole = fuse_scores(image, text, target, hidden), fuse_scores(image, text, target)
    assert (whole[hidden] > -0.01).all() and (shown[hidden] == -torch.inf).all()
    torch.testing.assert_close(shown.exp().masked_fill(hidden, 0).sum(1) >= 1 - 1e-5, torch.ones(4, dtype=torch.bool))


def test_negative_control() -> None:
    """Neither part alone, nor their sum, ranks like this."""
    image, text, target = unit(40, 8, seed=0), unit(40, 8, seed=1), unit(60, 1, 8, seed=2)
    rows = torch.arange(40)[:, None]
    fused = rank_scores(fuse_scores(image, text, target), rows)[:, 0, 0]
    for query in (image, text, F.normalize(image + text, dim=-1)):
        assert not np.array_equal(fused, rank_targets(query, target, rows)[0][:, 0, 0])


def test_scores_rank_as_vectors_do() -> None:
    """``rank_scores`` of plain scores is ``rank_targets``, ties, padding and excluded rows included."""
    query = unit(9, 4, seed=0)
    target = unit(12, 1, 4, seed=1)[torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3])]  # four equal pairs
    targets = torch.tensor([[n, (n + 3) % 12 if n % 2 else -1] for n in range(9)])
    excluded = torch.tensor([[(n + 1) % 12, (n + 3) % 12 if n == 5 else -1] for n in range(9)])
    expected, _ = rank_targets(query, target, targets, excluded)
    assert torch.equal(rank_scores(query @ target[:, 0].T, targets, excluded), expected)
    assert (expected[..., 0] != expected[..., 1]).any()
