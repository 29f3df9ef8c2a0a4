"""Ranks, first k and recalls against loops over exact integers; and what a model that knows nothing scores."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from spn4cir import search
from spn4cir.backbone import Backbone
from spn4cir.evaluate import evaluate
from spn4cir.images import ImageSource, Transform
from spn4cir.measures import best_ranks, recall
from spn4cir.ranking import rank_queries
from spn4cir.results import compute_metrics
from spn4cir.search import rank_targets, top_k
from spn4cir.types import Benchmark, Composed, ImageFeatures, Query, Tokens, recall_measures

G = 30


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: dot products are exact in any order, and many are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def score(query: list[float], vectors: list[list[float]]) -> float:
    return max(sum(a * b for a, b in zip(query, v, strict=True)) for v in vectors)


def slow_rank(query: list[float], gallery: list, targets: list[int], excluded: list[int]) -> list[int]:  # type: ignore[type-arg]
    """Ranks of the best target: one more than the ranked non-targets that score more, or no less."""
    best = max(score(query, gallery[t]) for t in targets if t >= 0 and t not in excluded)
    others = [score(query, gallery[j]) for j in range(len(gallery)) if j not in targets and j not in excluded]
    return [1 + sum(other > best for other in others), 1 + sum(other >= best for other in others)]


def slow_ranks(  # type: ignore[no-untyped-def]
    query: list[float],
    gallery: list,
    targets: list[int],
    excluded=(),
    subset=range(G),  # type: ignore[type-arg]
) -> list[list[int]]:
    """Ranks of each target, one by one; [0, 0] for padding and for a target that is not ranked."""
    ranked = [j for j in range(len(gallery)) if j in subset and j not in excluded]
    others = [score(query, gallery[j]) for j in ranked if j not in targets]
    found = []
    for target in targets:
        if target in ranked:
            own = score(query, gallery[target])
            found.append([1 + sum(other > own for other in others), 1 + sum(other >= own for other in others)])
        else:
            found.append([0, 0])
    return found


def slow_recall(ranks: list[list[int]], k: int) -> float:
    """Percentage over all places that each target may stand on, one by one."""
    shares = [sum(place <= k for place in range(a, b + 1)) / (b - a + 1) for a, b in ranks]
    return 100 * sum(shares) / len(shares)


def rows(width: int, count: int, avoid: Tensor | None = None) -> Tensor:
    """(count, width) distinct rows, some padded with -1, none of those in ``avoid``."""
    draw, found = random.Random(width), []
    for n in range(count):
        free = [j for j in range(G) if avoid is None or j not in avoid[n].tolist()]
        real = draw.randint(1, width)
        found.append(draw.sample(free, real) + [-1] * (width - real))
    return torch.tensor(found)


def tables(several: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, excluded rows and a subset: the first target is in the subset and is not excluded, others may not be."""
    targets = rows(several, count)
    excluded = rows(4, count, avoid=targets[:, :1])
    subset = torch.cat([rows(9, count), targets[:, :1], targets[:, :1]], 1)  # a row may be named twice
    return targets, excluded, subset


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("several", [1, 3, 12])
def test_ranks_of_every_target_equal_the_loop(vectors: int, several: int) -> None:
    """Ties, up to 12 targets, excluded images and targets, targets outside the subset, a ragged second chunk."""
    count = search.CHUNK + 11
    query, gallery = integers(count, 4), integers(G, vectors, 4, seed=1)
    targets, excluded, subset = tables(several, count)
    found, over_subset = rank_targets(query, gallery, targets, excluded, subset)
    given = [table.tolist() for table in (query, targets, excluded, subset)]
    slow = [slow_ranks(q, gallery.tolist(), t, x) for q, t, x, _ in zip(*given, strict=True)]
    slow_subset = [slow_ranks(q, gallery.tolist(), t, x, s) for q, t, x, s in zip(*given, strict=True)]
    assert found.tolist() == slow and over_subset is not None and over_subset.tolist() == slow_subset
    assert found.shape == (count, several, 2) and found.dtype == over_subset.dtype == torch.int64
    if several > 1:  # targets that are excluded, or only outside the subset
        assert ((targets >= 0) & (found[..., 0] == 0)).any()
        assert ((found[..., 0] > 0) & (over_subset[..., 0] == 0)).any()
    without = rank_targets(query, gallery, targets)
    assert without[1] is None and without[0].tolist() != slow  # negative control: exclusion matters
    assert without[0].tolist() == [slow_ranks(q, gallery.tolist(), t) for q, t, _, _ in zip(*given, strict=True)]


