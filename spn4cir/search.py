"""Exact search over given vectors: rank of the target by counting, and the first k.

The gallery is scored block by block, so what is held beside the inputs does not grow with it. A gallery may lie on
another device than the queries, or in half precision: each block is moved to the queries and widened there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 256  # queries scored at once; fixed, since the block size of a product can move its last bits
BLOCK = 16_384  # candidate vectors scored at once; likewise, but ``top_k`` takes more for few queries


class Searchable(Protocol):
    """A gallery that finds the first k itself, such as ``spn4cir.faiss_search.Neighbours``."""

    def top_k(
        self, query: Tensor, k: int, excluded: Tensor | None = None, members: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What ``top_k`` below returns."""
        ...


def scores_of(query: Tensor, candidates: Tensor) -> Tensor:
    """Scores (B, N) of queries (B, E) against candidates (N, K, E): the maximum dot product over a candidate's vectors.

    They are in float32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    n, k, e = candidates.shape
    with torch.autocast(query.device.type, enabled=False):  # mixed precision ends where scores begin
        products = query.to(wide) @ candidates.reshape(n * k, e).to(wide).T  # (B, n·K)
    return products if k == 1 else products.view(len(query), n, k).amax(2)


def score_one(query: Tensor, block: Tensor) -> Tensor:
    """Scores (1, n) of one query (1, E) on the CPU, where numpy takes half the time of torch's matrix product."""
    products = np.einsum("nke,e->nk", block.numpy(), query[0].to(block.dtype).numpy())
    return torch.from_numpy(products).amax(1)[None]


