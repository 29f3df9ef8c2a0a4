"""Rank the gallery of a benchmark by given embeddings; each process ranks its share of the queries."""

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from spn4cir.distributed import all_reduce, process_rank, world_size
from spn4cir.measures import Ranks
from spn4cir.query_values import NegativeRanks
from spn4cir.search import fuse_scores, inside, rank_scores, rank_targets, top_k
from spn4cir.types import Benchmark

FUSED = 64  # queries whose scores of a whole gallery are in memory at once


def padded_rows(lists: Sequence[Sequence[str]], row: dict[str, int]) -> Tensor:
    """Lists of ids → (Q, longest) rows, padded with -1; ids without a row are left out."""
    rows = [[row[i] for i in ids if i in row] for ids in lists]
    width = max(map(len, rows), default=0)
    padded = [ids + [-1] * (width - len(ids)) for ids in rows]
    return torch.tensor(padded, dtype=torch.long).view(len(lists), width)


class _Ranked(NamedTuple):
    """Queries that share a gallery: their numbers, and rows of it that rankings are about; padded with -1."""

    over: tuple[str, ...]
    numbers: list[int]
    vectors: Tensor  # (g, K, E)
    rows: Tensor  # (g,) in the benchmark's gallery
    targets: Tensor
    excluded: Tensor | None
    subset: Tensor | None


def _rankings(benchmark: Benchmark, target: Tensor) -> Iterator[_Ranked]:
    """What is ranked: the gallery with the subset, and each tuple of candidates with the queries that have it."""
    wanted = {measure.over for measure in benchmark.measures}
    place = {item: n for n, item in enumerate(benchmark.gallery)}
    plans: list[tuple[tuple[str, ...], Sequence[str], Sequence[int]]] = []
    if wanted & {"gallery", "subset"}:
        over: tuple[str, ...] = ("gallery", "subset") if "subset" in wanted else ("gallery",)
        plans.append((over, benchmark.gallery, range(len(benchmark.queries))))
    if "candidates" in wanted:
        by_candidates: dict[int, list[int]] = {}
        for number, query in enumerate(benchmark.queries):
            by_candidates.setdefault(id(query.candidates), []).append(number)
        plans += [(("candidates",), benchmark.queries[n[0]].candidates, n) for n in by_candidates.values()]
    for over, ids, numbers in plans:
        if own := [number for number in numbers if number % world_size() == process_rank()]:
            queries, row = [benchmark.queries[n] for n in own], {item: n for n, item in enumerate(ids)}
            rows = torch.tensor([place[i] for i in ids], dtype=torch.long, device=target.device)
            references = [[q.reference] if q.reference is not None else [] for q in queries]
            yield _Ranked(
                over, own, target if ids is benchmark.gallery else target[rows], rows,
                padded_rows([q.targets for q in queries], row),
                padded_rows(references, row) if benchmark.exclude_reference else None,
                padded_rows([q.candidates for q in queries], row) if "subset" in over else None,
            )  # fmt: skip


def rank_queries(benchmark: Benchmark, query: Tensor, target: Tensor) -> dict[str, Ranks]:
    """Ranks (Q, P, 2) of targets for queries (Q, E) and a gallery (G, K, E), by what is ranked, such as ``subset``."""
    most = max((len(q.targets) for q in benchmark.queries), default=0)
    empty = torch.zeros(len(benchmark.queries), most, 2, dtype=torch.long, device=query.device)
    found: dict[str, Tensor] = {measure.over: empty.clone() for measure in benchmark.measures}
    for part in _rankings(benchmark, target):
        ranks = rank_targets(query[part.numbers], part.vectors, part.targets, part.excluded, part.subset)
        for over, ranked in zip(part.over, ranks, strict=False):
            if over in found and ranked is not None:
                found[over][part.numbers, : ranked.shape[1]] = ranked
    return {over: all_reduce(ranks).cpu().numpy() for over, ranks in found.items()}


