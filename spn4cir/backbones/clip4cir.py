"""CLIP4CIR: the query is the sum of what CLIP makes of the reference image and of the text."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import open_clip
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbone import Backbone
from spn4cir.errors import InputError
from spn4cir.images import Transform
from spn4cir.types import Composed, ImageFeatures, Tokens

EMBEDDED = Path(__file__).parent.parent / "embedded" / "clip"


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collect open_clip's warnings that there are no weights: no news while a checkpoint is loaded, else an error."""
    texts: list[str] = []

    def pass_on(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "no CLIP weights" in text or text.startswith("No pretrained weights"):
            texts.append(text)
            return False
        return True

    root = logging.getLogger()
    root.addFilter(pass_on)
    try:
        yield texts
    finally:
        root.removeFilter(pass_on)


class CLIP4CIR(Backbone):
    """``q = normalise(f_img(reference) + f_txt(text))``, both un-normalised; ``t = normalise(f_img(target))``.

    L = K = 1 and D = E, CLIP's embedding width. The whole model stays in eval mode, so BatchNorm's statistics never
    move. Texts longer than CLIP's context are cut at it.

    Args:
        model: ``embedded`` (the small model that ships), or any model of open_clip by name, such as
            ``RN50x4-quickgelu``, ``ViT-L-14-quickgelu``, ``local-dir:FOLDER`` or ``hf-hub:NAME``.
        pretrained: a tag of open_clip (``openai``) or a weights file; None gives random weights, except where ``model``
            brings its own.
        load_weights: False builds the architecture alone, for a checkpoint to fill.

    Raises:
        InputError: if open_clip knows no such model, tag or file.

    Source: Baldrati et al., "Conditioned and composed image retrieval combining and partially fine-tuning CLIP-based
    features", CVPRW 2022, with the element-wise sum.
    """

    name = "clip4cir"

    def __init__(self, model: str = "embedded", pretrained: str | None = None, load_weights: bool = True):
        super().__init__()
        self.options = {"model": model, "pretrained": pretrained}
        located = f"local-dir:{EMBEDDED}" if model == "embedded" else model
        try:
            with _missing_weights() as missing:
                self.clip = open_clip.create_model(
                    located, pretrained=pretrained, load_weights=load_weights, weights_only=True
                )
                self._tokenizer = open_clip.get_tokenizer(located)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"clip4cir: cannot load model {model!r}, pretrained {pretrained!r}: {error}") from None
        if load_weights and missing and located.startswith("local-dir:"):
            raise InputError(f"clip4cir: {located.removeprefix('local-dir:')} holds a config but no weights")
        for scalar in ("logit_scale", "logit_bias"):  # the loss has its own temperature
            if getattr(self.clip, scalar, None) is not None:
                getattr(self.clip, scalar).requires_grad_(False)
        sample = self._tokenizer(["a"])[0]  # begin, word, end, padding
        self._padding = int(sample[-1])
        size = self.clip.visual.image_size
        mean, std = self.clip.visual.image_mean, self.clip.visual.image_std
        self.transform = Transform(size[0] if isinstance(size, tuple) else size, mean=tuple(mean), std=tuple(std))
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """B texts → ``{"text": (B, context)}``; an empty one, which CIRR's test1 has, is a text without words."""
        return {"text": self._tokenizer(list(texts))}

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, 1, E) as CLIP gives it, target (B, 1, E) of unit norm."""
        features = self.clip.encode_image(pixels)  # (B, E)
        return ImageFeatures(features[:, None], F.normalize(features.float(), dim=-1)[:, None])

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """(B, 1, E) and texts → queries (B, E)."""
        text = self._encode_text(tokens["text"])  # (B, E)
        return Composed(F.normalize(reference[:, 0].float() + text.float(), dim=-1))

    def _encode_text(self, text: Tensor) -> Tensor:
        """(B, context) → (B, E), as open_clip's ``encode_text``, without the columns that are padding in all rows.

        With causal attention no position sees what comes after it, so cutting the tail changes nothing but the time.
        """
        clip = self.clip
        if (
            not isinstance(clip, open_clip.CLIP)
            or clip.attn_mask is None
            or clip.text_pool_type not in ("argmax", "eos")
            or not isinstance(clip.text_projection, Tensor)
        ):
            return clip.encode_text(text)  # type: ignore[no-any-return]
        used = (
            int((text != self._padding).any(0).nonzero().max()) + 2
        )  # one more, as some models pad with the end token
        text = text[:, :used]  # (B, T)
        used = text.shape[1]
        x = clip.token_embedding(text) + clip.positional_embedding[:used]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:used, :used]))  # (B, T, width)
        pooled = text_global_pool(x, text, clip.text_pool_type, eos_token_id=clip.text_eos_id)  # (B, width)
        return pooled @ clip.text_projection  # type: ignore[no-any-return]

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The visual tower."""
        return [self.clip.visual]

    def train(self, mode: bool = True) -> "CLIP4CIR":
        """Stays in eval mode: CLIP has no dropout, and its BatchNorm statistics are not to move."""
        nn.Module.train(self, False)
        return self
