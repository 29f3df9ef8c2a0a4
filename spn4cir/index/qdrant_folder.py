"""A collection of Qdrant in a folder, by Qdrant's own core inside this process (``qdrant-edge-py``).

It searches exactly, and one process at a time opens it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spn4cir.errors import InputError
from spn4cir.index.qdrant_collection import Collection, Point, column_key, import_qdrant
from spn4cir.selection import Condition, Kind

PAGE = 4096  # points listed at once


class FolderCollection(Collection):
    """A collection in a folder."""

    one_process = True

    def __init__(self, folder: Path):
        self.kit, self.place, self._folder = import_qdrant("qdrant_edge"), str(folder), folder
        self._opened: Any = None

    def exists(self) -> bool:
        """Whether the folder holds a collection. Raises ``InputError`` if it holds anything else."""
        if (self._folder / "edge_config.json").is_file():
            return True
        if self._folder.exists() and not (self._folder.is_dir() and not any(self._folder.iterdir())):
            raise InputError(f"{self.place} holds other files, or a damaged collection: give a new or an empty folder")
        return False

    @property
    def _shard(self) -> Any:
        if self._opened is None:
            self._opened = self._guard(self.kit.EdgeShard.load, str(self._folder))
        return self._opened

    def _guard(self, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return function(*given)
        except BaseException as error:  # a panic of the engine is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
                raise
            if "WouldBlock" in str(error):
                raise InputError(f"{self.place} is open in another process, or twice in this one: close it") from None
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.place} is damaged, or cannot be written: {reason}") from None

    def _update(self, operation: Any) -> None:
        self._guard(self._shard.update, operation)

    def create(self, shape: tuple[int, int]) -> None:
        """Make the folder, in place of an empty collection."""
        kit, (count, width) = self.kit, shape
        if self.exists():
            self.close()
            shutil.rmtree(self._folder)
        several = kit.MultiVectorConfig(kit.MultiVectorComparator.MaxSim) if count > 1 else None
        vectors = kit.EdgeVectorParams(size=width, distance=kit.Distance.Dot, multivector_config=several)
        optimizers = kit.EdgeOptimizersConfig(indexing_threshold=2**40)  # no HNSW: a folder is searched exactly
        config = kit.EdgeConfig(vectors=vectors, optimizers=optimizers)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.place} cannot be written: {error.strerror}") from None
        self._opened = self._guard(kit.EdgeShard.create, str(self._folder), config)

    def write(self, points: Sequence[Point]) -> None:
        """Add points, in place of those with the same ids."""
        structs = [self.kit.Point(one.id, one.vector, one.payload) for one in points]
        self._update(self.kit.UpdateOperation.upsert_points(structs))

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points."""
        self._update(self.kit.UpdateOperation.delete_points(list(ids)))

    def read(self, ids: Sequence[str], vectors: bool = False) -> list[Point]:
        """The points of these ids that there are."""
        records = self._guard(self._shard.retrieve, list(ids), True, vectors)
        return [Point(str(one.id), one.payload or {}, one.vector) for one in records]

    def scan(self, key: str) -> Iterator[Point]:
        """All points with one key of their payload."""
        start = None
        while True:
            request = self.kit.ScrollRequest(offset=start, limit=PAGE, with_payload=[key], with_vector=False)
            records, start = self._guard(self._shard.scroll, request)
            yield from (Point(str(one.id), one.payload or {}) for one in records)
            if start is None:
                return

    def query(self, vector: Any, count: int, conditions: Sequence[Condition], excluded: Sequence[str]) -> list[Point]:
        """The points of the highest scores."""
        request = self.kit.QueryRequest(
            limit=count,
            query=self.kit.Query.Nearest(vector),
            filter=self._filter(conditions, excluded),
            params=self.kit.SearchParams(exact=True),
            with_payload=True,
            with_vector=True,
        )
        records = self._guard(self._shard.query, request)
        return [Point(str(one.id), one.payload, one.vector, one.score) for one in records]

    def index_column(self, name: str, kind: Kind) -> None:
        """Index a column for filters."""
        schema = self.kit.PayloadSchemaType.Keyword if kind == "text" else self.kit.PayloadSchemaType.Float
        self._update(self.kit.UpdateOperation.delete_field_index(column_key(name)))
        self._update(self.kit.UpdateOperation.create_field_index(column_key(name), schema))

    def __len__(self) -> int:
        return int(self._guard(self._shard.count, self.kit.CountRequest()))

    def finish(self) -> None:
        """Reclaim the space of deleted points, and write everything to disk."""
        self._guard(self._shard.optimize)
        self._guard(self._shard.flush)

    def close(self) -> None:
        """Let other processes open the folder."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _has_id(self, ids: Sequence[str]) -> Any:
        return self.kit.HasIdCondition(set(ids))

    def _range(self, **bounds: float) -> Any:
        return self.kit.RangeFloat(**bounds)
