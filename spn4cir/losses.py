"""The one loss: InfoNCE of composed queries against a set of candidates, of any size, here or on many processes."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.distributed import all_gather_rows, all_reduce, process_rank, world_size
from spn4cir.streaming import CandidateMask, Softmax, Transform, candidate_gradient, finite, pooled, streaming_softmax


@dataclass(frozen=True)
class Shard:
    """The candidates that this process holds, (n, K, E): row ``first`` of all and the following.

    Where there are several processes, each holds some; together they hold all, once. If they learn, each process gets
    the whole gradient of its own, of the mean over processes of their losses.
    """

    vectors: Tensor
    first: int = 0

    def detach(self) -> "Shard":
        """The same without a gradient."""
        return Shard(self.vectors.detach(), self.first)


class Margin(Protocol):
    """What a margin makes of cosines."""

    def positive(self, cosine: Tensor, query: Tensor) -> Tensor:
        """Of the positives (T,), of these of the B queries; differentiable."""
        ...

    def others(self, positive: Tensor) -> Transform | None:
        """Of all other candidates, given the positives' cosines (B,) as they are; None if they stay as they are."""
        ...


def info_nce(
    query: Tensor,
    candidates: Tensor | Shard,
    positives: Tensor,
    temperature: Tensor | float,
    ignore: Tensor | None = None,
    threshold: float | None = None,
    margin: Margin | None = None,
) -> Tensor:
    """Cross-entropy of each query's positive among all candidates, a scalar.

    ``loss = mean_i [ -s(q_i, c_p) / t + log Σ_j exp(s(q_i, c_j) / t) ]`` with ``s`` the maximum dot product over a
    candidate's K vectors. Candidates are the targets of the batch in stage 1, the whole bank in stage 2. Several
    positives of one query are one term each, with the query's other positives left out of its sum; the mean is over
    terms. Scores are computed and scaled in float32 or wider, whatever the candidates are stored in.

    Candidates are read a block at a time, so memory does not grow with their number. Where they are frozen the same
    pass carries the gradient, ``(softmax-weighted mean of candidates - positive) / t``; where they learn, the backward
    pass computes the scores once more. It can be differentiated once.

    Args:
        query: (B, E), unit norm; of several processes that hold a ``Shard`` each, as many on each.
        candidates: (N, K, E), unit norm; or this process's ``Shard`` of them: the loss is then this process's share,
            such that the mean over processes is that of all queries.
        positives: (B,) candidate rows, or (B, P) padded with -1.
        temperature: positive scalar.
        ignore: (2, M) pairs of query row and candidate row that are not negatives of each other (duplicates, other
            accepted targets), or None. A pair that is the positive itself stays.
        threshold: leave out candidates whose cosine similarity to one of the query's positives exceeds this; of images
            with K vectors that of their means. None for no such bound.
        margin: changes scores before they are divided by the temperature, which then does not learn; None for none.

    Raises ``ValueError`` if no query has a positive, or one that no candidate has, or the temperature is not above 0.

    Source: Feng et al., "Improving Composed Image Retrieval via Contrastive Learning with Scaling Positives and
    Negatives", ACM MM 2024; van den Oord et al., 2018 (InfoNCE).
    """
    if torch.is_tensor(temperature):
        temperature = temperature.to(query.device)
    else:
        if not temperature > 0:
            raise ValueError(f"a temperature is above 0, got {temperature}")
        temperature = torch.tensor(temperature, dtype=torch.float64, device=query.device)
    if margin is not None and (temperature.requires_grad or (positives.dim() > 1 and positives.shape[1] > 1)):
        raise ValueError("a margin takes a temperature that does not learn, and one positive for each query")
    vectors, batch = _batch(candidates, positives.view(len(query), -1), ignore, threshold)
    with torch.autocast(query.device.type, enabled=False):  # mixed precision ends where scores begin
        loss: Tensor = _InfoNCE.apply(query, vectors, temperature, batch, margin)
    return loss


