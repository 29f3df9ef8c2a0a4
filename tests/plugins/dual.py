"""A toy backbone that embeds texts as targets, too."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spn4cir.backbone import Backbone, l2_normalize
from spn4cir.images import Transform
from spn4cir.types import Composed, ImageFeatures, Tokens

WORDS, WIDTH = 64, 16


class Dual(Backbone):
    """Mean colours of a picture, and a bag of hashed words, in one space: L = K = 1."""

    name = "dual"

    def __init__(self, load_weights: bool = True):
        super().__init__()
        torch.manual_seed(3)
        self.options, self.transform = {}, Transform(8)
        self.visual, self.words = nn.Linear(3, WIDTH), nn.EmbeddingBag(WORDS, WIDTH)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        rows = [[zlib.crc32(word.encode()) % WORDS for word in f"{text} ' '".split()][:4] for text in texts]
        return {"text": torch.tensor([row + row[-1:] * (4 - len(row)) for row in rows])}

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        features = self.visual(pixels.mean((2, 3)))[:, None]  # (B, 1, E)
        return ImageFeatures(features, l2_normalize(features))

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        text = self.words(tokens["text"])
        return Composed(l2_normalize(reference[:, 0] + text), parts=(reference[:, 0], text))

    def encode_text_target(self, tokens: Tokens) -> Tensor:
        return l2_normalize(self.words(tokens["text"]))[:, None]

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        return [self.visual]
