"""BLIP4CIR: BLIP's text encoder reads the modification and looks at the reference image while it does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval

from spn4cir.backbone import Backbone, l2_normalize
from spn4cir.backbones.shared_blip import BERT, load_bert_tokenizer, load_library, load_settings
from spn4cir.backbones.shared_vision import encode_images
from spn4cir.errors import InputError
from spn4cir.images import Transform
from spn4cir.text_tokenizer import PortableTokenizer, copy_tokenizer
from spn4cir.types import Composed, ImageFeatures, Tokens

EMBEDDED = Path(__file__).parent.parent / "embedded" / "blip"
MARKS = ("[DEC]", "[ENC]")
"""What BLIP appends to BERT's vocabulary; the second one stands first in each text."""
VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 16, "image_size": 384, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
    "initializer_range": 0.02,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0,
    "bos_token_id": None, "sep_token_id": None,  # for writing texts; the defaults lie outside a small vocabulary
    "is_decoder": True,  # transformers' word for having cross-attention; whether it is causal is said in each call
}  # fmt: skip
PUBLISHED = {"image_text_hidden_size": 256, "vision_config": VISION, "text_config": TEXT}
LEFT_OUT = {"layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Values that files in transformers' layout have from its defaults, and BLIP's training had not."""


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``BlipConfig.from_dict`` takes: published BLIP with these entries. Raises ``InputError`` for another one."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    for part, known in ((config, PUBLISHED), (vision, VISION), (text, TEXT)):
        if unknown := [key for key in part if key not in known and (part is not text or key != "encoder_hidden_size")]:
            raise InputError(f"config of blip4cir has no {unknown[0]!r}; known: {', '.join(known)}")
    vision = {**VISION, **vision}
    text = {**TEXT, **text, "encoder_hidden_size": vision["hidden_size"]}
    return {**PUBLISHED, **config, "vision_config": vision, "text_config": text}


def load_config(model: str | Path) -> dict[str, Any]:
    """Read the config of a folder or of a name on the hub. Raises ``InputError`` if there is none."""
    settings = load_settings(BlipConfig, model)
    config: dict[str, Any] = {"image_text_hidden_size": settings.image_text_hidden_size}
    for part, published in (("vision_config", VISION), ("text_config", TEXT)):
        found = {key: getattr(getattr(settings, part), key) for key in published}
        config[part] = {key: published[key] if LEFT_OUT.get(key) == value else value for key, value in found.items()}
    return complete_config(config)


class Blip(BlipForImageTextRetrieval):  # type: ignore[misc]
    """Without the head that tells whether image and text match: no score reads it."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"itm_head"]

    def __init__(self, config: BlipConfig):
        super().__init__(config)
        del self.itm_head


class BLIP4CIR(Backbone):
    """``q = normalise(text_proj(h_0))`` of the text's states h, which attend to the reference; ``t`` of a class token.

    The reference is the vision tower's tokens after its last norm (L = 577 of D = 768 at 384 pixels); the target is
    ``normalise(vision_proj(token 0))``, K = 1 and E = 256. Texts begin with ``[ENC]`` and are cut at the number of
    positions that the text encoder has. The config carries its dropout; the vision tower has none.

    Args:
        model: ``embedded`` (the small model that ships); a folder or a name on the hub in transformers' layout, such as
            ``Salesforce/blip-itm-base-coco``; or None for ``config`` alone, with random weights.
        config: the architecture, completed by ``complete_config``; None takes that of ``model``.
        tokenizer: folder or name on the hub of BERT's tokenizer; None takes that of ``model``, or BERT's own.
        train_vision: whether stage 1 trains the vision tower and its projection, which the published one did not.

    Raises ``InputError`` if there is no such model or tokenizer, or they do not fit together.

    Source: Liu et al., "Candidate Set Re-ranking for Composed Image Retrieval with Dual Multi-modal Encoder", 2023
    (stage I); Li et al., "BLIP: Bootstrapping Language-Image Pre-training", ICML 2022.
    """

    name = "blip4cir"

    def __init__(
        self,
        model: str | None = "embedded",
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        train_vision: bool = False,
    ):
        super().__init__()
        if model is None and config is None:
            raise InputError("blip4cir needs a model, or the config of one")
        source = EMBEDDED if model == "embedded" else model
        settings = complete_config(config) if config else load_config(str(source))
        self.options = {"model": model, "config": settings, "tokenizer": tokenizer, "train_vision": train_vision}
        self.blip = load_library(Blip, source, settings)
        self._tokenizer = load_bert_tokenizer(tokenizer or source or BERT, settings["text_config"]["vocab_size"], MARKS)
        if self._tokenizer("").input_ids[:1] != [self._tokenizer.cls_token_id]:
            raise InputError("a tokenizer for BLIP puts a mark before each text, as BERT's does, and this one does not")
        self._enc = self._tokenizer.convert_tokens_to_ids(MARKS[1])
        self.transform = Transform(settings["vision_config"]["image_size"])
        self.blip.vision_model.requires_grad_(train_vision)
        self.blip.vision_proj.requires_grad_(train_vision)
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """B texts → ``{"ids": (B, T), "mask": (B, T)}``, padded to the longest; an empty one is its marks alone."""
        limit = self.options["config"]["text_config"]["max_position_embeddings"]
        found = self._tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        found["input_ids"][:, 0] = self._enc
        return {"ids": found["input_ids"], "mask": found["attention_mask"]}

    def portable_tokenizer(self) -> PortableTokenizer:
        """BERT's, with ``[ENC]`` before each text."""
        from tokenizers.processors import TemplateProcessing

        found, own = copy_tokenizer(self._tokenizer), self._tokenizer
        ends = [(MARKS[1], self._enc), (own.sep_token, own.sep_token_id)]
        found.post_processor = TemplateProcessing(f"{MARKS[1]} $A {own.sep_token}", special_tokens=ends)
        found.enable_padding(pad_id=own.pad_token_id, pad_token=own.pad_token)
        found.enable_truncation(self.options["config"]["text_config"]["max_position_embeddings"])
        return PortableTokenizer(found, {"ids": "ids", "mask": "attention_mask"})

    def save_assets(self, folder: Path) -> None:
        """Write the tokenizer."""
        self._tokenizer.save_pretrained(folder / "tokenizer")

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, L, D) as the vision tower gives it, target (B, 1, E) of unit norm."""

        see, project = self.blip.vision_model, self.blip.vision_proj
        trains = any(parameter.requires_grad for parameter in see.parameters())
        tokens = encode_images(lambda part: see(pixel_values=part).last_hidden_state, pixels, trains)  # (B, L, D)
        return ImageFeatures(tokens, l2_normalize(project(tokens[:, :1])))

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """(B, L, D) and texts → queries (B, E)."""
        hidden = self.blip.text_encoder(
            input_ids=tokens["ids"], attention_mask=tokens["mask"], encoder_hidden_states=reference
        ).last_hidden_state  # (B, T, text width)
        return Composed(l2_normalize(self.blip.text_proj(hidden[:, 0])))

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The vision tower and its projection."""
        return [self.blip.vision_model, self.blip.vision_proj]
