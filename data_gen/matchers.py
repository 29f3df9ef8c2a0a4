"""Image encoders that rank: Unicom, open_clip, timm, transformers, and models of this project.

Each turns images into L2-normalised vectors, whose products are the similarities, in float32 whatever its weights are.
"""

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from spn4cir.backbone import l2_normalize
from spn4cir.backbones import build_backbone
from spn4cir.backbones.shared_clip import load_clip
from spn4cir.checkpoints import load_model
from spn4cir.config import TrainConfig
from spn4cir.data_gen.steps import EMBEDDED
from spn4cir.data_gen.unicom import PUBLISHED, SIZES, check_weights, find_weights, known_size, load_unicom
from spn4cir.errors import InputError
from spn4cir.files import hash_files
from spn4cir.images import Transform, crop_to_middle

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".json")  # files of a model's folder that decide its vectors
Preprocess: TypeAlias = Callable[[Image.Image], Tensor]  # RGB image → (3, H, W)
Read: TypeAlias = Callable[[Tensor], Tensor]  # (B, 3, H, W) on the module's device → (B, E), of unit norm, in float32
Parts: TypeAlias = tuple[nn.Module, Preprocess, Read, str]  # all that makes a ``Matcher`` but where it comes from


class Matcher:
    """An image encoder, put in eval mode; ``made_by`` is its kind, model and weights, ``says`` the vector it gives."""

    def __init__(self, module: nn.Module, transform: Preprocess, vectors: Read, made_by: dict[str, Any], says: str):
        self.module, self._vectors = module.eval().requires_grad_(False), vectors
        is_bounded = isinstance(transform, Transform)  # those of other packages resize pictures of any length
        self.transform = transform if is_bounded else lambda picture: transform(crop_to_middle(picture))
        self.made_by, self.says = made_by, says

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> "Matcher":
        """Move it there."""
        self.module.to(device)
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, E) in float32, of unit norm, on the device of the model."""

        with torch.inference_mode():
            return self._vectors(pixels.to(self.device))


def identify(name: str) -> dict[str, Any]:
    """What decides a matcher's vectors: kind, model, and the digest of its weights where they are local.

    No model is built. A local one may be moved. Raises ``InputError`` if there is no such kind of matcher, or what it
    names locally is missing.
    """
    kind, model = _split(name)
    if kind == "embedded":
        return {"kind": kind, "model": kind, "weights": content_digest(EMBEDDED / "clip")}
    if kind == "unicom":
        found = check_weights(Path(model)) if is_file_of_unicom(model) else PUBLISHED[known_size(model)].sha256
        return {"kind": kind, "model": {w.sha256: size for size, w in PUBLISHED.items()}.get(found), "weights": found}
    if kind == "run":
        files = [Path(model) / file for file in ("model.json", "model.safetensors")]
        return {"kind": kind, "model": "a folder", "weights": content_digest(*files)}
    local = _local(kind, model)
    if local is not None:
        model = model.partition(":")[0] if local.is_file() else "a folder"
    return {"kind": kind, "model": model, "weights": content_digest(local) if local else None}


def load_matcher(name: str) -> Matcher:
    """The matcher of a name such as ``unicom:ViT-L/14``, on the CPU; ``GenerateConfig`` lists the kinds.

    Raises ``InputError`` if its weights are missing and cannot be downloaded.
    """
    kind, model = _split(name)
    made_by = identify(name)
    module, transform, vectors, says = LOADERS[kind](model)
    return Matcher(module, transform, vectors, made_by, says)


def content_digest(*paths: Path) -> str:
    """SHA-256 of files, or of the model files of a folder, names included. Raises ``InputError`` for a missing one."""
    total = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.iterdir() if p.suffix in WEIGHTS) if path.is_dir() else [path]
        for file in files:
            try:
                total.update(f"{file.name} {hash_files(file)}\n".encode())
            except FileNotFoundError:
                raise InputError(f"{file.parent} holds no model: {file.name} is missing") from None
    return total.hexdigest()


def _split(name: str) -> tuple[str, str]:
    kind, _, model = name.partition(":")
    if kind not in LOADERS or bool(model) == (kind == "embedded"):
        known = "embedded, unicom:ViT-L/14 (or FILE), open_clip:MODEL:TAG, timm:MODEL, transformers:NAME and run:FOLDER"
        raise InputError(f"matcher {name!r} is unknown; known: {known}")
    return kind, model


def _local(kind: str, model: str) -> Path | None:
    """The folder or file that a model's name stands for or ends with, if it does."""
    path = Path(model.removeprefix("local-dir:"))
    if kind == "open_clip" and not model.startswith("local-dir:"):  # MODEL:FILE
        file = Path(model.partition(":")[2])
        return file if file.is_file() else None
    if not path.is_dir() and model.startswith(("local-dir:", "/", ".", "~")):
        raise InputError(f"matcher {kind}:{model}: there is no folder {path}")
    return path if path.is_dir() else None


def is_file_of_unicom(model: str) -> bool:
    """Whether what stands behind ``unicom:`` is a file rather than a size."""
    return model not in SIZES and (Path(model).suffix in WEIGHTS or Path(model).exists())


