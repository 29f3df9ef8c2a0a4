"""Weighted terms over the codes of images and of their texts: the objective of stage ``crossmodal``."""

from torch import Tensor

from spn4cir.backbones.masln import MASLN
from spn4cir.batches import TripletBatch
from spn4cir.objective import Objective
from spn4cir.terms import TermInput, WeightedTerms


class PairObjective(Objective):
    """``Σ weight · term`` over codes (B, k) of images and of texts, which are not normalised here.

    Args:
        terms: with what they need already built in.
        steps: optimiser steps of the whole training, which ramps count.

    Source: Xu et al., "Modal-adversarial semantic learning network for extendable cross-modal retrieval", ICMR 2018.
    """

    def __init__(self, backbone: MASLN, terms: WeightedTerms, steps: int):
        super().__init__(backbone, temperature=1.0)
        self.add_terms(terms, steps)

    def forward(self, batch: TripletBatch) -> Tensor:
        """The loss of one batch, a scalar: the mean over its pairs."""
        features, backbone = self._encode(batch), self.backbone
        assert features is not None and isinstance(backbone, MASLN) and self.terms is not None
        reference = features.reference[batch.reference]  # (B, 1, D_v)
        text = backbone.read_text(batch.tokens)  # (B, D_t)
        codes = backbone.project(reference), backbone.text_encoder(text)
        loss: Tensor = self.terms(TermInput(codes, batch.label, (reference[:, 0], text), self.progress(batch)))
        return loss

    def statistics(self) -> dict[str, float]:
        """The value of each term in the last batch."""
        assert self.terms is not None
        return self.terms.statistics()
