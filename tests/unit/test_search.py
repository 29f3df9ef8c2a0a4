"""Scores, ranks and the first k."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir import search
from spn4cir.measures import best_ranks
from spn4cir.search import CHUNK, rank_targets, scores_of, top_k


def l2_normalize(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def gallery_of(scores: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Queries and a gallery whose scores are exactly these, (Q, G)."""
    table = torch.tensor(scores)  # (Q, G)
    return torch.eye(len(table)), table.T[:, None].contiguous()  # (Q, Q), (G, 1, Q)


def ranks(query: Tensor, gallery: Tensor, *rows: Tensor) -> list[list[int]]:
    """First and last rank of each query's best target."""
    return best_ranks(rank_targets(query, gallery, *rows)[0].numpy()).tolist()  # type: ignore[no-any-return]


def naive_rank(scores: Tensor, targets: list[int], excluded: list[int]) -> int:
    """Best target's place if equal scores stand ahead of it, its fellow targets and the excluded left out."""
    best = max(float(scores[t]) for t in targets)
    others = [g for g in range(len(scores)) if g not in targets and g not in excluded]
    return 1 + sum(float(scores[g]) >= best for g in others)


def test_scores_are_the_maximum_over_vectors() -> None:
    """K vectors per candidate: the best dot product counts."""
    query, candidates = l2_normalize(5, 8), l2_normalize(7, 3, 8, seed=1)
    naive = torch.stack([torch.stack([(c @ q).max() for c in candidates]) for q in query])
    torch.testing.assert_close(scores_of(query, candidates), naive)


@pytest.mark.parametrize(("given", "kept"), [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64),
])  # fmt: skip
def test_scores_are_float32_or_wider(given: torch.dtype, kept: torch.dtype) -> None:
    """Half precision is widened before the product; double stays double."""
    assert scores_of(l2_normalize(2, 4).to(given), l2_normalize(3, 1, 4).to(given)).dtype == kept


def test_rank_against_a_naive_loop() -> None:
    """Several targets, several exclusions, padding: the ranks of a plain loop over the definition."""
    query, gallery = l2_normalize(9, 6), l2_normalize(30, 2, 6, seed=1)
    picks = torch.Generator().manual_seed(2)
    rows = [torch.randperm(30, generator=picks)[:5].tolist() for _ in range(9)]
    targets = torch.tensor([[r[0], r[1], -1] if n % 2 else [-1, r[0], -1] for n, r in enumerate(rows)])
    excluded = torch.tensor([[r[2], -1] if n % 3 else [r[2], r[3]] for n, r in enumerate(rows)])
    scores = scores_of(query, gallery)
    expected = [
        naive_rank(s, [t for t in ts if t >= 0], [x for x in xs if x >= 0])
        for s, ts, xs in zip(scores, targets.tolist(), excluded.tolist(), strict=True)
    ]
    assert ranks(query, gallery, targets, excluded) == [[r, r] for r in expected]
    assert ranks(query, gallery, targets) != [[r, r] for r in expected]  # the exclusions do matter


def test_ties_never_favour_the_target() -> None:
    """A model that gives everything one score puts the target anywhere, not first."""
    query, gallery = gallery_of([[0.5, 0.5, 0.5, 0.5]])
    for row in range(4):
        assert ranks(query, gallery, torch.tensor([[row]])) == [[1, 4]]


def test_a_subset_is_a_second_ranking() -> None:
    """Within three of five images; padding is no image; a target outside has no rank."""
    query, gallery = gallery_of([[0.9, 0.8, 0.7, 0.7, 0.1]])
    subset, none = torch.tensor([[1, 2, 3, -1]]), torch.tensor([[-1]])

    def both(target: int, excluded: Tensor) -> list[list[int]]:
        found = rank_targets(query, gallery, torch.tensor([[target]]), excluded, subset)
        return [ranked[0, 0].tolist() for ranked in found if ranked is not None]

    assert both(2, none) == [[3, 4], [2, 3]]
    assert both(2, torch.tensor([[1]])) == [[2, 3], [1, 2]]
    with pytest.raises(ValueError, match="no rank"):
        both(0, none)
    scores, rows = top_k(query, gallery, 4, torch.tensor([[1]]), subset)
    assert rows[0, :2].tolist() == [2, 3] and scores[0, 2:].isneginf().all()


def test_every_target_has_its_ranks() -> None:
    """Each among the non-targets alone; padding and what is left out have none."""
    query, gallery = gallery_of([[0.9, 0.8, 0.7, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]])
    targets, excluded = torch.tensor([[2, 0, 4], [1, -1, 3]]), torch.tensor([[-1], [3]])
    found, within = rank_targets(query, gallery, targets, excluded, torch.tensor([[2, 3, 4], [0, 1, 2]]))
    assert found.tolist() == [[[2, 3], [1, 1], [3, 3]], [[3, 3], [0, 0], [0, 0]]]
    assert within is not None and within.tolist() == [[[1, 2], [0, 0], [2, 2]], [[2, 2], [0, 0], [0, 0]]]


def test_other_targets_do_not_stand_in_the_way() -> None:
    """The best of several targets counts, and an equal second target is not ahead of it."""
    query, gallery = gallery_of([[0.9, 0.8, 0.8, 0.1]])
    assert ranks(query, gallery, torch.tensor([[1, 2]])) == [[2, 2]]
    assert ranks(query, gallery, torch.tensor([[3, 2]])) == [[2, 3]]


