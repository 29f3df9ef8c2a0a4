"""CLIP from open_clip, for the backbones that stand on one."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import VisionTransformer, text_global_pool
from torch import Tensor

from spn4cir.backbones.shared_weights import READS_WEIGHTS
from spn4cir.errors import InputError
from spn4cir.images import Transform
from spn4cir.text_tokenizer import copy_tokenizer, prepend_normalizers

EMBEDDED = Path(__file__).parents[1] / "embedded"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""What OpenAI's tokenizer splits a text into: endings, words, single digits, runs of other signs."""


def load_clip(
    model: str, pretrained: str | None, pad_ratio: float | None, embedded: str = "clip"
) -> tuple[Any, Callable[..., Tensor], Transform]:
    """Load a model of open_clip, its tokenizer (B texts → (B, context)), and its transform.

    The model's scale gets no gradient. Where ``READS_WEIGHTS`` is false the model has random weights.

    Args:
        model: ``embedded`` (the small model that ships), or any model of open_clip by name, such as
            ``ViT-B-16-quickgelu``, ``RN50x4-quickgelu``, ``local-dir:FOLDER`` or ``hf-hub:NAME``.
        pretrained: a tag of open_clip (``openai``) or a weights file; None for random weights, unless ``model`` brings
            its own.
        pad_ratio: of the transform.
        embedded: folder of the small model.

    Raises ``InputError`` if open_clip knows no such model, tag or file.
    """
    load_weights = READS_WEIGHTS.get()
    located = f"local-dir:{EMBEDDED / embedded}" if model == "embedded" else model
    try:
        with _missing_weights() as missing:
            tag = pretrained if load_weights else None
            clip = open_clip.create_model(located, tag, load_weights=load_weights, weights_only=True)
            tokenizer = open_clip.get_tokenizer(located)
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        advice = "where there is no network, give a file of weights as pretrained, or --init FOLDER of spn4cir-import"
        raise InputError(f"cannot load CLIP {model!r}, pretrained {pretrained!r} ({advice}): {said}") from None
    if load_weights and missing and located.startswith("local-dir:"):
        raise InputError(f"{located.removeprefix('local-dir:')} holds a config but no weights")
    for scalar in ("logit_scale", "logit_bias"):  # the loss has its own temperature
        if getattr(clip, scalar, None) is not None:
            getattr(clip, scalar).requires_grad_(False)
    if isinstance(clip.visual, ModifiedResNet):  # the layout in which convolutions are fastest
        clip.visual.to(memory_format=torch.channels_last)
    size = clip.visual.image_size
    mean, std = tuple(clip.visual.image_mean), tuple(clip.visual.image_std)
    return clip, tokenizer, Transform(size[0] if isinstance(size, tuple) else size, pad_ratio, mean, std)


def has_openai_text(clip: Any) -> bool:
    """Whether the text tower is in OpenAI's layout: causal, pooled at the end token, and projected by a matrix."""
    is_clip = isinstance(clip, open_clip.CLIP) and clip.attn_mask is not None
    return is_clip and clip.text_pool_type in ("argmax", "eos") and isinstance(clip.text_projection, Tensor)


def has_openai_vision(clip: Any) -> bool:
    """Whether the image tower is a vision transformer in OpenAI's layout: pooled at the class token, and projected."""
    visual: Any = getattr(clip, "visual", None)
    is_vit = isinstance(visual, VisionTransformer) and isinstance(visual.proj, Tensor)
    return is_vit and (visual.pool_type, visual.attn_pool, visual.final_ln_after_pool) == ("tok", None, False)


