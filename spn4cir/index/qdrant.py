"""An index that Qdrant holds: exported from an index on disk, and searched with the same results.

Each image is a point, whose payload has the image's id, the absolute path of its picture and its columns. A reserved
point, the note, says of which model the vectors are and what the columns hold, so that an address is all that a search
needs. Booleans are stored as 0 and 1, which Qdrant's filters treat the same on a server and in a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Collection as Ids
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spn4cir.errors import InputError
from spn4cir.index.exporting import Exported, image_paths, live_rows
from spn4cir.index.qdrant_collection import Collection, Point, clamp, import_qdrant
from spn4cir.index.qdrant_folder import FolderCollection
from spn4cir.index.qdrant_server import ServerCollection
from spn4cir.index.searchable import Nearest, SearchableIndex
from spn4cir.index.snapshot import Snapshot, SourceNote
from spn4cir.index.source import Source, read_source, stored_image
from spn4cir.model import Model, load
from spn4cir.selection import Condition, Kind
from spn4cir.types import ImageRef

ADDRESS = "qdrant://HOST:PORT/COLLECTION or qdrant:FOLDER"
PORT, TIMEOUT = 6333, 60  # seconds
FORMAT = 1
NOTE = str(uuid.UUID(int=0))
"""Id of the note; ids of images are version 5."""
NUMBERS = 500_000  # sent in one request, about 10 MB of JSON; a server refuses more than 32
_SERVER = re.compile(r"qdrant(\+https)?://([\w.-]+)(?::(\d+))?/([^/?#]+)(?:\?exact=(true|false))?")
_FOLDER = re.compile(r"qdrant:(?://(?=/))?([^/].*|/[^/].*)", re.DOTALL)


@dataclass(frozen=True)
class Note:
    """What a collection says of itself.

    Args:
        model: what ``spn4cir.load`` takes.
        fingerprint: of the model's image side.
        shape: (K, E) of an image.
        kinds: what each column holds.
        sources: where images were read from, for those without a file of their own.
        sample: ids of the background sample.
        images: number of images.
        complete: whether an export has ever come to its end.
    """

    model: str
    fingerprint: str
    shape: tuple[int, int]
    kinds: dict[str, Kind]
    sources: tuple[SourceNote, ...]
    sample: tuple[str, ...]
    images: int
    complete: bool = True


def point_id(image_id: str) -> str:
    """The UUID of an image's point."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, image_id))


def open_collection(address: str) -> Collection:
    """The collection at an address, whether or not it exists. An API key is read from ``QDRANT_API_KEY``.

    Args:
        address: ``qdrant://HOST[:PORT]/COLLECTION``, or ``qdrant+https://…`` for a server behind TLS, either followed
            by ``?exact=false`` to search approximately; or ``qdrant:FOLDER``.

    Raises:
        InputError: for another address, or if a package is missing.
    """
    if match := _SERVER.fullmatch(address):
        secure, host, port, name, exact = match.groups()
        client = import_qdrant("qdrant_client").QdrantClient(
            host=host,
            port=int(port or PORT),
            https=bool(secure),
            api_key=os.environ.get("QDRANT_API_KEY"),
            timeout=TIMEOUT,
            check_compatibility=False,
        )
        return ServerCollection(client, name, address, exact != "false")
    if match := _FOLDER.fullmatch(address):
        return FolderCollection(Path(match[1]))
    raise InputError(f"{address!r} is no address of Qdrant: expected {ADDRESS}")


