"""Weights of FreestyleRet's published code, as the network that it computes."""

from collections.abc import Mapping
from typing import Any

import torch

from spn4cir.backbones.freestyle import STYLE
from spn4cir.backbones.shared_style import CHANNELS, StyleSpace, convert_filters
from spn4cir.errors import InputError
from spn4cir.importers.published import Published, recognising

PUBLISHED_MODEL = "ViT-L-14"
UNUSED = {
    "visual.": "the image tower a second time",
    "transformer.": "its transformer a third time",
    "gram_patch.": "never trained, and what is made of it never reaches the network",
    "gram_pool.": "never trained, and what is made of it never reaches the network",
    "gram_linear.": "never trained, and what is made of it never reaches the network",
    "style_patch.": "never trained and never called",
    "style_linear.": "never trained and never called",
}


def convert_freestyle_weights(content: Mapping[str, Any], options: Mapping[str, Any]) -> Published:
    """Convert the state dict of ``DeepStyleRetrieval``.

    Its two tables of prompts are the same for all pictures, and photographs are embedded with them too: that is
    ``prompts: shared``. Style vectors and centres are no part of such a file.

    Raises ``InputError`` if it is another file, or the model that is stated has other shapes.
    """
    if not {"style_prompt", "gram_prompt"} <= content.keys():
        first = ", ".join(map(repr, list(content)[:5])) or "nothing"
        raise InputError(f"style_prompt and gram_prompt, FreestyleRet's prompts, are not in it; found {first}")
    clip = {f"clip.{name.removeprefix('openclip.')}": v for name, v in content.items() if name.startswith("openclip.")}
    ignored = {name: why for name in content for begin, why in UNUSED.items() if name.startswith(begin)}
    for name in [name for name in ignored if name.startswith(("visual.", "transformer."))]:
        same = "clip." + ("visual." * name.startswith("transformer.")) + name
        if same not in clip or not torch.equal(content[name], clip[same]):
            raise InputError(f"{name} differs from openclip's own, and a model has one image tower")
    encoder = {name.removeprefix("gram_encoder."): v for name, v in content.items() if name.startswith("gram_encoder.")}
    state: dict[str, Any] = dict(clip)
    with recognising("a published FreestyleRet"):
        tokens, _ = content["style_prompt"].shape
        if content["gram_prompt"].shape != content["style_prompt"].shape:
            raise InputError("style_prompt and gram_prompt have different shapes, and both places have as many tokens")
        filters = convert_filters(encoder)
        state |= {f"filters.{name}": value for name, value in filters.items()}
        state |= {
            "tables.shallow.weight": content["style_prompt"][None],
            "tables.deep.weight": content["gram_prompt"][None],
        }
        layers = {name.split(".")[4] for name in clip if name.startswith("clip.visual.transformer.resblocks.")}
        for number in layers:
            for norm in ("ln_1", "ln_2"):
                for part in ("weight", "bias"):
                    theirs = f"clip.visual.transformer.resblocks.{number}.{norm}.{part}"
                    state[f"query_norms.{number}.{norm}.{part}"] = clip[theirs]
        state |= {f"query_norm.{part}": clip[f"clip.visual.ln_post.{part}"] for part in ("weight", "bias")}
    ignored |= {f"gram_encoder.{n}": "a layer of VGG behind relu2_1" for n in encoder if int(n.split(".")[0]) > 9}
    used = {f"gram_encoder.{n}.{part}" for n in (0, 2, 5, 9) for part in ("weight", "bias")}
    known = {"style_prompt", "gram_prompt"} | used | ignored.keys()
    if unknown := [name for name in content if name not in known and not name.startswith("openclip.")]:
        raise InputError(f"{unknown[0]!r} is unknown here")
    space = StyleSpace(
        CHANNELS[-1] * (CHANNELS[-1] + 1) // 2, len(STYLE["names"]), STYLE["width"], STYLE["temperature"]
    )
    state |= {f"style_space.{name}": value for name, value in space.state_dict().items()}
    stated: dict[str, Any] = {"model": options.get("model") or PUBLISHED_MODEL, "pretrained": None, "prompts": "shared"}
    stated |= {"place": "both", "tokens": int(tokens), "trains": "norms", "style": {"filters": "vgg"}}
    return Published(stated, state, ignored, "DeepStyleRetrieval, its state dict")
