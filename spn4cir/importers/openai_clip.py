"""OpenAI's CLIP models: which of them a published state dict belongs to."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import open_clip
from torch import Tensor

from spn4cir.errors import InputError

OPENAI = (  # quickgelu is what they were trained with: a plain name means another activation, and no shape tells
    "RN50-quickgelu", "RN101-quickgelu", "RN50x4-quickgelu", "RN50x16-quickgelu", "RN50x64-quickgelu",
    "ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu",
)  # fmt: skip


def drop_jit_numbers(state: dict[str, Any], prefix: str) -> dict[str, str]:
    """Remove the numbers that OpenAI's archives hold beside the weights; returns their names with the reason."""
    names = [prefix + name for name in ("input_resolution", "context_length", "vocab_size")]
    reason = "a number beside the weights of OpenAI's archives"
    return {name: reason for name in names if state.pop(name, None) is not None}


def name_clip_model(stated: str | None, state: Mapping[str, Tensor]) -> str:
    """The stated model of open_clip, or the model of OpenAI that has the shapes of what begins with ``clip.``.

    Raises ``InputError`` if the stated one has another activation than OpenAI's weights, or no model has these shapes.
    """
    clip = {name.removeprefix("clip."): value for name, value in state.items() if name.startswith("clip.")}
    model = stated or recognise_clip_model(clip)
    if f"{model}-quickgelu" in OPENAI:
        raise InputError(f"{model} has another activation than OpenAI's weights: the model is {model}-quickgelu")
    return model


def _read_dimensions(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read from shapes what open_clip's config states; heads are 64 wide. Raises ``InputError`` without a tensor."""

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    try:
        vision: dict[str, Any]
        if "visual.proj" in state:
            width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
            size = patch * isqrt(state["visual.positional_embedding"].shape[0] - 1)  # one more for the class
            vision = {"layers": count("visual.transformer.resblocks."), "width": width, "patch_size": patch}
        else:
            width = state["visual.layer1.0.conv1.weight"].shape[0]
            size = 32 * isqrt(state["visual.attnpool.positional_embedding"].shape[0] - 1)  # one more for the mean
            vision = {"layers": [count(f"visual.layer{n}.") for n in (1, 2, 3, 4)], "width": width, "patch_size": None}
        context, text_width = state["positional_embedding"].shape
        text = {"context_length": context, "vocab_size": state["token_embedding.weight"].shape[0]}
        text |= {"width": text_width, "heads": text_width // 64, "layers": count("transformer.resblocks.")}
        embed_dim = state["text_projection"].shape[1]
    except KeyError as error:
        raise InputError(f"the architecture cannot be recognised without {error}; name it with --model") from None
    except (AttributeError, IndexError, ValueError):
        raise InputError("the architecture cannot be recognised by these shapes; name it with --model") from None
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": size, **vision}, "text_cfg": text}


def recognise_clip_model(state: Mapping[str, Tensor]) -> str:
    """Return open_clip's name of the OpenAI model with these shapes. Raises ``InputError`` if there is none."""
    found = _read_dimensions(state)
    for name in OPENAI:
        config = open_clip.get_model_config(name)
        if config["embed_dim"] == found["embed_dim"] and all(
            {**config[part], **found[part]} == config[part] for part in ("vision_cfg", "text_cfg")
        ):
            return name
    parts = {"": {"embed_dim": found["embed_dim"]}, "image ": found["vision_cfg"], "text ": found["text_cfg"]}
    told = ", ".join(f"{part}{key} {value}" for part, values in parts.items() for key, value in values.items())
    raise InputError(f"no model of OpenAI has {told}; name it: --model NAME of open_clip, or --model local-dir:FOLDER")
