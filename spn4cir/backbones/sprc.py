"""SPRC: BLIP-2's Q-Former fuses image and text, and a second pass reads the fused states and the text as a sentence."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForImageTextRetrieval, PreTrainedConfig

from spn4cir.backbone import Backbone, l2_normalize
from spn4cir.backbones.shared_blip import BERT, load_bert_tokenizer, load_library
from spn4cir.compute import gradient_cached
from spn4cir.errors import InputError
from spn4cir.images import Transform
from spn4cir.in_batch import InBatch
from spn4cir.text_tokenizer import PortableTokenizer, copy_tokenizer, prepend_normalizers
from spn4cir.types import Composed, ImageFeatures, Tokens

EMBEDDED = Path(__file__).parents[1] / "embedded" / "blip2"
WORDS = 50
PUNCTUATION = r'[.!"()*#:;~]'
"""What BLIP's preprocessing takes out of a text."""
PARTS = ("vision_config", "qformer_config", "num_query_tokens", "image_text_hidden_size")
VISION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "qkv_bias",
)  # fmt: skip
QFORMER = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "initializer_range",
    "layer_norm_eps", "pad_token_id", "cross_attention_frequency", "use_qformer_text_input",
)  # fmt: skip


class TextTwin(nn.Module):
    """Copies of what reads the fused states as a sentence, without the parts that only an image calls for."""

    def __init__(self, blip2: Any):
        super().__init__()
        self.embeddings = deepcopy(blip2.embeddings)
        self.qformer: Any = deepcopy(blip2.qformer)
        self.text_projection = deepcopy(blip2.text_projection)
        for layer in self.qformer.encoder.layer:
            for part in ("crossattention", "intermediate_query", "output_query"):
                if hasattr(layer, part):
                    delattr(layer, part)
            layer.has_cross_attention = False


