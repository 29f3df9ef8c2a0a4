"""What a backbone is: two methods to write, two derived, and a promise about its image side."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.errors import InputError
from spn4cir.in_batch import InBatch
from spn4cir.text_tokenizer import PortableTokenizer
from spn4cir.types import Composed, ImageFeatures, Tokens


def to_float32(x: Tensor) -> Tensor:
    """In float32 or wider, whatever mixed precision made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_normalize(x: Tensor) -> Tensor:
    """Unit norm along the last dimension, in float32 or wider."""
    return F.normalize(to_float32(x), dim=-1)


class Backbone(nn.Module, ABC):
    """A composed retrieval model. Shapes: see ``spn4cir.types``.

    A subclass sets ``name``, ``options`` (what rebuilds it), ``transform`` (RGB image → (3, H, W)) and ``tokenize``
    (B texts → tokens), and writes ``encode_image``, ``compose`` and ``image_side``.
    """

    name: ClassVar[str]
    options: dict[str, Any]
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str]], Tokens]
    temperature: float | None = None
    """The temperature that its weights were trained with, as far as their checkpoint says."""
    fixed_options: ClassVar[frozenset[str]] = frozenset()
    """Options, or settings of one such as ``style.names``, that a checkpoint of it decides."""
    reads_texts: ClassVar[bool] = True
    """Whether a query may have a text."""
    chunk: int | None = None
    """Images, and texts, in one pass of a training step; None for all."""

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, L, D) and target (B, K, E), the latter of unit norm."""

    @abstractmethod
    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """Reference features (B, L, D) and modification texts → queries (B, E) of unit norm."""

    @abstractmethod
    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """Everything that ``encode_image`` reads."""

    @property
    def query_is_sum(self) -> bool:
        """Whether ``compose`` gives the ``parts`` whose sum the query is."""
        return False

    def frozen_beside(self) -> list[nn.Module | nn.Parameter]:
        """What ``freeze_image_side`` freezes beside the image side: what only stage 1 trains."""
        return []

    def untie_text_side(self) -> None:
        """Give ``compose`` a copy of its own of whatever it shares with ``encode_image`` and goes on training.

        Called before the image side is frozen; a second call changes nothing. ``options`` record it, for checkpoints.
        """

    def extra_losses(self, composed: Composed, targets: ImageFeatures, contrast: InBatch) -> dict[str, Tensor]:
        """Further terms of a published model's stage 1, each a weighted scalar under its name; they are summed.

        Args:
            composed: what ``compose`` made of this process's batch.
            targets: features of the batch's target images, (B, …).
            contrast: ``contrast(query, target)`` is the main term's loss of queries (B, E) against targets (B, K, E).
        """
        return {}

    @property
    def statistics_sample(self) -> int:
        """Number of training images that ``fit_statistics`` wants before the first step; 0 if it wants none."""
        return 0

    def fit_statistics(self, references: Tensor, labels: Sequence[str | None], targets: Tensor) -> None:
        """Fit what is computed from training images rather than trained; called where ``statistics_sample`` is not 0.

        Args:
            references: (N, 3, H, W) reference images of training triplets, on the CPU.
            labels: of their triplets.
            targets: (M, 3, H, W) target images, on the CPU.
        """

    def describe_reference(self, reference: Tensor) -> Mapping[str, Tensor]:
        """What the model sees in reference features (B, L, D), for people to read: {name: (B,)}."""
        return {}

    def save_assets(self, folder: Path) -> None:
        """Write into a checkpoint's folder what the constructor needs beside weights and ``options``.

        A subfolder ``tokenizer`` is given back as the option of that name.
        """

    def portable_tokenizer(self) -> PortableTokenizer:
        """``tokenize`` for programs without this package, for exports. Raises ``InputError`` where there is none."""
        raise InputError(f"backbone {self.name} has no portable_tokenizer: its texts cannot be read outside Python")

    def encode_text_target(self, tokens: Tokens) -> Tensor:
        """B texts as gallery items → (B, K, E), unit norm. Raises ``InputError`` where texts are no targets."""
        raise InputError(f"backbone {self.name} cannot embed texts as targets: its gallery holds images")

    def compose_image(self, features: ImageFeatures) -> Tensor:
        """Reference images without any text → queries (B, E) of unit norm; by default the mean target vector."""
        return l2_normalize(features.target.mean(1))

    def compose_text(self, tokens: Tokens) -> Composed:
        """Texts without any reference → queries (B, E) of unit norm; by default zeros stand for the reference."""
        count = len(next(iter(tokens.values())))
        return self.compose(next(self.parameters()).new_zeros(count, *self.reference_shape), tokens)

    def compose_partial(
        self, features: ImageFeatures | None, tokens: Tokens, has_reference: Tensor | None, has_text: Tensor | None
    ) -> Composed:
        """Queries (B, E) of which some lack their reference, or their text; states and parts only if none does.

        Args:
            features: of the reference images, any values where there is none; None if no query has one.
            tokens: of the texts, of any text where there is none.
            has_reference, has_text: (B,) booleans; None if every query has one.
        """
        if features is None:
            return self.compose_text(tokens)
        if has_reference is None and has_text is None:
            return self.compose(features.reference, tokens)
        present = torch.ones(len(features.target), dtype=torch.bool, device=features.target.device)
        has_reference = present if has_reference is None else has_reference
        has_text = present if has_text is None else has_text
        if bool((has_reference & has_text).all()):
            return self.compose(features.reference, tokens)
        kinds = has_reference & has_text, has_reference & ~has_text, ~has_reference
        both, image, text = groups = [rows.nonzero()[:, 0] for rows in kinds]
        queries = []
        if len(both):
            queries.append(self.compose(features.reference[both], {k: v[both] for k, v in tokens.items()}).query)
        if len(image):
            queries.append(self.compose_image(ImageFeatures(*(part[image] for part in features))))
        if len(text):
            queries.append(self.compose_text({k: v[text] for k, v in tokens.items()}).query)
        return Composed(torch.cat(queries)[torch.cat(groups).argsort()])

    @cached_property
    def reference_shape(self) -> tuple[int, ...]:
        """(L, D) of the reference features of one image."""
        mode, pixels = self.training, self.transform(Image.new("RGB", (64, 64)))[None]
        with torch.no_grad():  # in eval mode, as dropout would draw a number that a resumed run draws elsewhere
            shape = self.eval().encode_image(pixels.to(next(self.parameters()))).reference.shape
        self.train(mode)
        return tuple(shape[1:])

    def encode_query(self, pixels: Tensor, tokens: Tokens) -> Tensor:
        """Reference images (B, 3, H, W) and texts → queries (B, E)."""
        return self.compose(self.encode_image(pixels).reference, tokens).query

    def encode_target(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, K, E)."""
        return self.encode_image(pixels).target

    def freeze_image_side(self) -> None:
        """From here on ``encode_image`` never moves, so a bank is valid: no gradient, always eval mode."""
        self.untie_text_side()
        self._frozen = True
        for part in (*self.image_side(), *self.frozen_beside()):
            part.requires_grad_(False)
        self.train(self.training)

    @property
    def is_frozen(self) -> bool:
        """Whether ``freeze_image_side`` was called."""
        return getattr(self, "_frozen", False)

    def train(self, mode: bool = True) -> "Backbone":
        """As in torch, but a module whose parameters are all frozen stays in eval mode, with what is inside it."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                nn.Module.train(module, False)
        return self

    def image_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the image side, by their full names."""
        parts = {id(part) for part in self.image_side()}
        state = {
            f"{prefix}.{name}": value
            for prefix, module in self.named_modules()
            if id(module) in parts
            for name, value in module.state_dict().items()
        }
        state |= {name: value.detach() for name, value in self.named_parameters() if id(value) in parts}
        return dict(sorted(state.items()))