@torch.no_grad()
def masked_share(
    candidates: Tensor | Shard, positives: Tensor, ignore: Tensor | None = None, threshold: float | None = None
) -> float:
    """Share of the pairs of a query and a candidate, its positives aside, that ``info_nce`` masks as false negatives.

    Over the queries and candidates of all processes, all of which take part. Arguments are those of ``info_nce``,
    positives (B, P) padded with -1.
    """
    vectors, batch = _batch(candidates, positives, ignore, threshold)
    batch = batch.of_all()
    positives, dtype = batch.positives, torch.promote_types(vectors.dtype, torch.float32)
    mask = _hidden(batch, len(vectors), _positive_vectors(vectors, batch, dtype, positives.device), True)
    own = _within(row_pairs(positives, positives >= 0), batch.first, len(vectors))
    borders = [*range(0, len(vectors), 4096), len(vectors)]
    masked, others = 0, len(positives) * len(vectors) - own.shape[1]
    for start, block in zip(borders, mask.blocks(borders), strict=False):
        hidden = block.mask(len(positives), vectors[start : start + 4096].to(positives.device))
        inside = (own[1] >= start) & (own[1] < start + 4096)
        hidden[own[0, inside], own[1, inside] - start] = False
        masked += int(hidden.sum())
    counts = all_reduce(torch.tensor([masked, others], device=positives.device))
    return int(counts[0]) / max(int(counts[1]), 1)


@torch.no_grad()
def class_cosines(query: Tensor, candidates: Tensor | Shard, positives: Tensor) -> Tensor:
    """Cosines of the queries (B, E) of all processes with their positives (B,), in rank order."""
    vectors, own = _batch(candidates, positives[:, None], None, None)
    batch, everyone = own.of_all(), all_gather_rows(query) if own.spread else query
    found = _own_scores(everyone, _positive_vectors(vectors, batch, query.dtype, query.device)).amax(2)[:, 0]
    return found if own.spread else all_gather_rows(found)


@torch.no_grad()
def sums_of_others(query: Tensor, candidates: Tensor | Shard, positives: Tensor) -> Tensor:
    """Logarithms of ``Σ_j exp(q_i · c_j)`` over all but the positives (B,), for queries (B, E) of all processes."""
    vectors, own = _batch(candidates, positives[:, None], None, None)
    batch, everyone = own.of_all(), all_gather_rows(query) if own.spread else query
    found = _positive_vectors(vectors, batch, query.dtype, query.device)
    sums = streaming_softmax(everyone, vectors, _hidden(batch, len(vectors), found, True))
    return _join_processes(sums).logarithm if own.spread else all_gather_rows(sums.logarithm)


@dataclass(frozen=True)
class _Batch:
    """Positives (B, P) and ignored pairs (2, M) of some queries; rows are those of all candidates."""

    positives: Tensor
    pairs: Tensor
    threshold: float | None
    first: int
    spread: bool

    def of_all(self) -> "_Batch":
        """That of all processes, in rank order."""
        if not self.spread:
            return self
        sizes = all_gather_rows(torch.tensor([self.pairs.shape[1]], device=self.pairs.device)).tolist()
        padded = self.pairs.new_zeros(max(sizes), 2)
        padded[: self.pairs.shape[1]] = self.pairs.T + self.pairs.new_tensor([process_rank() * len(self.positives), 0])
        pairs = all_gather_rows(padded[None])  # (processes, most, 2)
        kept = torch.cat([part[:size] for part, size in zip(pairs, sizes, strict=True)]).T
        return _Batch(all_gather_rows(self.positives), kept, self.threshold, self.first, True)


def _batch(
    candidates: Tensor | Shard, positives: Tensor, ignore: Tensor | None, threshold: float | None
) -> tuple[Tensor, _Batch]:
    """The candidates that are here, and the batch that is scored against all of them."""
    held, spread = (candidates, world_size() > 1) if isinstance(candidates, Shard) else (Shard(candidates), False)
    pairs = positives.new_zeros(2, 0) if ignore is None else ignore
    return held.vectors, _Batch(positives, pairs, threshold, held.first, spread)


