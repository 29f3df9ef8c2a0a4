"""Margins of the softmax over class centres: what becomes of the cosine of a query and its class, and of the others.

``MARGINS`` names them: a new one is a class here, one line in the dictionary and one test. Each has the scale s that
cosines are multiplied by, the inverse of a temperature. What changes while training is in buffers, saved and resumed.
"""

import math

import torch
from torch import Tensor, nn

from spn4cir.distributed import all_gather_rows
from spn4cir.errors import InputError
from spn4cir.losses import Shard, class_cosines, sums_of_others
from spn4cir.streaming import Transform

EDGE = 1e-7
"""Cosines are kept this far from -1 and 1, where the angle has no derivative."""
LEAST_SCALE = 1.0
"""Of AdaCos: with few classes its formula may give a scale below zero, which would turn the loss round."""


def _inside(cosine: Tensor) -> Tensor:
    return cosine.clamp(-1 + EDGE, 1 - EDGE)


def _arc(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """``cos(θ + m)`` where ``θ + m < π``, else the line ``c - m sin m`` that goes on below."""
    cosine, margin = _inside(cosine), torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device)
    added = cosine * margin.cos() - (1 - cosine * cosine).sqrt() * margin.sin()
    return torch.where(cosine > -margin.cos(), added, cosine - margin * margin.sin())


class ArcFace(nn.Module):
    """``cos(θ_y + m)``; with K centres for each class it is sub-centre ArcFace.

    Args:
        scale: s.
        margin: m, in radians.

    Source: Deng et al., "ArcFace", CVPR 2019; Deng et al., "Sub-center ArcFace", ECCV 2020.
    """

    scale: Tensor

    def __init__(self, scale: float = 30.0, margin: float = 0.5):
        super().__init__()
        if not (scale > 0 and 0 <= margin < math.pi):
            raise InputError(f"a margin softmax needs a scale above 0 and a margin from 0 to π, got {scale}, {margin}")
        self.margin = margin
        self.register_buffer("scale", torch.tensor(float(scale)))

    def observe(self, query: Tensor, norm: Tensor, centres: Tensor | Shard, label: Tensor) -> None:
        """Take note of a batch before its loss.

        Args:
            query: (B, E), unit norm.
            norm: (B,) norms of the embeddings before that.
            centres: (C, K, E), unit norm, or this process's share of them.
            label: (B,) rows of the centres.
        """
        self._label, self._norm = label, norm.detach()

    def positive(self, cosine: Tensor, query: Tensor) -> Tensor:
        """Of the cosines (T,) of these queries and their classes."""
        return _arc(cosine, self.margin)

    def others(self, positive: Tensor) -> Transform | None:
        """Of all other cosines, given those of the queries' classes (B,); None if they stay as they are."""
        return None


class CosFace(ArcFace):
    """``cos θ_y - m``. Source: Wang et al., "CosFace", CVPR 2018."""

    def __init__(self, scale: float = 30.0, margin: float = 0.35):
        super().__init__(scale, margin)

    def positive(self, cosine: Tensor, query: Tensor) -> Tensor:
        """As in ``ArcFace``."""
        return cosine - self.margin


class DynamicArcFace(ArcFace):
    """ArcFace with a margin for each class, the larger the fewer images it has.

    ``m_c = low + (high - low) (1 + cos(π ñ_c)) / 2`` with ``ñ_c = (n_c - n_min) / (n_max - n_min)``.

    Args:
        counts: number of images of each class.

    Source: Kaggle's dynamic margins (Ha et al., 2020), as in the published UniFEx code.
    """

    margins: Tensor

    def __init__(self, counts: list[int], scale: float = 30.0, low: float = 0.2, high: float = 0.5):
        super().__init__(scale, high)
        n = torch.tensor(counts, dtype=torch.float64)
        share = (n - n.min()) / (n.max() - n.min()).clamp(min=1)
        self.register_buffer("margins", (low + (high - low) * (1 + (math.pi * share).cos()) / 2).float())

    def positive(self, cosine: Tensor, query: Tensor) -> Tensor:
        """As in ``ArcFace``."""
        return _arc(cosine, self.margins[self._label[query]])


class LiArcFace(ArcFace):
    """``(π - 2 (θ_y + m)) / π``, and ``(π - 2 θ_j) / π`` of the others: linear in the angle.

    Source: Li et al., "AirFace", ICCV workshops 2019.
    """

    def positive(self, cosine: Tensor, query: Tensor) -> Tensor:
        """As in ``ArcFace``."""
        return 1 - 2 * (_inside(cosine).acos() + self.margin) / math.pi

    def others(self, positive: Tensor) -> Transform | None:
        """The same without the margin."""

        def linear(cosine: Tensor) -> tuple[Tensor, Tensor]:
            inside = _inside(cosine)
            return 1 - 2 * inside.acos() / math.pi, 2 / math.pi * (1 - inside * inside).rsqrt()

        return linear


