"""The one loss: InfoNCE of composed queries against a set of candidates."""

import torch
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
