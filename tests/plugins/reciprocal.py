"""A toy measure: the reciprocal rank of the best target, within the first k."""

import numpy as np

from spn4cir.measures import Kind, Ranks, Values, best_ranks


def reciprocal_rank(ranks: Ranks, k: int) -> Values:
    """1 / rank, 0 beyond k; equal scores take their last rank."""
    last = best_ranks(ranks)[:, 1]
    return np.where(last <= k, 1 / last, 0.0)


RECIPROCAL = Kind("MRR", reciprocal_rank)
