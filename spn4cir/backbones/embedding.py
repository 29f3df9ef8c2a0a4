"""UniFEx: an image as few numbers, by a frozen tower and one linear layer that is trained on classes of images."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbone import Backbone, l2_normalize, to_float32
from spn4cir.backbones.shared_towers import load_tower
from spn4cir.backbones.shared_vision import encode_images
from spn4cir.compute import blocks_of
from spn4cir.errors import InputError
from spn4cir.types import Composed, ImageFeatures, Tokens

NECKS = ("linear", "pool", "none")


class Embedding(Backbone):
    """``q = normalise(W dropout(f) + b)`` for features f of any image tower, as query and in the gallery (K = 1).

    The reference is f alone (L = 1). With a frozen tower it is cached, and training reads no image. There are no texts:
    whatever asks for a query with one is refused.

    Args:
        model: the tower: ``embedded``; ``open_clip:MODEL:TAG``; ``timm:MODEL``; ``transformers:NAME``; or
            ``run:FOLDER`` for the target embeddings of another model of this project.
        neck: ``linear``; ``pool``, which averages neighbouring features instead, without training; ``none``.
        width: E, of both kinds of neck.
        dropout: of the features, while the neck trains.
        blocks: of the tower's last blocks, so many train as well; then images are encoded at every step.
        known: what a checkpoint notes about its tower; nothing for people to set.

    Raises ``InputError`` if there is no such tower, or the options fit nothing.

    Source: "UniFEx", GCPR 2024, arXiv 2409.13513. Unlike theirs, features of a frozen tower are encoded once.
    """

    name = "embedding"
    reads_texts = False

    def __init__(
        self,
        model: str = "embedded",
        neck: str = "linear",
        width: int = 64,
        dropout: float = 0.2,
        blocks: int = 0,
        known: dict[str, Any] | None = None,
    ):
        super().__init__()
        if neck not in NECKS or width < 1 or not 0 <= dropout < 1 or blocks < 0:
            what = f"neck {neck!r}, width {width}, dropout {dropout}, blocks {blocks}"
            raise InputError(f"embedding: {what}: a neck is one of {', '.join(NECKS)}, and dropout is in [0, 1)")
        tower = load_tower(model, known or {})
        self.tower, self.transform, self._read = tower.module, tower.transform, tower.read
        self.options = {"model": model, "neck": neck, "width": width, "dropout": dropout, "blocks": blocks}
        self.options["known"] = dict(tower.known)
        self.tower.requires_grad_(False)
        self.eval()
        with torch.no_grad():
            features = self._encode(self.transform(Image.new("RGB", (64, 64)))[None])
        self.features = features.shape[1]
        if neck != "none" and width > self.features:
            raise InputError(f"embedding: {width} numbers are more than the {self.features} of {model}")
        self.dropout = nn.Dropout(dropout)
        self.neck = nn.Linear(self.features, width) if neck == "linear" else None
        self._train_blocks(blocks)
        self.eval()

    def _train_blocks(self, count: int) -> None:
        if not count:
            return
        blocks = self._blocks_of_images()
        if len(blocks) < count:
            raise InputError(f"embedding: {self.options['model']} has {len(blocks)} blocks, and {count} should train")
        for block in blocks[-count:]:
            block.requires_grad_(True)

    def _blocks_of_images(self) -> list[nn.Module]:
        """Blocks that an image goes through, in order: a tower may have others, for texts."""
        self.tower.requires_grad_(True)
        pixels = self.transform(Image.new("RGB", (64, 64)))[None]
        with torch.enable_grad():
            found = encode_images(self._encode, pixels, True).sum()
        if not found.requires_grad:
            self.tower.requires_grad_(False)
            return []
        weights = {name: value for name, value in self.tower.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(found, list(weights.values()), allow_unused=True)
        used = {id(value) for value, grad in zip(weights.values(), gradients, strict=True) if grad is not None}
        self.tower.requires_grad_(False)
        blocks = blocks_of(self.tower)
        return [block for block in blocks if any(id(value) in used for value in block.parameters())]

    def _encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D) in float32."""
        found: Tensor = to_float32(self._read(pixels))
        return found

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """A placeholder for each text, which must be empty."""
        if any(texts):
            _refuse_texts()
        return {"text": torch.zeros(len(texts), 1, dtype=torch.long)}

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, 1, D), target (B, 1, E) of unit norm."""
        trains = any(parameter.requires_grad for parameter in self.tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            features = encode_images(self._encode, pixels, trains)
        return ImageFeatures(features[:, None], self.embed(features[:, None])[:, None])

    def project(self, reference: Tensor) -> Tensor:
        """Reference (B, 1, D) → embeddings (B, E), before they are normalised."""
        features = to_float32(reference[:, 0])
        if self.options["neck"] == "pool":
            return F.adaptive_avg_pool1d(features[:, None], self.options["width"])[:, 0]
        return features if self.neck is None else self.neck(self.dropout(features))

    def embed(self, reference: Tensor) -> Tensor:
        """Reference (B, 1, D) → embeddings (B, E) of unit norm."""
        return l2_normalize(self.project(reference))

    def compose_image(self, features: ImageFeatures) -> Tensor:
        """The image's embedding."""
        return self.embed(features.reference)

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """Raises ``InputError``."""
        _refuse_texts()

    def compose_text(self, tokens: Tokens) -> Composed:
        """Raises ``InputError``."""
        _refuse_texts()

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """Tower and neck."""
        return [self.tower, *([] if self.neck is None else [self.neck])]


class TowerFeatures(Backbone):
    """The tower of an ``Embedding`` alone, whose features are cached for any neck; it has no embedding of its own."""

    name = "embedding"

    def __init__(self, whole: Embedding):
        super().__init__()
        self.tower, self.transform, self._encode, self.tokenize = (
            whole.tower,
            whole.transform,
            whole._encode,
            whole.tokenize,
        )
        self.options = {key: whole.options[key] for key in ("model", "known")}

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, 1, D), and its first number in the place of a target, (B, 1, 1)."""
        with torch.no_grad():
            features = encode_images(self._encode, pixels, False)[:, None]
        return ImageFeatures(features, features[:, :, :1])

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """Raises ``InputError``."""
        _refuse_texts()

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The tower."""
        return [self.tower]


def _refuse_texts() -> NoReturn:
    raise InputError("backbone embedding reads images alone: a query of it has no text")