def test_excluding_the_reference() -> None:
    """A reference that scores best costs a place only where the protocol keeps it."""
    query, gallery = gallery_of([[0.9, 0.8]])
    target = torch.tensor([[1]])
    assert ranks(query, gallery, target) == [[2, 2]]
    assert ranks(query, gallery, target, torch.tensor([[0]])) == [[1, 1]]


def test_an_excluded_target_has_no_rank() -> None:
    """A query whose only target is left out of the ranking is refused, not counted."""
    gallery, query = torch.eye(3)[:, None], torch.eye(3)[:1]
    with pytest.raises(ValueError, match="no rank"):
        rank_targets(query, gallery, torch.tensor([[0]]), torch.tensor([[0]]))
    assert ranks(query, gallery, torch.tensor([[0]]), torch.tensor([[1]])) == [[1, 1]]


def test_ranks_over_several_chunks() -> None:
    """The chunked loop equals one query at a time, a ragged last chunk included."""
    count = CHUNK + 3
    query, gallery = l2_normalize(count, 4).double(), l2_normalize(11, 1, 4, seed=1).double()
    targets = torch.arange(count)[:, None] % 11
    excluded = (targets + 1) % 11
    singly = [rank_targets(query[n : n + 1], gallery, targets[n : n + 1], excluded[n : n + 1])[0] for n in range(count)]
    assert torch.equal(rank_targets(query, gallery, targets, excluded)[0], torch.cat(singly))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_have_no_rank(value: float) -> None:
    """A broken embedding is a ValueError, not a good rank."""
    query, gallery = l2_normalize(2, 4), l2_normalize(3, 1, 4)
    gallery[1, 0, 2] = value
    with pytest.raises(ValueError, match="finite"):
        rank_targets(query, gallery, torch.tensor([[0], [1]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("count", [1, 2])
def test_scores_that_are_not_finite_have_no_first_k(count: int, value: float) -> None:
    """Neither with a NaN on top, which sorting puts first, nor with what would come last."""
    query, gallery = torch.ones(count, 1), torch.tensor([0.9, 0.8, value, 0.1])[:, None, None]
    with pytest.raises(ValueError, match="finite"):
        top_k(query, gallery, 1)
    with pytest.raises(ValueError, match="finite"):
        top_k(torch.cat([query[1:], query[:1] * value]), gallery[:2], 1)
    assert top_k(query, gallery[:2], 1)[1].tolist() == [[0]] * count


def test_a_query_without_target_has_no_rank() -> None:
    """All padding is a ValueError."""
    with pytest.raises(ValueError, match="without a target"):
        rank_targets(l2_normalize(2, 4), l2_normalize(3, 1, 4), torch.tensor([[0, -1], [-1, -1]]))


def test_no_queries_give_no_answers() -> None:
    """Zero queries are zero ranks and zero rows, not an error of concatenation."""
    gallery = l2_normalize(3, 1, 4)
    assert rank_targets(l2_normalize(0, 4), gallery, torch.zeros(0, 1, dtype=torch.long))[0].shape == (0, 1, 2)
    scores, rows = top_k(l2_normalize(0, 4), gallery, 2)
    assert scores.shape == rows.shape == (0, 2)


def test_top_k_is_sorted_and_stable() -> None:
    """Best first, equal scores by row."""
    query, gallery = gallery_of([[0.1, 0.7, 0.3, 0.7, 0.7]])
    scores, rows = top_k(query, gallery, 4)
    assert rows.tolist() == [[1, 3, 4, 2]] and rows.dtype == torch.int64
    torch.testing.assert_close(scores, torch.tensor([[0.7, 0.7, 0.7, 0.3]]))


def test_top_k_leaves_the_excluded_out() -> None:
    """Excluded rows do not come up, padding excludes nothing."""
    query, gallery = gallery_of([[0.1, 0.7, 0.3], [0.9, 0.2, 0.3]])
    assert top_k(query, gallery, 2, torch.tensor([[1], [-1]]))[1].tolist() == [[2, 0], [0, 2]]


def test_top_k_over_several_chunks() -> None:
    """The chunked loop equals one query at a time."""
    query, gallery = l2_normalize(CHUNK + 3, 4).double(), l2_normalize(11, 1, 4, seed=1).double()
    rows = top_k(query, gallery, 3)[1]
    assert rows.shape == (CHUNK + 3, 3)
    assert torch.equal(rows, torch.cat([top_k(query[n : n + 1], gallery, 3)[1] for n in range(len(query))]))


def test_k_beyond_the_gallery_gives_the_whole_gallery() -> None:
    """More than there is gives all there is."""
    scores, rows = top_k(l2_normalize(2, 4), l2_normalize(3, 1, 4), 10)
    assert scores.shape == (2, 3)
    assert [sorted(found) for found in rows.tolist()] == [[0, 1, 2]] * 2


def test_top_k_rows_do_not_pass_through_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stay integers, whatever holds the scores: float32 would round them from 2²⁴ on, as float16 does from 2¹¹."""
    scores = torch.zeros(2, 4099, dtype=torch.float16)
    scores[:, 4097] = 1
    monkeypatch.setattr(search, "scores_of", lambda query, gallery: scores)
    assert top_k(torch.zeros(2, 1), torch.zeros(4099, 1, 1), 1)[1].tolist() == [[4097]] * 2
