"""CLIP from open_clip: models by name, folder or shapes, for the backbones that stand on one."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from spn4cir.errors import InputError
from spn4cir.images import Transform

EMBEDDED = Path(__file__).parent / "embedded" / "clip"
OPENAI = (  # quickgelu is what they were trained with: a plain name means another activation, and no shape tells
    "RN50-quickgelu", "RN101-quickgelu", "RN50x4-quickgelu", "RN50x16-quickgelu", "RN50x64-quickgelu",
    "ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu",
)  # fmt: skip
JIT_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Numbers beside the weights of OpenAI's archives."""


def load_clip(
    model: str, pretrained: str | None, load_weights: bool, pad_ratio: float | None
) -> tuple[Any, Callable[..., Tensor], Transform]:
    """A model of open_clip, its tokenizer (B texts → (B, context)), and its transform. Its scale gets no gradient.

    Args:
        model: ``embedded``, or whatever open_clip's ``create_model`` takes.
        pretrained: a tag of open_clip or a weights file; None for random weights, unless ``model`` brings its own.
        load_weights: False builds the architecture alone.
        pad_ratio: of the transform.

    Raises:
        InputError: if open_clip knows no such model, tag or file.
    """
    located = f"local-dir:{EMBEDDED}" if model == "embedded" else model
    try:
        with _missing_weights() as missing:
            clip = open_clip.create_model(
                located,
                pretrained=pretrained if load_weights else None,
                load_weights=load_weights,
                weights_only=True,
            )
            tokenizer = open_clip.get_tokenizer(located)
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot load CLIP {model!r}, pretrained {pretrained!r} (where there is no network, give a file of weights "
            f"as pretrained, or --init FOLDER of spn4cir-import): {said}"
        ) from None
    if load_weights and missing and located.startswith("local-dir:"):
        raise InputError(f"{located.removeprefix('local-dir:')} holds a config but no weights")
    for scalar in ("logit_scale", "logit_bias"):  # the loss has its own temperature
        if getattr(clip, scalar, None) is not None:
            getattr(clip, scalar).requires_grad_(False)
    size = clip.visual.image_size
    mean, std = tuple(clip.visual.image_mean), tuple(clip.visual.image_std)
    return clip, tokenizer, Transform(size[0] if isinstance(size, tuple) else size, pad_ratio, mean, std)


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collect open_clip's warnings that there are no weights: no news while a checkpoint is loaded, else an error.

    What it logs about a failed download is dropped: it raises the same.
    """
    texts: list[str] = []

    def pass_on(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "no CLIP weights" in text or text.startswith("No pretrained weights"):
            texts.append(text)
            return False
        return not text.startswith("Failed to download")

    root = logging.getLogger()
    root.addFilter(pass_on)
    try:
        yield texts
    finally:
        root.removeFilter(pass_on)


def _dimensions(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a config of open_clip states, read from shapes; heads are 64 wide in all of OpenAI's models.

    Raises:
        InputError: naming the tensor that would be needed.
    """

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
        text = {
            "context_length": context,
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // 64,
            "layers": count("transformer.resblocks."),
        }
        embed_dim = state["text_projection"].shape[1]
    except KeyError as error:
        raise InputError(f"the architecture cannot be recognised without {error}; name it with --model") from None
    except (AttributeError, IndexError, ValueError):
        raise InputError("the architecture cannot be recognised by these shapes; name it with --model") from None
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": size, **vision}, "text_cfg": text}


def recognise(state: Mapping[str, Tensor]) -> str:
    """open_clip's name of the model of OpenAI that has these shapes.

    Raises:
        InputError: with the dimensions found, if it is none of them.
    """
    found = _dimensions(state)
    for name in OPENAI:
        config = open_clip.get_model_config(name)
        if config["embed_dim"] == found["embed_dim"] and all(
            {**config[part], **found[part]} == config[part] for part in ("vision_cfg", "text_cfg")
        ):
            return name
    parts = {"": {"embed_dim": found["embed_dim"]}, "image ": found["vision_cfg"], "text ": found["text_cfg"]}
    told = ", ".join(f"{part}{key} {value}" for part, values in parts.items() for key, value in values.items())
    raise InputError(f"no model of OpenAI has {told}; name it: --model NAME of open_clip, or --model local-dir:FOLDER")