def rank_fused(benchmark: Benchmark, image: Tensor, text: Tensor, target: Tensor) -> dict[str, Ranks]:
    """As ``rank_queries``, by late fusion of each query's image alone (Q, E) and its text alone (Q, E).

    The score is the maximum of both softmaxes over what is ranked, at a temperature of 0.01.

    Source: Li et al., "FreestyleRet: Retrieving Images from Style-Diversified Queries", ECCV 2024, for queries of two.
    """
    most = max(len(q.targets) for q in benchmark.queries)
    empty = torch.zeros(len(benchmark.queries), most, 2, dtype=torch.long, device=image.device)
    found = {measure.over: empty.clone() for measure in benchmark.measures}
    for part in _rankings(benchmark, target):
        for start in range(0, len(part.numbers), FUSED):
            numbers, here = part.numbers[start : start + FUSED], slice(start, start + FUSED)
            targets = part.targets[here].to(image.device)
            hidden = torch.zeros(len(numbers), len(part.vectors), dtype=torch.bool, device=image.device)
            if part.excluded is not None:
                hidden[inside(part.excluded[here].to(image.device), 0, hidden.shape[1])] = True
            for over in part.over:
                if over == "subset":
                    assert part.subset is not None
                    outside = torch.ones_like(hidden)
                    outside[inside(part.subset[here].to(image.device), 0, hidden.shape[1])] = False
                    hidden = hidden | outside
                if over in found:
                    scores = fuse_scores(image[numbers], text[numbers], part.vectors, hidden)  # (b, g)
                    found[over][numbers, : targets.shape[1]] = rank_scores(scores, targets)
    return {over: all_reduce(ranks).cpu().numpy() for over, ranks in found.items()}


def rank_negatives(benchmark: Benchmark, query: Tensor, target: Tensor) -> NegativeRanks | None:
    """Ranks of the wrong answers that queries (Q, E) name, in a gallery (G, K, E), or among their candidates alone.

    None if no query names one.
    """
    most = max((len(q.negatives) for q in benchmark.queries), default=0)
    if not most:
        return None
    over = "gallery" if any(measure.over != "candidates" for measure in benchmark.measures) else "candidates"
    found = torch.zeros(2, len(benchmark.queries), most, 2, dtype=torch.long, device=query.device)
    for part in _rankings(benchmark, target):
        held = [n for n, number in enumerate(part.numbers) if benchmark.queries[number].negatives]
        if part.over[0] != over or not held:
            continue
        numbers = [part.numbers[n] for n in held]
        row = {benchmark.gallery[place]: n for n, place in enumerate(part.rows.tolist())}
        negatives = padded_rows([benchmark.queries[n].negatives for n in numbers], row)
        excluded = None if part.excluded is None else part.excluded[held]
        both = torch.cat([negatives, part.targets[held]], 1)  # the second ranking has only them
        ranks = rank_targets(query[numbers], part.vectors, negatives, excluded, both)
        for side, ranked in enumerate(ranks):
            assert ranked is not None
            found[side, numbers, : ranked.shape[1]] = ranked
    return NegativeRanks(*all_reduce(found).cpu().numpy())


def first_items(
    benchmark: Benchmark, query: Tensor, target: Tensor, k: int
) -> dict[str, tuple[list[list[str]], list[list[float]]]]:
    """Ids and scores of the first k items of each query, and all of its subset, best first, by what is ranked."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    wanted = {measure.over for measure in benchmark.measures}
    for over in sorted(wanted | ({"gallery"} if "subset" in wanted else set())):  # on all processes alike
        width = max(len(q.candidates) for q in benchmark.queries) if over == "subset" else k
        empty = torch.zeros(len(benchmark.queries), width, device=query.device)
        found[over] = empty, torch.zeros_like(empty, dtype=torch.long)
    for part in _rankings(benchmark, target):
        searches: list[tuple[str, int, Tensor | None]] = [(part.over[0], k, None)]
        if part.subset is not None and part.subset.shape[1]:
            searches.append(("subset", part.subset.shape[1], part.subset))
        for over, count, members in searches:
            scores, rows = top_k(query[part.numbers], part.vectors, count, part.excluded, members)
            found[over][0][part.numbers, : scores.shape[1]] = scores.float()
            rows = part.rows.to(rows)[rows].masked_fill(scores.isneginf(), -1)
            found[over][1][part.numbers, : rows.shape[1]] = rows + 1  # 0 is padding
    named = {}
    for over, (held, places) in found.items():
        numbers, values = all_reduce(places).tolist(), all_reduce(held).tolist()
        ids = [[benchmark.gallery[n - 1] for n in row if n] for row in numbers]
        named[over] = ids, [list(compress(*pair)) for pair in zip(values, numbers, strict=True)]
    return named
