"""Weights of CLIP4CIR: of the original's two stages, or of SPN's stage 2."""

from collections.abc import Mapping
from typing import Any

from spn4cir.errors import InputError
from spn4cir.importers.openai_clip import drop_jit_numbers, name_clip_model
from spn4cir.importers.published import Published, find_state_dict


def convert_clip_weights(content: Mapping[str, Any], options: Mapping[str, Any]) -> Published:
    """Convert weights of the original (``CLIP``, or ``Combiner``, whose CLIP is another file) or SPN's ``state_dict``.

    Raises ``InputError`` if it is none of these, or if no ``model`` is stated and no model of OpenAI has these shapes.
    """
    key, state, ignored = find_state_dict(content, "CLIP", "state_dict", "Combiner", prefix="clip.")
    if key == "Combiner":
        if options.get("model"):
            raise InputError("it holds the Combiner alone, and its CLIP is that of --base: leave out --model")
        named = {f"combiner.{name}": value for name, value in state.items()}
        stated = {"fusion": "combiner", "rgb_last": True}
        return Published(stated, named, ignored, "Combiner, the original's names", lacks="CLIP")
    container = "state_dict, prefix clip."
    if key == "CLIP":
        container, state = "CLIP, OpenAI's names", {f"clip.{name}": value for name, value in state.items()}
    ignored |= drop_jit_numbers(state, "clip.")
    model = name_clip_model(options.get("model"), state)
    return Published({"model": model, "pretrained": None, "rgb_last": True}, state, ignored, container)
