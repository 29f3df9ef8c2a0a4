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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spn4cir.errors import InputError
from spn4cir.files import read_json, replaced, write_text
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
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class SourceNote:
    """Where images were read from (folder, table, hub name or dataset), and the folder that holds all of them."""

    place: str
    dataset: str
    root: str


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
    """

    model: str
    fingerprint: str
    dtype: str
    shape: tuple[int, int]
    kind: str
    sources: tuple[SourceNote, ...] = ()
    segments: tuple[SegmentNote, ...] = ()
    removed: tuple[str, ...] = ()


def read_head(path: Path) -> Head:
    """The last commit of an index. Raises ``InputError`` if there is none, or it is damaged or of a later format."""
    file = path / HEAD
    if not file.is_file():
        raise InputError(f"{path} holds no index ({HEAD} is missing): make one by spn4cir-index build FOLDER {path}")
    about = read_json(file)
    try:
        if about["format"] != FORMAT:
            raise InputError(f"{file} has format {about['format']}, this release reads format {FORMAT}: build it anew")
        head = Head(
            str(about["model"]),
            str(about["fingerprint"]),
            str(about["dtype"]),
            (int(about["shape"][0]), int(about["shape"][1])),
            str(about["kind"]),
            tuple(SourceNote(**source) for source in about["sources"]),
            tuple(SegmentNote(**segment) for segment in about["segments"]),
            tuple(map(str, about["removed"])),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: {error!r}: build the index anew") from None
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
        try:
            self._open()
        except InputError:
            again = read_head(path)  # another process may have committed, and cleaned up, in between
            if again == self.head:
                raise
            self.head = again
            self._open()

    def _open(self) -> None:
        self.vectors: list[StoredRows] = []
        self.alive: Mask = np.ones(sum(part.rows for part in self.head.segments), dtype=bool)
        for part, start in zip(self.head.segments, self.starts, strict=True):
            arrays = segment_store(self.path, part.key, part.rows, self.head.dtype).open()
            if not arrays:
                raise InputError(f"{self.path / part.key} is missing or damaged: build the index anew")
            self.vectors.append(arrays["target"])
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
        return {field.name: _kind(field.type) for field in self.columns.schema}

    def _table(self, name: str) -> pyarrow.Table:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            parts = [parquet.read_table(self.path / part.key / name) for part in self.head.segments]
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path}: {name} is missing or damaged ({error}): build the index anew") from None
        return concatenate_tables(parts)

    def live_ids(self) -> list[str]:
        """Ids of all images."""
        ids: list[str] = self.files["id"].filter(self.alive).to_pylist()
        return ids

    def rows_of(self, ids: Sequence[str]) -> list[int]:
        """The rows of these ids. Raises ``InputError`` for an id that the index lacks."""
        import pyarrow as pa
        import pyarrow.compute as pc

        places = pc.index_in(self.files["id"], pa.array(ids, pa.string())).to_numpy(zero_copy_only=False)
        found: dict[str, int] = {}
        for row in np.flatnonzero(~np.isnan(places.astype(float)) & self.alive):
            found[ids[int(places[row])]] = int(row)
        if lost := [image_id for image_id in ids if image_id not in found]:
            raise InputError(f"{self.path}: {len(lost)} ids are not in the index, such as {lost[0]!r:.80}")
        return [found[image_id] for image_id in ids]

    def gather(self, rows: Sequence[int]) -> Tensor:
        """Vectors (n, K, E) of rows, in the type they are stored in."""
        out = np.empty((len(rows), *self.head.shape), dtype=self.head.dtype)
        wanted = np.asarray(rows, dtype=np.int64)
        for start, vectors in zip(self.starts, self.vectors, strict=True):
            inside = np.flatnonzero((wanted >= start) & (wanted < start + len(vectors)))
            if len(inside):
                out[inside] = vectors.whole().numpy()[wanted[inside] - start]
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
            mask = mask & _matches(self.columns[condition.column], condition)
        return mask

    def remove(self, rows: np.ndarray[Any, Any]) -> Head:
        """A head without these rows; its lists of rows that are gone are written, the commit is not."""
        alive = self.alive.copy()
        alive[rows] = False
        parts = []
        for part, start in zip(self.head.segments, self.starts, strict=True):
            gone = np.flatnonzero(~alive[start : start + part.rows])
            if len(gone) == part.rows:
                continue
            parts.append(replace(part, removed=write_removed(self.path / part.key, gone)))
        return replace(self.head, segments=tuple(parts))


def concatenate_tables(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """Tables below each other; a column that one lacks is empty there, and of different types becomes text."""
    import pyarrow as pa

    kinds: dict[str, set[Kind]] = {}
    for table in tables:
        for field in table.schema:
            if not pa.types.is_null(field.type):
                kinds.setdefault(field.name, set()).add(_kind(field.type))
    mixed = [name for name, found in kinds.items() if len(found) > 1]

    def fit(table: pyarrow.Table) -> pyarrow.Table:
        for name in set(mixed) & set(table.column_names):
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].cast(pa.string()))
        return table

    return pa.concat_tables([fit(table) for table in tables], promote_options="permissive").combine_chunks()


def _kind(arrow_type: Any) -> Kind:
    import pyarrow as pa

    if pa.types.is_boolean(arrow_type):
        return "boolean"
    return "number" if pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type) else "text"


def _matches(column: Any, condition: Condition) -> Mask:
    import pyarrow as pa
    import pyarrow.compute as pc

    if _kind(column.type) == "number":
        column = column.cast(pa.float64())
    if condition.operator in ("=", "!="):
        found = pc.is_in(column, pa.array(condition.values, column.type))
    else:
        compare = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}[condition.operator]
        found = pc.fill_null(compare(column, condition.values[0]), False)
    mask: Mask = found.to_numpy(zero_copy_only=False).astype(bool)
    return ~mask if condition.operator == "!=" else mask


def _read_rows(path: Path, count: int) -> np.ndarray[Any, Any]:
    try:
        rows: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
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


def other_model(path: Path, built_with: str, given: str) -> InputError:
    """The error of a model whose embeddings do not fit an index."""
    return InputError(f"{path} was built with another model, {built_with}, not {given}: give that, or build it anew")
