"""Exact search over given vectors: rank of the target by counting, and the first k."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # queries scored at once; fixed, since the block size of a product can move its last bits
BLOCK = 65_536  # candidate vectors scored at once


def scores_of(query: Tensor, candidates: Tensor) -> Tensor:
    """Score of each query against each candidate: the maximum dot product over the candidate's vectors.

    Args:
        query: (B, E).
        candidates: (N, K, E).

    Returns:
        (B, N), in float32 or wider.
    """
    size = max(1, BLOCK // candidates.shape[1])
    blocks = [candidates[start : start + size] for start in range(0, max(1, len(candidates)), size)]
    if len(blocks) == 1:
        return _block_scores(query, candidates)
    if query.requires_grad and torch.is_grad_enabled() and not candidates.requires_grad:
        # a bank that is stored in half precision is widened block by block, in the backward pass once more
        found = [
            checkpoint(_block_scores, query, block, use_reentrant=False, preserve_rng_state=False) for block in blocks
        ]
    else:
        found = [_block_scores(query, block) for block in blocks]
    return torch.cat(found, 1)


def _block_scores(query: Tensor, candidates: Tensor) -> Tensor:
    """(B, E) against (n, K, E) → (B, n)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    n, k, e = candidates.shape
    with torch.autocast(query.device.type, enabled=False):  # mixed precision ends where scores begin
        products = query.to(wide) @ candidates.reshape(n * k, e).to(wide).T  # (B, n·K)
    return products.view(len(query), n, k).amax(2)


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
    ranks = [torch.zeros(0, 2, dtype=torch.long, device=query.device)]
    for start in range(0, len(query), CHUNK):
        rows = slice(start, start + CHUNK)
        scores = _finite(scores_of(query[rows], gallery))  # (b, G)
        wanted = targets[rows].to(scores.device)
        ranked = torch.full_like(scores, members is None, dtype=torch.bool)
        if members is not None:
            _mark(ranked, members[rows].to(scores.device), True)
        if excluded is not None:
            _mark(ranked, excluded[rows].to(scores.device), False)
        best = _at(scores.masked_fill(~ranked, -torch.inf), wanted).amax(1, keepdim=True)  # (b, 1)
        if bool(best.isneginf().any()):
            raise ValueError("a query whose targets are all left out has no rank")
        _mark(ranked, wanted, False)
        ahead = (ranked & (scores > best)).sum(1)
        ranks.append(torch.stack([ahead + 1, (ranked & (scores >= best)).sum(1) + 1], 1))
    return torch.cat(ranks)


def _finite(scores: Tensor) -> Tensor:
    """The scores, if all are finite."""
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores are not finite: an embedding holds NaN or infinity")
    return scores


def _at(scores: Tensor, rows: Tensor) -> Tensor:
    """Scores at padded rows; padding gives minus infinity."""
    return scores.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -torch.inf)


def _mark(flags: Tensor, rows: Tensor, value: bool) -> None:
    """Set ``flags`` at padded rows, in place."""
    for column in rows.T:
        held = (column >= 0).nonzero()[:, 0]
        flags[held, column[held]] = value


@torch.no_grad()
def top_k(
    query: Tensor, gallery: Tensor, k: int, excluded: Tensor | None = None, members: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best gallery rows of each query, best first, equal scores by row.

    Args:
        query: (Q, E).
        gallery: (G, K, E).
        k: how many; all G where it is more.
        excluded: (Q, X) gallery rows left out, padded with -1, or None.
        members: (Q, M) gallery rows that alone are searched, padded with -1, or None for all.

    Returns:
        Scores and rows, both (Q, k); rows that are left out come last, with a score of minus infinity.

    Raises:
        ValueError: if a score is not finite.
    """
    k = min(k, len(gallery))
    scores_found, rows_found = [gallery.new_zeros(0, k)], [torch.zeros(0, k, dtype=torch.long, device=gallery.device)]
    for start in range(0, len(query), CHUNK):
        scores = _finite(scores_of(query[start : start + CHUNK], gallery))  # (b, G)
        found = torch.full_like(scores, members is None, dtype=torch.bool)
        if members is not None:
            _mark(found, members[start : start + CHUNK].to(scores.device), True)
        if excluded is not None:
            _mark(found, excluded[start : start + CHUNK].to(scores.device), False)
        scores.masked_fill_(~found, -torch.inf)
        values, rows = scores.sort(dim=1, descending=True, stable=True)
        scores_found.append(values[:, :k])
        rows_found.append(rows[:, :k])
    return torch.cat(scores_found), torch.cat(rows_found)
