"""Loss terms over the codes of two sides, such as images and texts: the objective is their weighted sum.

A new term is one class here, or elsewhere, one line in ``TERMS`` and one test.

Source of all four: Xu et al., "Modal-adversarial semantic learning network for extendable cross-modal retrieval", ICMR
2018. Its sums over examples are means here, so a weight does not depend on the batch size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.errors import InputError

DISCRIMINATOR, DECODER = 64, 256  # hidden units
RAMP = 10.0


@dataclass
class TermSizes:
    """What terms are built for.

    Args:
        code: k, the length of a code.
        inputs: (D_a, D_b), lengths of the inputs to reconstruct; None without.
        class_vectors: (C, D_c), an embedding of each class; None without.
        classes: C; 0 without labels.
    """

    code: int
    inputs: tuple[int, int] | None = None
    class_vectors: Tensor | None = None
    classes: int = 0


@dataclass
class TermInput:
    """One batch.

    Args:
        codes: (B, k) of the first side, and (B, k) of the second; row i of both belongs together.
        label: (B,) classes; -1 where an example has none; None without labels.
        inputs: (B, D_a) and (B, D_b), what the codes were made of; None without.
        progress: share of the training that is done, from 0 to 1.
    """

    codes: tuple[Tensor, Tensor]
    label: Tensor | None = None
    inputs: tuple[Tensor, Tensor] | None = None
    progress: float = 1.0


class Term(nn.Module, ABC):
    """A scalar loss of a ``TermInput``.

    Attributes:
        needs_label, needs_inputs: what it reads beside the codes.
    """

    needs_label = False
    needs_inputs = False

    def __init__(self, sizes: TermSizes):
        super().__init__()

    @abstractmethod
    def forward(self, batch: TermInput) -> Tensor:
        """The loss, a scalar: the mean over the batch."""


class Correlation(Term):
    """``mean_i ‖a_i − b_i‖²`` for the codes a, b of both sides."""

    def forward(self, batch: TermInput) -> Tensor:
        """Codes (B, k) → scalar."""
        first, second = batch.codes
        return (first - second).square().sum(1).mean()


class Reconstruction(Term):
    """Both inputs from both codes, given the class: ``mean_i Σ_{s,t} ‖x_t − g_t([c_s; e(y)])‖²``, four terms.

    s and t are sides, x_t the input of side t, g_t its decoder, c_s the code of side s, and e(y) the embedding of the
    class, which is concatenated to the code.
    """

    needs_label = True
    needs_inputs = True

    def __init__(self, sizes: TermSizes):
        super().__init__(sizes)
        if sizes.inputs is None or sizes.class_vectors is None:
            raise InputError("terms.reconstruction needs inputs and embeddings of classes: stage crossmodal has both")
        self.register_buffer("class_vectors", sizes.class_vectors.detach().clone())
        width = sizes.code + sizes.class_vectors.shape[1]
        self.decoders = nn.ModuleList(
            nn.Sequential(nn.Linear(width, DECODER), nn.ReLU(), nn.Linear(DECODER, size)) for size in sizes.inputs
        )

    def forward(self, batch: TermInput) -> Tensor:
        """Codes (B, k), inputs (B, D_a) and (B, D_b), labels (B,) → scalar."""
        assert batch.inputs is not None and batch.label is not None
        class_vectors: Any = self.class_vectors
        losses = []
        for code in batch.codes:
            conditioned = torch.cat([code, class_vectors[batch.label]], 1)  # (B, k + D_c)
            for decoder, given in zip(self.decoders, batch.inputs, strict=True):
                losses.append((given - decoder(conditioned)).square().sum(1).mean())
        return torch.stack(losses).sum()


class Adversary(Term):
    """Cross-entropy of a discriminator that tells the sides apart by a code, whose gradient reaches codes reversed.

    The discriminator minimises it, and the encoders maximise it, at a factor that ramps from 0 to 1 in the training.
    """

    def __init__(self, sizes: TermSizes):
        super().__init__(sizes)
        self.discriminator = nn.Sequential(nn.Linear(sizes.code, DISCRIMINATOR), nn.ReLU(), nn.Linear(DISCRIMINATOR, 1))

    def forward(self, batch: TermInput) -> Tensor:
        """Codes (B, k) → scalar, the mean over 2 B codes."""
        codes = torch.cat(batch.codes)  # (2B, k)
        logits = self.discriminator(reverse_gradient(codes, reversal_ramp(batch.progress)))[:, 0]
        first, second = batch.codes
        is_second = torch.cat([logits.new_zeros(len(first)), logits.new_ones(len(second))])
        return F.binary_cross_entropy_with_logits(logits, is_second)


class Classification(Term):
    """Cross-entropy of the class by one linear layer, which codes of both sides share."""

    needs_label = True

    def __init__(self, sizes: TermSizes):
        super().__init__(sizes)
        if sizes.classes < 2:
            raise InputError(f"terms.classification needs at least two classes, and the data has {sizes.classes}")
        self.head = nn.Linear(sizes.code, sizes.classes)

    def forward(self, batch: TermInput) -> Tensor:
        """Codes (B, k), labels (B,) → scalar, the mean over the codes that have a label; 0 if none has one."""
        assert batch.label is not None
        label = torch.cat([batch.label, batch.label])
        logits = self.head(torch.cat(batch.codes))  # (2B, C)
        return F.cross_entropy(logits, label, ignore_index=-1, reduction="sum") / max(int((label >= 0).sum()), 1)


TERMS: dict[str, type[Term]] = {
    "correlation": Correlation,
    "reconstruction": Reconstruction,
    "adversary": Adversary,
    "classification": Classification,
}


def reversal_ramp(progress: float) -> float:
    """``2 / (1 + e^{−10 p}) − 1`` for the share p of the training that is done.

    Source: Ganin and Lempitsky, "Unsupervised domain adaptation by backpropagation", ICML 2015.
    """
    return 2 / (1 + math.exp(-RAMP * progress)) - 1


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


def reverse_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient is multiplied by ``-factor``."""
    found: Tensor = _Reversal.apply(x, factor)
    return found


def check_terms(weights: Mapping[str, float], allowed: Collection[str] = tuple(TERMS), stage: str = "") -> None:
    """Raises ``InputError`` for a term that is unknown or that a stage does not have, and for a weight below 0."""
    for name, weight in weights.items():
        if name not in TERMS:
            raise InputError(f"terms has no {name!r}; known: {', '.join(TERMS)}")
        if name not in allowed:
            raise InputError(f"terms.{name} is not for stage {stage}, which has {', '.join(allowed) or 'none'}")
        if not 0 <= weight < math.inf:
            raise InputError(f"terms.{name} is a weight of 0 or more, got {weight}")


class WeightedTerms(nn.Module):
    """Terms by name, each with its weight; those of weight 0 are left out.

    Raises ``InputError`` for an unknown name, a weight below 0, or a term that needs what the data lacks.
    """

    def __init__(self, weights: Mapping[str, float], sizes: TermSizes):
        super().__init__()
        check_terms(weights)
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.terms = nn.ModuleDict({name: TERMS[name](sizes) for name in self.weights})
        self.last: dict[str, Tensor] = {}

    def forward(self, batch: TermInput) -> Tensor:
        """``Σ weight · term``, a scalar."""
        values = {name: term(batch) for name, term in self.terms.items()}
        self.last = {name: value.detach() for name, value in values.items()}
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum()

    def statistics(self) -> dict[str, float]:
        """The value of each term in the last batch, without its weight."""
        return {f"terms/{name}": value.item() for name, value in self.last.items()}
