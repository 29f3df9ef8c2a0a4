"""The one module given to accelerate: ``forward`` returns the loss, so that gradients of all processes are reduced."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from spn4cir.backbone import Backbone, l2_normalize, to_float32
from spn4cir.bank import Bank
from spn4cir.batches import TripletBatch
from spn4cir.compute import gradient_cached
from spn4cir.distributed import all_gather_rows
from spn4cir.errors import InputError
from spn4cir.in_batch import InBatch, TripletMargin
from spn4cir.losses import Shard, info_nce, masked_share, row_pairs
from spn4cir.terms import TermInput, WeightedTerms
from spn4cir.types import Composed, ImageFeatures

TEMPERATURE_BOUNDS = (0.005, 0.5)
INITIAL_TEMPERATURE = 0.07
"""Where BLIP4CIR and SPRC start if the weights that they start from hold no temperature."""
PARTS = {"text": (0, 1), "reference": (1, 0)}
"""Which part of a sum is kept, and which is swapped, to form negatives by text or by reference."""


def initial_temperature(backbone: Backbone) -> float:
    """The temperature that ``temperature: null`` stands for: that of the starting weights, else the published one."""
    return INITIAL_TEMPERATURE if backbone.temperature is None else backbone.temperature


class Candidates(nn.Module, ABC):
    """What queries are scored against, where that is not the batch itself."""

    @abstractmethod
    def forward(self, batch: TripletBatch) -> tuple[Tensor | Shard, Tensor, Tensor | None]:
        """Candidates (N, K, E), positives (B, P) padded with -1, and pairs (2, M) to ignore, as ``info_nce`` takes."""


class ClassCentres(Candidates):
    """Learned centres (C, K, E) of classes, unit norm, the nearest of K counting; the query's class is its positive.

    Args:
        classes, vectors, width: C, K, E.
        process: rank of this process, and how many there are that hold a share of the classes each. Where there are
            several, the parameter is no copy of those of others.
    """

    def __init__(self, classes: int, vectors: int, width: int, process: tuple[int, int] = (0, 1)):
        super().__init__()
        rank, count = process
        share = -(-classes // count)
        self.first, self.is_shared = min(rank * share, classes), count > 1
        drawn = torch.randn(classes, vectors, width)[self.first : self.first + share]
        self.centres = nn.Parameter(drawn.clone() / width**0.5)
        if self.is_shared:
            self.centres.first_row = self.first  # type: ignore[attr-defined]  # for checkpoints, and for gradient norms

    def forward(self, batch: TripletBatch) -> tuple[Tensor | Shard, Tensor, Tensor | None]:
        """All centres, or this process's share, and each query's class."""
        assert batch.label is not None, "class centres need labels"
        held = l2_normalize(self.centres)
        return Shard(held, self.first) if self.is_shared else held, batch.label[:, None], None


class BankCandidates(Candidates):
    """Frozen targets of a bank, of several processes this one's share.

    Args:
        limit: number of candidates drawn for a step, beside the targets of its triplets; None for the whole bank.
        seed: of the draw, which depends on the step too, so it is the same on all processes, and after a resume.
    """

    def __init__(self, bank: Bank, limit: int | None = None, seed: int = 0):
        super().__init__()
        self.bank, self.limit, self.seed = bank, limit, seed

    def forward(self, batch: TripletBatch) -> tuple[Tensor | Shard, Tensor, Tensor | None]:
        """Rows of the bank; ignored are further targets of the same query."""
        held, positives = Shard(self.bank.target, self.bank.first), batch.target[:, : batch.positives]
        ignore = None if batch.others is None else row_pairs(batch.others, batch.others >= 0)
        if self.limit is not None:
            held, positives, ignore = self._drawn(positives, ignore, batch.step)
        return held if self.bank.shared else held.vectors, positives, ignore

    def _drawn(self, positives: Tensor, ignore: Tensor | None, step: int) -> tuple[Shard, Tensor, Tensor]:
        """Candidates drawn for a step, and the targets of its triplets, of which each query sees only its own.

        Source: the ablation of the number of negatives of Feng et al., 2024; there each query draws its own.
        """
        assert self.limit is not None
        chance, count = np.random.default_rng((self.seed, step)), min(self.limit, self.bank.total)
        drawn = torch.from_numpy(chance.choice(self.bank.total, count, replace=False)).sort().values
        drawn = drawn.to(positives.device)
        wanted = torch.unique(all_gather_rows(positives))  # (W,) of all processes
        wanted = wanted[wanted >= 0]
        rows = torch.unique(torch.cat([drawn, wanted]))  # (C,) in order
        here = (rows >= self.bank.first) & (rows < self.bank.first + len(self.bank.target))
        local = (rows[here] - self.bank.first).to(self.bank.target.device)
        shard = Shard(self.bank.target[local].to(positives.device), int((rows < self.bank.first).sum()))
        beside = torch.searchsorted(rows, wanted[~torch.isin(wanted, drawn)])  # places of what was not drawn
        owner = torch.arange(len(positives), device=positives.device).repeat_interleave(len(beside))
        hidden = torch.stack([owner, beside.repeat(len(positives))])
        if ignore is not None:
            kept = ignore[:, torch.isin(ignore[1], rows)]
            hidden = torch.cat([hidden, torch.stack([kept[0], torch.searchsorted(rows, kept[1])])], 1)
        return shard, torch.searchsorted(rows, positives).masked_fill(positives < 0, -1), hidden


class StoredTargets(Candidates):
    """Targets of the batches of all processes, from a bank: stage 1 where the image side does not train."""

    def __init__(self, bank: Bank):
        super().__init__()
        self.bank = bank

    def own(self, batch: TripletBatch) -> Tensor:
        """The targets (B · T, K, E) of this process."""
        rows = batch.target.clamp(min=0).flatten().to(self.bank.target.device)
        return to_float32(self.bank.target[rows].to(batch.target.device))

    def forward(self, batch: TripletBatch) -> tuple[Tensor | Shard, Tensor, Tensor | None]:
        """The targets (N, K, E) of all processes; ignored are the same pairs as in ``InBatch``."""
        contrast = self.contrast(batch)
        return all_gather_rows(self.own(batch)), contrast.own, contrast.ignored

    def contrast(self, batch: TripletBatch) -> InBatch:
        """Which targets of the batches are a query's own, and which are ignored."""
        return InBatch(batch.identity, 1.0, batch.others, positives=batch.positives)


