"""Image towers of other libraries, by names such as ``timm:MODEL``: a module, its transform, and which vector it gives.

Where ``READS_WEIGHTS`` is false they have random weights, for a checkpoint to fill.
"""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from spn4cir.backbones.shared_clip import load_clip
from spn4cir.backbones.shared_weights import READS_WEIGHTS
from spn4cir.errors import InputError

Preprocess: TypeAlias = Callable[[Image.Image], Tensor]  # RGB image → (3, H, W)
Read: TypeAlias = Callable[[Tensor], Tensor]  # (B, 3, H, W) on the module's device → (B, D)
POOLED = "the pooled output"


class Tower(NamedTuple):
    """An image encoder.

    Attributes:
        module: what has the weights.
        transform: RGB image → (3, H, W).
        read: (B, 3, H, W) on the module's device → (B, D), as the module gives it.
        says: which vector that is.
        known: what a checkpoint notes, to build the same tower without its weights.
    """

    module: nn.Module
    transform: Preprocess
    read: Read
    says: str
    known: Mapping[str, Any] = MappingProxyType({})


def load_tower(name: str, known: Mapping[str, Any] = MappingProxyType({})) -> Tower:
    """The tower of ``embedded`` or ``KIND:MODEL``, kinds those of ``TOWERS``; ``known`` is what was noted of it.

    Raises ``InputError`` if it cannot be had.
    """
    if name == "embedded":
        clip, _, transform = load_clip("embedded", None, pad_ratio=None)
        return Tower(clip.visual, transform, clip.visual, "the image embedding")
    kind, _, model = name.partition(":")
    if kind not in TOWERS or not model:
        forms = "embedded, open_clip:MODEL:TAG, timm:MODEL, transformers:NAME and run:FOLDER"
        raise InputError(f"image tower {name!r} is unknown; known: {forms}")
    return TOWERS[kind](model, known)


def _failed(kind: str, model: str, error: Exception, advice: str) -> InputError:
    said = " ".join(str(error).split())[:250] or type(error).__name__
    return InputError(f"{kind}:{model} cannot be loaded{advice}: {said}")


def _download(kind: str, hub: str, then: str = "") -> str:
    then = then or f"give its folder, as {kind}:FOLDER"
    return f" (where there is no network: get https://huggingface.co/{hub} and {then})" if hub else ""


def split_tag(model: str) -> tuple[str, str | None]:
    """``MODEL:TAG``, ``local-dir:FOLDER`` or ``hf-hub:NAME`` of open_clip → model and tag. Raises ``InputError``."""
    return (model, None) if model.partition(":")[0] in ("local-dir", "hf-hub") else _tagged(model)


