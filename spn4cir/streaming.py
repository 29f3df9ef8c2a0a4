"""Softmax of queries over any number of candidates, a block at a time: attention that also gives its log-sum-exp.

The scores of all candidates never exist at once. A block gives a log-sum-exp and a weighted mean of its vectors, two
matrix products; blocks are joined as they come, so memory does not grow with the number of candidates.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention",
NeurIPS 2022.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES = {"cpu": 2**20}
"""Scores held at once; more on any other device."""
NUMBERS = {"cpu": 2**22}
"""Numbers of candidates held at once where they are widened, or come from elsewhere."""
FUSED = {"cpu": 1, "cuda": 16}
"""Heads that candidates are split into for fused attention: a GPU shares out heads, and would idle with one."""
LEAST = 64
"""Candidates that a head should have."""


class Softmax(NamedTuple):
    """What a query's sum over candidates comes to: ``Σ_j exp(s_j) = total · exp(top)``, and the weighted mean.

    In two numbers, as the logarithm of large sums has too few digits for the differences that matter.
    """

    top: Tensor
    """(B,) a score near the largest, or minus infinity if there is no candidate."""
    total: Tensor
    """(B,), zero if there is none."""
    mean: Tensor
    """(B, E) candidates' vectors, weighted by their share of the sum; zeros if there is none."""

    @property
    def logarithm(self) -> Tensor:
        """(B,) log-sum-exp."""
        return self.top + self.total.log()


@dataclass(frozen=True)
class CandidateMask:
    """Which candidates a query's sum leaves out.

    Args:
        pairs: (2, M) query row and candidate row, by candidate.
        shown: (2, S) pairs that a threshold does not hide, by candidate.
        like: (B, P, E) vectors, unit norm, that no candidate may be too similar to; None for no threshold.
        threshold: similarity above which a candidate is left out.
    """

    pairs: Tensor
    shown: Tensor
    like: Tensor | None = None
    threshold: float = 1.0

    @property
    def none(self) -> bool:
        """Whether nothing can be left out."""
        return self.like is None and not self.pairs.shape[1]

    def blocks(self, borders: list[int]) -> "Iterator[CandidateMask]":
        """What is hidden between each two borders (rows of candidates), in order; rows count from the first border."""
        wanted, parts = torch.tensor(borders, device=self.pairs.device), (self.pairs, self.shown)
        cuts = [torch.searchsorted(part[1].contiguous(), wanted).tolist() for part in parts]
        for n, first in enumerate(borders[:-1]):
            local = [part[:, cut[n] : cut[n + 1]] for part, cut in zip(parts, cuts, strict=True)]
            pairs, shown = (torch.stack([part[0], part[1] - first]) for part in local)
            yield CandidateMask(pairs, shown, self.like, self.threshold)

    def mask(self, queries: int, vectors: Tensor) -> Tensor:
        """B and all candidates (n, K, E) → (B, n), true where hidden."""
        if self.like is None:
            hidden = torch.zeros(queries, len(vectors), dtype=torch.bool, device=vectors.device)
        else:
            alike = torch.einsum("bpe,ne->bpn", self.like, pooled(vectors))  # (B, P, n)
            hidden = (alike > self.threshold).any(1)
            hidden[self.shown[0], self.shown[1]] = False
        hidden[self.pairs[0], self.pairs[1]] = True
        return hidden


def pooled(vectors: Tensor) -> Tensor:
    """(…, K, E) → (…, E), unit norm: one vector for an image, by which images are compared with each other."""
    return vectors[..., 0, :] if vectors.shape[-2] == 1 else F.normalize(vectors.mean(-2), dim=-1)