class Objective(nn.Module):
    """Composed queries against candidates: the targets of the batch (stage 1), a bank (stage 2), or class centres.

    Args:
        backbone: with its image side frozen if the candidates are a bank.
        temperature: divisor of the scores; None for ``initial_temperature``.
        learn_temperature: whether it is trained, from that value on.
        candidates: a bank or class centres; None for the targets of the batch.
        types: which element of the triplet is replaced to form negatives, for candidates of the batch: ``target``,
            ``query``, ``text``, ``reference``; the loss is their mean.
        max_similarity: candidates more similar to a positive than this are masked as false negatives; None for none.
        margin: of a triplet loss in the place of InfoNCE, for targets of the batch; None for InfoNCE.

    Raises ``InputError`` if the temperature is out of bounds, or the backbone has no such negatives.
    """

    def __init__(
        self,
        backbone: Backbone,
        temperature: float | None,
        learn_temperature: bool = False,
        candidates: Candidates | None = None,
        types: Sequence[str] = ("target",),
        max_similarity: float | None = None,
        margin: TripletMargin | None = None,
    ):
        super().__init__()
        if isinstance(candidates, BankCandidates) and not backbone.is_frozen:
            raise ValueError("a bank needs a frozen image side: call freeze_image_side() first")
        temperature = initial_temperature(backbone) if temperature is None else temperature
        low, high = TEMPERATURE_BOUNDS
        if learn_temperature and not low <= temperature <= high:
            raise InputError(f"a learned temperature begins between {low} and {high}, got {temperature}")
        for kind in types:
            if kind in PARTS and not backbone.query_is_sum:
                raise InputError(f"negatives.types: {kind} needs a query that is a sum, and {backbone.name}'s is none")
        self.backbone, self.candidates, self.types = backbone, candidates, tuple(types)
        self.max_similarity, self.margin = max_similarity, margin
        self.temperature = nn.Parameter(torch.tensor(float(temperature)), requires_grad=learn_temperature)
        self.terms: WeightedTerms | None = None
        self._scored: Callable[[], tuple[Tensor | Shard, Tensor, Tensor | None]] | None = None  # by the last batch

    def add_terms(self, terms: WeightedTerms, steps: int, class_of: Tensor | None = None) -> None:
        """Add terms to the loss, between queries and their first targets.

        Args:
            terms: their weights and what they learn.
            steps: optimiser steps of the whole training.
            class_of: (N,) classes of images by their ``identity``, -1 for none; None without labels.
        """
        self.terms, self._steps = terms, steps
        self.register_buffer("_class_of", class_of, persistent=False)

    def progress(self, batch: TripletBatch) -> float:
        """The share of the training that is done, from 0 to 1."""
        return min(batch.step / max(self._steps, 1), 1.0)

    @property
    def needs_whole_triplets(self) -> bool:
        """Whether each triplet must have a reference, a text and one target: for further losses and types."""
        return self.types != ("target",) or type(self.backbone).extra_losses is not Backbone.extra_losses

    def forward(self, batch: TripletBatch) -> Tensor:
        """The loss of one batch, a scalar: the mean over this process's queries, against the candidates of all."""
        features = self._encode(batch)
        composed = self._compose(features, batch)
        if batch.has_reference is not None or batch.has_text is not None:
            # every parameter gets a gradient, as processes wait for those of each other, and the optimizer steps alike
            composed.query = composed.query + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        if self.candidates is None:
            return self._against_batch(composed, features, batch)
        vectors, positives, ignore = self.candidates(batch)
        self._scored = lambda: (vectors, positives, ignore)
        if self.margin is not None:
            assert isinstance(self.candidates, StoredTargets)
            contrast, target = self.candidates.contrast(batch), self.candidates.own(batch)
            return contrast.by_margin(composed.query, target, self.margin, batch.step)
        return info_nce(composed.query, vectors, positives, self.temperature, ignore, self.max_similarity)

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp a learned temperature to its bounds."""
        if self.temperature.requires_grad:
            self.temperature.clamp_(*TEMPERATURE_BOUNDS)

    def statistics(self) -> dict[str, float]:
        """Numbers for the log about the last batch: the temperature, and the share of candidates that were masked."""
        found = {"temperature": self.temperature.item()}
        if self._scored is not None:
            found["masked"] = masked_share(*self._scored(), self.max_similarity)
        return found | (self.terms.statistics() if self.terms is not None else {})

    def _encode(self, batch: TripletBatch) -> ImageFeatures | None:
        """Features of the batch's unique images (U, …) or of its references (B, …); None if it has no image."""
        if batch.features is not None:
            return ImageFeatures(*(to_float32(part) for part in batch.features))
        if batch.pixels is None:
            return None
        if not self.backbone.is_frozen:
            return gradient_cached(self.backbone.encode_image, self.backbone.chunk, batch.pixels)
        with torch.no_grad(), torch.autocast(batch.pixels.device.type, enabled=False):  # as the bank was made
            return self.backbone.encode_image(batch.pixels)

    def _compose(self, features: ImageFeatures | None, batch: TripletBatch) -> Composed:
        """Queries of the batch's references and texts, where it has them."""
        names, tokens = list(batch.tokens), list(batch.tokens.values())
        masks = [mask for mask in (batch.has_reference, batch.has_text) if mask is not None]

        def compose(rows: Tensor, *parts: Tensor) -> Composed:
            texts = dict(zip(names, parts, strict=False))
            if not masks:
                assert features is not None
                return self.backbone.compose(features.reference[rows], texts)
            own = features and ImageFeatures(*(part[rows] if len(part) else part for part in features))
            # the query alone, as chunks of whole triplets would have states and parts, and others none
            return Composed(self.backbone.compose_partial(own, texts, *parts[len(names) :]).query)

        return gradient_cached(compose, self.backbone.chunk, batch.reference, *tokens, *masks)

    def _against_batch(self, composed: Composed, features: ImageFeatures | None, batch: TripletBatch) -> Tensor:
        """Stage 1: candidates are the targets, and hard negatives, of all processes."""
        assert features is not None
        rows = batch.target.clamp(min=0).flatten()
        targets = ImageFeatures(features.reference[rows], features.target[rows])  # (B · T, …)
        contrast = InBatch(batch.identity, self.temperature, batch.others, self.max_similarity, batch.positives)
        if self.margin is not None:
            terms = [contrast.by_margin(composed.query, targets.target, self.margin, batch.step)]
        else:
            terms = [self._replacing(kind, composed, targets.target, contrast, batch) for kind in self.types]
        extra = self.backbone.extra_losses(composed, targets, contrast)
        if self.terms is not None:
            extra = {**extra, "terms": self.terms(self._as_pairs(composed.query, targets.target, batch))}
        target = targets.target.detach()
        self._scored = lambda: (all_gather_rows(target), contrast.own, contrast.ignored)
        return sum(extra.values(), torch.stack(terms).mean())

    def _as_pairs(self, query: Tensor, target: Tensor, batch: TripletBatch) -> TermInput:
        """Queries (B, E) and, of the K vectors of each one's first target (B · T, K, E), the nearest one."""
        first = target.view(len(query), -1, *target.shape[1:])[:, 0]  # (B, K, E)
        nearest = (first.detach() @ query.detach()[:, :, None])[:, :, 0].argmax(1)  # (B,)
        codes = query, first[torch.arange(len(query), device=query.device), nearest]
        class_of = self._class_of
        label = class_of[batch.identity[:, 0]] if isinstance(class_of, Tensor) else None
        return TermInput(codes, label, progress=self.progress(batch))

    @staticmethod
    def _replacing(kind: str, composed: Composed, target: Tensor, contrast: InBatch, batch: TripletBatch) -> Tensor:
        """The loss where the target, the query, or one of its parts is replaced to form negatives."""
        if kind == "target":
            return contrast(composed.query, target)
        if kind == "query":
            return contrast.by_query(composed.query, target)
        assert composed.parts is not None and batch.query_identity is not None
        kept, swapped = PARTS[kind]
        identity = batch.query_identity[:, kept], batch.query_identity[:, swapped]
        return contrast.by_part(composed.parts[kept], composed.parts[swapped], target[:, 0], identity)
