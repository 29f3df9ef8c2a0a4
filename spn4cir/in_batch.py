"""Stage 1's candidates: the targets of the batch, and what else may be replaced to form negatives."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.distributed import all_gather_rows, all_reduce, gather_with_gradient, process_rank, world_size
from spn4cir.losses import info_nce
from spn4cir.search import scores_of
from spn4cir.streaming import pooled


class TripletMargin(NamedTuple):
    """The margin of a triplet loss on cosines, and the seed by which negatives are drawn."""

    value: float
    seed: int = 0


@dataclass(frozen=True)
class InBatch:
    """Scores of a batch's queries against the targets of the batches of all processes.

    T is the number of candidates that each triplet brings: its positives, and then its hard negatives.

    Args:
        identity: (B, T), or (B,) for T = 1: equal for equal targets; -1 is padding.
        temperature: divisor of the scores.
        others: (B, A) identities of further targets of the same query, padded with -1: they are not negatives.
        threshold: candidates more similar to the query's target than this are not negatives; None for no bound.
        positives: number of the T columns that are positives.
    """

    identity: Tensor
    temperature: Tensor | float
    others: Tensor | None = None
    threshold: float | None = None
    positives: int = 1

    def __call__(self, query: Tensor, target: Tensor) -> Tensor:
        """``info_nce`` of queries (B, E) against the targets (B · T, K, E), the query's own as positives; a scalar."""
        candidates = gather_with_gradient(target)  # (N, K, E)
        loss = info_nce(query, candidates, self.own, self.temperature, self.ignored, self.threshold)
        if self.positives == 1:
            return loss
        terms = (self.own >= 0).sum().to(loss)  # other processes may have more, and the mean is over the terms of all
        return loss * (world_size() * terms / all_reduce(terms))

    @property
    def columns(self) -> Tensor:
        """(B, T) identities."""
        return self.identity.view(len(self.identity), -1)

    @property
    def own(self) -> Tensor:
        """(B, P) rows of each query's positives among the candidates of all processes, padded with -1."""
        columns, first = self.columns, process_rank() * self.identity.numel()
        rows = torch.arange(first, first + columns.numel(), device=columns.device).view(columns.shape)
        return rows.masked_fill(columns < 0, -1)[:, : self.positives]

    @property
    def ignored(self) -> Tensor:
        """(2, M) pairs of query and candidate that are not negatives: equal to a target of the query, or padding."""
        candidates = all_gather_rows(self.columns).flatten()  # (N,)
        alike = self.columns[:, 0, None] == candidates  # (B, N)
        for column in (*self.columns.T[1 : self.positives], *(() if self.others is None else self.others.T)):
            alike |= column[:, None] == candidates
        if self.columns.shape[1] > 1:
            alike |= candidates < 0
        return alike.nonzero().T

    def _answers(self, target: Tensor) -> Tensor:
        """(B, N), true where this query's target (B, K, E) is also a target of another query."""
        identity = self.columns[:, 0]
        alike = identity[:, None] == all_gather_rows(identity)
        for other in () if self.others is None else all_gather_rows(self.others).T:
            alike |= identity[:, None] == other
        if self.threshold is not None:
            own = pooled(target.detach())  # (B, E)
            alike |= scores_of(own, all_gather_rows(own)[:, None]) > self.threshold
        return alike

    def replaced(self, scores: Tensor, alike: Tensor) -> Tensor:
        """Cross-entropy of scores (B, N), a query's own being right; pairs that are ``alike`` (B, N) are masked."""
        own = self.own[:, 0]
        hidden = alike.scatter(1, own[:, None], False)
        return F.cross_entropy((scores / self.temperature).masked_fill(hidden, -torch.inf), own)

    def by_query(self, query: Tensor, target: Tensor) -> Tensor:
        """Each target (B, K, E) against the queries (B, E) of all processes."""
        scores = scores_of(gather_with_gradient(query), target).T  # (B, N)
        return self.replaced(scores, self._answers(target))

    def by_margin(self, query: Tensor, target: Tensor, margin: TripletMargin, step: int) -> Tensor:
        """Triplet loss of queries (B, E) against targets (B · T, K, E) and one negative each, drawn anew in each step.

        ``d(q, t) = 1 - q·t``; the mean of ``relu(d(q, t) - d(q, n) + margin)`` and of the same with t as the anchor,
        ``relu(d(t, q) - d(t, n) + margin)``. t is the first target, n a negative of the batches of all processes. A
        query without any negative adds nothing.

        Source: Li et al., "FreestyleRet: Retrieving Images from Style-Diversified Queries", ECCV 2024.
        """
        candidates = gather_with_gradient(target)  # (N, K, E)
        own = self.own[:, 0]  # (B,)
        is_negative = torch.ones(len(query), len(candidates), dtype=torch.bool, device=query.device)
        is_negative[tuple(self.ignored)] = False
        is_negative.scatter_(1, own[:, None], False)
        chance = torch.from_numpy(np.random.default_rng((margin.seed, step, process_rank())).random(is_negative.shape))
        drawn = chance.to(query.device).masked_fill(~is_negative, -1).argmax(1)
        scores = scores_of(query, candidates)  # (B, N)
        among = scores_of(pooled(candidates[own]), candidates)  # (B, N), of targets
        matched, other = scores.gather(1, own[:, None])[:, 0], drawn[:, None]  # (B,), (B, 1)
        both = torch.stack(
            [part.gather(1, other)[:, 0] - matched + margin.value for part in (scores, among)]
        ).relu()  # (2, B)
        return (both * is_negative.any(1)).mean()

    def by_part(self, kept: Tensor, swapped: Tensor, target: Tensor, identity: tuple[Tensor, Tensor]) -> Tensor:
        """Each target (B, E) against sums of its query's one part and the other part of all queries.

        Masked are other parts that are equal, and those of queries that share the kept part and this target; equal
        parts that are kept, and that are swapped, have an equal ``identity`` (B,).
        """
        same_kept, same_swapped = (part[:, None] == all_gather_rows(part) for part in identity)  # (B, N)
        alike = same_swapped | (same_kept & self._answers(target[:, None]))
        return self.replaced(sum_scores(kept, gather_with_gradient(swapped), target), alike)


def sum_scores(kept: Tensor, swapped: Tensor, target: Tensor) -> Tensor:
    """``⟨n(kept_i + swapped_j), target_i⟩`` for all i and j, n being the division by the norm, in float32 or wider.

    From dot products alone, as ``|a + b|² = |a|² + 2ab + |b|²``: of (B, E), (N, E) and (B, E) only (B, N) is made.
    """
    wide = torch.promote_types(kept.dtype, torch.float32)
    kept, swapped, target = kept.to(wide), swapped.to(wide), target.to(wide)
    with torch.autocast(kept.device.type, enabled=False):
        above = (kept * target).sum(1, keepdim=True) + target @ swapped.T  # (B, N)
        squares = (kept * kept).sum(1, keepdim=True) + 2 * kept @ swapped.T + (swapped * swapped).sum(1)
    return above / squares.clamp(min=1e-12).sqrt()
