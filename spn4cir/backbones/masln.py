"""MASLN: images and texts in one space of codes, by two small encoders over frozen features."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spn4cir.backbone import Backbone, l2_normalize, to_float32
from spn4cir.backbones.shared_clip import encode_text, load_clip, portable_clip_tokenizer
from spn4cir.backbones.shared_towers import Tower, load_tower, split_tag
from spn4cir.backbones.shared_vision import encode_images
from spn4cir.errors import InputError
from spn4cir.images import VectorTransform
from spn4cir.text_tokenizer import PortableTokenizer
from spn4cir.types import VECTOR, Composed, ImageFeatures, Tokens

GIVEN = "given:"
FEATURES = "features"
"""Name of tokens that are frozen text features already."""


class GivenVectors(nn.Module):
    """Features that are given rather than computed: (B, D) → (B, D). Its parameter never trains."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.factor = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """The vectors themselves."""
        return vectors * self.factor


class TextTower(nn.Module):
    """The text side of a CLIP: tokens (B, context) → features (B, D) of unit norm."""

    def __init__(self, model: str, pretrained: str | None):
        super().__init__()
        self.clip, self._tokenizer, _ = load_clip(model, pretrained, pad_ratio=None)
        self.clip.visual = nn.Identity()  # the image side is not used
        self._padding = int(self._tokenizer(["a"])[0, -1])
        with torch.no_grad():
            self.width = self(self.tokenize(["a"])).shape[1]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """B texts → (B, context)."""
        found: Tensor = self._tokenizer(list(texts))
        return found

    def portable_tokenizer(self) -> PortableTokenizer:
        """That of CLIP."""
        return PortableTokenizer(portable_clip_tokenizer(self._tokenizer), {"text": "ids"})

    def forward(self, text: Tensor) -> Tensor:
        """(B, context) → (B, D)."""
        return l2_normalize(encode_text(self.clip, text, self._padding))


class MASLN(Backbone):
    """Codes ``c_v = f_v(v)`` of images and ``c_t = f_t(t)`` of texts, ranked by their cosine (K = 1).

    Both v (B, D_v) and t (B, D_t) are frozen features, of a tower (then of unit norm) or given ones (as they are). The
    reference is v alone, so it is cached. A class label is used in training only, by the terms of the objective.

    Args:
        image: ``embedded``; ``open_clip:MODEL:TAG``, ``timm:MODEL``, ``transformers:NAME`` or ``run:FOLDER``; or
            ``given:D`` for vectors of D numbers.
        text: ``embedded``; ``open_clip:MODEL:TAG``; or ``given:D`` for texts that are D numbers with spaces between.
        width: k, the length of a code.
        hidden: widths of the encoders' hidden layers; empty for linear encoders.
        known: what a checkpoint notes about its image tower; nothing for people to set.

    Raises ``InputError`` if there is no such tower, or a width is not at least 1.

    Source: Xu et al., "Modal-adversarial semantic learning network for extendable cross-modal retrieval", ICMR 2018.
    """

    name = "masln"

    def __init__(
        self,
        image: str = "embedded",
        text: str = "embedded",
        width: int = 64,
        hidden: list[int] | None = None,
        known: dict[str, Any] | None = None,
    ):
        super().__init__()
        hidden = [256] if hidden is None else list(hidden)
        if any(not isinstance(size, int) or size < 1 for size in (width, *hidden)):
            raise InputError(f"masln: width {width} and hidden {hidden} must be whole numbers of at least 1")
        tower, self.image_width = _load_image_tower(image, known or {})
        self.image_tower, self.transform, self._read = tower.module, tower.transform, tower.read
        self.text_tower = _load_text_tower(text)
        self.text_width = self.text_tower.width
        self.options = {"image": image, "text": text, "width": width, "hidden": hidden}
        self.options["known"] = dict(tower.known)
        self.image_tower.requires_grad_(False)
        self.text_tower.requires_grad_(False)
        self.image_encoder = build_mlp(self.image_width, hidden, width)
        self.text_encoder = build_mlp(self.text_width, hidden, width)
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """B texts → ``{"text": (B, context)}``, or (B, D) for given features, zeros for the empty text.

        Raises ``InputError`` if a text should be D numbers and is not.
        """
        if isinstance(self.text_tower, TextTower):
            if vector := next((text for text in texts if text.startswith(VECTOR)), None):
                count = len(vector.removeprefix(VECTOR).split())
                what = f"texts are vectors of {count} given features, and the model reads words"
                raise InputError(f"masln: {what}: set backbone_options.text to given:{count}")
            return {"text": self.text_tower.tokenize(texts)}
        return {"text": torch.stack([_parse_numbers(text, self.text_width) for text in texts])}

    def portable_tokenizer(self) -> PortableTokenizer:
        """That of the text tower. Raises ``InputError`` for given features."""
        if not isinstance(self.text_tower, TextTower):
            raise InputError("masln: its texts are vectors of given features, which have no tokenizer")
        return self.text_tower.portable_tokenizer()

    def read_image(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), or given vectors (B, D_v) → frozen features (B, D_v) in float32."""
        found: Tensor = to_float32(self._read(pixels))
        return found if isinstance(self.image_tower, GivenVectors) else l2_normalize(found)

    @torch.no_grad()
    def read_text(self, tokens: Tokens) -> Tensor:
        """Tokens → frozen features (B, D_t) in float32; tokens called ``features`` are such already."""
        if FEATURES in tokens:
            return to_float32(tokens[FEATURES])
        found: Tensor = to_float32(self.text_tower(tokens["text"]))
        return found

    def project(self, reference: Tensor) -> Tensor:
        """Reference (B, 1, D_v) → codes (B, k), before they are normalised."""
        code: Tensor = self.image_encoder(to_float32(reference[:, 0]))
        return code

    def project_text(self, tokens: Tokens) -> Tensor:
        """Tokens → codes (B, k), before they are normalised."""
        code: Tensor = self.text_encoder(self.read_text(tokens))
        return code

    def embed(self, reference: Tensor) -> Tensor:
        """Reference (B, 1, D_v) → codes (B, k) of unit norm."""
        return l2_normalize(self.project(reference))

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) or (B, D_v) → reference (B, 1, D_v), target (B, 1, k) of unit norm."""
        with torch.no_grad():  # the tower never trains
            features = encode_images(self.read_image, pixels, False)[:, None]
        return ImageFeatures(features, self.embed(features)[:, None])

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """(B, 1, D_v) and texts → queries (B, k): the normalised sum of both codes, each of unit norm."""
        image, text = self.embed(reference), l2_normalize(self.project_text(tokens))
        return Composed(l2_normalize(image + text), parts=(image, text))

    def compose_image(self, features: ImageFeatures) -> Tensor:
        """The image's code."""
        return self.embed(features.reference)

    def compose_text(self, tokens: Tokens) -> Composed:
        """The text's code."""
        return Composed(l2_normalize(self.project_text(tokens)))

    def encode_text_target(self, tokens: Tokens) -> Tensor:
        """The text's code, (B, 1, k)."""
        return l2_normalize(self.project_text(tokens))[:, None]

    @property
    def query_is_sum(self) -> bool:
        """The query is the sum of the image's and the text's code."""
        return True

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The image tower and the image encoder."""
        return [self.image_tower, self.image_encoder]


class FrozenImages(Backbone):
    """The image tower of a ``MASLN`` alone, whose features are cached for any encoder."""

    name = "masln"

    def __init__(self, whole: MASLN):
        super().__init__()
        self.image_tower, self.transform, self._encode = whole.image_tower, whole.transform, whole.read_image
        self.tokenize = whole.tokenize
        self.options = {"model": whole.options["image"]}

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) or (B, D_v) → reference (B, 1, D_v), and its first number in the place of a target."""
        with torch.no_grad():
            features = encode_images(self._encode, pixels, False)[:, None]
        return ImageFeatures(features, features[:, :, :1])

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """Raises ``InputError``."""
        raise InputError("frozen features have no queries")

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The tower."""
        return [self.image_tower]


def build_mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers (B, inputs) → (B, outputs), with ReLU between them."""
    sizes = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers += [*([nn.ReLU()] if number else []), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def _parse_numbers(text: str, width: int) -> Tensor:
    """``width`` numbers with spaces between → (width,); zeros for the empty text."""
    text = text.removeprefix(VECTOR)
    if not text:
        return torch.zeros(width)
    try:
        numbers = torch.tensor([float(part) for part in text.split()])
    except ValueError:
        raise InputError(f"masln: text: given:{width} needs texts of {width} numbers, got {text!r:.60}") from None
    if len(numbers) != width or not bool(numbers.isfinite().all()):
        raise InputError(f"masln: text: given:{width} needs {width} finite numbers, got {len(numbers)}: {text!r:.60}")
    return numbers


def _given_width(name: str) -> int | None:
    """D of ``given:D``; None for any other name. Raises ``InputError`` if D is no whole number of at least 1."""
    if not name.startswith(GIVEN):
        return None
    width = name.removeprefix(GIVEN)
    if not width.isdecimal() or int(width) < 1:
        raise InputError(f"masln: {name!r} needs the number of features behind the colon, such as given:4096")
    return int(width)


def _load_image_tower(name: str, known: Mapping[str, Any]) -> tuple[Tower, int]:
    """The tower, and D_v."""
    if width := _given_width(name):
        module = GivenVectors(width)
        transform: Any = VectorTransform(width)
        return Tower(module, transform, module, "given features"), width
    from PIL import Image

    tower = load_tower(name, known)
    tower.module.eval()
    with torch.no_grad():
        return tower, tower.read(tower.transform(Image.new("RGB", (64, 64)))[None]).shape[1]


def _load_text_tower(name: str) -> Any:
    """A module with ``width``, D_t. Raises ``InputError`` for an unknown name."""
    if width := _given_width(name):
        return GivenVectors(width)
    if name == "embedded":
        return TextTower(name, None)
    kind, _, model = name.partition(":")
    if kind != "open_clip" or not model:
        raise InputError(f"text tower {name!r} is unknown; known: embedded, open_clip:MODEL:TAG and given:D")
    return TextTower(*split_tag(model))