@pytest.mark.parametrize("several", [1, 3, 12])
def test_best_ranks_are_those_of_the_best_target(several: int) -> None:
    """The best of all targets' ranks is the rank that the best target takes, over the gallery and over the subset."""
    query, gallery = integers(70, 4), integers(G, 1, 4, seed=1)
    targets, excluded, subset = tables(several, 70)
    found, over_subset = rank_targets(query, gallery, targets, excluded, subset)
    slow, slow_subset = [], []
    for q, t, x, s in zip(*(table.tolist() for table in (query, targets, excluded, subset)), strict=True):
        slow.append(slow_rank(q, gallery.tolist(), t, x))
        slow_subset.append(slow_rank(q, gallery.tolist(), t, [*x, *(j for j in range(G) if j not in s)]))
    assert over_subset is not None and best_ranks(over_subset.numpy()).tolist() == slow_subset
    assert best_ranks(found.numpy()).tolist() == slow
    if several > 1:  # negative control: the best target is not always the first
        assert found[:, 0].tolist() != slow


def test_ties_and_other_targets_matter() -> None:
    """Negative control: strict comparison, or letting other targets stand in the way, gives other ranks."""
    query, gallery = integers(50, 4), integers(G, 1, 4, seed=1)
    targets = rows(3, 50)
    ranks = rank_targets(query, gallery, targets)[0]
    scores = (query @ gallery[:, 0].T)[:, None]  # (Q, 1, G)
    own = scores[:, 0].gather(1, targets.clamp(min=0))[..., None]  # (Q, P, 1)
    real = targets >= 0
    assert not torch.equal(ranks[real][:, 1], ((scores > own).sum(2) + 1)[real])
    assert not torch.equal(ranks[real][:, 1], (scores >= own).sum(2)[real])


def test_an_excluded_target_has_no_rank() -> None:
    """A target that the ranking leaves out gets rank 0, and the other target's rank does not change."""
    query, gallery = torch.tensor([[1.0]]), torch.tensor([[[9.0]], [[5.0]], [[1.0]]])
    both = torch.tensor([[0, 2]])
    assert rank_targets(query, gallery, both, torch.tensor([[0]]))[0].tolist() == [[[0, 0], [2, 2]]]
    assert rank_targets(query, gallery, both)[0].tolist() == [[[1, 1], [2, 2]]]
    subset = rank_targets(query, gallery, both, None, torch.tensor([[1, 2]]))[1]
    assert subset is not None and subset.tolist() == [[[0, 0], [2, 2]]]
    with pytest.raises(ValueError, match="all left out"):
        rank_targets(query, gallery, both, both)


@pytest.mark.parametrize("vectors", [1, 3])
def test_top_k_equals_sorting(vectors: int) -> None:
    """Best first, equal scores by row, excluded images absent, a ragged second chunk."""
    count = search.CHUNK + 5
    query, gallery = integers(count, 4), integers(G, vectors, 4, seed=1)
    excluded = rows(2, count)
    scores, found = top_k(query, gallery, 7, excluded)
    for q, skip, s, row in zip(query.tolist(), excluded.tolist(), scores.tolist(), found.tolist(), strict=True):
        ranked = sorted((-score(q, vectors), j) for j, vectors in enumerate(gallery.tolist()) if j not in skip)[:7]
        assert row == [j for _, j in ranked] and s == [-negative for negative, _ in ranked]
    assert not torch.equal(top_k(query, gallery, 7)[1], found)  # negative control


def test_the_rank_is_the_place_in_the_sorted_list() -> None:
    """The two searches agree where scores differ."""
    torch.manual_seed(0)
    query, gallery = torch.randn(40, 8), torch.randn(G, 2, 8)
    targets = torch.randint(0, G, (40, 1))
    places = (top_k(query, gallery, G)[1] == targets).int().argmax(1) + 1
    assert torch.equal(torch.stack([places, places], 1)[:, None], rank_targets(query, gallery, targets)[0])


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small chunks give what one gives."""
    query, gallery, targets = integers(20, 4), integers(G, 1, 4, seed=1), rows(2, 20)
    whole = rank_targets(query, gallery, targets)[0], top_k(query, gallery, 5)[1]
    monkeypatch.setattr(search, "CHUNK", 3)
    assert torch.equal(whole[0], rank_targets(query, gallery, targets)[0])
    assert torch.equal(whole[1], top_k(query, gallery, 5)[1])


def every_score(query: Tensor, gallery: Tensor, excluded: Tensor | None, members: Tensor | None) -> Tensor:
    """(Q, G) scores of all at once in float32, minus infinity for images that are left out."""
    scores = (query.float() @ gallery.float().flatten(0, 1).T).view(len(query), *gallery.shape[:2]).amax(2)
    for n, row in enumerate(scores):
        if members is not None:
            row[[g for g in range(len(gallery)) if g not in members[n]]] = -torch.inf
        if excluded is not None:
            row[[x for x in excluded[n].tolist() if x >= 0]] = -torch.inf
    return scores


def sorted_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The straightforward way: a stable sort of everything."""
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], order[:, :k]