class _InfoNCE(torch.autograd.Function):
    """``info_nce``: the gradients of query and temperature are ready when the loss is."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, vectors: Tensor, temperature: Tensor, own: _Batch, margin: Margin | None
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        t = temperature.to(wide)
        local = query.to(wide).contiguous() / t
        batch, scaled = own.of_all(), all_gather_rows(local) if own.spread else local
        found = _positive_vectors(vectors, batch, wide, query.device)  # (B, P, K, E)
        scores, which = _own_scores(scaled, found).max(2)  # (B, P)
        nearest = found.gather(2, which[..., None, None].expand(-1, -1, 1, found.shape[3]))[:, :, 0]  # (B, P, E)
        learned = ctx.needs_input_grad[1]
        # to leave candidates out, as fused attention does not serve here, or the positive has a score of its own
        cheap = learned or vectors.shape[1] > 1 or margin is not None
        hidden = _hidden(batch, len(vectors), found, cheap)
        transform = None if margin is None else _scaled(margin.others(scores[:, 0] * t), t)
        sums = streaming_softmax(scaled, vectors, hidden, transform)
        if own.spread:
            sums = _join_processes(sums)

        rows = slice(process_rank() * len(query), (process_rank() + 1) * len(query)) if own.spread else slice(None)
        apart = _apart(own.positives, cheap)  # (B, 1)
        owner, slot = (own.positives >= 0).nonzero(as_tuple=True)  # (T,) terms
        count = int(all_reduce(torch.tensor(len(owner), device=query.device))) if own.spread else len(owner)
        if not count:
            raise ValueError("no query has a positive: the mean over no terms is undefined")
        each = (world_size() if own.spread else 1) / count  # weight of a term
        score, nearest = scores[rows][owner, slot], nearest[rows][owner, slot]  # (T,), (T, E)
        slope = torch.ones_like(score)
        if margin is not None:
            with torch.enable_grad():
                cosine = (score * t).detach().requires_grad_()
                changed = margin.positive(cosine, owner)
                (slope,) = torch.autograd.grad(changed.sum(), cosine)
            score = changed.detach() / t
        mine = Softmax(*(part[rows][owner] for part in sums))
        behind = (mine.top - score) + mine.total.log()  # (T,)
        added = apart[owner, 0]
        share = torch.where(added, behind.sigmoid(), 1.0)  # of a term's sum, what the pass went through
        terms = torch.where(added, F.softplus(behind), behind.clamp(min=0))
        pulled = share[:, None] * (mine.mean - slope[:, None] * nearest)  # (T, E)
        gradient = torch.zeros_like(local).index_add_(0, owner, pulled) * (each / t)
        ctx.save_for_backward(query, gradient, temperature)
        ctx.learned = learned
        if learned:
            weight = local.new_zeros(len(local)).index_add_(0, owner, share) * each  # (B,)
            pull = local.new_zeros(own.positives.shape).index_put_((owner, slot), share * slope * each)  # (B, P)
            if own.spread:  # the mean over processes
                weight, pull = (all_gather_rows(part) / world_size() for part in (weight, pull))
            ctx.hidden, ctx.terms, ctx.transform = hidden, (batch, pull), transform
            ctx.state = (scaled, vectors.detach(), sums, weight, which)
        return (terms.sum() * each).to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        query, gradient, temperature = ctx.saved_tensors
        of_query = (given * gradient).to(query.dtype) if ctx.needs_input_grad[0] else None
        of_temperature = None
        if ctx.needs_input_grad[2]:
            of_temperature = (-given * (query.to(gradient) * gradient).sum() / temperature).to(temperature)
        of_vectors = None
        if ctx.learned:
            scaled, vectors, sums, weight, which = ctx.state
            batch, pull = ctx.terms
            owner, slot = ((batch.positives >= batch.first) & (batch.positives < batch.first + len(vectors))).nonzero(
                as_tuple=True
            )
            row = batch.positives[owner, slot] - batch.first
            with torch.autocast(query.device.type, enabled=False):
                of_vectors = candidate_gradient(scaled, vectors, ctx.hidden, sums, weight, ctx.transform)
            share = pull[owner, slot]
            of_vectors.index_put_((row, which[owner, slot]), -share[:, None] * scaled[owner], accumulate=True)
            of_vectors = (given * of_vectors).to(vectors.dtype)
        return of_query, of_vectors, of_temperature, None, None


def _scaled(transform: Transform | None, temperature: Tensor) -> Transform | None:
    """A transform of cosines as one of scores, which are divided by a temperature."""
    if transform is None:
        return None

    def scaled(scores: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = transform(scores * temperature)
        return values / temperature, slopes

    return scaled


def _positive_vectors(vectors: Tensor, batch: _Batch, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B, P, K, E) of the positives, zeros for padding; those of other processes too."""
    local = batch.positives - batch.first
    here = (batch.positives >= 0) & (local >= 0) & (local < len(vectors))
    rows = local.clamp(0, max(len(vectors) - 1, 0)).flatten().to(vectors.device)
    found = vectors[rows] if len(vectors) else vectors.new_zeros(len(rows), *vectors.shape[1:])
    found = found.to(device, dtype).view(*here.shape, *found.shape[1:]) * here[..., None, None]
    if batch.spread:
        found, here = all_reduce(found), all_reduce(here.int()) > 0
    if bool((here != (batch.positives >= 0)).any()):
        lost = batch.positives[here != (batch.positives >= 0)][0].item()
        raise ValueError(f"a query's positive is row {lost}, which no candidate has")
    return found


