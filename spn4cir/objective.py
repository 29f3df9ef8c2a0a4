"""The one module given to accelerate: ``forward`` returns the loss, so that gradients of all processes are reduced."""

import numpy as np
import torch
from torch import Tensor, nn

from spn4cir.backbone import Backbone, gradient_cached, to_float32
from spn4cir.bank import Bank
from spn4cir.config import NegativesConfig
from spn4cir.distributed import all_gather_rows
from spn4cir.errors import InputError
from spn4cir.images import TripletBatch
from spn4cir.losses import InBatch, Shard, info_nce
from spn4cir.types import Composed, ImageFeatures

TEMPERATURE_BOUNDS = (0.005, 0.5)
PARTS = {"text": (0, 1), "reference": (1, 0)}
"""Which part of a sum is kept, and which is swapped, where others take the place of a text or of a reference."""


class Objective(nn.Module):
    """Composed queries against candidates: those of the batch (stage 1), or a bank (stage 2).

    Args:
        backbone: with its image side frozen if a bank is given.
        temperature: what scores are divided by.
        learn_temperature: train it from there on.
        bank: frozen features of all candidates, of several processes this one's share; None for stage 1.
        negatives: what counts as a negative.
        draw: ``(limit, seed)``: how many candidates of the bank are drawn for a step; None for all of them.

    Raises:
        InputError: if the temperature is out of bounds, or the backbone has no such negatives.
    """

    def __init__(
        self,
        backbone: Backbone,
        temperature: float,
        learn_temperature: bool = False,
        bank: Bank | None = None,
        negatives: NegativesConfig | None = None,
        draw: tuple[int, int] | None = None,
    ):
        super().__init__()
        if bank is not None and not backbone.frozen:
            raise ValueError("a bank needs a frozen image side")
        low, high = TEMPERATURE_BOUNDS
        if learn_temperature and not low <= temperature <= high:
            raise InputError(f"a learned temperature begins between {low} and {high}, got {temperature}")
        self.negatives = negatives or NegativesConfig()
        for kind in self.negatives.types:
            if kind in PARTS and not backbone.query_is_sum:
                raise InputError(f"negatives.types: {kind} needs a query that is a sum, and {backbone.name}'s is none")
        self.backbone, self.bank, self.draw = backbone, bank, draw
        self.temperature = nn.Parameter(torch.tensor(float(temperature)), requires_grad=learn_temperature)

    def forward(self, batch: TripletBatch, step: int = 0) -> Tensor:
        """The loss of one batch, a scalar: the mean over this process's queries, against the candidates of all.

        Args:
            batch: of this process.
            step: of the run; what is drawn depends on it.
        """
        return self._against_batch(batch) if self.bank is None else self._against_bank(batch, step)

    @torch.no_grad()
    def hold_temperature(self) -> None:
        """Bring a learned temperature back within its bounds, after a step."""
        if self.temperature.requires_grad:
            self.temperature.clamp_(*TEMPERATURE_BOUNDS)

    def _against_batch(self, batch: TripletBatch) -> Tensor:
        """Stage 1: encode the batch's images; candidates are the targets of all processes."""
        assert batch.pixels is not None, "stage 1 needs pixels"
        features = gradient_cached(self.backbone.encode_image, self.backbone.chunk, batch.pixels)  # (U, …)
        targets = ImageFeatures(features.reference[batch.target], features.target[batch.target])
        composed = self._compose(features.reference, batch.reference, batch)
        contrast = InBatch(batch.identity, self.temperature, batch.others, self.negatives.max_similarity)
        found = [self._replacing(kind, composed, targets.target, contrast, batch) for kind in self.negatives.types]
        terms = self.backbone.extra_losses(composed, targets, contrast)
        return sum(terms.values(), torch.stack(found).mean())

    def _compose(self, reference: Tensor, rows: Tensor, batch: TripletBatch) -> Composed:
        """Queries of references (U, L, D), of which each has a row (B,), and the batch's texts."""
        names, tokens = list(batch.tokens), list(batch.tokens.values())

        def compose(rows: Tensor, *tokens: Tensor) -> Composed:
            return self.backbone.compose(reference[rows], dict(zip(names, tokens, strict=True)))

        composed: Composed = gradient_cached(compose, self.backbone.chunk, rows, *tokens)
        return composed

    @staticmethod
    def _replacing(kind: str, composed: Composed, target: Tensor, contrast: InBatch, batch: TripletBatch) -> Tensor:
        """The loss where others take the place of the target, the query, or one of its parts."""
        if kind == "target":
            return contrast(composed.query, target)
        if kind == "query":
            return contrast.by_query(composed.query, target)
        assert composed.parts is not None and batch.asked is not None
        kept, swapped = PARTS[kind]
        asked = batch.asked[:, kept], batch.asked[:, swapped]
        return contrast.by_part(composed.parts[kept], composed.parts[swapped], target[:, 0], asked)

    def _against_bank(self, batch: TripletBatch, step: int) -> Tensor:
        """Stage 2: candidates are all rows of the bank, whose reference features were gathered with the batch."""
        assert self.bank is not None
        if batch.features is not None:
            reference, rows = to_float32(batch.features), torch.arange(len(batch.target), device=batch.target.device)
        else:
            assert batch.pixels is not None, "without a bank of references, stage 2 needs pixels"
            with torch.no_grad(), torch.autocast(batch.pixels.device.type, enabled=False):  # as the bank was made
                reference, rows = self.backbone.encode_image(batch.pixels).reference, batch.reference
        query = self._compose(reference, rows, batch).query
        held, positives, ignore = Shard(self.bank.target, self.bank.first), batch.target, _pairs(batch.others)
        if self.draw:
            held, positives, ignore = self._drawn(positives, ignore, step)
        candidates = held if self.bank.shared else held.vectors
        return info_nce(query, candidates, positives, self.temperature, ignore, self.negatives.max_similarity)

    def _drawn(self, positives: Tensor, ignore: Tensor | None, step: int) -> tuple[Shard, Tensor, Tensor]:
        """Candidates drawn for a step, beside the targets of its triplets, of which each query sees its own alone.

        The draw depends on seed and step, so it is the same on all processes, and after a resume.

        Source: the ablation of the number of negatives of Feng et al., 2024; there each query draws its own.
        """
        assert self.bank is not None and self.draw is not None
        limit, seed = self.draw
        chance = np.random.default_rng((seed, step))
        drawn = torch.from_numpy(chance.choice(self.bank.total, min(limit, self.bank.total), replace=False))
        drawn = drawn.sort().values.to(positives.device)
        wanted = torch.unique(all_gather_rows(positives))  # (W,) of all processes
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
        return shard, torch.searchsorted(rows, positives), hidden


def _pairs(others: Tensor | None) -> Tensor | None:
    """(B, A) rows padded with -1 → (2, M) pairs of query and row."""
    if others is None:
        return None
    owner, slot = (others >= 0).nonzero(as_tuple=True)
    return torch.stack([owner, others[owner, slot]])