def encode_text(clip: Any, text: Tensor, padding: int) -> Tensor:
    """(B, context) → (B, E), as open_clip's ``encode_text``, without the columns that are padding in all rows."""
    if not has_openai_text(clip) or torch.compiler.is_compiling():  # an exported graph has no shape that a text decides
        return clip.encode_text(text)  # type: ignore[no-any-return]
    # with causal attention no position sees what comes after it, so cutting the tail changes nothing but the time;
    # one column more than the last that is not padding, as some models pad with the end token
    text = text[:, : int((text != padding).any(0).nonzero().max()) + 2]  # (B, T)
    used = text.shape[1]
    x = clip.token_embedding(text) + clip.positional_embedding[:used]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:used, :used]))  # (B, T, width)
    pooled = text_global_pool(x, text, clip.text_pool_type, eos_token_id=clip.text_eos_id)  # (B, width)
    return pooled @ clip.text_projection  # type: ignore[no-any-return]


def portable_clip_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer of open_clip (B texts → (B, context)) as a ``tokenizers.Tokenizer`` that pads to the context.

    It cleans whitespace, and replaces single characters as ftfy does: quotes, ligatures, widths, control characters. It
    repairs no broken encodings as ftfy does, and no HTML entities.
    Raises ``InputError`` for a kind of tokenizer that has no such form.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    pad = 0, "<pad>"
    if isinstance(tokenizer, HFTokenizer):
        found, inner = copy_tokenizer(tokenizer.tokenizer), tokenizer.tokenizer
        pad = inner.pad_token_id, inner.pad_token
    elif isinstance(tokenizer, SimpleTokenizer):
        first, last = (tokenizer.decoder[n] for n in (tokenizer.sot_token_id, tokenizer.eot_token_id))
        merges = list(tokenizer.bpe_ranks)
        found = Tokenizer(models.BPE(vocab=tokenizer.encoder, merges=merges, end_of_word_suffix="</w>"))
        found.normalizer = normalizers.Lowercase()
        split = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)
        by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        found.pre_tokenizer = pre_tokenizers.Sequence([split, by_byte])
        ends = [(first, tokenizer.sot_token_id), (last, tokenizer.eot_token_id)]
        found.post_processor = processors.TemplateProcessing(f"{first} $A {last}", special_tokens=ends)
    else:
        raise InputError(f"open_clip's {type(tokenizer).__name__} has no form that the library tokenizers can read")
    replace = [normalizers.Replace(Regex(pattern), text) for pattern, text in _replacements().items()]
    space = normalizers.Replace(Regex(r"\s+"), " ")
    prepend_normalizers(found, *replace, normalizers.NFC(), space, normalizers.Strip())
    found.enable_padding(length=tokenizer.context_length, pad_id=pad[0], pad_token=pad[1])
    found.enable_truncation(tokenizer.context_length)
    return found


def _replacements() -> dict[str, str]:
    """What ftfy makes of single characters, in its order: a pattern of characters → their text."""
    from ftfy import fixes

    steps = (
        fixes.fix_c1_controls, fixes.fix_latin_ligatures, fixes.fix_character_width, fixes.uncurl_quotes,
        fixes.remove_terminal_escapes, fixes.remove_control_chars,
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    for character in map(chr, (n for n in range(0x10000) if not 0xD800 <= n < 0xE000)):
        text = character
        for step in steps:
            text = step(text)
        if text != character:
            found.setdefault(text, []).append(character)
    patterns = {"".join(f"\\x{{{ord(c):x}}}" for c in characters): text for text, characters in found.items()}
    terminal = r"\x{1b}\[[\d;]*[a-zA-Z]"  # colours and cursor movements
    return {terminal: "", **{f"[{pattern}]": text for pattern, text in patterns.items()}}


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collect open_clip's warnings that there are no weights: no news while a checkpoint is loaded, else an error."""
    texts: list[str] = []

    def pass_on(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "no CLIP weights" in text or text.startswith("No pretrained weights"):
            texts.append(text)
            return False
        return not text.startswith("Failed to download")  # it raises the same

    root = logging.getLogger()
    root.addFilter(pass_on)
    try:
        yield texts
    finally:
        root.removeFilter(pass_on)