def _open_clip(model: str, known: Mapping[str, Any]) -> Tower:
    import open_clip

    schema, _, hub = model.partition(":")
    name, tag = split_tag(model)
    advice = _download("open_clip", hub if schema == "hf-hub" else "", "give its folder, as open_clip:local-dir:FOLDER")
    if tag and READS_WEIGHTS.get():
        about = open_clip.get_pretrained_cfg(name, tag)
        advice = _download("open_clip", about.get("hf_hub", "").strip("/"), f"give its file, as open_clip:{name}:FILE")
    try:
        clip, _, _ = load_clip(name, tag, pad_ratio=None)
    except InputError as error:  # its advice is for the command line of training
        raise _failed("open_clip", model, ValueError(str(error).rpartition("): ")[2]), advice) from None
    prepare = open_clip.transform.PreprocessCfg(**clip.visual.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(prepare, is_train=False)
    return Tower(clip, transform, clip.encode_image, "the image embedding")


def _tagged(model: str) -> tuple[str, str]:
    """Model and tag of open_clip, with the activation that the weights of that tag were trained with."""
    import open_clip

    name, _, tag = model.partition(":")
    if not READS_WEIGHTS.get():
        return name, tag
    if name not in open_clip.list_models():
        raise InputError(f"open_clip has no model {name!r}; {_close(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags and not Path(tag).is_file():
        known = f"known: {', '.join(tags[:8])}{' …' * (len(tags) > 8)} or a file" if tags else "there are but files"
        raise InputError(f"open_clip:{name} needs a tag of pretrained weights behind a colon, got {tag!r}; {known}")
    trained = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    if tag in tags and trained != open_clip.get_model_config(name).get("quick_gelu", False):
        other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        raise InputError(f"{tag} of open_clip's {name} has another activation: it is open_clip:{other}:{tag}")
    return name, tag


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 5, 0.3) or known[:5]
    return f"the closest of {len(known)} are {', '.join(close)}"


def _timm(model: str, known: Mapping[str, Any]) -> Tower:
    import timm

    name = f"local-dir:{model}" if Path(model).is_dir() else model
    if ":" not in name and not timm.is_model(name):
        raise InputError(f"timm has no model {model!r}; {_close(model, timm.list_models(pretrained=True))}")
    config = timm.get_pretrained_cfg(name) if ":" not in name else None
    hub = name.removeprefix("hf-hub:") if config is None else config.hf_hub_id or ""
    data: Any = timm.data  # without types
    try:
        network = timm.create_model(name, pretrained=READS_WEIGHTS.get(), num_classes=0)
        transform = data.create_transform(**data.resolve_model_data_config(network), is_training=False)
    except (RuntimeError, ValueError, OSError, KeyError, AttributeError) as error:
        raise _failed("timm", model, error, _download("timm", "" if Path(model).is_dir() else hub)) from None
    return Tower(network, transform, network, "the pooled features")


def _transformers(model: str, known: Mapping[str, Any]) -> Tower:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    missing: list[str] = []
    try:
        processor = AutoImageProcessor.from_pretrained(model)
        if READS_WEIGHTS.get():
            network, about = AutoModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
            missing = list(about["missing_keys"])
        else:
            network = AutoModel.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        advice = _download("transformers", "" if Path(model).is_dir() else model)
        raise _failed("transformers", model, error, advice) from None
    lost = [name for name in missing if "pooler" not in name]
    if lost:
        raise InputError(f"transformers:{model} lacks {len(lost)} weights of its model, such as {lost[0]}")

    def transform(picture: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    has_pooler = known["vector"] == POOLED if known else not missing
    read, says = _choose_vector(network, transform, has_pooler)
    if read is None:
        raise InputError(f"transformers:{model} gives no vector for an image: {says}")
    return Tower(network, transform, read, says, {"vector": says})


def _choose_vector(
    network: Any, transform: Callable[[Image.Image], Tensor], pooler: bool
) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """Which vector of a model of transformers stands for an image: a function of pixels, and how to call it.

    The image embedding of models of images and texts; else the pooled output, unless its weights are missing (not
    ``pooler``) and would be random, as a classifier's; else the class token; else the mean over all places.
    """

    white = transform(Image.new("RGB", (64, 64), "white"))[None]
    images = getattr(network, "get_image_features", None)
    try:
        with torch.inference_mode():
            output = network.eval()(pixel_values=white) if images is None else images(pixel_values=white)
    except (RuntimeError, ValueError, TypeError) as error:
        return None, " ".join(str(error).split())[:200]
    if images is not None:
        read, says = (lambda pixels: _pooled(images(pixel_values=pixels)), "the image embedding")
        return (read, says) if _pooled(output).ndim == 2 else (None, f"its features are {tuple(_pooled(output).shape)}")
    if pooler and getattr(output, "pooler_output", None) is not None:
        return lambda pixels: network(pixel_values=pixels).pooler_output.flatten(1), POOLED
    if getattr(output, "last_hidden_state", None) is None:
        return None, f"its output is {', '.join(output)}"
    if any(name.endswith("cls_token") for name, _ in network.named_parameters()):
        return lambda pixels: network(pixel_values=pixels).last_hidden_state[:, 0], "the class token"

    def mean(pixels: Tensor) -> Tensor:
        states: Tensor = network(pixel_values=pixels).last_hidden_state  # (B, L, D) or (B, D, H, W)
        return states.mean(1) if states.ndim == 3 else states.flatten(2).mean(2)

    return mean, "the mean over all places"


def _pooled(output: Any) -> Tensor:
    """The pooled vector of an output, which older models give by itself."""
    pooled: Tensor = output if hasattr(output, "ndim") else output.pooler_output
    return pooled


TOWERS: dict[str, Callable[[str, Mapping[str, Any]], Tower]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "transformers": _transformers,
}