Transform: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Scores (B, n) of a block → what takes their place, element by element, and its derivative."""


def streaming_softmax(
    query: Tensor, candidates: Tensor, hidden: CandidateMask, transform: Transform | None = None
) -> Softmax:
    """The softmax of scores over all candidates, and the mean of candidates that it weighs, in the query's type.

    Args:
        query: (B, E), float32 or wider, already divided by the temperature.
        candidates: (N, K, E) in any float type, on the query's device or another; the nearest of K vectors counts.
        hidden: what each query leaves out.
        transform: of the scores, or None. The mean then weighs candidates by its derivative too.
    """
    found = Softmax(query.new_full((len(query),), -torch.inf), query.new_zeros(len(query)), torch.zeros_like(query))
    for vectors, block in _walk(query, candidates, hidden, transform is not None):
        found = join(found, _block_softmax(query, vectors, block, transform))
    return found


def candidate_gradient(
    query: Tensor,
    candidates: Tensor,
    hidden: CandidateMask,
    found: Softmax,
    weight: Tensor,
    transform: Transform | None = None,
) -> Tensor:
    """The gradient of ``Σ_i weight_i · logarithm_i`` with respect to the candidates (N, K, E), in the query's type.

    Scores are computed once more; ``found`` is what ``streaming_softmax`` returned for the same arguments.
    """
    parts, weight = [], weight / found.total.clamp(min=torch.finfo(weight.dtype).tiny)
    for vectors, block in _walk(query, candidates, hidden, transform is not None):
        scores, which = _scores(query, vectors)
        scores, slopes = (scores, None) if transform is None else transform(scores)
        if not block.none:
            scores = scores.masked_fill(block.mask(len(query), vectors), -torch.inf)
        share = (scores - finite(found.top)[:, None]).exp_().mul_(weight[:, None])  # (B, n)
        share = share if slopes is None else share * slopes
        if which is not None:  # (B, n) weights of candidates → (B, n·K) weights of their vectors
            spread = share.new_zeros(*share.shape, vectors.shape[1])
            share = spread.scatter_(2, which[..., None], share[..., None]).flatten(1)
        parts.append((share.T @ query).view(vectors.shape))
    return torch.cat(parts) if parts else query.new_zeros(candidates.shape)


def join(one: Softmax, two: Softmax) -> Softmax:
    """What ``streaming_softmax`` gives for two sets of candidates together."""
    top = torch.maximum(one.top, two.top)
    weights = [part.total * (part.top - finite(top)).exp() for part in (one, two)]
    total = weights[0] + weights[1]
    share = (weights[1] / total.clamp(min=torch.finfo(total.dtype).tiny))[:, None]
    return Softmax(top, total, torch.lerp(one.mean, two.mean, share))


def finite(top: Tensor) -> Tensor:
    """Zero in the place of minus infinity, from which nothing can be subtracted."""
    return top.masked_fill(top.isneginf(), 0.0)


def _walk(
    query: Tensor, candidates: Tensor, hidden: CandidateMask, dense: bool
) -> Iterator[tuple[Tensor, CandidateMask]]:
    """Blocks (n, K, E) of the candidates, in the query's type and on its device, with what is hidden in each."""
    size = block_size(query, candidates, dense=dense or not hidden.none)
    borders = [*range(0, len(candidates), size), len(candidates)]
    blocks = zip(_ahead(candidates, borders, query.device), hidden.blocks(borders), strict=True)
    for vectors, block in blocks:
        yield vectors.to(query.dtype), block


def block_size(query: Tensor, candidates: Tensor, dense: bool) -> int:
    """Candidates in one block; ``dense`` where scores will be written somewhere."""
    (_, k, e), kind = candidates.shape, query.device.type
    size = NUMBERS.get(kind, 2**26) // (k * e)
    if dense or k > 1 or not fused(kind, query.dtype, e):
        scores = SCORES.get(kind, 2**25) // (4 if k > 1 else 1)  # the caches hold vectors too
        size = min(size, scores // (len(query) * k))
    return max(1, size)


def _ahead(candidates: Tensor, borders: list[int], device: torch.device) -> Iterator[Tensor]:
    """Blocks on that device; where they lie elsewhere, the next one is copied meanwhile."""
    pairs = list(itertools.pairwise(borders))
    if candidates.device == device:
        yield from (candidates[start:stop] for start, stop in pairs)
        return

    def copy(start: int, stop: int) -> Tensor:
        block = candidates[start:stop]
        return (block.pin_memory() if device.type == "cuda" else block).to(device)

    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(copy, *pair) for pair in pairs[:1]]
        for n in range(len(pairs)):
            block = waiting.pop().result()
            waiting = [pool.submit(copy, *pair) for pair in pairs[n + 1 : n + 2]]
            yield block


