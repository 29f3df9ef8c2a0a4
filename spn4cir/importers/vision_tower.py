"""Vision towers of BLIP and BLIP-2: published names → those of transformers, and the architecture by the shapes."""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.errors import InputError
from spn4cir.importers.published import recognising

TOWER = "visual_encoder."
BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
STEM = {
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}  # fmt: skip


def rename_vision_tower(published: Mapping[str, Any]) -> dict[str, Any]:
    """The vision tower of a published state dict, ``visual_encoder.`` in its names, under the names of transformers.

    BLIP's towers have one bias for query, key and value; EVA's have ``q_bias`` and ``v_bias``, the key's being zero.
    ``norm``, where there is one, becomes ``post_layernorm``. Names that are unknown stay as they are.
    """
    state = {name.removeprefix(TOWER): value for name, value in published.items() if name.startswith(TOWER)}
    found: dict[str, Any] = {}
    for name, value in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block and block[2] in ("attn.q_bias", "attn.v_bias"):
            if block[2] == "attn.q_bias":
                key = state.get(f"blocks.{block[1]}.attn.v_bias")
                if key is None:
                    raise InputError(f"beside {name} there is no v_bias")
                found[f"encoder.layers.{block[1]}.self_attn.qkv.bias"] = torch.cat([value, torch.zeros_like(key), key])
        elif block:
            part, _, last = block[2].rpartition(".")
            found[f"encoder.layers.{block[1]}.{BLOCK.get(part, part)}.{last}"] = value
        elif name in STEM:
            found[STEM[name]] = value
        else:
            found[re.sub(r"^norm\.", "post_layernorm.", name)] = value
    return found


def recognise_vision_tower(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, int]:
    """Read from shapes what a configuration states of a vision tower, named as by ``rename_vision_tower``.

    ``heads`` is None if each head has width 64. Raises ``InputError`` naming the tensor that would be needed.
    """
    with recognising("the shapes of its vision tower"):
        width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
        places = state["embeddings.position_embedding"].shape[1]
        inner = state["encoder.layers.0.mlp.fc1.weight"].shape[0]
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads or max(1, width // 64),
        "patch_size": patch,
        "image_size": patch * isqrt(places - 1),  # one more for the class
    }


def resize_positions(state: Mapping[str, Tensor], size: int) -> tuple[dict[str, Tensor], str]:
    """Interpolate the position embeddings of patches, bicubically, for images of ``size`` pixels.

    Returns the state dict, named as by ``rename_vision_tower``, and what to tell of it: empty if nothing changed.
    Raises ``InputError`` naming the tensor that would be needed, or if patches do not fill the image.
    """
    settings = recognise_vision_tower(state)
    patch, old, name = settings["patch_size"], settings["image_size"], "embeddings.position_embedding"
    if size == old:
        return dict(state), ""
    if size % patch:
        raise InputError(f"images of {size} pixels are not filled by patches of {patch}")
    old, new = old // patch, size // patch
    first, grid = state[name][:, :1], state[name][:, 1:]  # (1, 1, D), (1, old², D)
    if grid.shape[1] != old * old:
        raise InputError(f"{grid.shape[1]} positions are no square grid")
    planes = grid.float().transpose(1, 2).reshape(1, -1, old, old)  # (1, D, old, old)
    planes = F.interpolate(planes, (new, new), mode="bicubic", align_corners=False)
    grid = planes.flatten(2).transpose(1, 2).to(first.dtype)  # (1, new², D)
    return {**state, name: torch.cat([first, grid], 1)}, f", positions resized from {old}×{old} to {new}×{new}"
