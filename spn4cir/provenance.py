"""Which images triplets and runs were made from: names and contents, never a path, since folders move.

A folder that was made from images holds ``made_from.json``. Two sets of images are the same catalogue if at least
half of them agree in name and content, so a catalogue that grows, or loses a few pictures, stays the same one.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spn4cir.files import write_text
from spn4cir.types import ImageRef

NOTE = "made_from.json"
SAMPLE = 256  # images whose contents are read: a million images cost as much as these
ENDS = 1 << 16  # bytes read from either end of a file
SAME = 0.5  # share of images that two states of one catalogue have in common


@dataclass(frozen=True)
class Provenance:
    """The images of a catalogue.

    Args:
        dataset: name of the dataset that read them.
        name: what to call the catalogue: its folder, or its folder and table.
        place: where it was when this was written, for messages alone.
        images: number of images.
        digest: of all names, and of the contents of the sample.
        sample: hash of an id → hash of that image's content, of the ``SAMPLE`` ids with the smallest hashes.
    """

    dataset: str
    name: str
    place: str
    images: int
    digest: str
    sample: Mapping[str, str]

    @classmethod
    def of(
        cls, dataset: str, name: str, place: str, ids: Sequence[str], image: Callable[[str], ImageRef]
    ) -> Provenance:
        """Hash all ids, and the contents of a sample that the ids choose."""
        hashes = {image_id: hashlib.blake2b(image_id.encode(), digest_size=8).hexdigest() for image_id in ids}
        chosen = heapq.nsmallest(SAMPLE, ids, key=hashes.__getitem__)
        sample = {hashes[image_id]: hash_content(image(image_id)) for image_id in chosen}
        total = hashlib.sha256(json.dumps(sample).encode())
        for image_id in sorted(ids):
            total.update(f"{hashes[image_id]}\n".encode())
        return cls(dataset, name, place, len(ids), total.hexdigest()[:16], sample)

    def similarity(self, other: Provenance) -> float:
        """Return the share of the images of both that agree in name and content, estimated from the samples.

        The smallest hashes of a union are a fair sample of it (Broder, "On the resemblance and containment of
        documents", 1997). An image that cannot be read agrees with any of its name.
        """
        union = heapq.nsmallest(SAMPLE, self.sample.keys() | other.sample.keys())
        pairs = [(self.sample[key], other.sample[key]) for key in union if key in self.sample and key in other.sample]
        agree = [one == another or not (one and another) for one, another in pairs]
        return sum(agree) / max(len(union), 1)

    def is_same(self, other: Provenance) -> bool:
        """Whether both are states of one catalogue."""
        return self.digest == other.digest or self.similarity(other) >= SAME

    def __str__(self) -> str:
        return f"{self.name} ({self.images:,} images in {self.place})"

    def write(self, folder: Path) -> None:
        """Write the note into a folder, if it does not hold this one."""
        if read_provenance(folder) != self:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / NOTE, json.dumps(asdict(self), indent=0) + "\n")


def hash_content(image: ImageRef) -> str:
    """Hash the size and both ends of an image's bytes; empty if it is missing or not a regular file."""
    try:
        if callable(image.source):
            data = image.source()
            return _digest(len(data), data[:ENDS], data[-ENDS:])
        if not stat.S_ISREG(image.source.stat().st_mode):
            return ""
        with image.source.open("rb") as file:
            size, first = image.source.stat().st_size, file.read(ENDS)
            file.seek(max(size - ENDS, 0))
            return _digest(size, first, file.read(ENDS))
    except (OSError, ValueError):
        return ""


def _digest(size: int, first: bytes, last: bytes) -> str:
    return hashlib.sha256(f"{size} ".encode() + first + last).hexdigest()[:12]


def read_provenance(folder: Path) -> Provenance | None:
    """The note in a folder; None if there is none, or it is damaged."""
    try:
        values = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        found = Provenance(**{**values, "sample": dict(values["sample"]), "images": int(values["images"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def list_catalogues(base: Path) -> dict[Path, Provenance]:
    """Folders below ``base`` that belong to a catalogue, with the catalogue."""
    return {path.parent: note for path in sorted(base.glob(f"*/{NOTE}")) if (note := read_provenance(path.parent))}


def folder_of(base: Path, own: Provenance | None) -> Path:
    """The folder below ``base`` for data of these images: of the same catalogue, wherever its pictures lie now.

    Without such a folder, one of the catalogue's name, or of its name and digest if another catalogue has that. None,
    as for a published dataset, gives ``base`` itself. Nothing is written.
    """
    if own is None:
        return base
    likeness = {folder: own.similarity(note) for folder, note in list_catalogues(base).items() if own.is_same(note)}
    if likeness:
        return max(likeness, key=likeness.__getitem__)
    folder = base / (re.sub(r"[^\w.-]+", "_", own.name).strip("._") or "images")
    return folder.with_name(f"{folder.name}-{own.digest[:6]}") if (folder / NOTE).exists() else folder


def describe_others(base: Path, own: Provenance) -> str:
    """The other catalogues that have a folder below ``base``, three at most; empty if there are none."""
    others = [str(note) for note in list_catalogues(base).values() if not own.is_same(note)]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return "; ".join(others[:3]) + more
