"""An index on disk: what a commit names, opened by memory map.

``index.json`` is the commit. It names segments, each a folder with the store of its vectors, ``files.parquet`` (where
each image lies, and how to tell that it changed) and ``columns.parquet`` (what is known about it). A segment never
changes; rows that are gone are listed in a file of their own, which a later commit names. So whoever is killed leaves
the last commit as it was.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spn4cir.errors import InputError
from spn4cir.files import open_array, read_json, replaced, write_text
from spn4cir.index.columns import Mask, column_kind, concatenate_tables, matching_rows
from spn4cir.selection import Condition, Kind
from spn4cir.store import EmbeddingStore, StoredRows

if TYPE_CHECKING:
    import pyarrow

HEAD = "index.json"
FORMAT = 1
SAMPLE = 1024
"""Images of the background sample of a query's z-scores: those with the smallest hash of their id."""
BLOCK = 256  # rows encoded between two notes of what is done
SEGMENT = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True)
class SourceNote:
    """Where images were read from (folder, table, hub name or dataset), and the folder that holds all of them."""

    place: str
    dataset: str
    root: str
    is_gone: bool = False


@dataclass(frozen=True)
class SegmentNote:
    """A segment by its folder, how many rows it has, and the file that lists those that are gone."""

    key: str
    rows: int
    removed: str = ""


@dataclass(frozen=True)
class Head:
    """What ``index.json`` says.

    Args:
        model: what ``spn4cir.load`` takes.
        fingerprint: of the model's image side.
        dtype: that vectors are stored in.
        shape: (K, E) of an image.
        kind: ``exact``, ``ivf`` or ``hnsw``.
        sources: where images were read from.
        segments: in order.
        removed: ids that were removed by hand, which an update leaves out.
        broken: id of each picture that does not decode → why.
    """

    model: str
    fingerprint: str
    dtype: str
    shape: tuple[int, int]
    kind: str
    sources: tuple[SourceNote, ...] = ()
    segments: tuple[SegmentNote, ...] = ()
    removed: tuple[str, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)


