"""The one module given to accelerate: ``forward`` returns the loss, so that gradients of all processes are reduced."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spn4cir.backbone import Backbone
from spn4cir.bank import Bank
from spn4cir.images import TripletBatch
from spn4cir.losses import info_nce
from spn4cir.types import ImageFeatures

TEMPERATURE_BOUNDS = (0.005, 0.5)


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
        self.backbone, self.bank = backbone, bank
        self.temperature = nn.Parameter(torch.tensor(float(temperature)), requires_grad=learn_temperature)

    def forward(self, batch: TripletBatch) -> Tensor:
        """The loss of one batch, a scalar: the mean over this process's queries, against the candidates of all."""
        reference, targets, candidates, positives, ignore = (
            self._from_batch(batch) if self.bank is None else self._from_bank(self.bank, batch)
        )
        composed = self.backbone.compose(reference, batch.tokens)
        temperature: Tensor = self.temperature
        if temperature.requires_grad:
            temperature = temperature.clamp(*TEMPERATURE_BOUNDS)
        loss = info_nce(composed.query, candidates, positives, temperature, ignore)
        extra = None if targets is None else self.backbone.extra_loss(composed, targets)
        return loss if extra is None else loss + extra

    def _from_batch(self, batch: TripletBatch) -> tuple[Tensor, ImageFeatures | None, Tensor, Tensor, Tensor | None]:
        """Stage 1: encode the batch's images; candidates are the targets of all processes."""
        assert batch.pixels is not None, "stage 1 needs pixels"
        features = self.backbone.encode_image(batch.pixels)  # (U, …)
        targets = ImageFeatures(features.reference[batch.target], features.target[batch.target])
        candidates = gather(targets.target)  # (N, K, E)
        identity = gather(batch.identity)  # (N,)
        rank = dist.get_rank() if len(candidates) > len(batch.target) else 0
        positives = torch.arange(len(batch.target), device=candidates.device) + rank * len(batch.target)
        same = batch.identity[:, None] == identity  # (B, N) duplicates of a query's own target
        return features.reference[batch.reference], targets, candidates, positives, same.nonzero().T

    def _from_bank(self, bank: Bank, batch: TripletBatch) -> tuple[Tensor, None, Tensor, Tensor, None]:
        """Stage 2: everything about images is a row of the bank; all rows are candidates."""
        reference = bank.reference[batch.reference].float()
        return reference, None, bank.target, batch.target, None
