"""Build, add, remove, update, compact: each change of an index is one commit, and goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spn4cir.batches import prefetch
from spn4cir.distributed import cpu_count
from spn4cir.errors import InputError
from spn4cir.files import locked, replaced
from spn4cir.images import open_image
from spn4cir.index.approximate import MIN_APPROXIMATE, build_approximate, check_kind
from spn4cir.index.snapshot import (
    BLOCK,
    HEAD,
    Head,
    SegmentNote,
    Snapshot,
    concatenate_tables,
    other_model,
    segment_store,
    write_head,
    write_removed,
)
from spn4cir.index.source import Source, content_hashes, image_stamps, read_source
from spn4cir.model import Model
from spn4cir.store import EmbeddingStore, StoredRows
from spn4cir.types import ImageRef

if TYPE_CHECKING:
    import pyarrow

OWN = re.compile(r"index\.(json|lock)(\.tmp)?|[0-9a-f]{24}(\.lock)?")
"""Files and folders of an index."""
MANY_SEGMENTS, MANY_GONE = 16, 0.25
"""An index of more segments than that, or of which more than that share is gone, is compacted with the next change."""


@dataclass
class Changes:
    """What a change of an index did, in images."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    encoded: int = 0
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("added", "changed", "removed", "encoded")}
        lines = [", ".join(f"{count:,} {name}" for name, count in counts.items())]
        if self.broken:
            lines.append(f"{len(self.broken)} pictures are left out since they do not decode, such as {self.broken[0]}")
        return "\n".join(lines + self.notes)


def build(model: Model, source: Source, path: Path, kind: str = "exact", dtype: str = "float32") -> Changes:
    """Make an index. A build that was killed goes on where it stopped, to the same bytes.

    Raises:
        InputError: if there is an index already or the folder holds something else, no picture decodes, or the disk
            has no room.
    """
    if dtype not in ("float32", "float16"):
        raise InputError(f"vectors are stored as float32 or float16, not {dtype!r}")
    if (path / HEAD).is_file():
        raise InputError(f"{path} already holds an index: use update or add, or give another folder")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: give a folder")
    foreign = [one.name for one in path.iterdir() if not OWN.fullmatch(one.name)] if path.is_dir() else []
    if foreign:
        raise InputError(f"{path} holds other files, such as {foreign[0]!r:.60}: give a new or an empty folder")
    check_kind(kind)
    path.mkdir(parents=True, exist_ok=True)
    with _changing(path):
        head = Head(model.name, model.fingerprint, dtype, model.target_shape, kind, (source.note,))
        change = _Change(path, model, head, None)
        change.write(source, 0, list(source.images))
        return change.commit(Changes(added=len(source.images), notes=list(source.notes)))


def add(model: Model, source: Source, path: Path) -> Changes:
    """Add the images of another source. Raises ``InputError`` for an id that the index holds already."""
    with _changing(path):
        old = Snapshot(path)
        if source.note in old.head.sources:
            raise InputError(f"{source.note.place or source.note.dataset} is in {path} already: use update")
        if held := sorted(source.images.keys() & set(old.live_ids()))[:1]:
            raise InputError(f"{path} already holds an image with the id {held[0]!r:.80}: ids occur once")
        removed = tuple(image_id for image_id in old.head.removed if image_id not in source.images)
        head = replace(old.head, sources=(*old.head.sources, source.note), removed=removed)
        change = _Change(path, model, head, old)
        change.write(source, len(old.head.sources), list(source.images))
        return _finish(change, Changes(added=len(source.images), notes=list(source.notes)))


def remove(path: Path, ids: Sequence[str]) -> Changes:
    """Remove images; an update leaves them out from now on. Raises ``InputError`` for an id that the index lacks."""
    with _changing(path):
        old = Snapshot(path)
        rows = old.rows_of(list(dict.fromkeys(ids)))
        change = _Change(path, None, replace(old.head, removed=tuple(sorted({*old.head.removed, *ids}))), old)
        change.gone += rows
        return _finish(change, Changes(removed=len(rows)))