def _own_scores(query: Tensor, found: Tensor) -> Tensor:
    """(B, E) and (B, P, K, E) → (B, P, K), as a part of matrix products.

    So they are rounded as those of all candidates are: of vectors that are nearly equal, what counts are differences.
    """
    parts = []
    for rows, vectors in zip(torch.split(query, 64), torch.split(found, 64), strict=True):
        products = rows @ vectors.flatten(0, 2).T  # (b, b·P·K)
        parts.append(products.view(len(rows), len(rows), *found.shape[1:3]).diagonal().movedim(-1, 0))
    return torch.cat(parts)


def _apart(positives: Tensor, always: bool) -> Tensor:
    """(B, P) → (B, 1), true where positives stay out of the pass, and each term adds its own.

    So it is where there are several of them, and wherever it costs nothing: a gradient is then
    ``share · (mean of the others - positive)``, which loses no digits where the share is small.
    """
    return torch.full_like(positives[:, :1], True, dtype=torch.bool) if always else (positives >= 0).sum(1, True) > 1


def _hidden(batch: _Batch, count: int, found: Tensor, cheap: bool) -> CandidateMask:
    """What the queries' sums leave out of ``count`` candidates from ``batch.first`` on."""
    positives, (query, row) = batch.positives, batch.pairs
    like = None if batch.threshold is None else pooled(found)  # (B, P, E)
    apart = _apart(positives, cheap)
    pairs = batch.pairs[:, ~((positives[query] == row[:, None]) & ~apart[query]).any(1)]
    if cheap or positives.shape[1] > 1:
        pairs = torch.cat([pairs, row_pairs(positives, (positives >= 0) & apart)], 1)
    shown = row_pairs(positives, (positives >= 0) & ~apart) if like is not None else pairs[:, :0]
    pairs, shown = (_within(part, batch.first, count) for part in (pairs, shown))
    return CandidateMask(pairs, shown, like, 1.0 if batch.threshold is None else batch.threshold)


def row_pairs(rows: Tensor, chosen: Tensor) -> Tensor:
    """(B, P) candidate rows, of which some are chosen → (2, M) pairs of query row and candidate row."""
    owner, slot = chosen.nonzero(as_tuple=True)
    return torch.stack([owner, rows[owner, slot]])


def _within(pairs: Tensor, first: int, count: int) -> Tensor:
    """Pairs whose candidate is one of ``count`` from ``first`` on, counted from there, by candidate."""
    local = torch.stack([pairs[0], pairs[1] - first])
    local = local[:, (local[1] >= 0) & (local[1] < count)]
    return local[:, local[1].argsort()]


def _join_processes(own: Softmax) -> Softmax:
    """What ``streaming_softmax`` gave on each process → what it gives for the candidates of all."""
    top = all_reduce(own.top, "MAX")
    share = own.total * (own.top - finite(top)).exp()  # (B,)
    joined = all_reduce(torch.cat([share[:, None], share[:, None] * own.mean], 1))  # (B, 1 + E)
    total = joined[:, :1]
    return Softmax(top, total[:, 0], joined[:, 1:] / total.clamp(min=torch.finfo(total.dtype).tiny))
