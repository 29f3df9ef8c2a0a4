"""Weights of TG-CIR, as SPN published them: of its stage 1, or of SPN's stage 2."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spn4cir.backbones.tgcir import LOCALS
from spn4cir.errors import InputError
from spn4cir.importers.openai_clip import drop_jit_numbers, name_clip_model
from spn4cir.importers.published import Published, find_state_dict

RENAMED = {  # prefixes, and whole names
    "backbone.clip.": "clip.", "backbone.fc.": "image_fc.", "backbone.text_fc.": "text_fc.",
    "s_remain_map.": "gate.", "t_remain_map.": "teacher_remain.", "t_replace_map.": "teacher_replace.",
    "backbone.masks.weight": "masks", "backbone.masks_text.weight": "text_masks", "local_weight": "local_weight",
}  # fmt: skip
ALIAS, ALIASED = "backbone.image_backbone.", "backbone.clip.visual."


def convert_tgcir_weights(content: Mapping[str, Any], options: Mapping[str, Any]) -> Published:
    """Convert weights of stage 1 or of SPN's stage 2, both under ``state_dict``; the latter has twins for the text.

    Raises ``InputError`` if it is neither, or if no ``model`` is stated and no model of OpenAI has these shapes.
    """
    _, published, ignored = find_state_dict(content, "state_dict", prefix="backbone.")
    temperature = None
    if "loss_T" in published:
        scale = published.pop("loss_T")
        number = float(scale) if isinstance(scale, Tensor) and scale.numel() == 1 else float("nan")
        if not 0 < number < float("inf"):
            raise InputError("loss_T, the scale of the logits, is no number above 0")
        temperature = 1 / number
        ignored["loss_T"] = f"learned scale {number:.4g} of the logits: temperature {temperature:.4g} in the recipe"
    ignored |= drop_jit_numbers(published, "backbone.clip.") | _drop_alias(published)
    separated = any(name.startswith(("backbone.tokenlearn_text.", "backbone.masks_text.")) for name in published)
    state = _join_learner(published, "backbone.tokenlearn.", "learner")
    if separated:
        state |= _join_learner(published, "backbone.tokenlearn_text.", "text_learner")
    state |= {_rename(name): value for name, value in published.items()}
    model = name_clip_model(options.get("model"), state)
    container = f"state_dict, TG-CIR's names, {'stage 2: text with twins' if separated else 'stage 1'}"
    stated = {"model": model, "pretrained": None, "rgb_last": True, "separated": separated}
    return Published(stated, state, ignored, container, temperature=temperature)


def _drop_alias(published: dict[str, Any]) -> dict[str, str]:
    """Remove the visual tower's second set of names, which must be the same weights; returns them with the reason."""
    ignored = {}
    for name in [name for name in published if name.startswith(ALIAS)]:
        twin = ALIASED + name.removeprefix(ALIAS)
        one, two = published.pop(name), published.get(twin)
        if not (isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two)):
            raise InputError(f"{name} should be the same tensor as {twin}, and is not")
        ignored[name] = "a second name of the visual tower's weights"
    return ignored


def _join_learner(published: dict[str, Any], prefix: str, name: str) -> dict[str, Any]:
    """Remove the convolutions over one position, (1, E, 1) each; returns them as the rows of one linear layer."""
    state: dict[str, Any] = {}
    for kind in ("weight", "bias"):
        keys = [f"{prefix}tokenizers.{q}.conv.0.{kind}" for q in range(LOCALS)]
        rows = [published.pop(key, None) for key in keys]
        for key, row in zip(keys, rows, strict=True):
            if not isinstance(row, Tensor):
                raise InputError(f"{key} is missing" if row is None else f"{key} is {type(row).__name__}, not a tensor")
            right = (1, *row.shape[1:2], 1) if kind == "weight" else (1,)
            if row.shape != right or row.shape != rows[0].shape:
                raise InputError(f"{key} has shape {tuple(row.shape)}, where a convolution over one position belongs")
        state[f"{name}.{kind}"] = torch.cat(rows).flatten(1) if kind == "weight" else torch.cat(rows)
    return state


def _rename(name: str) -> str:
    for prefix, own in RENAMED.items():
        if name.startswith(prefix) if prefix.endswith(".") else name == prefix:
            return own + name.removeprefix(prefix)
    raise InputError(f"{name!r} is no name of TG-CIR's weights")