def update(model: Model, path: Path) -> Changes:
    """Read all sources again, and encode what is new or has changed.

    An image is looked at again if the size or the time of its file is another one, and encoded again if its content
    is. A row of a table that says something else of the same picture keeps its vectors.

    Raises:
        InputError: if a source is missing, or two sources have one id.
    """
    with _changing(path):
        old, changes = Snapshot(path), Changes()
        change = _Change(path, model, old.head, old)
        files = old.files.select(["id", "source", "size", "mtime_ns", "columns", "problem"]).to_pydict()
        known: dict[str, int] = {}  # the last row of each id that is there, or was broken
        for place, image_id in enumerate(files["id"]):
            if old.alive[place] or files["problem"][place]:
                known[image_id] = place
        seen: set[str] = set()
        for number, note in enumerate(old.head.sources):
            source = read_source(note.place, note.dataset)
            changes.notes += source.notes
            ids = [image_id for image_id in source.images if image_id not in old.head.removed]
            if twice := [image_id for image_id in ids if image_id in seen]:
                raise InputError(f"two sources of {path} hold an image with the id {twice[0]!r:.80}: ids occur once")
            seen.update(ids)
            stamps = image_stamps(source.images[image_id] for image_id in ids)
            hashes = dict(zip(source.images, source.column_hashes(), strict=True))
            now = [(number, *stamp, hashes[image_id]) for image_id, stamp in zip(ids, stamps, strict=True)]
            names = ("source", "size", "mtime_ns", "columns")
            stale = [
                image_id
                for image_id, about in zip(ids, now, strict=True)
                if (row := known.get(image_id)) is None or about != tuple(files[name][row] for name in names)
            ]
            changes.added += sum(image_id not in known for image_id in stale)
            changes.changed += sum(image_id in known for image_id in stale)
            change.gone += [known[image_id] for image_id in stale if image_id in known]
            change.write(source, number, stale)
        lost = [row for image_id, row in known.items() if image_id not in seen and old.alive[row]]
        changes.removed = len(lost)
        change.gone += lost
        return _finish(change, changes)


def compact(path: Path) -> Changes:
    """Write all images into one segment, without those that are gone."""
    with _changing(path):
        return _compact(path)


def _compact(path: Path) -> Changes:
    old = Snapshot(path)
    problems = np.array([bool(problem) for problem in old.files["problem"].to_pylist()], dtype=bool)
    live = set(old.live_ids())
    kept = [
        row
        for row, image_id in enumerate(old.files["id"].to_pylist())
        if old.alive[row] or (problems[row] and image_id not in live)
    ]
    change = _Change(path, None, replace(old.head, segments=()), old)
    change.rows.append(_Rows([None] * len(kept), old.files.take(kept), old.columns.take(kept), kept))
    return change.commit(Changes())


@dataclass
class _Rows:
    """Rows to write: their images, their tables, and the old row whose vectors each takes over, or -1."""

    images: Sequence[ImageRef | None]
    files: pyarrow.Table
    columns: pyarrow.Table
    copied: list[int]


