"""The one loss: InfoNCE of composed queries against a set of candidates."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from spn4cir.search import scores_of


def info_nce(
    query: Tensor, candidates: Tensor, positives: Tensor, temperature: Tensor | float, ignore: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each query's positive among all candidates.

    ``loss = mean_i [ -s(q_i, c_p) / t + log Σ_j exp(s(q_i, c_j) / t) ]`` with ``s`` the maximum dot product over a
    candidate's K vectors. The same function serves stage 1 (candidates = the targets of the batch) and stage 2
    (candidates = the whole bank). Several positives of one query are one term each, with the query's other positives
    left out of its sum; the mean is over terms. Scores are computed and scaled in float32 or wider.

    Args:
        query: (B, E), unit norm.
        candidates: (N, K, E), unit norm.
        positives: (B,) candidate rows, or (B, P) padded with -1.
        temperature: positive scalar.
        ignore: (2, M) pairs of query row and candidate row that are not negatives of each other (duplicates, other
            accepted targets), or None. A pair that is the positive itself stays.

    Returns:
        Scalar.

    Source: Feng et al., "Improving Composed Image Retrieval via Contrastive Learning with Scaling Positives and
    Negatives", ACM MM 2024; van den Oord et al., 2018 (InfoNCE).
    """
    logits = scores_of(query, candidates) / temperature  # (B, N)
    positives = positives.view(len(query), -1)  # (B, P)
    owner, slot = (positives >= 0).nonzero(as_tuple=True)  # (T,) terms
    if len(owner) == 0:
        raise ValueError("no query has a positive: the mean over no terms is undefined")
    label = positives[owner, slot]
    if ignore is None and positives.shape[1] == 1:
        return F.cross_entropy(logits[owner], label)
    terms = logits[owner]  # (T, N)
    hidden = torch.zeros_like(terms, dtype=torch.bool)
    if ignore is not None:
        owned = torch.zeros_like(logits, dtype=torch.bool)
        owned[ignore[0], ignore[1]] = True
        hidden |= owned[owner]
    if positives.shape[1] > 1:
        owned = torch.zeros_like(logits, dtype=torch.bool)
        owned[owner, label] = True
        hidden |= owned[owner]
    hidden[torch.arange(len(label), device=label.device), label] = False
    return F.cross_entropy(terms.masked_fill(hidden, -torch.inf), label)


class _Gather(torch.autograd.Function):
    """Concatenate equally sized tensors of all processes; each gets back the summed gradient of its own part."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.rows = len(local)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows :][: ctx.rows]


def gather(local: Tensor) -> Tensor:
    """(B, …) of each process → (all B, …), in rank order; the tensor itself where there is one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return local
    gathered: Tensor = _Gather.apply(local)
    return gathered


@dataclass(frozen=True)
class InBatch:
    """Stage 1's way to score: the candidates are the targets of the batch, of all processes.

    ``identity`` (B,) is equal for equal targets, which are not each other's negatives; ``temperature`` is what scores
    are divided by.
    """

    identity: Tensor
    temperature: Tensor | float

    def __call__(self, query: Tensor, target: Tensor) -> Tensor:
        """``info_nce`` of queries (B, E) against the targets (B, K, E), a query's own being its positive; a scalar."""
        candidates, identity = gather(target), gather(self.identity)  # (N, K, E), (N,)
        rank = dist.get_rank() if len(candidates) > len(target) else 0
        positives = torch.arange(len(target), device=target.device) + rank * len(target)
        same = self.identity[:, None] == identity  # (B, N) duplicates of a query's own target
        return info_nce(query, candidates, positives, self.temperature, same.nonzero().T)