def _failed(kind: str, model: str, error: Exception, advice: str) -> InputError:
    said = " ".join(str(error).split())[:250] or type(error).__name__
    return InputError(f"matcher {kind}:{model} cannot be loaded{advice}: {said}")


def _download(kind: str, hub: str, then: str = "") -> str:
    then = then or f"give its folder, as {kind}:FOLDER"
    return f" (where there is no network: get https://huggingface.co/{hub} and {then})" if hub else ""


def _of_backbone(backbone: Any) -> Parts:
    """Its target vector as it is; of several the mean, of unit norm again."""

    def vectors(pixels: Tensor) -> Tensor:
        targets: Tensor = backbone.encode_target(pixels)  # (B, K, E)
        return targets[:, 0].float() if targets.shape[1] == 1 else l2_normalize(targets.float().mean(1))

    return backbone, backbone.transform, vectors, "the target vector, or the mean of several"


def _unicom(model: str) -> Parts:
    is_file = is_file_of_unicom(model)
    network = load_unicom(Path(model)) if is_file else load_unicom(find_weights(model), SIZES[known_size(model)])
    transform = Transform(network.size.image, pad_ratio=None)  # resized, cropped and normalised as CLIP's images are
    return network, transform, lambda pixels: l2_normalize(network(pixels)), "the projection of all patches"


def _open_clip(model: str) -> Parts:
    import open_clip

    schema, _, hub = model.partition(":")
    name, tag = (model, None) if schema in ("local-dir", "hf-hub") else _tagged(model)
    advice = _download("open_clip", hub if schema == "hf-hub" else "", "give its folder, as open_clip:local-dir:FOLDER")
    if tag:
        known = open_clip.get_pretrained_cfg(name, tag)
        advice = _download("open_clip", known.get("hf_hub", "").strip("/"), f"give its file, as open_clip:{name}:FILE")
    try:
        clip, _, _ = load_clip(name, tag, pad_ratio=None)
    except InputError as error:  # its advice is for the command line of training
        raise _failed("open_clip", model, ValueError(str(error).rpartition("): ")[2]), advice) from None
    prepare = open_clip.transform.PreprocessCfg(**clip.visual.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(prepare, is_train=False)
    return clip, transform, lambda pixels: l2_normalize(clip.encode_image(pixels)), "the image embedding"


def _tagged(model: str) -> tuple[str, str]:
    """Model and tag of open_clip, with the activation that the weights of that tag were trained with."""
    import open_clip

    name, _, tag = model.partition(":")
    if name not in open_clip.list_models():
        raise InputError(f"open_clip has no model {name!r}; {_close(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags and not Path(tag).is_file():
        known = f"known: {', '.join(tags[:8])}{' …' * (len(tags) > 8)} or a file" if tags else "there are but files"
        raise InputError(f"open_clip:{name} needs a tag of pretrained weights behind a colon, got {tag!r}; {known}")
    trained = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    if tag in tags and trained != open_clip.get_model_config(name).get("quick_gelu", False):
        other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        raise InputError(f"{tag} of open_clip's {name} has another activation: the matcher is open_clip:{other}:{tag}")
    return name, tag


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 5, 0.3) or known[:5]
    return f"the closest of {len(known)} are {', '.join(close)}"


def _timm(model: str) -> Parts:
    import timm

    name = f"local-dir:{model}" if Path(model).is_dir() else model
    if ":" not in name and not timm.is_model(name):
        raise InputError(f"timm has no model {model!r}; {_close(model, timm.list_models(pretrained=True))}")
    config = timm.get_pretrained_cfg(name) if ":" not in name else None
    hub = name.removeprefix("hf-hub:") if config is None else config.hf_hub_id or ""
    data: Any = timm.data  # without types
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
        transform = data.create_transform(**data.resolve_model_data_config(network), is_training=False)
    except (RuntimeError, ValueError, OSError, KeyError, AttributeError) as error:
        raise _failed("timm", model, error, _download("timm", "" if Path(model).is_dir() else hub)) from None
    return network, transform, lambda pixels: l2_normalize(network(pixels)), "the pooled features"


def _transformers(model: str) -> Parts:
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(model)
        network, about = AutoModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        advice = _download("transformers", "" if Path(model).is_dir() else model)
        raise _failed("transformers", model, error, advice) from None
    lost = [name for name in about["missing_keys"] if "pooler" not in name]
    if lost:
        raise InputError(f"transformers:{model} lacks {len(lost)} weights of its model, such as {lost[0]}")

    def transform(picture: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    read, says = _choose_vector(network, transform, pooler=not about["missing_keys"])
    if read is None:
        raise InputError(f"matcher transformers:{model} gives no vector for an image: {says}")
    return network, transform, lambda pixels: l2_normalize(read(pixels)), says


def _choose_vector(network: Any, transform: Preprocess, pooler: bool) -> tuple[Read | None, str]:
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
        return lambda pixels: network(pixel_values=pixels).pooler_output.flatten(1), "the pooled output"
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


LOADERS: dict[str, Callable[[str], Parts]] = {
    "embedded": lambda _: _of_backbone(build_backbone(TrainConfig.backbone, model="embedded")),
    "unicom": _unicom,
    "open_clip": _open_clip,
    "timm": _timm,
    "transformers": _transformers,
    "run": lambda model: _of_backbone(load_model(Path(model))),
}
