"""The bank: frozen features of images, each unique image encoded once, kept on disk under its fingerprint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spn4cir.backbone import Backbone
from spn4cir.errors import InputError
from spn4cir.images import ImageSource
from spn4cir.store import BEGUN, WHOLE, EmbeddingStore, StoredRows
from spn4cir.types import ImageFeatures

CPU = torch.device("cpu")
NO_ROOM = "set SPN4CIR_RUNS to a larger disk, or bank.dtype float16, or bank.references recompute"


def fits_in_memory(size: int, device: torch.device) -> bool:
    """Whether so many bytes may stay on a device: they are less than half of what is free there."""
    if device.type != "cuda":
        return True
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, and free to use
    return 2 * size < torch.cuda.mem_get_info(device)[0] + unused


@dataclass
class Bank:
    """Features of N unique images; ``rows`` says which image is where.

    ``reference`` (N, L, D) stays on disk; None where it is recomputed instead. ``target`` (N, K, E) is on ``device``,
    where queries are; or on disk, where that is a CPU or has no room for it. Of several processes each may keep the
    targets of some rows only: those from ``first`` on, out of ``total``.
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

    def first_rows(self, count: int) -> "Bank":
        """The same bank with the targets of its first rows alone; references stay."""
        return self if count == self.total else replace(self, target=self.target[:count], total=count)

    def shard(self, process: int, processes: int) -> "Bank":
        """The same bank with the targets that one of several processes keeps, still where they are.

        Each keeps as many rows, one after the other; the last ones fewer, or none. Raises ``ValueError`` if there is no
        such process, or this is a share already.
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
    """Sees whether ``encode_image`` gives for an image (3, H, W), to the bit, what it gave when the bank came into use.

    A fingerprint tells which weights a bank was made with; this tells that they are all that ``encode_image`` reads.
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
                cause = "image_side() or untie_text_side() leaves out something that encode_image reads"
                what = "encode_image has moved while the bank was in use, so the bank is stale"
                raise InputError(f"{backbone.name}: {what}: {cause}")


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

    A build that was killed goes on where it stopped, to the same bytes; one whose first row is not what
    ``encode_image`` gives now is made anew. Who wants a bank that another process is making waits for it.

    Args:
        backbone: its image side must be frozen.
        images: pixels by image id.
        hashes: which images, in order, each with the hash of its pixels; those with equal pixels share a row.
        root: folder of banks.
        batch_size: images encoded at once; a build that began with another number begins anew.
        parts: what ``stored_parts`` gives; None stores both in float32.

    Raises ``ValueError`` if the image side is not frozen; ``InputError`` if the disk has no room for it, or features
    are not finite, of which nothing is kept.
    """
    if not backbone.is_frozen:
        raise ValueError("a bank of a model whose image side still trains would be stale: freeze_image_side() first")
    parts = parts or stored_parts("float32")
    name, rows = fingerprint(backbone, hashes, parts), assign_rows(hashes)
    first = {row: image_id for image_id, row in reversed(rows.items())}  # of images that share a row
    order = [first[row] for row in range(len(first))]
    store = EmbeddingStore(root, name, len(order), parts, batch_size, "the bank", NO_ROOM)

    def usable(note: str) -> Bank | None:
        arrays = store.open(note)
        bank = Bank(arrays.get("reference"), arrays["target"].whole(), rows, name) if arrays else None
        return bank if bank and _is_valid(bank, backbone, images.stack(order[:1])) else None

    if bank := usable(WHOLE):
        return bank
    with store.lock():
        if bank := usable(WHOLE):  # another process has made it meanwhile
            return bank
        if not usable(BEGUN):
            store.remove()
        _encode(backbone, images, order, store)
        arrays = store.finish()
        return Bank(arrays.get("reference"), arrays["target"].whole(), rows, name)


@torch.no_grad()
def _is_valid(bank: Bank, backbone: Backbone, pixels: Tensor) -> bool:
    """Whether the first row is what the model gives, but for rounding and the size of a batch."""
    features = backbone.encode_image(pixels.to(next(backbone.parameters()).device))
    stored = ImageFeatures(bank.reference[[0]] if bank.reference is not None else features.reference, bank.target[:1])
    pairs = [(now.float().cpu(), then.float().cpu()) for now, then in zip(features, stored, strict=True)]
    return all(now.shape == then.shape and (now - then).norm() <= 0.01 * now.norm() for now, then in pairs)


@torch.no_grad()
def _encode(backbone: Backbone, images: ImageSource, order: Sequence[str], store: EmbeddingStore) -> None:
    """Encode the images that are missing in the store; the caller holds its lock."""
    device, missing = next(backbone.parameters()).device, store.missing()
    done = missing[0] if missing else len(order)
    with tqdm(total=len(order), initial=done, desc="bank", unit="image", leave=False) as bar:
        for start in missing:
            features = backbone.encode_image(images.stack(order[start : start + store.block]).to(device))
            values = {p: getattr(features, p).to(getattr(torch, dtype)).cpu() for p, dtype in store.dtypes.items()}
            for part, value in values.items():
                if not value.isfinite().all():
                    store.remove()
                    what = f"{part} features hold numbers that are not finite in {store.dtypes[part]}"
                    raise InputError(f"{backbone.name}: {what}: set bank.dtype float32, or look at the weights")
            store.write(start, values)
            bar.update(len(features.target))
            del features, values  # before the next ones are made