def _block_softmax(query: Tensor, vectors: Tensor, block: CandidateMask, transform: Transform | None = None) -> Softmax:
    """As ``streaming_softmax``, for one block that is at hand."""
    if (
        transform is None
        and block.none
        and vectors.shape[1] == 1
        and fused(query.device.type, query.dtype, query.shape[1])
    ):
        return _attention(query, vectors[:, 0])
    scores, which = _scores(query, vectors)  # (B, n)
    scores, slopes = (scores, None) if transform is None else transform(scores)
    if not block.none:
        scores.masked_fill_(block.mask(len(query), vectors), -torch.inf)
    top = scores.amax(1)
    weights = scores.sub_(finite(top)[:, None]).exp_()
    total = weights.sum(1)
    weights = weights if slopes is None else weights * slopes
    if which is None:
        summed = weights @ vectors[:, 0]
    else:
        rows = which + torch.arange(len(vectors), device=which.device) * vectors.shape[1]  # one vector of each
        summed = F.embedding_bag(rows, vectors.flatten(0, 1), mode="sum", per_sample_weights=weights)
    return Softmax(top, total, summed / total.clamp(min=torch.finfo(total.dtype).tiny)[:, None])


def _scores(query: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, n) scores, and for K > 1 which vector gave each."""
    n, k, _ = vectors.shape
    if k == 1:
        return query @ vectors[:, 0].T, None
    products = vectors.flatten(0, 1) @ query.T  # (n·K, B), the faster way round where there are many vectors
    scores, which = products.view(n, k, len(query)).max(1)  # (n, B)
    return scores.T.contiguous(), which.T.contiguous()


@functools.cache
def fused(kind: str, dtype: torch.dtype, width: int) -> bool:
    """Whether torch's fused attention serves here; tried once, with keys for all heads, and a wrong answer is said."""
    if kind not in FUSED:
        return False
    draw = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(n, width, generator=draw).to(kind, dtype) / width**0.5 for n in (5, 1100))
    scores = 3 * query @ keys.T
    right = scores.logsumexp(1), scores.softmax(1) @ keys
    try:
        found = _attention(3 * query, keys)
    except (RuntimeError, AttributeError):  # no kernel for this width or type, or a torch without it
        return False
    pairs = zip((found.logarithm, found.mean), right, strict=True)
    if all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in pairs):
        return True
    warnings.warn(f"torch's fused attention is wrong on {kind} for vectors of {width} {dtype}: not used", stacklevel=2)
    return False


def _attention(query: Tensor, keys: Tensor) -> Softmax:
    """(B, E) over (n, E), as ``streaming_softmax``, by torch's fused attention; keys are shared out among heads."""
    query, keys = query.contiguous(), keys.contiguous()  # a kernel may take the layout of one for that of its result
    kind, n = query.device.type, len(keys)
    heads = FUSED[kind] if n >= LEAST * FUSED[kind] else 1
    even = n // heads * heads
    total = _heads(query, keys[:even].view(heads, even // heads, -1))
    return total if even == n else join(total, _heads(query, keys[even:][None]))


def _heads(query: Tensor, keys: Tensor) -> Softmax:
    """(B, E) over (heads, n, E): the heads' results, joined."""
    queries = query.expand(1, len(keys), *query.shape)
    given = queries, keys[None], keys[None]
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, False, scale=1.0)
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(*given, None, True, 0.0, False, scale=1.0)
    mean, lse = found[:2]
    lse = lse[0, :, : len(query)].to(query.dtype)  # (heads, B): kernels may round the number of queries up
    top = lse.amax(0)  # (B,)
    weights = (lse - top).exp()  # (heads, B)
    total = weights.sum(0)
    return Softmax(top, total, ((weights / total)[..., None] * mean[0]).sum(0))
