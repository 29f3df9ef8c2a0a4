"""A collection of Qdrant on a server."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from spn4cir.errors import InputError
from spn4cir.index.qdrant_collection import Collection, Point, column_key
from spn4cir.selection import Condition, Kind

PAGE = 4096  # points listed at once


class ServerCollection(Collection):
    """A collection on a server, or in the imitation of a server that ``qdrant_client`` brings for tests.

    Args:
        client: a ``qdrant_client.QdrantClient``.
        name: of the collection.
        place: the address.
        exact: whether all points are scored; False searches the server's HNSW graph.
    """

    def __init__(self, client: Any, name: str, place: str, exact: bool = True):
        self.kit = importlib.import_module("qdrant_client.models")
        self._failures = (importlib.import_module("qdrant_client.http.exceptions").ApiException, ValueError, OSError)
        self._client, self._name, self.place, self._exact = client, name, place, exact

    def _call(self, method: str, **given: Any) -> Any:
        try:
            return getattr(self._client, method)(self._name, **given)
        except self._failures as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.place}: Qdrant did not answer the request: {reason}") from None

    def exists(self) -> bool:
        """Whether the server has such a collection."""
        return bool(self._call("collection_exists"))

    def create(self, shape: tuple[int, int]) -> None:
        """Make the collection, in place of an empty one."""
        kit, (count, width) = self.kit, shape
        if self.exists():
            self._call("delete_collection")
        several = kit.MultiVectorConfig(comparator=kit.MultiVectorComparator.MAX_SIM) if count > 1 else None
        vectors = kit.VectorParams(size=width, distance=kit.Distance.DOT, multivector_config=several)
        self._call("create_collection", vectors_config=vectors)

    def write(self, points: Sequence[Point]) -> None:
        """Add points, in place of those with the same ids."""
        structs = [self.kit.PointStruct(id=one.id, vector=one.vector, payload=one.payload) for one in points]
        self._call("upsert", points=structs, wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points."""
        self._call("delete", points_selector=self.kit.PointIdsList(points=list(ids)), wait=True)

    def read(self, ids: Sequence[str], vectors: bool = False) -> list[Point]:
        """The points of these ids that there are."""
        records = self._call("retrieve", ids=list(ids), with_payload=True, with_vectors=vectors)
        return [Point(str(one.id), one.payload, one.vector) for one in records]

    def scan(self, key: str) -> Iterator[Point]:
        """All points with one key of their payload."""
        start = None
        while True:
            records, start = self._call("scroll", limit=PAGE, offset=start, with_payload=[key], with_vectors=False)
            yield from (Point(str(one.id), one.payload) for one in records)
            if start is None:
                return

    def query(self, vector: Any, count: int, conditions: Sequence[Condition], excluded: Sequence[str]) -> list[Point]:
        """The points of the highest scores."""
        answer = self._call(
            "query_points",
            query=vector,
            limit=count,
            query_filter=self._filter(conditions, excluded),
            search_params=self.kit.SearchParams(exact=self._exact),
            with_payload=True,
            with_vectors=True,
        )
        return [Point(str(one.id), one.payload, one.vector, one.score) for one in answer.points]

    def index_column(self, name: str, kind: Kind) -> None:
        """Index a column for filters."""
        schema = self.kit.PayloadSchemaType.KEYWORD if kind == "text" else self.kit.PayloadSchemaType.FLOAT
        self._call("delete_payload_index", field_name=column_key(name))
        self._call("create_payload_index", field_name=column_key(name), field_schema=schema)

    def __len__(self) -> int:
        return int(self._call("count", exact=True).count)

    def finish(self) -> None:
        """Do nothing: the server has written what it has confirmed."""

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _has_id(self, ids: Sequence[str]) -> Any:
        return self.kit.HasIdCondition(has_id=list(ids))

    def _range(self, **bounds: float) -> Any:
        return self.kit.Range(**bounds)
