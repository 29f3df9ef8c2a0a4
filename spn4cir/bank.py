"""The bank: frozen features of images, each unique image encoded once, kept on disk under its fingerprint."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spn4cir.backbone import Backbone
from spn4cir.errors import InputError
from spn4cir.images import ImageSource
from spn4cir.types import ImageFeatures


class StoredRows:
    """Rows of an array on disk, memory-mapped: only those that are asked for are read.

    Args:
        path: a ``.npy`` file.

    Raises:
        ValueError, OSError, EOFError: if it is none, or is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self._array: np.memmap[Any, Any] = np.load(path, mmap_mode="c", allow_pickle=False)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """A copy of these rows, in the type they are stored in."""
        return torch.from_numpy(np.ascontiguousarray(self._array[list(rows)]))

    def __len__(self) -> int:
        return len(self._array)

    def __reduce__(self) -> tuple[type, tuple[Path]]:  # else a copy of the whole array would go to a worker process
        return StoredRows, (self.path,)

    def whole(self) -> Tensor:
        """All rows as a tensor that lies on disk."""
        return torch.from_numpy(self._array)


@dataclass
class Bank:
    """Features of N unique images; ``rows`` says which image is where.

    ``reference`` (N, L, D) stays on disk and is gathered by rows; None where it is recomputed instead. ``target``
    (N, K, E) is on the device, or on disk where the device is a CPU.
    """

    reference: StoredRows | None
    target: Tensor
    rows: dict[str, int]
    fingerprint: str

    def to(self, device: torch.device) -> "Bank":
        """The same bank with its targets on another device."""
        return replace(self, target=self.target.to(device))

    def references(self, image_ids: Sequence[str]) -> Tensor:
        """(B, L, D) of these images, as stored."""
        assert self.reference is not None
        return self.reference[[self.rows[i] for i in image_ids]]


class Probe:
    """Sees whether ``encode_image`` gives for one image, to the bit, what it gave when the bank came into use.

    A fingerprint tells which weights a bank was made with; this tells that they are all that ``encode_image`` reads.

    Args:
        backbone: with a frozen image side; put in eval mode.
        pixels: (3, H, W).
    """

    def __init__(self, backbone: Backbone, pixels: Tensor):
        self._pixels = pixels[None]
        self._features = self._encode(backbone.eval())

    @torch.no_grad()
    def _encode(self, backbone: Backbone) -> ImageFeatures:
        return backbone.encode_image(self._pixels.to(next(backbone.parameters()).device))

    def check(self, backbone: Backbone) -> None:
        """Raises ``InputError`` if the features have moved, or are others in the mode that the model is in now."""
        for now, then in zip(self._encode(backbone), self._features, strict=True):
            if not torch.equal(now, then):
                raise InputError(
                    f"{backbone.name}: encode_image has moved while the bank was in use, so the bank is stale: "
                    "image_side() or separate() leaves out something that encode_image reads"
                )


def assign_rows(hashes: Mapping[str, str]) -> dict[str, int]:
    """Image id → row; images with equal pixels share one, so they are never each other's negatives."""
    row_of_hash: dict[str, int] = {}
    return {i: row_of_hash.setdefault(pixels, len(row_of_hash)) for i, pixels in hashes.items()}


