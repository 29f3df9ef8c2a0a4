"""The bank: frozen features of images, each unique image encoded once, kept on disk under its fingerprint."""

import hashlib
import json
import math
import os
import shutil
import time
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
from spn4cir.files import locked, read_json, write_text
from spn4cir.images import ImageSource
from spn4cir.types import ImageFeatures

WHOLE, BEGUN = "bank.json", "begun.json"  # what a folder of banks holds beside the arrays, and until they are whole
CPU = torch.device("cpu")
SECONDS = 5.0
"""How much encoding a killed build may lose: so often it puts on disk what it has, and notes how far that goes."""


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


def fits_in_memory(size: int, device: torch.device) -> bool:
    """Whether so many bytes may stay on a device: they are less than half of what is free there."""
    if device.type != "cuda":
        return True
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, and free to use
    return 2 * size < torch.cuda.mem_get_info(device)[0] + unused


@dataclass
class Bank:
    """Features of N unique images; ``rows`` says which image is where.

    ``reference`` (N, L, D) stays on disk and is gathered by rows; None where it is recomputed instead. ``target``
    (N, K, E) is on ``device``, where queries are; or on disk, where that is a CPU or has no room for it. Of several
    processes each may keep the targets of some rows only: those from ``first`` on, out of ``total``.
    """

    reference: StoredRows | None
    target: Tensor
    rows: dict[str, int]
    fingerprint: str
    device: torch.device = CPU
    first: int = 0
    total: int = 0
    shared: bool = False

    def __post_init__(self) -> None:
        self.total = self.total or len(self.target)

    @property
    def resident(self) -> bool:
        """Whether the targets are where the queries are; else they have to be read ahead from disk."""
        return self.target.device.type == self.device.type

    def to(self, device: torch.device) -> "Bank":
        """The same bank for queries on a device, with its targets there if they fit."""
        if device == self.target.device or not fits_in_memory(self.target.nbytes, device):
            return replace(self, device=device)
        return replace(self, target=self.target.to(device), device=device)

    def shard(self, process: int, processes: int) -> "Bank":
        """The same bank with the targets that one of several processes keeps, still where they are.

        Each keeps as many rows, one after the other; the last ones fewer, or none.

        Raises:
            ValueError: if there is no such process, or this is a share already.
        """
        if not 0 <= process < processes:
            raise ValueError(f"process {process} of {processes}")
        if len(self.target) < self.total:
            raise ValueError("a share of a bank cannot be shared out again")
        share = -(-self.total // processes)
        first = min(process * share, self.total)
        return replace(self, target=self.target[first : first + share], first=first, shared=processes > 1)

    def references(self, image_ids: Sequence[str]) -> Tensor:
        """(B, L, D) of these images, as stored."""
        assert self.reference is not None
        return self.reference[[self.rows[i] for i in image_ids]]


class FrozenCheck:
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
                    "image_side() or untie_text_side() leaves out something that encode_image reads"
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
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
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

    A build that was killed goes on where it stopped, to the same bytes. Only a bank that is whole is used; and one
    whose first row is not what ``encode_image`` gives now is made anew. Who wants a bank that another process is
    making waits for it.

    Args:
        backbone: its image side must be frozen.
        images: pixels by image id.
        hashes: which images, in order, each with the hash of its pixels; those with equal pixels share a row.
        root: folder of banks.
        batch_size: images encoded at once; a build that began with another number begins anew.
        parts: what ``stored_parts`` gives; None stores both in float32.

    Raises:
        ValueError: if the image side is not frozen.
        InputError: if the disk has no room for it, or features are not finite, of which nothing is kept.
    """
    if not backbone.is_frozen:
        raise ValueError("a bank of a model whose image side still trains would be stale: freeze_image_side() first")
    parts = parts or stored_parts("float32")
    name, rows = fingerprint(backbone, hashes, parts), assign_rows(hashes)
    first: dict[int, str] = {}
    for image_id, row in rows.items():
        first.setdefault(row, image_id)
    order = [first[row] for row in range(len(first))]
    folder = root / name

    def usable(note: str) -> Bank | None:
        bank = _open(folder / note, parts, rows) if _noted(folder / note, len(order), parts) is not None else None
        return bank if bank and _is_valid(bank, backbone, images.stack(order[:1])) else None

    if (bank := usable(WHOLE)) is not None:
        return bank
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f"{name}.lock"):
        if (bank := usable(WHOLE)) is not None:  # another process has made it meanwhile
            return bank
        done = _rows_done(folder, len(order), batch_size, parts) if usable(BEGUN) else 0
        _build(backbone, images, order, folder, range(done, len(order), batch_size), parts)
    bank = _open(folder / WHOLE, parts, rows)
    assert bank is not None
    return bank


def _open(note: Path, parts: Mapping[str, str], rows: dict[str, int]) -> Bank | None:
    """The bank in the folder of this note, or None if it is not there or damaged."""
    try:
        stored = {part: StoredRows(note.with_name(f"{part}.npy")) for part in parts}
    except (ValueError, OSError, EOFError):
        return None
    sound = note.is_file() and all(
        len(file) == max(rows.values()) + 1 and file[[0]].dtype == getattr(torch, parts[part])
        for part, file in stored.items()
    )
    return Bank(stored.get("reference"), stored["target"].whole(), rows, note.parent.name) if sound else None


@torch.no_grad()
def _is_valid(bank: Bank, backbone: Backbone, pixels: Tensor) -> bool:
    """Whether the first row is what the model gives, but for rounding and the size of a batch."""
    features = backbone.encode_image(pixels.to(next(backbone.parameters()).device))
    stored = ImageFeatures(bank.reference[[0]] if bank.reference is not None else features.reference, bank.target[:1])
    pairs = [(now.float().cpu(), then.float().cpu()) for now, then in zip(features, stored, strict=True)]
    return all(now.shape == then.shape and (now - then).norm() <= 0.01 * now.norm() for now, then in pairs)


def _note(rows: int, images: int, batch_size: int, parts: Mapping[str, str]) -> dict[str, Any]:
    """What the folder of a bank says of it when so many rows of it are on disk."""
    return {"images": images, "parts": dict(parts), "batch_size": batch_size, "rows": rows}


def _noted(note: Path, images: int, parts: Mapping[str, str]) -> dict[str, Any] | None:
    """What the note says, if it is one of a bank of so many images in these parts."""
    try:
        found = read_json(note)
    except InputError:
        return None
    right = isinstance(found, dict) and (found.get("images"), found.get("parts")) == (images, dict(parts))
    return found if right and (note.name != WHOLE or found.get("rows") == images) else None


def _rows_done(folder: Path, images: int, batch_size: int, parts: Mapping[str, str]) -> int:
    """How many rows a build of the same blocks has written; 0 if there is none."""
    found = _noted(folder / BEGUN, images, parts)
    ends = (*range(batch_size, images, batch_size), images)
    return next((rows for rows in ends if found == _note(rows, images, batch_size, parts)), 0)


@torch.no_grad()
def _build(
    backbone: Backbone,
    images: ImageSource,
    order: Sequence[str],
    folder: Path,
    blocks: range,
    parts: Mapping[str, str],
) -> None:
    """Encode blocks of images: all, or the rest of those of a build that was killed. The caller holds the lock."""
    if not blocks.start and folder.exists():
        shutil.rmtree(folder)
    files = _reopen(folder, parts, blocks.start / len(order)) if blocks.start else {}
    device, noted = next(backbone.parameters()).device, time.monotonic()

    def note(rows: int) -> None:
        for file in files.values():
            file.flush()
        write_text(folder / BEGUN, json.dumps(_note(rows, len(order), blocks.step, parts)) + "\n")

    with tqdm(total=len(order), initial=blocks.start, desc="bank", unit="image", leave=False) as bar:
        for start in blocks:
            features = backbone.encode_image(images.stack(order[start : start + blocks.step]).to(device))
            files = files or _allocate(folder, parts, features, len(order))
            for part, file in files.items():
                values = getattr(features, part).to(getattr(torch, parts[part])).cpu()
                if not values.isfinite().all():
                    shutil.rmtree(folder)
                    raise InputError(
                        f"{backbone.name}: {part} features hold numbers that are not finite in {parts[part]}: "
                        "set bank.dtype float32, or look at the weights"
                    )
                file[start : start + len(values)] = values.numpy()
            bar.update(len(features.target))
            if time.monotonic() - noted > SECONDS:
                note(start + len(features.target))
                noted = time.monotonic()
            del features, values  # before the next ones are made
    note(len(order))
    os.replace(folder / BEGUN, folder / WHOLE)


def _allocate(
    folder: Path, parts: Mapping[str, str], features: ImageFeatures, rows: int
) -> "dict[str, np.memmap[Any, Any]]":
    """A folder with empty arrays for so many rows, if the disk has room for them."""
    shapes = {part: (rows, *getattr(features, part).shape[1:]) for part in parts}
    _check_room(folder.parent, sum(math.prod(shape) * np.dtype(parts[part]).itemsize for part, shape in shapes.items()))
    folder.mkdir()
    return {
        part: np.lib.format.open_memmap(folder / f"{part}.npy", "w+", np.dtype(parts[part]), shape)
        for part, shape in shapes.items()
    }


def _reopen(folder: Path, parts: Mapping[str, str], done: float) -> "dict[str, np.memmap[Any, Any]]":
    """The arrays of a build that was killed, to go on with, if the disk has room for the share that is not done."""
    files = {part: np.load(folder / f"{part}.npy", mmap_mode="r+") for part in parts}
    _check_room(folder.parent, int(sum(file.nbytes for file in files.values()) * (1 - done)))
    return files


def _check_room(root: Path, needed: int) -> None:
    """Raises ``InputError`` if so many bytes have no room: a full disk would end the process unheard."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise InputError(
            f"the bank needs {needed / 1e9:.1f} GB in {root}, and {free / 1e9:.1f} GB are free: set "
            "SPN4CIR_RUNS to a larger disk, or bank.dtype float16, or bank.references recompute"
        )
