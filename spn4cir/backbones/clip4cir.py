"""CLIP4CIR: the query is the sum of what CLIP makes of the reference image and of the text."""

from collections.abc import Mapping, Sequence
from typing import Any

import open_clip
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbone import Backbone, Published
from spn4cir.clip import JIT_NUMBERS, OPENAI, load_clip, recognise
from spn4cir.errors import InputError
from spn4cir.types import Composed, ImageFeatures, Tokens


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
        self.clip, self._tokenizer, self.transform = load_clip(model, pretrained, load_weights, pad_ratio=1.25)
        sample = self._tokenizer(["a"])[0]  # begin, word, end, padding
        self._padding = int(sample[-1])
        self.eval()

    @classmethod
    def from_published(cls, content: Mapping[str, Any], options: Mapping[str, Any]) -> Published:
        """Weights of the original (entry ``CLIP``, OpenAI's names) or of SPN's stage 2 (``state_dict``, ``clip.``).

        Raises:
            InputError: if it is neither, or if no ``model`` is stated and the shapes are not those of one of OpenAI's.
        """
        key, state, ignored = Published.find(content, "CLIP", "state_dict")
        container = "CLIP, OpenAI's names" if key == "CLIP" else "state_dict, prefix clip."
        if key == "CLIP":
            state = {f"clip.{name}": value for name, value in state.items()}
        elif not any(name.startswith("clip.") for name in state):
            raise InputError(f"the names in state_dict should begin with clip., not as in {next(iter(state))}")
        for name in JIT_NUMBERS:
            if state.pop(f"clip.{name}", None) is not None:
                ignored[f"clip.{name}"] = "a number beside the weights of OpenAI's archives"
        named = {name.removeprefix("clip."): value for name, value in state.items() if name.startswith("clip.")}
        model = options.get("model") or recognise(named)
        if f"{model}-quickgelu" in OPENAI:
            raise InputError(f"{model} has another activation than OpenAI's weights: the model is {model}-quickgelu")
        return Published({"model": model, "pretrained": None}, state, ignored, container)

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
