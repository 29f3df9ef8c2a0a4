"""Images against learned centres of their classes, with a margin: the objective of stage ``classes``."""

from typing import Any

import torch
from torch import Tensor

from spn4cir.backbone import l2_normalize
from spn4cir.backbones.embedding import Embedding
from spn4cir.batches import TripletBatch
from spn4cir.errors import InputError
from spn4cir.losses import info_nce
from spn4cir.margins import MARGINS, ArcFace
from spn4cir.objective import ClassCentres, Objective

SET_BY_US = {"scale", "classes", "counts"}
"""Arguments of margins that the data or the temperature decide."""


def find_margin(name: str) -> type[ArcFace]:
    """The class of a margin. Raises ``InputError`` for an unknown name."""
    if name not in MARGINS:
        raise InputError(f"classes.margin cannot be {name!r}; known: {', '.join(MARGINS)}")
    return MARGINS[name]


def build_margin(name: str, options: dict[str, Any], temperature: float, counts: list[int]) -> ArcFace:
    """A margin of ``MARGINS`` for classes of so many images each, with the scale 1 / temperature.

    Raises ``InputError`` for an unknown name or option.
    """
    kind: Any = find_margin(name)
    names = kind.__init__.__code__.co_varnames[1 : kind.__init__.__code__.co_argcount]
    free = [option for option in names if option not in SET_BY_US]
    if unknown := [option for option in options if option not in free]:
        known = ", ".join(free) or "none"
        raise InputError(f"classes.options: {name} has no option {unknown[0]!r}; known: {known}")
    own = {"scale": 1 / temperature, "classes": len(counts), "counts": counts}
    try:
        found: ArcFace = kind(**{option: own[option] for option in names if option in own}, **options)
    except TypeError as error:
        raise InputError(f"classes.options: {error}") from None
    return found


class ClassObjective(Objective):
    """``info_nce`` of image queries against class centres (C, K, E) with an angular margin on the query's own class.

    Args:
        margin: its scale is the inverse of the temperature, which follows it.
        centres: of all classes, or this process's share.

    Source: Deng et al., "ArcFace", CVPR 2019; "UniFEx", GCPR 2024.
    """

    def __init__(self, backbone: Embedding, margin: ArcFace, centres: ClassCentres):
        super().__init__(backbone, 1 / margin.scale.item(), candidates=centres)
        self.head = margin
        if centres.is_shared:  # torch's DistributedDataParallel would make copies of them
            self._ddp_params_and_buffers_to_ignore = ["candidates.centres"]

    def forward(self, batch: TripletBatch) -> Tensor:
        """The loss of one batch, a scalar: the mean over its images."""
        features = self._encode(batch)
        assert features is not None and batch.label is not None and self.candidates is not None
        assert isinstance(self.backbone, Embedding)
        embedding = self.backbone.project(features.reference[batch.reference])  # (B, E)
        query = l2_normalize(embedding)
        centres, positives, _ = self.candidates(batch)
        self.head.observe(query, embedding.norm(dim=1), centres, batch.label)
        with torch.no_grad():
            self.temperature.copy_(1 / self.head.scale)
        return info_nce(query, centres, positives, self.temperature.detach(), margin=self.head)