def export_qdrant(path: Path, collection: Collection) -> Exported:
    """Make a collection hold the images of an index: write what is new or differs, delete what is gone.

    An export that was killed goes on where it stopped. The collection is closed.

    Raises:
        InputError: if there is no index, the engine is down, or the collection holds another model's vectors or was not
            made by an export.
    """
    snapshot = Snapshot(path)
    head, rows = snapshot.head, live_rows(snapshot)
    if quoted := [name for name in snapshot.kinds if '"' in name]:
        raise InputError(f"{path}: Qdrant cannot filter on column {quoted[0]!r}: rename it, and update the index")
    ids = snapshot.files["id"].take(snapshot.sample()).to_pylist()
    note = Note(head.model, head.fingerprint, head.shape, snapshot.kinds, head.sources, tuple(ids), len(rows))
    with closing(collection):
        before = _prepare(collection, note)
        for name, kind in note.kinds.items():
            if before is None or before.kinds.get(name) != kind:
                collection.index_column(name, kind)
        stored = {one.id: one.payload.get("digest") for one in collection.scan("digest") if one.id != NOTE}
        size = max(1, NUMBERS // (head.shape[0] * head.shape[1]))
        written = 0
        for points in _changed_points(snapshot, rows, stored, size):
            collection.write(points)
            written += len(points)
        gone = list(stored.keys() - {point_id(image_id) for image_id in snapshot.live_ids()})
        for start in range(0, len(gone), size):
            collection.delete(gone[start : start + size])
        if written or gone or before != note:
            _write_note(collection, note)
            collection.finish()
    return Exported("images", written, len(gone), len(rows) - written)


def _prepare(collection: Collection, note: Note) -> Note | None:
    """Make the collection unless it exists; the note it has, or None if it is new."""
    if collection.exists() and len(collection):
        before = _read_note(collection)
        if (before.fingerprint, before.shape) != (note.fingerprint, note.shape):
            models = f"{before.model}, not {note.model}"
            raise InputError(f"{collection.place} holds vectors of another model, {models}: give another place")
        first, ours = (one.sources[0] for one in (before, note))
        if (first.place, first.dataset) != (ours.place, ours.dataset):
            other = first.place or first.dataset
            raise InputError(f"{collection.place} holds another index, of {other}: give another place")
        return before
    collection.create(note.shape)
    _write_note(collection, replace(note, complete=False))
    return None


def _changed_points(
    snapshot: Snapshot, rows: np.ndarray[Any, Any], stored: Mapping[str, Any], size: int
) -> Iterator[list[Point]]:
    """Points whose digest is not stored, with their vectors, in batches."""
    with tqdm(total=len(rows), desc="export", unit="image") as bar:
        for start in range(0, len(rows), size):
            part = rows[start : start + size].tolist()
            payloads = _payloads(snapshot, part)
            ids = [point_id(payload["id"]) for payload in payloads]
            changed = [n for n, payload in enumerate(payloads) if stored.get(ids[n]) != payload["digest"]]
            if changed:
                vectors = _nested(snapshot.gather([part[n] for n in changed]).float())
                yield [Point(ids[n], payloads[n], vector) for n, vector in zip(changed, vectors, strict=True)]
            bar.update(len(part))


def _payloads(snapshot: Snapshot, rows: Sequence[int]) -> list[dict[str, Any]]:
    files = snapshot.files.select(["id", "source", "box", "content"]).take(rows).to_pylist()
    columns = snapshot.columns.take(rows).to_pylist()
    payloads = []
    for file_row, path, row in zip(files, image_paths(snapshot, rows), columns, strict=True):
        cells = {name: _json_value(value) for name, value in row.items()}
        payload = {**file_row, "path": path, "columns": {name: v for name, v in cells.items() if v is not None}}
        text = json.dumps([payload, snapshot.head.dtype], sort_keys=True)
        payloads.append({**payload, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]})
    return payloads


def _json_value(value: Any) -> str | int | float | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return None if value != value else clamp(value)
    return value if value is None or isinstance(value, int) else str(value)


def _nested(vectors: Tensor) -> list[Any]:
    """Vectors (N, K, E) as lists: (E,) of each image for K = 1, else (K, E)."""
    nested: list[Any] = (vectors[:, 0] if vectors.shape[1] == 1 else vectors).tolist()
    return nested


def _write_note(collection: Collection, note: Note) -> None:
    payload = {**asdict(note), "kinds": list(map(list, note.kinds.items()))}  # an object may come back in another order
    (vector,) = _nested(torch.zeros(1, *note.shape))
    collection.write([Point(NOTE, {"spn4cir": FORMAT, "note": payload}, vector)])


def _read_note(collection: Collection) -> Note:
    points = collection.read([NOTE])
    if not points or "spn4cir" not in points[0].payload:
        raise InputError(f"{collection.place} was not made by spn4cir-index export: give another place")
    if points[0].payload["spn4cir"] != FORMAT:
        raise InputError(f"{collection.place} was made by another release: export the index to another place")
    note = points[0].payload["note"]
    return Note(
        note["model"],
        note["fingerprint"],
        (int(note["shape"][0]), int(note["shape"][1])),
        dict(note["kinds"]),
        tuple(SourceNote(**source) for source in note["sources"]),
        tuple(note["sample"]),
        int(note["images"]),
        bool(note["complete"]),
    )


