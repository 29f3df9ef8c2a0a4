"""Image encoders that rank: Unicom, open_clip, timm, transformers, and models of this project.

Each turns images into L2-normalised vectors, whose products are the similarities, in float32 whatever its weights are.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from spn4cir.backbone import l2_normalize
from spn4cir.backbones import build_backbone
from spn4cir.backbones.shared_towers import TOWERS, load_tower
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


def _of_tower(kind: str, model: str) -> Parts:
    tower = load_tower(f"{kind}:{model}")
    return tower.module, tower.transform, lambda pixels: l2_normalize(tower.read(pixels)), tower.says


LOADERS: dict[str, Callable[[str], Parts]] = {
    "embedded": lambda _: _of_backbone(build_backbone(TrainConfig.backbone, model="embedded")),
    "unicom": _unicom,
    "run": lambda model: _of_backbone(load_model(Path(model))),
    **{kind: partial(_of_tower, kind) for kind in TOWERS if kind != "run"},
}
