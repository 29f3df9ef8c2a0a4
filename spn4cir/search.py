"""Exact search over given vectors: rank of the target by counting, and the first k.

The gallery is scored block by block, so what is held beside the inputs does not grow with it. A gallery may lie on
another device than the queries, or in half precision: each block is moved to the queries and widened there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 256  # queries scored at once; fixed, since the block size of a product can move its last bits
BLOCK = 16_384  # candidate vectors scored at once; likewise


class Searchable(Protocol):
    """A gallery that finds the first k itself, such as ``spn4cir.faiss_search.Neighbours``."""

    def top_k(
        self, query: Tensor, k: int, excluded: Tensor | None = None, members: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What ``top_k`` below returns."""
        ...


def scores_of(query: Tensor, candidates: Tensor) -> Tensor:
    """Score of each query against each candidate: the maximum dot product over the candidate's vectors.

    Args:
        query: (B, E).
        candidates: (N, K, E).

    Returns:
        (B, N), in float32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    n, k, e = candidates.shape
    with torch.autocast(query.device.type, enabled=False):  # mixed precision ends where scores begin
        products = query.to(wide) @ candidates.reshape(n * k, e).to(wide).T  # (B, n·K)
    return products if k == 1 else products.view(len(query), n, k).amax(2)


def blocks(gallery: Tensor, query: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Parts of a gallery (G, K, E) to score at once, each with its first row, where and as wide as the queries."""
    size, wide = _block_size(gallery), torch.promote_types(query.dtype, torch.float32)
    for start in range(0, len(gallery), size):
        yield start, gallery[start : start + size].to(query.device, wide)


def _block_size(gallery: Tensor) -> int:
    """Images whose vectors are scored at once."""
    return max(1, BLOCK // gallery.shape[1])


@dataclass
class _Chunk:
    """Queries that are scored at once, and images that their rankings leave out or are about; padded with -1."""

    query: Tensor  # (b, E)
    excluded: Tensor | None  # (b, X)
    members: Tensor | None  # (b, M)

    def scores(self, start: int, block: Tensor) -> Tensor:
        """Scores (b, n) of a block (n, K, E), minus infinity for images that are left out.

        Raises:
            ValueError: if one is not finite.
        """
        scores = scores_of(self.query, block)
        if scores.numel() and not bool(torch.stack(torch.aminmax(scores)).isfinite().all()):
            raise ValueError("scores are not finite: an embedding holds NaN or infinity")
        if self.members is not None:
            kept = inside(self.members, start, len(block))
            scores = torch.full_like(scores, -torch.inf).index_put(kept, scores[kept])
        if self.excluded is not None:
            scores[inside(self.excluded, start, len(block))] = -torch.inf
        return scores


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
def rank_of_target(
    query: Tensor, gallery: Tensor, targets: Tensor, excluded: Tensor | None = None, members: Tensor | None = None
) -> Tensor:
    """Places that each query's best target can take among images of equal score, the best place being 1.

    Args:
        query: (Q, E).
        gallery: (G, K, E).
        targets: (Q, P) gallery rows that answer the query, padded with -1; the best one counts, and the query's other
            targets never stand in its way.
        excluded: (Q, X) gallery rows left out of the ranking, padded with -1, or None.
        members: (Q, M) gallery rows that alone are ranked, padded with -1, or None for all.

    Returns:
        (Q, 2) int64: first and last place, equal where no other image has the target's score.

    Raises:
        ValueError: if a query has no target that is ranked, or a score is not finite.
    """
    if bool((targets < 0).all(1).any()):
        raise ValueError("a query without a target has no rank")
    targets = targets.to(query.device)
    order = targets.amax(1).argsort(stable=True)  # so that few blocks hold the targets of a chunk
    ranks = torch.ones(len(query), 2, dtype=torch.long, device=query.device)
    chunks = [
        (numbers, _Rank(chunk, targets[numbers], _block_size(gallery)))
        for numbers, chunk in _chunks(query, order, excluded, members)
    ]
    behind = max((chunk.last for _, chunk in chunks), default=0)
    for again, walked in ((False, gallery), (True, gallery[:behind])):
        for start, block in blocks(walked, query):
            for _, chunk in chunks:
                chunk.look(start, block, again)
    for numbers, chunk in chunks:
        ranks[numbers] = chunk.ranks
    return ranks


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
        wide = torch.promote_types(chunk.query.dtype, torch.float32)
        self.best = targets.new_full((len(targets),), -torch.inf, dtype=wide)  # (b,)
        self.ranks = targets.new_ones(len(targets), 2)

    def look(self, start: int, block: Tensor, again: bool) -> None:
        """Learn from the block (n, K, E) that starts there; ``again`` in the second walk."""
        known = start >= self.last
        if known if again else not known and start not in self.holds:
            return
        scores = self.chunk.scores(start, block)  # (b, n)
        held = inside(self.targets, start, len(block))
        if not again:
            self.best.scatter_reduce_(0, held[0], scores[held].to(self.best), "amax")
        if known or again:
            self.count(scores.index_put_(held, scores.new_tensor(-torch.inf)))  # no target stands in another's way

    def count(self, scores: Tensor) -> None:
        """Move the ranks behind better scores, and the last place behind equal ones; uses up the scores."""
        if bool(self.best.isneginf().any()):
            raise ValueError("a query whose targets are all left out has no rank")
        best = self.best[:, None]
        # zeros and ones as floats: sums of so few are exact, and several times as fast as those of booleans
        self.ranks[:, 0] += torch.gt(scores, best, out=torch.empty_like(scores)).sum(1).long()
        self.ranks[:, 1] += scores.ge_(best).sum(1).long()


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

    Raises:
        ValueError: if a score is not finite.
    """
    if not isinstance(gallery, Tensor):
        return gallery.top_k(query, k, excluded, members)
    k = min(k, len(gallery))
    chunks = [chunk for _, chunk in _chunks(query, torch.arange(len(query), device=query.device), excluded, members)]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = [chunk.query.new_zeros(len(chunk.query), 0, dtype=wide) for chunk in chunks]
    rows = [chunk.query.new_zeros(len(chunk.query), 0, dtype=torch.long) for chunk in chunks]
    for start, block in blocks(gallery, query) if k else ():
        for n, chunk in enumerate(chunks):
            found, columns = _first(chunk.scores(start, block), k, scores[n])
            merged, order = torch.cat([scores[n], found], 1).sort(dim=1, descending=True, stable=True)
            scores[n], rows[n] = merged[:, :k], torch.cat([rows[n], columns + start], 1).gather(1, order[:, :k])
    none = query.new_zeros(0, k, dtype=wide)
    return torch.cat([none, *scores]), torch.cat([none.long(), *rows])


def _first(scores: Tensor, k: int, before: Tensor) -> tuple[Tensor, Tensor]:
    """The k best scores of each row and their columns, by column; of equal scores the first columns.

    Args:
        scores: (b, n).
        k: how many; all n where it is more.
        before: (b, k or fewer) best scores so far, best first. Where they are k, no lower or equal score counts any
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
