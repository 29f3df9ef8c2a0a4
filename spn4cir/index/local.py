"""An index in a folder: built from pictures, changed with them, and searched in memory-mapped vectors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spn4cir.datasets.reading import inner_path
from spn4cir.errors import InputError
from spn4cir.faiss_search import Neighbours
from spn4cir.index import changes
from spn4cir.index.approximate import open_approximate
from spn4cir.index.changes import Changes
from spn4cir.index.columns import Mask
from spn4cir.index.searchable import Nearest, SearchableIndex
from spn4cir.index.snapshot import HEAD, Snapshot, other_model, read_head
from spn4cir.index.source import Source, read_source, stored_image
from spn4cir.model import Model, load
from spn4cir.search import blocks, score_one
from spn4cir.selection import Condition, Kind, Selection, Value
from spn4cir.types import ImageRef


class Index(SearchableIndex):
    """A searchable index of pictures; see ``Index.build`` and ``Index.open``.

    Attributes:
        path: its folder.
        changes: what the last ``build``, ``add``, ``remove`` or ``update`` did; None after ``open``.

    Example:
        >>> import spn4cir
        >>> index = spn4cir.Index.build(spn4cir.load("embedded"), "pictures", "pictures.index")  # doctest: +SKIP
        >>> [hit.id for hit in index.search(text="a red heart", k=3)]  # doctest: +SKIP
    """

    changes: Changes | None = None

    def __init__(self, path: str | Path, model: Model | None = None, effort: int = 64):
        self.path, self._model, self._effort = Path(path).absolute(), model, effort
        self._sources: dict[int, Source] = {}
        self.refresh()
        if model is not None and model.fingerprint != self.snapshot.head.fingerprint:
            raise other_model(self.path, self.snapshot.head.model, model.name)

    @classmethod
    def build(
        cls,
        model: Model,
        source: str | Path,
        path: str | Path,
        *,
        kind: str = "exact",
        dtype: str = "float32",
        dataset: str | None = None,
    ) -> Index:
        """Embed all images of a source, and write the index. A build that was killed goes on where it stopped.

        Args:
            model: from ``spn4cir.load``.
            source: folder of pictures, table, ``hf:`` and a hub name, or name of a dataset.
            path: new or empty folder.
            kind: ``exact``; or ``hnsw`` or ``ivf`` of faiss, which are faster and may miss hits.
            dtype: ``float32``, or ``float16`` for half the disk and memory.
            dataset: name of the dataset whose files are in ``source``.

        Raises:
            InputError: if there are no pictures, the folder holds something else, or the disk has no room.
        """
        if "://" in str(path):
            raise InputError(f"{path} is an engine: build a folder, and export it")
        done = changes.build(model, read_source(source, dataset), Path(path), kind, dtype)
        index = cls(path, model)
        index.changes = done
        return index

    @staticmethod
    def open(path: str | Path, model: Model | None = None, *, effort: int = 64) -> SearchableIndex:
        """Open an index by memory map.

        Args:
            path: its folder; or where an engine holds it: ``qdrant://HOST:PORT/COLLECTION``.
            model: to embed queries; by default the one that it was built with is loaded at the first search.
            effort: how much of an ``hnsw`` or ``ivf`` index a search looks at; more is slower and misses less.

        Raises:
            InputError: if there is none, it is damaged, or it is of another model.
        """
        from spn4cir.index.vector_engines import open_engine

        return open_engine(str(path), model) or Index(Path(path), model, effort)

    def refresh(self) -> None:
        """Read the last commit, such as one that another process made meanwhile."""
        while True:
            commit, snapshot = _commit_stamp(self.path), Snapshot(self.path)
            try:
                self._state = snapshot, self._open_approximate(snapshot)  # at once, for searches in other threads
                break
            except InputError:
                if read_head(self.path) == snapshot.head:  # else another process has committed in between
                    raise
        self._commit = commit
        self._sources.clear()
        self.__dict__.pop("background", None)

    def refresh_if_changed(self) -> bool:
        """Read the newest commit if another process has made one since, and say whether it has.

        Raises:
            InputError: if the index has been removed since, or is of another model.
        """
        if _commit_stamp(self.path) == self._commit:
            return False
        self.refresh()
        if self._model is not None and self._model.fingerprint != self.snapshot.head.fingerprint:
            self._commit = None  # raises each time
            raise other_model(self.path, self.snapshot.head.model, self._model.name)
        return True

    def column_values(self, column: str) -> list[Value]:
        """The values of a column, in order. Raises ``InputError`` for a column that the index lacks."""
        self.check_selection((), Selection(group=column))
        values: list[Value] = self.snapshot.columns[column].filter(self.snapshot.alive).unique().drop_null().to_pylist()
        return sorted(values)

    def add(self, source: str | Path, dataset: str | None = None) -> Changes:
        """Add the images of another source. Raises ``InputError`` for an id that the index holds already."""
        return self._changed(changes.add(lambda: self.model, read_source(source, dataset), self.path))

    def remove(self, ids: str | Sequence[str]) -> Changes:
        """Remove images; an update leaves them out from now on. Raises ``InputError`` for an unknown id."""
        ids = [ids] if isinstance(ids, str) else ids
        return self._changed(changes.remove(self.path, ids))

    def remove_source(self, place: str) -> Changes:
        """Remove a source with all its images. Raises ``InputError`` for an unknown one."""
        return self._changed(changes.remove_source(self.path, place))

    def update(self, restore: bool = False) -> Changes:
        """Follow the sources: encode what is new or has another content, and remove what is gone.

        With ``restore``, images that were removed by hand come back.
        """
        return self._changed(changes.update(lambda: self.model, self.path, restore))

    def compact(self) -> Changes:
        """Write all images into one segment, without those that are gone."""
        return self._changed(changes.compact(self.path))

    def _changed(self, done: Changes) -> Changes:
        self.refresh()
        self.changes = done
        return done

    @property
    def model(self) -> Model:  # type: ignore[override]
        """The model that queries are embedded with. Raises ``InputError`` if it has changed since."""
        if self._model is None:
            head = self.snapshot.head
            self._model = load(head.model)
            if self._model.fingerprint != head.fingerprint:
                raise InputError(f"{self.path}: the model {head.model} has changed since: build the index anew")
        return self._model

    @property
    def ids(self) -> list[str]:
        """Ids of all images."""
        return self.snapshot.live_ids()

    def __len__(self) -> int:
        return len(self.snapshot)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What each column holds: text, number or boolean."""
        return self.snapshot.kinds

    @cached_property
    def background(self) -> Tensor:
        """Vectors (S, K, E) of the background sample."""
        return self.snapshot.gather(self.snapshot.sample().tolist()).float()

    def nearest(
        self, query: Tensor, count: int, conditions: Sequence[Condition] = (), exclude: Collection[str] = ()
    ) -> Nearest:
        """The candidates of a query (E,).

        All images are scored under conditions, in small segments, where more than a tenth of a segment is wanted, and
        where faiss finds too few.
        """
        snapshot, approximates = self._state
        mask = snapshot.matching(conditions)
        if exclude:
            mask = mask.copy()
            mask[snapshot.rows_of(list(exclude))] = False
        rows_of_segments, floor = [np.zeros(0, np.int64)], -float("inf")
        for start, vectors, approximate in zip(snapshot.starts, snapshot.vectors, approximates, strict=True):
            part = mask[start : start + len(vectors)]
            few = approximate is not None and not conditions and count <= len(vectors) // 10
            candidates = approximate.candidates(query, count) if few and approximate is not None else None
            if candidates is not None:
                rows, least = candidates
                rows = rows[part[rows]]
            else:
                rows, least = _best(query, vectors.whole(), part, count)
            floor = max(floor, least)
            rows_of_segments.append(start + rows)
        candidate_rows = np.concatenate(rows_of_segments)
        return Nearest(
            snapshot.files["id"].take(candidate_rows).to_pylist(),
            snapshot.gather(candidate_rows.tolist()).float(),
            _Lazy(
                candidate_rows, lambda row: self._path(*(snapshot.files[n][row].as_py() for n in ("source", "path")))
            ),
            _Lazy(candidate_rows, lambda row: snapshot.columns.slice(row, 1).to_pylist()[0]),
            floor,
        )

    @property
    def snapshot(self) -> Snapshot:
        """The commit that is open."""
        return self._state[0]

    def _open_approximate(self, snapshot: Snapshot) -> list[Neighbours | None]:
        head = snapshot.head
        return [
            open_approximate(vectors.whole(), head.kind, self.path / part.key, self._effort)
            for part, vectors in zip(head.segments, snapshot.vectors, strict=True)
        ]

    def find_image(self, image_id: str) -> ImageRef | None:
        """The picture of an image; None for an id that the index lacks."""
        row = self.snapshot.row_of(image_id)
        if row is None:
            return None
        file_row = self.snapshot.files.slice(row, 1).to_pylist()[0]
        path = self._path(file_row["source"], file_row["path"])
        if path is None:
            return self._source(file_row["source"]).images.get(image_id)
        return stored_image(self.snapshot.head.sources[file_row["source"]], path, file_row["box"])

    def _path(self, source: int, path: str | None) -> Path | None:
        root = self.snapshot.head.sources[source].root
        return None if path is None else Path(root) / inner_path(Path(root), "path", path)

    def _source(self, number: int) -> Source:
        """A source, read again for images that have no file of their own."""
        if number not in self._sources:
            note = self.snapshot.head.sources[number]
            self._sources[number] = read_source(note.place, note.dataset)
        return self._sources[number]


def _commit_stamp(path: Path) -> tuple[int, int, int] | None:
    """What tells one commit of an index from the next; None where there is none."""
    try:
        status = (path / HEAD).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


class _Lazy(Sequence[Any]):
    """What is known about rows, read when it is asked for: few candidates become hits."""

    def __init__(self, rows: np.ndarray[Any, Any], read: Callable[[int], Any]):
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: Any) -> Any:
        return self._read(int(self._rows[position]))


def _best(query: Tensor, vectors: Tensor, mask: Mask, count: int) -> tuple[np.ndarray[Any, Any], float]:
    """Rows of the highest scores among those of the mask, and the lowest of these scores; minus infinity for all."""
    scores = torch.cat([score_one(query[None], block)[0] for _, block in blocks(vectors, query)])
    allowed = int(mask.sum())
    if allowed < len(mask):
        scores[torch.from_numpy(~mask)] = -torch.inf
    best = scores.topk(min(count, allowed))
    return best.indices.numpy(), float(best.values[-1]) if count < allowed else -float("inf")