def counted_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Ranks (Q, P, 2) by the definition, from all scores at once."""
    wanted = torch.zeros_like(scores, dtype=torch.bool)
    for n, row in enumerate(targets.tolist()):
        wanted[n, [t for t in row if t >= 0]] = True
    own = scores.gather(1, targets.clamp(min=0)).masked_fill(targets < 0, -torch.inf)[..., None]  # (Q, P, 1)
    others = scores.masked_fill(wanted, -torch.inf)[:, None]  # (Q, 1, G)
    ranks = torch.stack([(others > own).sum(2) + 1, (others >= own).sum(2) + 1], 2)
    return ranks.masked_fill(own.isneginf(), 0)


LEFT_OUT = ["nothing", "excluded", "members", "both"]


def left_out(which: str, count: int, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Tables of excluded rows, which do not hold the first target, and of members, which do."""
    members = torch.cat([rows(8, count), targets[:, :1], targets[:, :1]], 1)  # a row may be named twice
    excluded = rows(3, count, avoid=targets[:, :1])
    return excluded if which in ("excluded", "both") else None, members if which in ("members", "both") else None


@pytest.mark.parametrize("which", LEFT_OUT)
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "images"), [(search.CHUNK + 11, 7), (search.CHUNK // 4, 2), (1, 2)])
def test_blocks_of_the_gallery_equal_a_full_sort(  # type: ignore[no-untyped-def]
    vectors: int, stored: torch.dtype, which: str, count: int, images: int, monkeypatch
) -> None:
    """Blocks of 7, of 4 · 2 and of 8 · 2 images, the last one ragged; two thirds of the gallery occur twice."""
    monkeypatch.setattr(search, "BLOCK", images * vectors)
    if count == 1:
        monkeypatch.setattr(search, "CHUNK", 8)
    query, gallery = integers(count, 4), integers(G, vectors, 4, seed=1)
    gallery[G // 3 : 2 * (G // 3)] = gallery[: G // 3]
    targets = torch.stack([torch.randperm(G)[:3] for _ in range(count)])
    targets[::2, 1:] = -1
    excluded, members = left_out(which, count, targets)
    scores = every_score(query, gallery, excluded, members)
    whole = every_score(query, gallery, excluded, None)
    gallery = gallery.to(stored)
    over_gallery, over_subset = rank_targets(query, gallery, targets, excluded, members)
    assert torch.equal(over_gallery, counted_ranks(whole, targets))
    assert (over_subset is None) == (members is None)
    assert over_subset is None or torch.equal(over_subset, counted_ranks(scores, targets))
    for k in (1, 4, 7, 20, G + 5):
        values, order = sorted_top_k(scores, k)
        found = top_k(query, gallery, k, excluded, members)
        assert torch.equal(found[1], order) and torch.equal(found[0], values) and found[0].dtype == torch.float32
        backwards = sorted_top_k(scores.flip(1), k)[1]  # negative control: ties by row, and not the other way around
        assert (count == 1 and k < G) or not torch.equal(found[1], G - 1 - backwards)


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_gallery_of_one_vector_is_ranked_by_row(vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most ties that there can be: every image has the same score."""
    monkeypatch.setattr(search, "BLOCK", 7 * vectors)
    monkeypatch.setattr(search, "CHUNK", 5)
    query, gallery = torch.ones(5, 4), torch.ones(G, vectors, 4)
    for k, count in itertools.product((1, 6, 7, 8, G), (5, 2, 1)):  # in blocks of 7, 14 and 35 images
        few, excluded = query[:count], torch.full((count, 1), 2)
        assert top_k(few, gallery, k)[1].tolist() == [list(range(k))] * count
        assert top_k(few, gallery, k, excluded)[1][:, :6].tolist() == [[0, 1, 3, 4, 5, 6][:k]] * count
    ranks = rank_targets(query, gallery, torch.tensor([[0, 1], [3, -1], [9, 17], [28, 0], [29, 5]]))[0].tolist()
    assert ranks == [[[1, G - 1], [1, G - 1]], [[1, G], [0, 0]], *[[[1, G - 1], [1, G - 1]]] * 3]


@pytest.mark.parametrize("several", [1, 3])
def test_a_target_is_scored_in_its_block(several: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a score depends on the shape of the product, as last bits do, a target's comes from that of the others."""
    whole = search.scores_of
    shapes = []

    def shifted(query: Tensor, candidates: Tensor) -> Tensor:
        shapes.append((len(query), len(candidates)))
        return whole(query, candidates) + 0.25 * len(candidates) + 0.5 * len(query)

    count = search.CHUNK + 11
    query, gallery, targets = integers(count, 4), integers(G, 1, 4, seed=1), rows(several, count)
    monkeypatch.setattr(search, "scores_of", shifted)
    monkeypatch.setattr(search, "BLOCK", 6)
    wanted = counted_ranks(every_score(query, gallery, None, None), targets)
    assert torch.equal(rank_targets(query, gallery, targets)[0], wanted)
    assert set(shapes) == {(search.CHUNK, 6), (11, 6)} and len(shapes) < 2 * 2 * 5  # most blocks are scored once
    monkeypatch.setattr(search, "BLOCK", 7)  # negative control: the last block is ragged, and a shift no shift of all
    assert not torch.equal(rank_targets(query, gallery, targets)[0], wanted)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_scores_of_one_query_equal_a_product(vectors: int, kept: torch.dtype) -> None:
    """By numpy and by torch, up to the order of a sum; equal vectors have equal scores wherever they are."""
    draw = torch.Generator().manual_seed(0)
    query, block = torch.randn(1, 65, generator=draw), torch.randn(G, vectors, 65, generator=draw).to(kept)
    block[20:] = block[:10]
    ours, other = search.score_one(query, block), search.scores_of(query.to(kept), block)
    assert ours.dtype == kept and torch.equal(ours[:, 20:], ours[:, :10])
    torch.testing.assert_close(ours, other)
    assert not torch.allclose(ours, search.scores_of(query.to(kept), block.roll(1, 0)))  # negative control


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_no_product_grows_with_the_gallery(stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the gallery is ten times the blocks, none larger; few queries take larger ones that are no copies."""
    largest, whole = [], search.scores_of

    def noted(query: Tensor, candidates: Tensor) -> Tensor:
        largest[-1] = max(largest[-1], candidates.numel())
        return whole(query, candidates)

    monkeypatch.setattr(search, "scores_of", noted)
    monkeypatch.setattr(search, "BLOCK", 40)
    monkeypatch.setattr(search, "CHUNK", 6)
    for size in (10, 100, 1000):
        query, gallery = torch.ones(3, 4), integers(size, 2, 4).to(stored)
        largest.append(0)
        top_k(query, gallery, 2)
        largest.append(0)
        rank_targets(query, gallery, torch.zeros(3, 1).long())
    most = 20 * 2 * 4
    few = most * (2 if stored == torch.float32 else 1)
    assert largest == [10 * 2 * 4, 10 * 2 * 4, few, most, few, most]


def toy_benchmark(exclude: bool = True) -> Benchmark:
    draw = random.Random(3)
    ids = tuple(f"g{n}" for n in range(G))
    queries = []
    for n in range(25):
        reference, *others = draw.sample(ids, 6)
        queries.append(Query(reference, "x", (others[0],), (f"group {n % 3}",), (reference, *others)))
    measures = recall_measures(1, 5, 10, primary=(1,)) + recall_measures(1, 2, 3, over="subset")
    return Benchmark("loop/val", ids, tuple(queries), exclude, measures)


@pytest.mark.parametrize("exclude", [True, False])
def test_benchmark_ranks_and_metrics_equal_loops(exclude: bool) -> None:
    """Gallery ranks, ranks within the subset, recalls, tags and their macro mean."""
    benchmark, query, gallery = toy_benchmark(exclude), integers(25, 4), integers(G, 1, 4, seed=1)
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    ranks, few = [], []
    for q, vector in zip(benchmark.queries, query.tolist(), strict=True):
        skip, goal, vectors = [row[q.reference]] if exclude else [], [row[q.targets[0]]], gallery.tolist()
        ranks.append(slow_rank(vector, vectors, goal, skip))
        few.append(slow_rank(vector, vectors, goal, skip + [j for i, j in row.items() if i not in q.candidates]))
    found = rank_queries(benchmark, query, gallery)
    assert found["gallery"][:, 0].tolist() == ranks and found["subset"][:, 0].tolist() == few
    metrics, tags = compute_metrics(benchmark, found)
    assert metrics["R@5"] == pytest.approx(slow_recall(ranks, 5))
    assert metrics["Rs@2"] == pytest.approx(slow_recall(few, 2))
    parts = [[r for r, q in zip(ranks, benchmark.queries, strict=True) if name in q.tags] for name in tags]
    wanted = [slow_recall(part, 5) for part in parts]
    assert [tag["R@5"] for tag in tags.values()] == pytest.approx(wanted)
    assert metrics["macro R@5"] == pytest.approx(sum(wanted) / 3)
    other = rank_queries(toy_benchmark(not exclude), query, gallery)["gallery"]
    assert other[:, 0].tolist() != ranks  # negative control


@pytest.mark.parametrize("exclude", [True, False])
def test_own_candidates_and_several_targets_equal_loops(exclude: bool) -> None:
    """Each query over candidates of its own, some with a tuple that several share; up to four targets, no reference."""
    benchmark, query, gallery = toy_benchmark(exclude), integers(25, 4), integers(G, 2, 4, seed=1)
    shared = benchmark.gallery[3:17]
    queries = [
        replace(q, targets=q.candidates[1 : 2 + n % 4])
        if n % 3
        else Query(None, "x", shared[n % 5 : n % 5 + 1 + n % 2], q.tags, shared)
        for n, q in enumerate(benchmark.queries)
    ]
    measures = (*recall_measures(1, 5), *recall_measures(1, 2, over="candidates"))
    benchmark = replace(benchmark, queries=tuple(queries), measures=measures)
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    found = rank_queries(benchmark, query, gallery)
    for n, (q, vector) in enumerate(zip(queries, query.tolist(), strict=True)):
        skip = [row[q.reference]] if exclude and q.reference is not None else []
        goal, own = [row[i] for i in q.targets], [row[i] for i in q.candidates]
        padding = [[0, 0]] * (4 - len(goal))
        assert found["gallery"][n].tolist() == slow_ranks(vector, gallery.tolist(), goal, skip) + padding
        assert found["candidates"][n].tolist() == slow_ranks(vector, gallery.tolist(), goal, skip, own) + padding


class Constant(Backbone):
    """Every image and every query is the same vector."""

    name, options, transform = "constant", {}, Transform(8)

    def __init__(self) -> None:
        super().__init__()
        self.vector = torch.nn.Parameter(torch.tensor([0.6, 0.8]))

    def tokenize(self, texts) -> Tokens:  # type: ignore[no-untyped-def, override]
        return {"text": torch.zeros(len(texts), 1)}

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        vectors = self.vector.expand(len(pixels), 1, 2)
        return ImageFeatures(vectors, vectors)

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        return Composed(self.vector.expand(len(reference), 2))

    def image_side(self):  # type: ignore[no-untyped-def]
        return [self.vector]


def test_a_constant_model_scores_chance(toy) -> None:  # type: ignore[no-untyped-def]
    """Ties never favour the target: where all scores are equal, recall is k / ranked images."""
    result = evaluate(Constant(), toy.benchmark("val"), ImageSource(toy.image, Transform(8)))
    ranked, within = 47, 5  # without the reference
    chance = {f"R@{k}": 100 * k / ranked for k in (1, 5, 10)} | {f"Rs@{k}": 100 * k / within for k in (1, 2)}
    chance |= {f"macro R@{k}": 100 * k / ranked for k in (1, 5, 10)}
    assert result.metrics == pytest.approx(chance)


def test_a_random_model_scores_chance() -> None:
    """Recall at k is k / (G - 1) within four standard errors, the reference being left out; another k is far off."""
    torch.manual_seed(0)
    count, size = 3000, 101
    picks = torch.stack([torch.randperm(size)[:2] for _ in range(count)])
    ranks = rank_targets(torch.randn(count, 64), torch.randn(size, 1, 64), picks[:, :1], picks[:, 1:])[0].numpy()
    for k in (1, 10, 50):
        chance = k / (size - 1)
        error = 100 * np.sqrt(chance * (1 - chance) / count)
        assert abs(100 * recall(ranks, k).mean() - 100 * chance) < 4 * error
        assert abs(100 * recall(ranks, 2 * k).mean() - 100 * chance) > 4 * error  # negative control