class SPRC(Backbone):
    """Two passes of one Q-Former make the query; a target is what the query tokens read from it, each token projected.

    ``U`` = states of the K query tokens after the Q-Former read reference and text; ``q`` = projection of the text's
    first state after it read ``[U; text]`` without an image. L tokens of width D of the vision tower; a target has
    K = 32 vectors of width E = 256, of which the nearest counts.

    Args:
        model: ``embedded`` (the small model that ships), a folder or a name on the hub, both as ``save_pretrained`` of
            ``Blip2ForImageTextRetrieval`` writes them; None with ``config`` gives random weights.
        config: architecture, as ``Blip2Config`` takes it; None means that of ``model``.
        tokenizer: folder or name on the hub; None means that of ``model``, or BERT's where there is no model.
        train_vision: whether stage 1 trains the vision tower below its last norm, which is trained in any case.
        rtc: weight of the prompt's contrastive term.
        align: weight of the term that pulls fused states to the prompt.
        text_length: tokens after which a text is cut.

    Raises ``InputError`` if there is no such model or tokenizer, or they do not fit each other or ``text_length``.

    Source: Bai et al., "Sentence-level Prompts Benefit Composed Image Retrieval", ICLR 2024; Li et al., "BLIP-2", 2023.
    """

    name = "sprc"

    def __init__(
        self,
        model: str | None = "embedded",
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        train_vision: bool = False,
        rtc: float = 1.0,
        align: float = 1.0,
        text_length: int = 32,
    ):
        super().__init__()
        if model is None and config is None:
            raise InputError("sprc needs a model, or the config of one")
        if min(rtc, align) < 0:
            raise InputError(f"rtc and align are weights of 0 or more, got {rtc} and {align}")
        if lacking := [key for key in PARTS[:2] if config is not None and key not in config]:
            raise InputError(f"config of sprc lacks {lacking[0]!r}; it states {', '.join(PARTS)}")
        located = str(EMBEDDED) if model == "embedded" else model
        self.blip2: Any = load_library(Blip2ForImageTextRetrieval, located, config)
        del self.blip2.itm_head  # it would get no gradient
        settings = self.blip2.config
        self.options = {
            "model": model, "config": _plain(settings), "tokenizer": tokenizer, "train_vision": train_vision,
            "rtc": rtc, "align": align, "text_length": text_length, "separated": False,
        }  # fmt: skip
        if not settings.qformer_config.use_qformer_text_input:
            raise InputError(f"{model}: its Q-Former reads no text (use_qformer_text_input is false)")
        room = settings.qformer_config.max_position_embeddings - settings.num_query_tokens
        if not 3 <= text_length <= room:
            raise InputError(f"text_length is {text_length}: it must be 3 to {room}")
        self.blip2.vision_model.post_layernorm.eps = 1e-5  # BLIP-2's own; the library has one eps for all, 1e-6
        source = tokenizer or located or BERT
        self.tokenizer = load_bert_tokenizer(source, settings.qformer_config.vocab_size, added=("[DEC]",))
        self.transform = Transform(settings.vision_config.image_size)
        self.count = settings.num_query_tokens
        self.prompt_tokens = nn.Parameter(0.02 * torch.randn(self.blip2.query_tokens.shape))  # (1, K, H)
        self.prompt_tokens.requires_grad_(rtc > 0)  # nothing else moves them
        self.twin: Any = None
        self.blip2.vision_model.embeddings.requires_grad_(train_vision)
        self.blip2.vision_model.encoder.requires_grad_(train_vision)
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """B texts → ``text`` and ``mask`` (B, T), T that of the longest; an empty one is a text without words."""
        plain = [" ".join(re.sub(PUNCTUATION, " ", text.lower()).split()[:WORDS]) for text in texts]
        length = self.options["text_length"]
        tokens = self.tokenizer(plain, padding="longest", truncation=True, max_length=length, return_tensors="pt")
        return {"text": tokens["input_ids"], "mask": tokens["attention_mask"]}

    def portable_tokenizer(self) -> PortableTokenizer:
        """BERT's, which also takes punctuation out; ``WORDS`` is no limit below as many tokens."""
        from tokenizers import Regex, normalizers

        found = copy_tokenizer(self.tokenizer)
        prepend_normalizers(found, normalizers.Lowercase(), normalizers.Replace(Regex(PUNCTUATION), " "))
        found.enable_padding(pad_id=self.tokenizer.pad_token_id, pad_token=self.tokenizer.pad_token)
        found.enable_truncation(self.options["text_length"])
        return PortableTokenizer(found, {"text": "ids", "mask": "attention_mask"})

    def save_assets(self, folder: Path) -> None:
        """The tokenizer's files."""
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, L, D), the vision tower's tokens; target (B, K, E), each vector of unit norm."""
        tokens = self.blip2.vision_model(pixels).last_hidden_state  # (B, L, D)
        queries = self.blip2.query_tokens.expand(pixels.shape[0], -1, -1)  # an exported graph takes len() as fixed
        states = self.blip2.qformer(
            query_embeds=queries, query_length=self.count, encoder_hidden_states=tokens
        ).last_hidden_state  # (B, K, H)
        return ImageFeatures(tokens, l2_normalize(self.blip2.vision_projection(states)))

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """(B, L, D) and texts → queries (B, E)."""
        text = tokens["text"]  # (B, T)
        # K tokens that are all read stand before the text
        mask = torch.cat([tokens["mask"].new_ones(text.shape[0], self.count), tokens["mask"]], dim=1)  # (B, K + T)
        queries = self.blip2.query_tokens.expand(text.shape[0], -1, -1)
        embedded = self.blip2.embeddings(input_ids=text, query_embeds=queries)
        hidden = self.blip2.qformer(
            query_embeds=embedded, query_length=self.count, attention_mask=mask, encoder_hidden_states=reference
        ).last_hidden_state  # (B, K + T, H)
        # each query's own text made them: the published stage 2 cached them per image, as another text made them
        fused, reader = hidden[:, : self.count], self.twin or self.blip2  # (B, K, H)
        sentence = reader.embeddings(input_ids=text, query_embeds=fused)
        query = self._read(reader, sentence, mask, self.count)  # the text's first token stands behind the states
        return Composed(query, {"fused": fused, "text": text, "mask": mask})

    def _read(self, reader: Any, embedded: Tensor, mask: Tensor, place: int) -> Tensor:
        """Embeddings (B, K + T, H) read without an image → (B, E), unit norm, from the state at a place."""
        # with no image all positions are text, so the length of the query is nought, which the library must be told
        hidden = reader.qformer(query_embeds=embedded, query_length=0, attention_mask=mask).last_hidden_state
        return l2_normalize(reader.text_projection(hidden[:, place]))

    def extra_losses(self, composed: Composed, targets: ImageFeatures, contrast: InBatch) -> dict[str, Tensor]:
        """``rtc``, the text behind the prompt against the targets; ``align``, the mean fused state to the prompt's."""
        terms: dict[str, Tensor] = {}
        states = composed.states
        if self.options["rtc"]:
            query = gradient_cached(self._read_prompted, self.chunk, states["text"], states["mask"])
            terms["rtc"] = self.options["rtc"] * contrast(query, targets.target)
        if self.options["align"]:
            fused = states["fused"].mean(dim=1)  # (B, H)
            prompt = self.prompt_tokens.detach().mean(dim=1).expand_as(fused)
            terms["align"] = self.options["align"] * F.mse_loss(fused, prompt)
        return terms

    def _read_prompted(self, text: Tensor, mask: Tensor) -> Tensor:
        """(B, T), (B, K + T) → (B, E), from the first token, behind which the prompt stands before the others."""
        embeddings = self.blip2.embeddings
        words = embeddings.word_embeddings(text)  # (B, T, H)
        sentence = torch.cat([words[:, :1], self.prompt_tokens.expand(len(text), -1, -1), words[:, 1:]], dim=1)
        places = torch.arange(sentence.shape[1], device=text.device)
        return self._read(self.blip2, sentence + embeddings.position_embeddings(places), mask, 0)

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """Vision tower, query tokens, Q-Former and the projection of images."""
        return [self.blip2.vision_model, self.blip2.query_tokens, self.blip2.qformer, self.blip2.vision_projection]

    def frozen_beside(self) -> list[nn.Module | nn.Parameter]:
        """What the first pass reads of a text, and what only stage 1's prompt reads."""
        return [self.blip2.embeddings, self.blip2.text_projection, self.prompt_tokens]

    def untie_text_side(self) -> None:
        """The second pass gets copies: word embeddings, the text's half of the Q-Former, and the projection."""
        if self.twin is None:
            self.twin = TextTwin(self.blip2)
            self.options["separated"] = True


def _plain(settings: PreTrainedConfig) -> dict[str, Any]:
    """What of a library configuration decides the model, as JSON holds it: no language model's."""
    whole, kept = settings.to_dict(), {"vision_config": VISION, "qformer_config": QFORMER}
    return {part: {key: whole[part][key] for key in kept[part]} if part in kept else whole[part] for part in PARTS}