class AdaCos(ArcFace):
    """No margin, and a scale that follows the batch: ``s ← log B / cos(min(π/4, θ_med))``.

    B is the mean over queries of ``Σ_{j≠y} exp(s c_j)`` at the scale so far, which begins at ``√2 log(C - 1)``; θ_med
    is the median angle of queries and their classes. Unlike theirs, s stays above ``LEAST_SCALE``.

    Args:
        classes: C, at least three.

    Source: Zhang et al., "AdaCos", CVPR 2019.
    """

    def __init__(self, classes: int):
        if classes < 3:
            raise InputError(f"AdaCos needs at least 3 classes, got {classes}")
        super().__init__(math.sqrt(2) * math.log(classes - 1), 0.0)

    @torch.no_grad()
    def observe(self, query: Tensor, norm: Tensor, centres: Tensor | Shard, label: Tensor) -> None:
        """Set the scale by the batches of all processes."""
        super().observe(query, norm, centres, label)
        query, centres = query.detach(), centres.detach()
        sums = sums_of_others(query * self.scale, centres, label)
        angles = _inside(class_cosines(query, centres, label)).acos()
        mean = sums.logsumexp(0) - math.log(len(sums))  # log B
        scale = mean / angles.median().clamp(max=math.pi / 4).cos()
        self.scale.copy_(scale.clamp(min=LEAST_SCALE))

    def positive(self, cosine: Tensor, query: Tensor) -> Tensor:
        """The cosine itself."""
        return cosine + 0


class CurricularFace(ArcFace):
    """ArcFace, and others that are harder than the positive with its margin count ``c_j (t + c_j)``.

    ``t ← 0.99 t + 0.01 · mean(c_y)`` before each use, from 0 on.

    Source: Huang et al., "CurricularFace", CVPR 2020.
    """

    hardness: Tensor

    def __init__(self, scale: float = 30.0, margin: float = 0.5):
        super().__init__(scale, margin)
        self.register_buffer("hardness", torch.tensor(0.0))

    @torch.no_grad()
    def observe(self, query: Tensor, norm: Tensor, centres: Tensor | Shard, label: Tensor) -> None:
        """Let t follow the batches of all processes."""
        super().observe(query, norm, centres, label)
        own = class_cosines(query.detach(), centres.detach(), label)
        self.hardness.copy_(0.99 * self.hardness + 0.01 * own.mean())

    def others(self, positive: Tensor) -> Transform | None:
        """Harder ones by t."""
        bound, t = (_inside(positive).acos() + self.margin).cos()[:, None], self.hardness.clone()

        def curricular(cosine: Tensor) -> tuple[Tensor, Tensor]:
            hard = cosine > bound
            return torch.where(hard, cosine * (t + cosine), cosine), torch.where(hard, t + 2 * cosine, 1.0)

        return curricular


class AdaFace(ArcFace):
    """A margin by the norm of the embedding: an angle for small norms, a cosine for large ones.

    ``cos(clip(θ_y - m ẑ, ε, π - ε)) - (m + m ẑ)`` with ``ẑ = clip(h (z - μ) / (σ + 0.001), -1, 1)``; z is the norm,
    clipped to [0.001, 100]; μ and σ are those of the batch, averaged with a weight α of the new one.

    Source: Kim et al., "AdaFace", CVPR 2022.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, scale: float = 30.0, margin: float = 0.4, h: float = 0.333, alpha: float = 1.0):
        super().__init__(scale, margin)
        self.h, self.alpha = h, alpha
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("deviation", torch.tensor(100.0))

    @torch.no_grad()
    def observe(self, query: Tensor, norm: Tensor, centres: Tensor | Shard, label: Tensor) -> None:
        """Set mean and deviation by the batches of all processes."""
        super().observe(query, norm.clamp(1e-3, 100), centres, label)
        norms = all_gather_rows(self._norm)
        spread = norms.std() if len(norms) > 1 else self.deviation  # one image has none
        for state, new in ((self.mean, norms.mean()), (self.deviation, spread)):
            state.copy_(self.alpha * new + (1 - self.alpha) * state)

    def positive(self, cosine: Tensor, query: Tensor) -> Tensor:
        """As in ``ArcFace``."""
        z = (self.h * (self._norm[query] - self.mean) / (self.deviation + 1e-3)).clamp(-1, 1).to(cosine)
        angle = (_inside(cosine).acos() - self.margin * z).clamp(1e-3, math.pi - 1e-3)
        return angle.cos() - self.margin * (1 + z)


MARGINS: dict[str, type[ArcFace]] = {
    "arcface": ArcFace, "cosface": CosFace, "dynamic": DynamicArcFace, "li-arcface": LiArcFace, "adacos": AdaCos,
    "curricularface": CurricularFace, "adaface": AdaFace,
}  # fmt: skip