def read_head(path: Path) -> Head:
    """The last commit of an index. Raises ``InputError`` if there is none, or it is damaged or of a later format."""
    file = path / HEAD
    if not file.is_file():
        raise InputError(f"{path} holds no index: make one by spn4cir-index build FOLDER --index {path}")
    values = read_json(file)
    try:
        if values["format"] != FORMAT:
            raise InputError(f"{file} has format {values['format']}, this release reads format {FORMAT}: build it anew")
        head = Head(
            str(values["model"]),
            str(values["fingerprint"]),
            str(values["dtype"]),
            (int(values["shape"][0]), int(values["shape"][1])),
            str(values["kind"]),
            tuple(SourceNote(**source) for source in values["sources"]),
            tuple(SegmentNote(**segment) for segment in values["segments"]),
            tuple(map(str, values["removed"])),
            {str(image_id): str(problem) for image_id, problem in values["broken"].items()},
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: {error!r}: build the index anew") from None
    keys = [part.key for part in head.segments]
    if len(set(keys)) < len(keys) or not keys or not head.sources or min(head.shape) < 1:
        raise InputError(f"{file} is damaged: build the index anew")
    if not all(SEGMENT.fullmatch(part.key) and re.fullmatch(r"[\w.-]*", part.removed) for part in head.segments):
        raise InputError(f"{file} is damaged: a segment has an impossible name")
    return head


def write_head(path: Path, head: Head) -> None:
    """Commit, then remove what no commit names any more."""
    write_text(path / HEAD, json.dumps({"format": FORMAT, **asdict(head)}, indent=1, ensure_ascii=False) + "\n")
    kept = {part.key: part.removed for part in head.segments}
    for folder in segment_folders(path):
        if folder.name not in kept:
            shutil.rmtree(folder)
        else:
            for file in folder.glob("removed-*.npy"):
                if file.name != kept[folder.name]:
                    file.unlink()


def segment_folders(path: Path) -> list[Path]:
    """Folders of segments, whether committed, unfinished or stale."""
    return [one for one in path.iterdir() if one.is_dir() and SEGMENT.fullmatch(one.name)] if path.is_dir() else []


def segment_store(path: Path, key: str, rows: int, dtype: str) -> EmbeddingStore:
    """The store of a segment's vectors."""
    advice = "give the index a larger disk, or --dtype float16"
    return EmbeddingStore(path, key, rows, {"target": dtype}, BLOCK, "the index", advice)


class Snapshot:
    """An index as of its last commit. Rows are counted over all segments, those that are gone included.

    Raises:
        InputError: if there is no index, or a file of it is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.head = read_head(path)
        while True:
            try:
                self._open()
                break
            except InputError:
                again = read_head(path)  # another process may have committed, and cleaned up, in between
                if again == self.head:
                    raise
                self.head = again

    def _open(self) -> None:
        import pyarrow as pa

        self.vectors: list[StoredRows] = []
        self._tables: dict[str, list[pyarrow.Buffer]] = {"files.parquet": [], "columns.parquet": []}
        self.alive: Mask = np.ones(sum(part.rows for part in self.head.segments), dtype=bool)
        for part, start in zip(self.head.segments, self.starts, strict=True):
            arrays = segment_store(self.path, part.key, part.rows, self.head.dtype).open()
            if not arrays:
                raise InputError(f"{self.path / part.key} is missing or damaged: build the index anew")
            if arrays["target"].whole().shape[1:] != self.head.shape:
                raise InputError(f"{self.path / HEAD} is damaged: vectors have another shape: build the index anew")
            self.vectors.append(arrays["target"])
            for name, buffers in self._tables.items():  # mapped, so that they outlive a commit of another process
                try:
                    buffers.append(pa.memory_map(str(self.path / part.key / name)).read_buffer())
                except OSError:
                    raise self._damaged(name) from None
            if part.removed:
                self.alive[start + _read_rows(self.path / part.key / part.removed, part.rows)] = False

    @property
    def starts(self) -> list[int]:
        """The first row of each segment."""
        return [sum(part.rows for part in self.head.segments[:n]) for n in range(len(self.head.segments))]

    def __len__(self) -> int:
        return int(self.alive.sum())

    @cached_property
    def files(self) -> pyarrow.Table:
        """Of each row its id, where the image lies, and how to tell that it changed."""
        return self._table("files.parquet")

    @cached_property
    def columns(self) -> pyarrow.Table:
        """What is known about each row: category, title and caption, and the columns of a table."""
        return self._table("columns.parquet")

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """What each column holds."""
        return {field.name: column_kind(field.type) for field in self.columns.schema}

    def _table(self, name: str) -> pyarrow.Table:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            parts = [parquet.read_table(pa.BufferReader(buffer)) for buffer in self._tables[name]]
        except (OSError, pa.ArrowException):
            raise self._damaged(name) from None
        if [len(part) for part in parts] != [part.rows for part in self.head.segments]:
            raise self._damaged(name)
        return concatenate_tables(parts)

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{self.path}: {name} is missing or damaged: build the index anew")

    def live_ids(self) -> list[str]:
        """Ids of all images."""
        ids: list[str] = self.files["id"].filter(self.alive).to_pylist()
        return ids

    def rows_of(self, ids: Sequence[str]) -> list[int]:
        """The rows of these ids. Raises ``InputError`` for an id that the index lacks."""
        rows = [self.row_of(image_id) for image_id in ids]
        if lost := [image_id for image_id, row in zip(ids, rows, strict=True) if row is None]:
            raise InputError(f"{self.path}: {len(lost)} ids are not in the index, such as {lost[0]!r:.80}")
        return [row for row in rows if row is not None]

    def row_of(self, image_id: str) -> int | None:
        """The row of an id; None for an id that the index lacks."""
        if any("\ud800" <= letter <= "\udfff" for letter in image_id):  # no Unicode, so no id
            return None
        draws, order = self._by_draw
        drawn = np.uint64(draw_number(image_id))
        for place in range(*np.searchsorted(draws, [drawn, drawn + np.uint64(1)])):
            row = int(order[place])
            if self.alive[row] and self.files["id"][row].as_py() == image_id:
                return row
        return None

    @cached_property
    def _by_draw(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The numbers of all ids in ascending order, and their rows."""
        draws = self.files["draw"].to_numpy()
        order = np.argsort(draws, kind="stable")
        return draws[order], order

    def gather(self, rows: Sequence[int]) -> Tensor:
        """Vectors (n, K, E) of rows, in the type they are stored in."""
        out = np.empty((len(rows), *self.head.shape), dtype=self.head.dtype)
        numbers = np.asarray(rows, dtype=np.int64)
        for start, vectors in zip(self.starts, self.vectors, strict=True):
            inside = np.flatnonzero((numbers >= start) & (numbers < start + len(vectors)))
            if len(inside):
                out[inside] = vectors.whole().numpy()[numbers[inside] - start]
        return torch.from_numpy(out)

    def sample(self) -> np.ndarray[Any, Any]:
        """Rows of the background sample."""
        live = np.flatnonzero(self.alive)
        draws = self.files["draw"].to_numpy()[live]
        return np.sort(live[np.argsort(draws, kind="stable")[:SAMPLE]])

    def matching(self, conditions: Sequence[Condition]) -> Mask:
        """Which rows are there and satisfy all conditions."""
        mask = self.alive
        for condition in conditions:
            mask = mask & matching_rows(self.columns[condition.column], condition)
        return mask

    def remove(self, rows: np.ndarray[Any, Any]) -> Head:
        """A head without these rows; its lists of rows that are gone are written, the commit is not."""
        alive = self.alive.copy()
        alive[rows] = False
        parts = []
        for part, start in zip(self.head.segments, self.starts, strict=True):
            gone = np.flatnonzero(~alive[start : start + part.rows])
            if len(gone) == part.rows and alive.any():  # an index that has become empty keeps its segments
                continue
            parts.append(replace(part, removed=write_removed(self.path / part.key, gone)))
        return replace(self.head, segments=tuple(parts))


def _read_rows(path: Path, count: int) -> np.ndarray[Any, Any]:
    try:
        rows = open_array(path, None)
    except (OSError, ValueError, EOFError):
        raise InputError(f"{path} is missing or damaged: build the index anew") from None
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise InputError(f"{path} is damaged: it names rows that the segment lacks")
    return rows


def write_removed(folder: Path, rows: np.ndarray[Any, Any]) -> str:
    """Write the rows of a segment that are gone; the name of the file, empty if there are none."""
    if not len(rows):
        return ""
    name = f"removed-{hashlib.sha256(rows.tobytes()).hexdigest()[:12]}.npy"
    with replaced(folder / name) as beside, beside.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    return name


def draw_number(image_id: str) -> int:
    """A number that the background sample is drawn by, and that rows are found by; the same in every index."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big")


def other_model(path: Path, built_with: str, given: str) -> InputError:
    """The error of a model whose embeddings do not fit an index."""
    names = built_with if built_with != given else f"{built_with} with other weights"
    return InputError(f"{path} was built with another model, {names}, not {given}: give that, or build it anew")