@dataclass
class _Change:
    """A change on the way to its commit: rows to write as one new segment, and old rows that go."""

    path: Path
    model: Model | None
    head: Head
    old: Snapshot | None
    rows: list[_Rows] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.model is not None and self.model.fingerprint != self.head.fingerprint:
            raise other_model(self.path, self.head.model, self.model.name)

    def write(self, source: Source, number: int, ids: Sequence[str]) -> None:
        """Plan rows for images of a source; vectors of equal content are taken over from the old rows."""
        import pyarrow as pa

        if not ids:
            return
        images = [source.images[image_id] for image_id in ids]
        stamps, contents = image_stamps(images), content_hashes(images)  # in this order: a change in between shows
        places = {image_id: place for place, image_id in enumerate(source.images)}
        rows = [places[image_id] for image_id in ids]
        hashes = source.column_hashes()
        files = {
            "id": pa.array(ids, pa.string()),
            "source": pa.array([number] * len(ids), pa.int64()),
            "path": pa.array([source.relative_path(image_id) for image_id in ids], pa.string()),
            "box": pa.array([image.box and list(image.box) for image in images], pa.list_(pa.int64())),
            "size": pa.array([size for size, _ in stamps], pa.int64()),
            "mtime_ns": pa.array([time for _, time in stamps], pa.int64()),
            "content": pa.array(contents, pa.string()),
            "columns": pa.array([hashes[row] for row in rows], pa.uint64()),
            "draw": pa.array([draw_number(image_id) for image_id in ids], pa.uint64()),
            "problem": pa.array([""] * len(ids), pa.string()),
        }
        known = self._vectors_by_content
        copied = [known.get(content, -1) for content in contents]
        self.rows.append(_Rows(images, pa.table(files), source.columns.take(rows), copied))

    @cached_property
    def _vectors_by_content(self) -> dict[str, int]:
        if self.old is None:
            return {}
        names, problems = (self.old.files[name].to_pylist() for name in ("content", "problem"))
        return {content: row for row, content in enumerate(names) if content and not problems[row]}

    def commit(self, changes: Changes) -> Changes:
        """Write the new segment, then the head that names it."""
        head = self.head
        if self.old is not None and self.gone:
            head = replace(head, segments=self.old.remove(np.array(self.gone)).segments)
        if self.rows:
            files = concatenate_tables([rows.files for rows in self.rows])
            columns = concatenate_tables([rows.columns for rows in self.rows])
            images = [image for rows in self.rows for image in rows.images]
            copied = [row for rows in self.rows for row in rows.copied]
            changes.encoded = sum(row < 0 for row in copied) if self.model else 0
            segment = self._segment(_Rows(images, files, columns, copied), changes)
            head = replace(head, segments=(*head.segments, segment))
            if self.old is None and len(changes.broken) == segment.rows:
                raise InputError(f"no picture decodes, such as {changes.broken[0]}")
        write_head(self.path, head)
        return changes

    def _segment(self, rows: _Rows, changes: Changes) -> SegmentNote:
        """Write a segment: vectors first, then the tables; whoever comes after a kill goes on."""
        import pyarrow as pa
        from pyarrow import parquet

        key = _segment_key(self.head, rows)
        store = segment_store(self.path, key, len(rows.images), self.head.dtype)
        arrays = store.open() or self._encode(store, rows)
        broken = _zero_rows(arrays["target"])
        problems = rows.files["problem"].to_pylist()
        for row in broken.tolist():
            if image := rows.images[row]:
                problems[row] = _problem(image)
                changes.broken.append(problems[row])
        place = rows.files.column_names.index("problem")
        files = rows.files.set_column(place, "problem", pa.array(problems, pa.string()))
        for name, table in (("files.parquet", files), ("columns.parquet", rows.columns)):
            with replaced(store.folder / name) as beside:
                parquet.write_table(table, beside)
        removed = write_removed(store.folder, broken)
        if self.head.kind != "exact" and len(rows.images) >= MIN_APPROXIMATE:
            build_approximate(arrays["target"].whole(), self.head.kind, store.folder)
        return SegmentNote(key, len(rows.images), removed)

    @torch.no_grad()
    def _encode(self, store: EmbeddingStore, rows: _Rows) -> dict[str, StoredRows]:
        """Encode the rows that the store lacks, or take them over; zeros for a picture that does not decode."""
        missing = store.missing()
        total, ahead = len(rows.images), sum(row >= 0 for row in rows.copied)
        done = total - sum(min(BLOCK, total - start) for start in missing)
        with (
            ThreadPoolExecutor(cpu_count(), "decode") as pool,
            tqdm(total=total, initial=done, desc="index", unit="image", disable=ahead == total) as bar,
        ):

            def load(start: int) -> tuple[int, list[Tensor | None]]:
                part = range(start, min(start + BLOCK, total))
                return start, list(pool.map(lambda row: self._pixels(rows, row), part))

            for start, pixels in prefetch(load(start) for start in missing):
                store.write(start, {"target": self._vectors(rows, start, pixels)})
                bar.update(len(pixels))
        return store.finish()

    def _pixels(self, rows: _Rows, row: int) -> Tensor | None:
        """Preprocessed pixels; None where nothing is to be encoded, or the picture does not decode."""
        image = rows.images[row]
        if image is None or rows.copied[row] >= 0 or self.model is None:
            return None
        try:
            return self.model.backbone.transform(open_image(image))
        except InputError:
            return None

    def _vectors(self, rows: _Rows, start: int, pixels: Sequence[Tensor | None]) -> Tensor:
        """Vectors (n, K, E) of a block of rows, as they are stored."""
        vectors = torch.zeros(len(pixels), *self.head.shape, dtype=getattr(torch, self.head.dtype))
        old = [(n, row) for n in range(len(pixels)) if (row := rows.copied[start + n]) >= 0]
        if old and self.old is not None:
            vectors[[n for n, _ in old]] = self.old.gather([row for _, row in old])
        new = [(n, one) for n, one in enumerate(pixels) if one is not None]
        size = self.model.batch_size if self.model else 1
        for first in range(0, len(new), size):
            assert self.model is not None
            batch = new[first : first + size]
            target = self.model.features(torch.stack([one for _, one in batch])).target.float().cpu()
            if not bool(target.isfinite().all()):
                raise InputError(f"model {self.model.name}: embeddings are not finite: check its weights")
            vectors[[n for n, _ in batch]] = target.to(vectors.dtype)
        return vectors


def _finish(change: _Change, changes: Changes) -> Changes:
    """Commit, then compact an index of many segments, or of which a large part is gone."""
    change.commit(changes)
    snapshot = Snapshot(change.path)
    gone = len(snapshot.alive) - len(snapshot)
    if len(snapshot.head.segments) > MANY_SEGMENTS or gone > MANY_GONE * len(snapshot.alive) + BLOCK:
        _compact(change.path)
    return changes


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Keep other processes from changing an index meanwhile."""
    if not path.is_dir():
        raise InputError(f"{path} holds no index: make one by spn4cir-index build FOLDER --index {path}")
    with locked(path / "index.lock", f"{path} is being changed by another process"):
        yield


def _segment_key(head: Head, rows: _Rows) -> str:
    """Digest of everything that a segment holds."""
    import pyarrow as pa

    digest = hashlib.sha256(json.dumps([head.fingerprint, head.dtype, head.shape, head.kind, rows.copied]).encode())
    for table in (rows.files, rows.columns):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()[:24]


def _zero_rows(vectors: StoredRows) -> np.ndarray[Any, Any]:
    """Rows of pictures that did not decode."""
    whole, size = vectors.whole(), 16_384
    zero = [~whole[start : start + size].flatten(1).any(1) for start in range(0, len(whole), size)]
    return torch.cat(zero).nonzero()[:, 0].numpy()


def _problem(image: ImageRef) -> str:
    try:
        open_image(image)
    except InputError as error:
        return str(error)
    return f"image {image} changed while it was read"


def draw_number(image_id: str) -> int:
    """A number that the background sample is drawn by, the same in every index."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big")