def blocks(gallery: Tensor, query: Tensor, factor: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Parts of a gallery (G, K, E) to score at once, each with its first row, where and as wide as the queries.

    Args:
        factor: how many times the usual size of a block.
    """
    size, wide = factor * _block_size(gallery), torch.promote_types(query.dtype, torch.float32)
    for start in range(0, len(gallery), size):
        yield start, gallery[start : start + size].to(query.device, wide)


def _block_size(gallery: Tensor) -> int:
    """Images whose vectors are scored at once."""
    return max(1, BLOCK // gallery.shape[1])


def fuse_scores(
    first: Tensor, second: Tensor, gallery: Tensor, hidden: Tensor | None = None, temperature: float = 0.01
) -> Tensor:
    """Late fusion: the maximum of the log-softmax over a gallery (G, K, E) of two queries' scores → (B, G).

    The scores of these queries and the whole gallery are in memory at once.

    Args:
        first, second: both queries of each pair, (B, E); zeros for one that is missing, whose score never counts.
        hidden: (B, G) images that are not ranked, and so in no softmax; their score is minus infinity. None for none.
        temperature: divisor of the scores.
    """
    fused = []
    for query in (first, second):
        scores = torch.cat([scores_of(query, block) for _, block in blocks(gallery, query)], 1)  # (B, G)
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
        logs = (scores / temperature).log_softmax(1)
        fused.append(logs.masked_fill(~query.any(1, keepdim=True), -torch.inf))
    return torch.maximum(*fused)


@torch.no_grad()
def rank_scores(scores: Tensor, targets: Tensor, excluded: Tensor | None = None) -> Tensor:
    """``rank_targets`` of given scores (B, G) over the gallery alone → (B, P, 2)."""
    own = scores.gather(1, targets.clamp(min=0)).masked_fill(targets < 0, -torch.inf)  # (B, P)
    others = scores.clone()
    for rows in (targets, *(() if excluded is None else (excluded,))):
        others[inside(rows, 0, others.shape[1])] = -torch.inf
    if excluded is not None:
        own = own.masked_fill((targets[:, :, None] == excluded[:, None]).any(2), -torch.inf)
    counts = [[(others > one).sum(1), (others >= one).sum(1)] for one in own.T[..., None]]
    better = torch.stack([torch.stack(pair, 1) for pair in counts], 1)  # (B, P, 2)
    return (better + 1).masked_fill(own.isneginf()[..., None], 0)


@dataclass
class _Chunk:
    """Queries that are scored at once, and images that their rankings leave out or are about; padded with -1."""

    query: Tensor  # (b, E)
    excluded: Tensor | None  # (b, X)
    members: Tensor | None  # (b, M)

    def mask_excluded(self, scores: Tensor, start: int) -> Tensor:
        """Set the scores (b, n) of a block to minus infinity for images that are left out.

        Raises ``ValueError`` if one is not finite.
        """
        if scores.numel() and not bool(torch.stack(torch.aminmax(scores)).isfinite().all()):
            raise ValueError("scores are not finite: an embedding holds NaN or infinity")
        if self.excluded is not None:
            scores[inside(self.excluded, start, scores.shape[1])] = -torch.inf
        return scores

    def restrict(self, scores: Tensor, start: int, count: int) -> Tensor:
        """The scores (b, count) of a block, minus infinity for all images but the members."""
        assert self.members is not None
        kept = inside(self.members, start, count)
        return torch.full_like(scores, -torch.inf).index_put(kept, scores[kept])

    def scores(self, start: int, block: Tensor) -> Tensor:
        """Scores (b, n) of a block (n, K, E), of the members alone if there are any."""
        is_one = len(self.query) == 1 and self.query.device.type == "cpu"
        scores = self.mask_excluded((score_one if is_one else scores_of)(self.query, block), start)
        return scores if self.members is None else self.restrict(scores, start, len(block))


def _chunks(
    query: Tensor, order: Tensor, excluded: Tensor | None, members: Tensor | None
) -> Iterator[tuple[Tensor, _Chunk]]:
    """All queries in this order, so many at a time, each time with their numbers."""

    def part(table: Tensor | None, numbers: Tensor) -> Tensor | None:
        return None if table is None else table[numbers.to(table.device)].to(query.device)

    for start in range(0, len(order), CHUNK):
        numbers = order[start : start + CHUNK]
        yield numbers, _Chunk(query[numbers], part(excluded, numbers), part(members, numbers))


def inside(rows: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Where the scores (b, count) of a block hold the gallery rows of a padded table (b, X)."""
    held = (rows >= start) & (rows < start + count)
    return held.nonzero()[:, 0], rows[held] - start


@torch.no_grad()
def rank_targets(
    query: Tensor, gallery: Tensor, targets: Tensor, excluded: Tensor | None = None, subset: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Ranks that each target can take among the images of equal score, over the gallery and over a subset, in one pass.

    The other targets of a query are left out of the count, so none stands in another's way.

    Args:
        query: (Q, E).
        gallery: (G, K, E).
        targets: (Q, P) gallery rows of each query's targets, padded with -1.
        excluded: (Q, X) gallery rows left out of both rankings, padded with -1, or None.
        subset: (Q, M) gallery rows that alone are in the second ranking, padded with -1, or None for no such ranking.

    Returns:
        (Q, P, 2) int64: first and last rank from 1 on, equal where no non-target has the target's score; 0 where a
        target is padding or not ranked. The same over the subset, or None.

    Raises ``ValueError`` if no target of a query is ranked, or a score is not finite.
    """
    if bool((targets < 0).all(1).any()):
        raise ValueError("a query without a target has no rank")
    targets = targets.to(query.device)
    order = targets.amax(1).argsort(stable=True)  # so that few blocks hold the targets of a chunk
    chunks = [
        (numbers, _Rank(chunk, targets[numbers], _block_size(gallery)))
        for numbers, chunk in _chunks(query, order, excluded, subset)
    ]
    behind = max((chunk.last for _, chunk in chunks), default=0)
    for again, walked in ((False, gallery), (True, gallery[:behind])):
        for start, block in blocks(walked, query):
            for _, chunk in chunks:
                chunk.score(start, block, again)
    found = torch.zeros(2, *targets.shape, 2, dtype=torch.long, device=query.device)
    for numbers, chunk in chunks:
        for side, ranking in enumerate(chunk.rankings):
            found[side, numbers] = ranking.ranks()
    return found[0], found[1] if subset is not None else None


class _Ranking:
    """Scores of some queries' targets, and the number of non-targets that are better or equal."""

    def __init__(self, chunk: _Chunk, targets: Tensor):
        wide = torch.promote_types(chunk.query.dtype, torch.float32)
        self.own = targets.new_full(targets.shape, -torch.inf, dtype=wide)  # (b, P)
        self.better = targets.new_zeros(*targets.shape, 2)

    def count(self, scores: Tensor) -> None:
        """Count the scores (b, n) above, and not below, each target's; uses up the scores."""
        if bool(self.own.isneginf().all(1).any()):
            raise ValueError("a query whose targets are all left out has no rank")
        if self.own.shape[1] == 1:
            # zeros and ones as floats: sums of so few are exact, and several times as fast as those of booleans
            self.better[:, 0, 0] += torch.gt(scores, self.own, out=torch.empty_like(scores)).sum(1).long()
            self.better[:, 0, 1] += scores.ge_(self.own).sum(1).long()
            return
        own, order = self.own.sort(1)
        for side, right in ((0, False), (1, True)):
            passed = torch.searchsorted(own, scores, right=right)  # (b, n) targets below, or not above
            counts = self.better.new_zeros(len(own), own.shape[1] + 1)
            counts.scatter_add_(1, passed, torch.ones_like(passed))
            above = counts.flip(1).cumsum(1).flip(1)[:, 1:]  # (b, P) scores that pass target p, by ascending score
            self.better[..., side].scatter_add_(1, order, above)

    def ranks(self) -> Tensor:
        """(b, P, 2), 0 where a target is not ranked."""
        return (self.better + 1).masked_fill(self.own.isneginf()[..., None], 0)


class _Rank:
    """The ranks of some queries while the gallery passes by, twice if need be.

    A target's score is taken from the same product as those of the others: computed by itself, its last bit could
    differ, and an equal score would pass for a better one. So a block is counted only when the scores of all targets
    are known: at once from the last block on that holds one, in the second walk before it.
    """

    def __init__(self, chunk: _Chunk, targets: Tensor, size: int):
        self.chunk, self.targets = chunk, targets  # (b, P)
        self.holds = set((targets[targets >= 0] // size * size).tolist())  # first rows of blocks with a target
        self.last = max(self.holds)
        self.rankings = [_Ranking(chunk, targets) for _ in range(1 if chunk.members is None else 2)]

    def score(self, start: int, block: Tensor, again: bool) -> None:
        """Score the block (n, K, E) that starts there; ``again`` in the second walk."""
        known = start >= self.last
        if known if again else not known and start not in self.holds:
            return
        whole = self.chunk.mask_excluded(scores_of(self.chunk.query, block), start)  # (b, n)
        row, slot = ((self.targets >= start) & (self.targets < start + len(block))).nonzero(as_tuple=True)
        column = self.targets[row, slot] - start
        over_subset = self.chunk.restrict(whole, start, len(block)) if len(self.rankings) > 1 else whole
        for ranking, scores in zip(reversed(self.rankings), (over_subset, whole), strict=False):
            if not again:
                ranking.own[row, slot] = scores[row, column].to(ranking.own)
            if known or again:
                ranking.count(scores.index_put_((row, column), scores.new_tensor(-torch.inf)))


@torch.no_grad()
def top_k(
    query: Tensor,
    gallery: Tensor | Searchable,
    k: int,
    excluded: Tensor | None = None,
    members: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best gallery rows of each query, best first, equal scores by row.

    Args:
        query: (Q, E).
        gallery: (G, K, E), or what searches by an index of its own.
        k: how many; all G where it is more.
        excluded: (Q, X) gallery rows left out, padded with -1, or None.
        members: (Q, M) gallery rows that alone are searched, padded with -1, or None for all.

    Returns:
        Scores and rows, both (Q, k); rows that are left out come last, with a score of minus infinity.

    Raises ``ValueError`` if a score is not finite.
    """
    if not isinstance(gallery, Tensor):
        return gallery.top_k(query, k, excluded, members)
    k = min(k, len(gallery))
    chunks = [chunk for _, chunk in _chunks(query, torch.arange(len(query), device=query.device), excluded, members)]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = [chunk.query.new_zeros(len(chunk.query), 0, dtype=wide) for chunk in chunks]
    rows = [chunk.query.new_zeros(len(chunk.query), 0, dtype=torch.long) for chunk in chunks]
    # Few queries take larger blocks, with as many scores: on a busy CPU each operation's threads wait for each other.
    is_copied = gallery.dtype != wide or gallery.device != query.device  # then the memory of a block counts too
    factor = 1 if is_copied else CHUNK // min(max(1, len(query)), CHUNK)
    for start, block in blocks(gallery, query, factor) if k else ():
        for n, chunk in enumerate(chunks):
            found, columns = _first(chunk.scores(start, block), k, scores[n])
            merged, order = torch.cat([scores[n], found], 1).sort(dim=1, descending=True, stable=True)
            scores[n], rows[n] = merged[:, :k], torch.cat([rows[n], columns + start], 1).gather(1, order[:, :k])
    none = query.new_zeros(0, k, dtype=wide)
    return torch.cat([none, *scores]), torch.cat([none.long(), *rows])


def _first(scores: Tensor, k: int, before: Tensor) -> tuple[Tensor, Tensor]:
    """The k best of scores (b, n) in each row, or all n, and their columns, by column; of equal scores the first.

    Where ``before`` (b, k or fewer), the best scores so far, best first, are k, no lower or equal score counts any
    more, and any columns that have one will do.
    """
    n = scores.shape[1]
    values, columns = scores.topk(min(k + 1, n))
    if k < n:
        last = values[:, k - 1]
        open_ = values[:, k] == last  # which of the equal ones are among the k is not promised
        if before.shape[1] == k:
            open_ &= last > before[:, -1]
        columns = columns[:, :k]
        if bool(open_.any()):
            tied, last = scores[open_], last[open_, None]  # (t, n), (t, 1)
            place = torch.arange(n, 0, -1, dtype=torch.int32, device=scores.device)
            columns[open_] = torch.where(tied > last, place + n, (tied == last) * place).topk(k).indices
    columns = columns.sort(1).values
    return scores.gather(1, columns), columns
