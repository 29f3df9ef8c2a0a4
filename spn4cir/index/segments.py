"""A change of an index on its way to the commit: rows that are planned, then written as one segment.

A segment goes on after a kill, to the same bytes: its name is a digest of what it will hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from spn4cir.files import replaced
from spn4cir.images import open_image, takes_own_mode
from spn4cir.index.approximate import MIN_APPROXIMATE, build_approximate
from spn4cir.index.columns import concatenate_tables
from spn4cir.index.snapshot import (
    BLOCK,
    Head,
    SegmentNote,
    Snapshot,
    draw_number,
    other_model,
    segment_store,
    write_head,
    write_removed,
)
from spn4cir.index.source import Source, content_hashes, image_stamps
from spn4cir.model import Model
from spn4cir.store import EmbeddingStore, StoredRows
from spn4cir.types import ImageRef

if TYPE_CHECKING:
    import pyarrow


@dataclass
class PlannedRows:
    """Rows to write: their images, their tables, and the old row whose vectors each takes over, or -1."""

    images: Sequence[ImageRef | None]
    files: pyarrow.Table
    columns: pyarrow.Table
    copied: list[int]


@dataclass
class Change:
    """A change on the way to its commit: rows to write as one new segment, and old rows that go."""

    path: Path
    load: Callable[[], Model]
    head: Head
    old: Snapshot | None
    rows: list[PlannedRows] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    @cached_property
    def model(self) -> Model:
        """The model, loaded when the first image is to be encoded. Raises ``InputError`` if it is not the index's."""
        model = self.load()
        if model.fingerprint != self.head.fingerprint:
            raise other_model(self.path, self.head.model, model.name)
        return model

    def write(self, source: Source, number: int, ids: Sequence[str]) -> None:
        """Plan rows for images of a source; vectors of equal content are taken over from the old rows."""
        import pyarrow as pa

        if not ids:
            return
        images = [source.images[image_id] for image_id in ids]
        stamps, contents = image_stamps(images), content_hashes(images)  # in this order: a change in between shows
        places = {image_id: place for place, image_id in enumerate(source.images)}
        rows = [places[image_id] for image_id in ids]
        files = {
            "id": pa.array(ids, pa.string()),
            "source": pa.array([number] * len(ids), pa.int64()),
            "path": pa.array([source.relative_path(image_id) for image_id in ids], pa.string()),
            "box": pa.array([image.box and list(image.box) for image in images], pa.list_(pa.int64())),
            "size": pa.array([size for size, _ in stamps], pa.int64()),
            "mtime_ns": pa.array([time for _, time in stamps], pa.int64()),
            "content": pa.array(contents, pa.string()),
            "columns": pa.array([source.column_hashes[row] for row in rows], pa.uint64()),
            "draw": pa.array([draw_number(image_id) for image_id in ids], pa.uint64()),
        }
        copied = self._known_vectors(contents)
        self.rows.append(PlannedRows(images, pa.table(files), source.columns.take(rows), copied))

    def _known_vectors(self, contents: Sequence[str]) -> list[int]:
        """The old row that holds the vectors of each content, or -1; zeros of a broken picture are none."""
        if self.old is None:
            return [-1] * len(contents)
        known = {content: row for row, content in enumerate(self.old.files["content"].to_pylist()) if content}
        rows = [known.get(content, -1) for content in contents]
        known_rows = [row for row in rows if row >= 0]
        zero = {
            row for row, vectors in zip(known_rows, self.old.gather(known_rows), strict=True) if not bool(vectors.any())
        }
        return [-1 if row in zero else row for row in rows]

    def commit(self) -> tuple[int, list[str]]:
        """Write the new segment, then the head that names it; the number of encoded images, and what is broken."""
        head, encoded, problems = self.head, 0, dict[str, str]()
        if self.old is not None and self.gone:
            head = replace(head, segments=self.old.remove(np.array(self.gone)).segments)
        if self.rows:
            files = concatenate_tables([rows.files for rows in self.rows])
            columns = concatenate_tables([rows.columns for rows in self.rows])
            images = [image for rows in self.rows for image in rows.images]
            copied = [row for rows in self.rows for row in rows.copied]
            segment, problems = self._segment(PlannedRows(images, files, columns, copied))
            if self.old is None and len(problems) == segment.rows:
                raise InputError(f"no picture decodes, such as {next(iter(problems.values()))}")
            copied_ids = zip(copied, files["id"].to_pylist(), strict=True)
            encoded = sum(row < 0 and image_id not in problems for row, image_id in copied_ids)
            others = tuple(part for part in head.segments if part.key != segment.key)  # rows that still cannot be read
            head = replace(head, segments=(*others, segment), broken=head.broken | problems)
        write_head(self.path, head)
        return encoded, list(problems.values())

    def _segment(self, rows: PlannedRows) -> tuple[SegmentNote, dict[str, str]]:
        """Write a segment, vectors first, and say what does not decode; whoever comes after a kill goes on."""
        from pyarrow import parquet

        key = _segment_key(self.head, rows)
        store = segment_store(self.path, key, len(rows.images), self.head.dtype)
        arrays = store.open() or self._encode(store, rows)
        broken = _zero_rows(arrays["target"])
        problems = {
            str(rows.files["id"][row]): _problem(image) for row in broken.tolist() if (image := rows.images[row])
        }
        for name, table in (("files.parquet", rows.files), ("columns.parquet", rows.columns)):
            with replaced(store.folder / name) as beside, beside.open("wb") as file:
                parquet.write_table(table, file)
        removed = write_removed(store.folder, broken)
        if self.head.kind != "exact" and len(rows.images) >= MIN_APPROXIMATE:
            build_approximate(arrays["target"].whole(), self.head.kind, store.folder)
        return SegmentNote(key, len(rows.images), removed), problems

    @torch.no_grad()
    def _encode(self, store: EmbeddingStore, rows: PlannedRows) -> dict[str, StoredRows]:
        """Encode the rows that the store lacks, or take them over; zeros for a picture that does not decode."""
        missing = store.missing()
        if any(row < 0 for row in rows.copied):
            _ = self.model  # loaded once, and refused before any work
        total = len(rows.images)
        done = total - sum(min(BLOCK, total - start) for start in missing)
        with (
            ThreadPoolExecutor(cpu_count(), "decode") as pool,
            tqdm(total=total, initial=done, desc="index", unit="image") as bar,
        ):

            def load(start: int) -> tuple[int, list[Tensor | None]]:
                part = range(start, min(start + BLOCK, total))
                return start, list(pool.map(lambda row: self._pixels(rows, row), part))

            for start, pixels in prefetch(load(start) for start in missing):
                store.write(start, {"target": self._vectors(rows, start, pixels)})
                bar.update(len(pixels))
        return store.finish()

    def _pixels(self, rows: PlannedRows, row: int) -> Tensor | None:
        """Preprocessed pixels; None where nothing is to be encoded, or the picture does not decode."""
        image = rows.images[row]
        if image is None or rows.copied[row] >= 0:
            return None
        transform = self.model.backbone.transform
        try:
            pixels = transform(open_image(image, takes_own_mode(transform)))
        except InputError:
            return None
        planned = tuple(rows.files[name][row].as_py() for name in ("size", "mtime_ns"))
        return pixels if image_stamps([image]) == [planned] else None  # else it was changed after it was hashed

    def _vectors(self, rows: PlannedRows, start: int, pixels: Sequence[Tensor | None]) -> Tensor:
        """Vectors (n, K, E) of a block of rows, as they are stored."""
        vectors = torch.zeros(len(pixels), *self.head.shape, dtype=getattr(torch, self.head.dtype))
        old = [(n, row) for n in range(len(pixels)) if (row := rows.copied[start + n]) >= 0]
        if old and self.old is not None:
            vectors[[n for n, _ in old]] = self.old.gather([row for _, row in old])
        new = [(n, one) for n, one in enumerate(pixels) if one is not None]
        size = self.model.batch_size if new else 1
        for first in range(0, len(new), size):
            batch = new[first : first + size]
            target = self.model.features(torch.stack([one for _, one in batch])).target.float().cpu()
            if not bool(target.isfinite().all()):
                raise InputError(f"model {self.model.name}: embeddings are not finite: check its weights")
            vectors[[n for n, _ in batch]] = target.to(vectors.dtype)
        return vectors


def _segment_key(head: Head, rows: PlannedRows) -> str:
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