def fingerprint(backbone: Backbone, hashes: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """What a bank depends on: architecture, weights, preprocessing, pixels in order, which parts are stored as what."""
    built = {key: backbone.options.get(key) for key in ("model", "config")}  # numbers of heads are in no weight
    about = json.dumps([3, backbone.name, repr(backbone.transform), parts, built], sort_keys=True)
    digest = hashlib.sha256(about.encode())
    for name, value in backbone.image_state().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for image_id, pixels in hashes.items():
        digest.update(f"{image_id} {pixels}\n".encode())
    return digest.hexdigest()[:24]


def stored_parts(dtype: str, references: bool = True) -> dict[str, str]:
    """Which features a bank stores, and in which type (``float32`` or ``float16``)."""
    return {"target": dtype, "reference": dtype} if references else {"target": dtype}


def load_or_build(
    backbone: Backbone,
    images: ImageSource,
    hashes: Mapping[str, str],
    root: Path,
    batch_size: int = 256,
    parts: Mapping[str, str] | None = None,
) -> Bank:
    """The bank of these images, from disk if it is there, else encoded now.

    A bank is written beside its place and renamed when whole, so that a half-written one is never read; and one whose
    first row is not what ``encode_image`` gives now is made anew.

    Args:
        backbone: its image side must be frozen.
        images: pixels by image id.
        hashes: which images, in order, each with the hash of its pixels; those with equal pixels share a row.
        root: folder of banks.
        batch_size: images encoded at once.
        parts: what ``stored_parts`` gives; None stores both in float32.

    Raises:
        ValueError: if the image side is not frozen.
        InputError: if the disk has no room for it, or features are not finite.
    """
    if not backbone.frozen:
        raise ValueError("a bank of a model whose image side still trains would be stale: freeze_image_side() first")
    parts = parts or stored_parts("float32")
    name, rows = fingerprint(backbone, hashes, parts), assign_rows(hashes)
    first: dict[int, str] = {}
    for image_id, row in rows.items():
        first.setdefault(row, image_id)
    order = [first[row] for row in range(len(first))]
    folder = root / name
    bank = _open(folder, parts, rows)
    if bank is None or not _fits(bank, backbone, images.stack(order[:1])):
        _build(backbone, images, order, folder, batch_size, parts)
        bank = _open(folder, parts, rows)
    assert bank is not None
    return bank


def _open(folder: Path, parts: Mapping[str, str], rows: dict[str, int]) -> Bank | None:
    """The bank in a folder, or None if it is not there or damaged."""
    try:
        stored = {part: StoredRows(folder / f"{part}.npy") for part in parts}
    except (ValueError, OSError, EOFError):
        return None
    whole = (folder / "bank.json").is_file() and {len(part) for part in stored.values()} == {max(rows.values()) + 1}
    return Bank(stored.get("reference"), stored["target"].whole(), rows, folder.name) if whole else None


@torch.no_grad()
def _fits(bank: Bank, backbone: Backbone, pixels: Tensor) -> bool:
    """Whether the first row is what the model gives, but for rounding and the size of a batch."""
    features = backbone.encode_image(pixels.to(next(backbone.parameters()).device))
    stored = ImageFeatures(bank.reference[[0]] if bank.reference is not None else features.reference, bank.target[:1])
    pairs = [(now.float().cpu(), then.float().cpu()) for now, then in zip(features, stored, strict=True)]
    return all(now.shape == then.shape and (now - then).norm() <= 0.01 * now.norm() for now, then in pairs)


@torch.no_grad()
def _build(
    backbone: Backbone,
    images: ImageSource,
    order: Sequence[str],
    folder: Path,
    batch_size: int,
    parts: Mapping[str, str],
) -> None:
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    killed = [path for path in folder.parent.glob(f"{folder.name}.*.tmp") if not _alive(path.suffixes[-2][1:])]
    for leftover in (folder, beside, *killed):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        files: dict[str, np.memmap[Any, Any]] = {}
        device = next(backbone.parameters()).device
        with tqdm(total=len(order), desc="bank", unit="image", leave=False) as bar:
            for start in range(0, len(order), batch_size):
                features = backbone.encode_image(images.stack(order[start : start + batch_size]).to(device))
                files = files or _allocate(beside, parts, features, len(order))
                for part, file in files.items():
                    values = getattr(features, part).to(getattr(torch, parts[part])).cpu()
                    if not values.isfinite().all():
                        raise InputError(
                            f"{backbone.name}: {part} features hold numbers that are not finite in {parts[part]}: "
                            "set bank_dtype float32, or look at the weights"
                        )
                    file[start : start + len(values)] = values.numpy()
                bar.update(len(features.target))
                del features, values  # before the next ones are made
        for file in files.values():
            file.flush()
        (beside / "bank.json").write_text(json.dumps({"images": len(order), "parts": dict(parts)}) + "\n")
        try:
            os.rename(beside, folder)
        except OSError:  # unless another process was faster
            if not (folder / "bank.json").is_file():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _alive(process: str) -> bool:
    """Whether a process of that number runs."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _allocate(
    folder: Path, parts: Mapping[str, str], features: ImageFeatures, rows: int
) -> "dict[str, np.memmap[Any, Any]]":
    """Empty arrays on disk for so many rows, if it has room for them: a full disk would end the process unheard."""
    shapes = {part: (rows, *getattr(features, part).shape[1:]) for part in parts}
    needed = sum(math.prod(shape) * np.dtype(parts[part]).itemsize for part, shape in shapes.items())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the bank needs {needed / 1e9:.1f} GB in {folder.parent}, and {free / 1e9:.1f} GB are free: set "
            "SPN4CIR_RUNS to a larger disk, or bank_dtype float16, or bank_references recompute"
        )
    return {
        part: np.lib.format.open_memmap(folder / f"{part}.npy", "w+", np.dtype(parts[part]), shape)
        for part, shape in shapes.items()
    }
