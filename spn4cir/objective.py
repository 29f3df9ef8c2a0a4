"""The one module given to accelerate: ``forward`` returns the loss, so that gradients of all processes are reduced."""

import torch
from torch import Tensor, nn

from spn4cir.backbone import Backbone
from spn4cir.bank import Bank
from spn4cir.errors import InputError
from spn4cir.images import TripletBatch
from spn4cir.losses import InBatch, info_nce
from spn4cir.types import ImageFeatures

TEMPERATURE_BOUNDS = (0.005, 0.5)


class Objective(nn.Module):
    """Composed queries against candidates: those of the batch (stage 1), or a bank (stage 2).

    Args:
        backbone: with its image side frozen if a bank is given.
        temperature: what scores are divided by.
        learn_temperature: train it from there on.
        bank: frozen features of all candidates; None for stage 1.
    """

    def __init__(
        self, backbone: Backbone, temperature: float, learn_temperature: bool = False, bank: Bank | None = None
    ):
        super().__init__()
        if bank is not None and not backbone.frozen:
            raise ValueError("a bank needs a frozen image side")
        low, high = TEMPERATURE_BOUNDS
        if learn_temperature and not low <= temperature <= high:
            raise InputError(f"a learned temperature begins between {low} and {high}, got {temperature}")
        self.backbone, self.bank = backbone, bank
        self.temperature = nn.Parameter(torch.tensor(float(temperature)), requires_grad=learn_temperature)

    def forward(self, batch: TripletBatch) -> Tensor:
        """The loss of one batch, a scalar: the mean over this process's queries, against the candidates of all."""
        return self._against_batch(batch) if self.bank is None else self._against_bank(batch)

    @torch.no_grad()
    def hold_temperature(self) -> None:
        """Bring a learned temperature back within its bounds, after a step."""
        if self.temperature.requires_grad:
            self.temperature.clamp_(*TEMPERATURE_BOUNDS)

    def _against_batch(self, batch: TripletBatch) -> Tensor:
        """Stage 1: encode the batch's images; candidates are the targets of all processes."""
        assert batch.pixels is not None, "stage 1 needs pixels"
        features = self.backbone.encode_image(batch.pixels)  # (U, …)
        targets = ImageFeatures(features.reference[batch.target], features.target[batch.target])
        composed = self.backbone.compose(features.reference[batch.reference], batch.tokens)
        contrast = InBatch(batch.identity, self.temperature)
        terms = self.backbone.extra_losses(composed, targets, contrast)
        return sum(terms.values(), contrast(composed.query, targets.target))

    def _against_bank(self, batch: TripletBatch) -> Tensor:
        """Stage 2: candidates are all rows of the bank, whose reference features were gathered with the batch."""
        assert self.bank is not None
        if batch.features is not None:
            reference = batch.features.float()
        else:
            assert batch.pixels is not None, "without a bank of references, stage 2 needs pixels"
            with torch.no_grad(), torch.autocast(batch.pixels.device.type, enabled=False):  # as the bank was made
                reference = self.backbone.encode_image(batch.pixels).reference[batch.reference]
        query = self.backbone.compose(reference, batch.tokens).query
        return info_nce(query, self.bank.target, batch.target, self.temperature)
