"""Exact search over given vectors: rank of the target by counting, and the first k."""

import torch
from torch import Tensor

CHUNK = 256  # queries scored at once; fixed, since the block size of a product can move its last bits


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
        products = query.to(wide) @ candidates.reshape(n * k, e).to(wide).T  # (B, N·K)
    return products.view(len(query), n, k).amax(2)


@torch.no_grad()
def rank_of_target(query: Tensor, gallery: Tensor, targets: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Rank of each query's best target. Ties never favour it: an equal score counts as ahead.

    Args:
        query: (Q, E).
        gallery: (G, K, E).
        targets: (Q, P) gallery rows that answer the query, padded with -1; the best one counts, and the query's other
            targets never stand in its way.
        excluded: (Q, X) gallery rows left out of the ranking, padded with -1, or None.

    Returns:
        (Q,) int64, the best place being 1.

    Raises:
        ValueError: if a query has no target, or a score is not finite.
    """
    if bool((targets < 0).all(1).any()):
        raise ValueError("a query without a target has no rank")
    ranks = [torch.zeros(0, dtype=torch.long, device=query.device)]
    for start in range(0, len(query), CHUNK):
        rows = slice(start, start + CHUNK)
        scores = _finite(scores_of(query[rows], gallery))  # (b, G)
        wanted, ranked = targets[rows].to(scores.device), torch.ones_like(scores, dtype=torch.bool)
        if excluded is not None:
            _clear(ranked, excluded[rows].to(scores.device))
        best = _at(scores.masked_fill(~ranked, -torch.inf), wanted).amax(1, keepdim=True)  # (b, 1)
        if bool(best.isneginf().any()):
            raise ValueError("a query whose targets are all excluded has no rank")
        _clear(ranked, wanted)
        ahead = ranked & (scores >= best)
        ranks.append(ahead.sum(1) + 1)
    return torch.cat(ranks)


def _finite(scores: Tensor) -> Tensor:
    """The scores, if all are finite."""
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores are not finite: an embedding holds NaN or infinity")
    return scores


def _at(scores: Tensor, rows: Tensor) -> Tensor:
    """Scores at padded rows; padding gives minus infinity."""
    return scores.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -torch.inf)


def _clear(flags: Tensor, rows: Tensor) -> None:
    """Set ``flags`` to False at padded rows, in place."""
    for column in rows.T:
        held = column >= 0
        flags[held.nonzero()[:, 0], column[held]] = False


@torch.no_grad()
def top_k(query: Tensor, gallery: Tensor, k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k best gallery rows of each query, best first, equal scores by row.

    Args:
        query: (Q, E).
        gallery: (G, K, E).
        k: how many; all G where it is more.
        excluded: (Q, X) gallery rows left out, padded with -1, or None.

    Returns:
        Scores and rows, both (Q, k); excluded rows come last, with a score of minus infinity.

    Raises:
        ValueError: if a score is not finite.
    """
    k = min(k, len(gallery))
    scores_found, rows_found = [gallery.new_zeros(0, k)], [torch.zeros(0, k, dtype=torch.long, device=gallery.device)]
    for start in range(0, len(query), CHUNK):
        scores = _finite(scores_of(query[start : start + CHUNK], gallery))  # (b, G)
        if excluded is not None:
            for column in excluded[start : start + CHUNK].to(scores.device).T:
                held = (column >= 0).nonzero()[:, 0]
                scores[held, column[held]] = -torch.inf
        values, rows = scores.sort(dim=1, descending=True, stable=True)
        scores_found.append(values[:, :k])
        rows_found.append(rows[:, :k])
    return torch.cat(scores_found), torch.cat(rows_found)
