"""The bank: frozen features of training images, each unique image encoded once, kept on disk under its fingerprint."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spn4cir.backbone import Backbone
from spn4cir.images import ImageSource


@dataclass
class Bank:
    """``reference`` (N, L, D) and ``target`` (N, K, E) of N unique images; ``rows`` says which image is where."""

    reference: Tensor
    target: Tensor
    rows: dict[str, int]
    fingerprint: str

    def to(self, device: torch.device) -> "Bank":
        """The same bank on another device."""
        return Bank(self.reference.to(device), self.target.to(device), self.rows, self.fingerprint)


def assign_rows(hashes: Mapping[str, str]) -> dict[str, int]:
    """Image id → row; images with equal pixels share one, so they are never each other's negatives."""
    row_of_hash: dict[str, int] = {}
    return {i: row_of_hash.setdefault(pixels, len(row_of_hash)) for i, pixels in hashes.items()}


def fingerprint(backbone: Backbone, hashes: Mapping[str, str], dtype: str) -> str:
    """What a bank depends on: image-side weights, preprocessing, pixels in order, storage type."""
    digest = hashlib.sha256(f"1/{backbone.name}/{backbone.transform!r}/{dtype}".encode())
    for name, value in backbone.image_state().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for image_id, pixels in hashes.items():
        digest.update(f"{image_id} {pixels}\n".encode())
    return digest.hexdigest()[:24]


def load_or_build(
    backbone: Backbone,
    images: ImageSource,
    hashes: Mapping[str, str],
    root: Path,
    batch_size: int = 256,
    dtype: str = "float32",
) -> Bank:
    """The bank of these images, from disk if it is there, else encoded now.

    A bank is written beside its place and renamed when whole, so that a half-written one is never read.

    Args:
        backbone: its image side must be frozen.
        images: pixels by image id.
        hashes: which images, in order, each with the hash of its pixels; those with equal pixels share a row.
        root: folder of banks.
        batch_size: images encoded at once.
        dtype: ``float32`` or ``float16``.

    Raises:
        ValueError: if the image side is not frozen.
    """
    if not backbone.frozen:
        raise ValueError("a bank of a model whose image side still trains would be stale: freeze_image_side() first")
    name = fingerprint(backbone, hashes, dtype)
    rows = assign_rows(hashes)
    folder = root / name
    if not (folder / "bank.json").is_file():
        _build(backbone, images, rows, folder, batch_size, dtype)
    try:
        arrays = _open(folder)
    except (ValueError, OSError):  # damaged since it was written: as good as none
        _build(backbone, images, rows, folder, batch_size, dtype)
        arrays = _open(folder)
    return Bank(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]), rows, name)


def _open(folder: Path) -> "list[np.memmap[Any, Any]]":
    return [np.load(folder / f"{part}.npy", mmap_mode="c", allow_pickle=False) for part in ("reference", "target")]


@torch.no_grad()
def _build(
    backbone: Backbone, images: ImageSource, rows: dict[str, int], folder: Path, batch_size: int, dtype: str
) -> None:
    first: dict[int, str] = {}
    for image_id, row in rows.items():
        first.setdefault(row, image_id)
    order = [first[row] for row in range(len(first))]
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for leftover in (folder, beside):  # of a process that was killed: without bank.json nothing here is whole
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        files: list[np.memmap[Any, Any]] = []
        device = next(backbone.parameters()).device
        with tqdm(total=len(order), desc="bank", unit="image", leave=False) as bar:
            for start in range(0, len(order), batch_size):
                features = backbone.encode_image(images.stack(order[start : start + batch_size]).to(device))
                for number, (part, values) in enumerate(zip(features._fields, features, strict=True)):
                    if start == 0:
                        shape = (len(order), *values.shape[1:])
                        files.append(np.lib.format.open_memmap(beside / f"{part}.npy", "w+", np.dtype(dtype), shape))
                    files[number][start : start + len(values)] = values.float().cpu().numpy()
                bar.update(len(features.target))
        for file in files:
            file.flush()
        (beside / "bank.json").write_text(json.dumps({"images": len(order), "ids": len(rows), "dtype": dtype}) + "\n")
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
