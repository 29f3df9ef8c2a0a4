"""Weights of SPRC: of the original, or of SPN's stage 2."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spn4cir.backbones.shared_blip import BERT
from spn4cir.errors import InputError
from spn4cir.importers.published import (
    Published,
    find_state_dict,
    read_temperature,
    read_text_config,
    recognising,
)
from spn4cir.importers.vision_tower import TOWER, recognise_vision_tower, rename_vision_tower

GIANT = 1408  # width of ViT-g, whose 16 heads are 88 wide
RENAMED = (
    (r"ln_vision\.", "blip2.vision_model.post_layernorm."),
    (r"vision_proj\.", "blip2.vision_projection."),
    (r"text_proj\.", "blip2.text_projection."),
    (r"text_proj_q\.", "twin.text_projection."),
    (r"query_tokens$", "blip2.query_tokens"),
    (r"Qformer(_query)?\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"Qformer(_query)?\.bert\.embeddings\.", "embeddings."),
    (r"Qformer(_query)?\.bert\.encoder\.", "qformer.encoder."),
)
FOR_IMAGES = r"Qformer_query\.bert\.encoder\.layer\.\d+\.(crossattention|intermediate_query|output_query)\."
IGNORED = (
    (r"Qformer(_query)?\.cls\.", "head of a language model, which nothing here reads"),
    (r"Qformer(_query)?\.bert\.embeddings\.position_ids$", "buffer of older libraries that counts positions"),
    (r"itm_head\.", "head of image-text matching, which nothing here reads"),
    (FOR_IMAGES, "only read beside an image, and this copy never is"),
)


def convert_sprc_weights(content: Mapping[str, Any], options: Mapping[str, Any]) -> Published:
    """Convert weights of the original (``Blip2QformerCirAlignPrompt``) or of SPN's stage 2 (``state_dict``).

    Raises ``InputError`` if it is neither, or if the shapes that give the architecture are missing.
    """
    key, state, ignored = find_state_dict(content, "Blip2QformerCirAlignPrompt", "state_dict", prefix="blip_model.")
    prefix = "blip_model." if key == "state_dict" else ""
    ours = {name: value for name, value in state.items() if name.startswith(prefix)}
    temperature, told_of_it = read_temperature(state, f"{prefix}temp")
    reasons = {name: told_of_it.get(name) or _reason(name.removeprefix(prefix)) for name in ours}
    ignored |= {name: reason for name, reason in reasons.items() if reason}
    own = {name.removeprefix(prefix): value for name, value in ours.items() if not reasons[name]}
    strange = {name: value for name, value in state.items() if name not in ours}
    stated = {"tokenizer": BERT, **{key: value for key, value in options.items() if key != "model"}}
    separated = any(name.startswith("Qformer_query.") for name in own)
    found = {"model": None, "config": _recognise(own), "rgb_last": True, **stated, "separated": separated}
    container = f"{key}, stage {2 if separated else 1}" + (f", prefix {prefix}" if prefix else "")
    return Published(found, _rename(own) | strange, ignored, container, temperature=temperature)


def _reason(name: str) -> str | None:
    return next((reason for pattern, reason in IGNORED if re.match(pattern, name)), None)


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate published names without prefix. Names that are unknown stay as they are."""
    found = {f"blip2.vision_model.{name}": value for name, value in rename_vision_tower(state).items()}
    for name, value in state.items():
        if name.startswith(TOWER):
            continue
        pattern, new = next((pair for pair in RENAMED if re.match(pair[0], name)), ("", ""))
        renamed = re.sub(f"^{pattern}", new, name)
        if pattern.startswith("Qformer"):
            renamed = renamed.replace("attention.self.", "attention.attention.")
            renamed = ("twin." if name.startswith("Qformer_query.") else "blip2.") + renamed
        if renamed in found:
            raise InputError(f"{name} is there twice, under another name as well")
        found[renamed] = value
    return found


def _recognise(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the configuration from shapes under published names. Raises ``InputError`` that names a missing tensor."""
    names = [name.split(".") for name in state if name.startswith("Qformer.bert.encoder.layer.")]
    layers = len({parts[4] for parts in names})
    crossed = {int(parts[4]) for parts in names if "crossattention" in parts}
    every = min(crossed - {0}, default=max(layers, 1))
    if crossed != set(range(0, layers, every)):
        raise InputError(f"cross-attention in layers {sorted(crossed)} of {layers} is no even spacing from layer 0")
    is_giant = f"{TOWER}cls_token" in state and state[f"{TOWER}cls_token"].shape[-1] == GIANT
    with recognising("these shapes"):
        text = read_text_config(state, "Qformer.bert.")
        return {
            "vision_config": recognise_vision_tower(rename_vision_tower(state), heads=16 if is_giant else None),
            "qformer_config": {**text, "cross_attention_frequency": every, "use_qformer_text_input": True},
            "num_query_tokens": state["query_tokens"].shape[1],
            "image_text_hidden_size": state["vision_proj.weight"].shape[0],
        }
