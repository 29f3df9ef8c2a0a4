"""Weights of BLIP4CIR's stage 1, of SPN's stage 2, or of BLIP itself."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spn4cir.backbones.blip4cir import EMBEDDED, VISION, complete_config, load_config
from spn4cir.errors import InputError
from spn4cir.importers.published import (
    Published,
    find_state_dict,
    read_temperature,
    read_text_config,
    recognising,
)
from spn4cir.importers.vision_tower import TOWER, recognise_vision_tower, rename_vision_tower, resize_positions


def convert_blip_weights(content: Mapping[str, Any], options: Mapping[str, Any]) -> Published:
    """Convert weights of stage 1 (``BLIP_Retrieval``), of SPN's stage 2 (``state_dict``), or of BLIP (``model``).

    Beside the constructor's options, ``image_size`` states to which size the position embedding of BLIP's own file is
    resized (default 384). Raises ``InputError`` if it is none of these, or its shapes do not tell the architecture.
    """
    is_blip = "BLIP_Retrieval" not in content and "state_dict" not in content
    beside = {"config"} & content.keys() if is_blip else set()  # a dictionary of settings
    kept = {key: value for key, value in content.items() if key not in beside}
    key, state, ignored = find_state_dict(kept, "BLIP_Retrieval", "state_dict", "model")
    ignored |= dict.fromkeys(beside, "settings of its training")
    prefix = "blip." if key == "state_dict" else ""
    if not any(name.startswith(prefix + TOWER) for name in state):
        raise InputError(f"no name in {key} begins with {prefix}{TOWER}, as BLIP's do")
    temperature, told_of_it = read_temperature(state, "tau", f"{prefix}temp")
    reasons = {name: told_of_it.get(name) or _reason(name.removeprefix(prefix), is_blip) for name in state}
    ignored |= {name: reason for name, reason in reasons.items() if reason}
    named = {name.removeprefix(prefix): value for name, value in state.items() if not reasons[name]}
    vision = rename_vision_tower(named)
    container = f"{key}, prefix {prefix}" if prefix else f"{key}, BLIP's names"
    if is_blip:
        vision, told = resize_positions(vision, int(options.get("image_size") or VISION["image_size"]))
        container += told
    rest = {name: value for name, value in named.items() if not name.startswith(TOWER)}
    model = options.get("model")
    config = load_config(EMBEDDED if model == "embedded" else model) if model else _recognise(vision, rest)
    ours = {f"blip.vision_model.{name}": value for name, value in vision.items()}
    ours |= {f"blip.{name}": value for name, value in rest.items()}
    stated = {"model": model, "config": config, "tokenizer": options.get("tokenizer")}
    return Published(stated | {"rgb_last": True}, ours, ignored, container, temperature=temperature)


def _reason(name: str, is_blip: bool) -> str:
    """Why a name of a published file is not needed; empty if it is. ``is_blip``: the file is BLIP's own."""
    if name == "text_encoder.embeddings.position_ids":
        return "a buffer of old library versions"
    if not is_blip:
        return ""
    first = name.split(".")[0]
    if first.endswith("_m"):
        return "momentum copy"
    if first in ("image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue"):
        return "queue of its training"
    return {"text_decoder": "decoder, which writes captions", "itm_head": "head that no score reads"}.get(first, "")


def _recognise(vision: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Any]:
    with recognising("these shapes; name it with --model"):
        text = read_text_config(rest, "text_encoder.")
        embedding = len(rest["text_proj.weight"])
    tower = recognise_vision_tower(vision)
    return complete_config({"image_text_hidden_size": embedding, "vision_config": tower, "text_config": text})
