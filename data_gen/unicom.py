"""Unicom's vision transformers, in the names of their published weights.

Source: An et al., "Unicom: Universal and Compact Representation Learning for Image Retrieval", ICLR 2023.
"""

import os
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.errors import InputError
from spn4cir.files import hash_files, locked

RELEASES = "https://github.com/deepglint/unicom/releases/download"
BATCH_NORM_EPS = 2e-5
# how many batches BatchNorm saw in training: evaluation does not read them, so a file may lack them
COUNTERS = ("feature.1.num_batches_tracked", "feature.3.num_batches_tracked")


class Size(NamedTuple):
    """Dimensions of a model: images of ``image``² pixels in patches of ``patch``², vectors of ``embedding`` numbers."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    embedding: int

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.image // self.patch) ** 2


class Weights(NamedTuple):
    """A published file: its name, the release it belongs to, and the SHA-256 of its content."""

    file: str
    release: str
    sha256: str

    @property
    def url(self) -> str:
        """Where it is published."""
        return f"{RELEASES}/{self.release}/{self.file}"


SIZES = {
    "ViT-B/32": Size(224, 32, 768, 12, 12, 512),
    "ViT-B/16": Size(224, 16, 768, 12, 12, 768),
    "ViT-L/14": Size(224, 14, 1024, 24, 16, 768),
    "ViT-L/14@336px": Size(336, 14, 1024, 24, 16, 768),
}
PUBLISHED = {
    "ViT-B/32": Weights("FP16-ViT-B-32.pt", "b32", "f9d5696a9b58dbbbefee2d31615ca59084f2895a0fdd2ca4c235e0f9b2793f7a"),
    "ViT-B/16": Weights("FP16-ViT-B-16.pt", "b16", "c04f324f7c3b4435667236ec6c0eca1cd62f9d64fbfc2d06f8e8e60e6497edef"),
    "ViT-L/14": Weights("FP16-ViT-L-14.pt", "l14", "ff3ab62ff782876460099e6e0ee17b73a7c01109de2fffd595f16f4129404bbd"),
    "ViT-L/14@336px": Weights(
        "FP16-ViT-L-14-336px.pt", "l14_336px", "3916ab5aed3b522fc90345be8b4457fe5dad60801ad2af5a6871c0c096e8d7ea"
    ),
}


class Block(nn.Module):
    """``x + proj(attention(norm1(x)))``, then ``x + fc2(relu6(fc1(norm2(x))))``; queries, keys, values have no bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, width) → the same shape."""
        parts = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, P, 3, heads, d)
        query, key, value = parts.movedim(1, 3).unbind(1)  # each (B, heads, P, d)
        mixed = F.scaled_dot_product_attention(query, key, value)  # scaled by 1 / √d
        x = x + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        x = x + self.mlp["fc2"](F.relu6(self.mlp["fc1"](self.norm2(x))))
        return x


class Unicom(nn.Module):
    """A vision transformer without class token: ``BN(W2 BN(W1 [norm(x_1); …; norm(x_P)]))`` of its patch vectors.

    ``size`` is one of ``SIZES`` by name, or dimensions; weights are random.
    """

    def __init__(self, size: "str | Size" = "ViT-L/14"):
        super().__init__()
        self.size = size if isinstance(size, Size) else SIZES[known_size(size)]
        width, flat = self.size.width, self.size.patches * self.size.width
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, self.size.patch, self.size.patch)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.size.patches, width))
        self.blocks = nn.ModuleList(Block(width, self.size.heads) for _ in range(self.size.depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(flat, width, bias=False),
            nn.BatchNorm1d(width, eps=BATCH_NORM_EPS),
            nn.Linear(width, self.size.embedding, bias=False),
            nn.BatchNorm1d(self.size.embedding, eps=BATCH_NORM_EPS),
        )
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, image, image) → (B, embedding), not normalised."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed  # (B, P, width)
        for block in self.blocks:
            x = block(x)
        vectors: Tensor = self.feature(self.norm(x).flatten(1))
        return vectors


def known_size(name: str) -> str:
    """The published name of a size. Raises ``InputError`` that lists them."""
    full = f"{name}px" if name.endswith("@336") else name
    if full not in SIZES:
        raise InputError(f"unicom has no size {name!r}; known: {', '.join(SIZES)}, or the file of their weights")
    return full


def load_unicom(path: Path, size: Size | None = None) -> Unicom:
    """The model whose weights, under the published names, a file of ``torch.save`` holds: in float32, on the CPU.

    Without a size, the published ones are recognised by their shapes. Raises ``InputError`` if the file does not fit.
    """
    from spn4cir.checkpoints import differences
    from spn4cir.importers import read_published

    state = _without_prefix(read_published(path), path)
    with torch.device("meta"):  # the largest layer has a gigabyte, which would be drawn at random in vain
        model = Unicom(size or detect_size(state, path))
    own = model.state_dict()
    state = {name: torch.zeros((), dtype=torch.long) for name in COUNTERS} | state
    parts = differences(own, state)
    wrong = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in parts["of another shape"]]
    parts["of another shape"] = wrong
    if told := "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in parts.items() if names):
        raise InputError(f"{path} does not fit unicom: {told}")
    for name in own:
        state[name] = state[name].to(own[name].dtype, copy=True)  # a copy, as the file is mapped into memory
        if not state[name].isfinite().all():
            raise InputError(f"{path}: {name} holds numbers that are not finite: download it again")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def detect_size(state: Mapping[str, Tensor], path: Path) -> Size:
    """The published size that has these shapes. Raises ``InputError`` with the dimensions found."""
    try:
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        image, embedding = patch * isqrt(state["pos_embed"].shape[1]), state["feature.2.weight"].shape[0]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path} holds no weights of unicom: {' '.join(str(error).split())} not found in it") from None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for size in SIZES.values():
        if (size.image, size.patch, size.width, size.embedding) == (image, patch, width, embedding):
            return size
    told = f"images of {image} pixels, patches of {patch}, width {width}, {depth} blocks, vectors of {embedding}"
    raise InputError(f"{path} is none of unicom's sizes {', '.join(SIZES)}: {told}")


def find_weights(name: str) -> Path:
    """The published file of a size: in ``$SPN4CIR_CACHE/unicom`` (``~/.cache/spn4cir/unicom``), or downloaded into it.

    Raises ``InputError`` if the size is unknown, or the file neither there nor to be had, or its checksum is another.
    """
    weights = PUBLISHED[known_size(name)]
    folder = Path(os.environ.get("SPN4CIR_CACHE") or Path.home() / ".cache" / "spn4cir") / "unicom"
    path = folder / weights.file
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(path.name + ".lock")):  # of several processes the first downloads it
                if not path.is_file():
                    torch.hub.download_url_to_file(weights.url, str(path), hash_prefix=weights.sha256)
        except (OSError, RuntimeError) as error:
            told = f"{weights.file}, which cannot be downloaded ({' '.join(str(error).split())[:150]})"
            raise InputError(f"unicom:{name} needs {told}: get {weights.url} and put it in {folder}") from None
    check_weights(path)
    return path


def check_weights(path: Path) -> str:
    """SHA-256 of a file. Raises ``InputError`` if it is named as a published one and holds something else."""
    if not path.is_file():
        raise InputError(f"{path} is a folder: give the file of weights" if path.is_dir() else f"{path} is missing")
    found = hash_files(path)
    for weights in PUBLISHED.values():
        if weights.file == path.name and weights.sha256 != found:
            told = f"its SHA-256 is {found}, expected {weights.sha256}"
            advice = f"delete it and download {weights.url} again (weights of your own need another name)"
            raise InputError(f"{path} is not what was published: {told}; {advice}")
    return found


def _without_prefix(content: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    """Tensors by published name: training in several processes puts ``module.`` before all of them."""
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) < len(content):
        raise InputError(f"{path} holds more than named tensors: {_some([n for n in content if n not in tensors])}")
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
