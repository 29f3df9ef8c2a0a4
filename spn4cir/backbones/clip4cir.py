"""CLIP4CIR: the query is the sum of what CLIP makes of the reference image and of the text, or a learned fusion."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spn4cir.backbone import Backbone, l2_normalize, to_float32
from spn4cir.backbones.shared_clip import encode_text, load_clip, portable_clip_tokenizer
from spn4cir.backbones.shared_vision import encode_images
from spn4cir.errors import InputError
from spn4cir.text_tokenizer import PortableTokenizer
from spn4cir.types import Composed, ImageFeatures, Tokens

FUSIONS = ("sum", "combiner")


class Combiner(nn.Module):
    """``W_o z + λ x_txt + (1 - λ) x_img``: a mixture of both, weighted by λ, and a correction that is learned.

    ``a = drop(relu(W_t x_txt))``, ``b = drop(relu(W_i x_img))`` of width p; ``c = [a; b]``;
    ``z = drop(relu(W_c c))`` of width h; ``λ = sigmoid(W_2 drop(relu(W_1 c)))``, a scalar; each layer has a bias.

    p = 4E and h = 8E: the published 2,560 and 5,120, whose E is 640. Source: as of ``CLIP4CIR``.
    """

    def __init__(self, width: int):
        super().__init__()
        projected, hidden = 4 * width, 8 * width  # p, h
        self.text_projection_layer = nn.Linear(width, projected)
        self.image_projection_layer = nn.Linear(width, projected)
        self.combiner_layer = nn.Linear(2 * projected, hidden)
        self.output_layer = nn.Linear(hidden, width)
        self.dynamic_scalar = nn.Sequential(
            nn.Linear(2 * projected, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, 1), nn.Sigmoid()
        )
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, E) as CLIP gives them, not normalised → (B, E), not normalised."""
        layers = (self.text_projection_layer, text), (self.image_projection_layer, image)
        both = torch.cat([self.dropout(layer(x).relu()) for layer, x in layers], dim=-1)  # (B, 2p)
        hidden = self.dropout(self.combiner_layer(both).relu())  # (B, h)
        share = self.dynamic_scalar(both)  # (B, 1)
        mixed: Tensor = self.output_layer(hidden) + share * text + (1 - share) * image
        return mixed


class CLIP4CIR(Backbone):
    """``q = normalise(f_img(reference) + f_txt(text))``, both un-normalised; ``t = normalise(f_img(target))``.

    With ``fusion: combiner`` the original's learned fusion stands in the place of the sum. L = K = 1 and D = E, CLIP's
    embedding width. CLIP stays in eval mode, so BatchNorm's statistics never move; the Combiner has dropout where the
    backbone trains with it. Texts longer than CLIP's context are cut at it.

    Args:
        model, pretrained: as ``shared_clip.load_clip`` takes them.
        fusion: ``sum``, or ``combiner``.
        train_clip: False freezes CLIP, so that the Combiner alone trains, as in the original's second stage.

    Raises ``InputError`` if open_clip knows no such model, tag or file, or if nothing would train.

    Source: Baldrati et al., "Conditioned and composed image retrieval combining and partially fine-tuning CLIP-based
    features", CVPRW 2022, with the element-wise sum of its first stage or the Combiner of its second.
    """

    name = "clip4cir"

    def __init__(
        self, model: str = "embedded", pretrained: str | None = None, fusion: str = "sum", train_clip: bool = True
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise InputError(f"clip4cir has no fusion {fusion!r}; known: {', '.join(FUSIONS)}")
        if fusion == "sum" and not train_clip:
            raise InputError("clip4cir: a sum has no weights of its own, so train_clip: false leaves nothing to train")
        self.options = {"model": model, "pretrained": pretrained, "fusion": fusion, "train_clip": train_clip}
        self.clip, self._tokenizer, self.transform = load_clip(model, pretrained, pad_ratio=1.25)
        self.combiner: Combiner | None = None
        sample = self._tokenizer(["a"])[0]  # begin, word, end, padding
        self._padding = int(sample[-1])
        if fusion == "combiner":
            with torch.no_grad():
                self.combiner = Combiner(self._encode_text(sample[None]).shape[-1])
        if not train_clip:
            self.clip.requires_grad_(False)
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """B texts → ``{"text": (B, context)}``; an empty one, which CIRR's test1 has, is a text without words."""
        return {"text": self._tokenizer(list(texts))}

    def portable_tokenizer(self) -> PortableTokenizer:
        """That of CLIP."""
        return PortableTokenizer(portable_clip_tokenizer(self._tokenizer), {"text": "ids"})

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, 1, E) as CLIP gives it, target (B, 1, E) of unit norm."""
        features = encode_images(self.clip.encode_image, pixels, self.options["train_clip"])  # (B, E)
        return ImageFeatures(features[:, None], l2_normalize(features)[:, None])

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """(B, 1, E) and texts → queries (B, E)."""
        image, text = to_float32(reference[:, 0]), to_float32(self._encode_text(tokens["text"]))  # (B, E) each
        if self.combiner is not None:
            return Composed(l2_normalize(self.combiner(image, text)))
        return Composed(l2_normalize(image + text), parts=(image, text))

    @property
    def query_is_sum(self) -> bool:
        """Whether the query is a sum."""
        return self.combiner is None

    def _encode_text(self, text: Tensor) -> Tensor:
        """(B, context) → (B, E)."""
        return encode_text(self.clip, text, self._padding)

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The visual tower."""
        return [self.clip.visual]

    def train(self, mode: bool = True) -> "CLIP4CIR":
        """CLIP stays in eval mode: it has no dropout, and its BatchNorm statistics are not to move."""
        super().train(mode)
        nn.Module.train(self.clip, False)
        return self
