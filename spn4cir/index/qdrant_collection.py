"""A collection of Qdrant, on a server or in a folder, with the few operations that an index needs.

Conditions on columns become filters here, so that both kinds of collection return the same images.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from spn4cir.errors import InputError
from spn4cir.selection import Condition, Kind

_BOUNDS = {"=": ("gte", "lte"), "!=": ("gte", "lte"), "<": ("lt",), "<=": ("lte",), ">": ("gt",), ">=": ("gte",)}
_LARGEST = sys.float_info.max


class Point(NamedTuple):
    """A point: its UUID, its payload, its vector (E,) or vectors (K, E) as lists, and its score in a query."""

    id: str
    payload: dict[str, Any]
    vector: Any = None
    score: float = 0.0


class Collection(ABC):
    """Points with vectors and payloads.

    Attributes:
        place: the address, as errors name it.
        kit: the module whose classes describe filters.
    """

    place: str
    kit: Any
    one_process = False  # whether nothing else can change the collection while it is open

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is such a collection."""

    @abstractmethod
    def create(self, shape: tuple[int, int]) -> None:
        """Make the collection for points of K vectors of width E, in place of an empty one."""

    @abstractmethod
    def write(self, points: Sequence[Point]) -> None:
        """Add points, in place of those with the same ids."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Delete points."""

    @abstractmethod
    def read(self, ids: Sequence[str], vectors: bool = False) -> list[Point]:
        """The points of these ids that there are, in any order."""

    @abstractmethod
    def scan(self, key: str) -> Iterator[Point]:
        """All points with one key of their payload."""

    @abstractmethod
    def query(self, vector: Any, count: int, conditions: Sequence[Condition], excluded: Sequence[str]) -> list[Point]:
        """The ``count`` points of the highest scores that satisfy all conditions, with their vectors."""

    @abstractmethod
    def index_column(self, name: str, kind: Kind) -> None:
        """Index a column for filters, in place of an index of another kind."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def finish(self) -> None:
        """Write to disk what is not yet there."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine."""

    @abstractmethod
    def _has_id(self, ids: Sequence[str]) -> Any: ...

    @abstractmethod
    def _range(self, **bounds: float) -> Any: ...

    def _filter(self, conditions: Sequence[Condition], excluded: Sequence[str]) -> Any:
        required = [self._any_value(condition) for condition in conditions if condition.operator != "!="]
        excluded_values = [self._any_value(condition) for condition in conditions if condition.operator == "!="]
        return self.kit.Filter(must=required, must_not=[*excluded_values, self._has_id(excluded)])

    def _any_value(self, condition: Condition) -> Any:
        """A filter that holds where the column compares with one of the values; a point without it satisfies none."""
        tests = [self._test(condition, value) for value in condition.values if value == value]  # without NaN
        return self.kit.Filter(should=tests or [self._has_id([])])

    def _test(self, condition: Condition, value: Any) -> Any:
        key = column_key(condition.column)
        if isinstance(value, str):
            return self.kit.FieldCondition(key=key, match=self.kit.MatchValue(value=value))
        bounds = dict.fromkeys(_BOUNDS[condition.operator], clamp(float(value)))
        return self.kit.FieldCondition(key=key, range=self._range(**bounds))


def import_qdrant(name: str) -> Any:
    """A package of Qdrant. Raises ``InputError`` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"Qdrant needs the package {name}: pip install 'spn4cir[qdrant]'") from error


def column_key(name: str) -> str:
    """Path of a column inside a payload."""
    return f'columns."{name}"'


def clamp(number: float) -> float:
    """A number that JSON can hold."""
    return min(max(number, -_LARGEST), _LARGEST)