def open_index(address: str, model: Model | None = None) -> QdrantIndex:
    """Open the index at an address of Qdrant; see ``open_collection``."""
    collection = open_collection(address)
    try:
        return QdrantIndex(collection, model)
    except InputError:
        collection.close()
        raise


class QdrantIndex(SearchableIndex):
    """A searchable index that Qdrant holds; ``spn4cir.Index.open`` opens it by its address.

    Args:
        collection: where it is.
        model: to embed queries; by default the one that the index was built with is loaded at the first search.

    Raises:
        InputError: if there is no such collection, it is not of an export or not complete, or it is of another model.
    """

    def __init__(self, collection: Collection, model: Model | None = None):
        self.collection, self._model, self.place = collection, model, collection.place
        self._sources: dict[int, Source] = {}
        if not collection.exists() or not len(collection):
            raise InputError(f"{self.place} holds no index: make one by spn4cir-index export")
        self.note = _read_note(collection)
        lost = collection.one_process and len(collection) != self.note.images + 1
        if not self.note.complete or lost:
            raise InputError(f"{self.place}: its export was interrupted, or images are lost: export the index again")
        if model is not None and model.fingerprint != self.note.fingerprint:
            raise InputError(
                f"{self.place} was built with another model, {self.note.model}, not {model.name}: give that"
            )

    @property
    def model(self) -> Model:  # type: ignore[override]
        """The model that queries are embedded with. Raises ``InputError`` if it has changed since the export."""
        if self._model is None:
            self._model = load(self.note.model)
            if self._model.fingerprint != self.note.fingerprint:
                raise InputError(f"{self.place}: the model {self.note.model} has changed since: export the index anew")
        return self._model

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What each column holds: text, number or boolean."""
        return self.note.kinds

    def __len__(self) -> int:
        return len(self.collection) - 1  # without the note

    @cached_property
    def background(self) -> Tensor:
        """Vectors (S, K, E) of the background sample."""
        ids = [point_id(image_id) for image_id in self.note.sample]
        size = max(1, NUMBERS // (self.note.shape[0] * self.note.shape[1]))
        parts = (self.collection.read(ids[n : n + size], vectors=True) for n in range(0, len(ids), size))
        return self._vectors([one for part in parts for one in part])

    def nearest(
        self, query: Tensor, count: int, conditions: Sequence[Condition] = (), exclude: Ids[str] = ()
    ) -> Nearest:
        """The candidates of a query (E,), by the engine."""
        vector = query.tolist() if self.note.shape[0] == 1 else [query.tolist()]
        excluded = [NOTE, *map(point_id, exclude)]
        points = self.collection.query(vector, count, conditions, excluded)
        return Nearest(
            [one.payload["id"] for one in points],
            self._vectors(points),
            [Path(path) if (path := one.payload.get("path")) else None for one in points],
            [self._columns(one.payload.get("columns") or {}) for one in points],
            min(one.score for one in points) if len(points) == count else -float("inf"),
        )

    def _vectors(self, points: Sequence[Point]) -> Tensor:
        return torch.tensor([one.vector for one in points], dtype=torch.float32).reshape(-1, *self.note.shape)

    def _columns(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """All columns of an image; None for an empty cell."""
        cells = {name: stored.get(name) for name in self.kinds}
        return {n: bool(v) if self.kinds[n] == "boolean" and v is not None else v for n, v in cells.items()}

    def find_image(self, image_id: str) -> ImageRef | None:
        """The picture of an image; None for an id that the index lacks."""
        points = self.collection.read([point_id(image_id)])
        if not points:
            return None
        payload = points[0].payload
        if payload.get("path"):
            return stored_image(self.note.sources[payload["source"]], Path(payload["path"]), payload.get("box"))
        return self._source(payload["source"]).images.get(image_id)

    def _source(self, number: int) -> Source:
        """A source, read again for images that have no file of their own."""
        if number not in self._sources:
            note = self.note.sources[number]
            self._sources[number] = read_source(note.place, note.dataset)
        return self._sources[number]

    def close(self) -> None:
        """Close the connection, or let other processes open the folder."""
        self.collection.close()
