"""The arithmetic of a search: one query vector from weighted images and texts, and hits from the nearest candidates.

Pure functions, shared by the Python API, the command line and the engines, so that all of them return the same hits.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.errors import InputError

Operator: TypeAlias = Literal["=", "!=", "<", "<=", ">", ">="]
Kind: TypeAlias = Literal["text", "number", "boolean"]
Value: TypeAlias = "str | float | bool"
Where: TypeAlias = "str | Sequence[str] | Mapping[str, Value | Sequence[Value]]"
_CONDITION = re.compile(r"\s*([^=<>!|]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)


class Part(NamedTuple):
    """One summand of a query: an image, a text or both, by their positions, with a weight."""

    image: int | None
    text: int | None
    weight: float


class Condition(NamedTuple):
    """What a hit's column must satisfy: equal to one of ``values``, to none of them, or on one side of a number."""

    column: str
    operator: Operator
    values: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{self.column}{self.operator}{'|'.join(map(str, self.values))}"


@dataclass(frozen=True)
class Selection:
    """Which of the candidates become hits.

    Args:
        k: number of hits.
        min_score: lowest score; dot products of unit vectors, from -1 to 1.
        min_z: lowest number of standard deviations above the query's mean score over the background sample.
        fold: similarity from which a candidate is a near-duplicate of a better hit, and folded into that hit.
        group: column of which each value occurs in one hit only, such as a product's id.

    Raises:
        InputError: for a value out of range.
    """

    k: int = 10
    min_score: float | None = None
    min_z: float | None = None
    fold: float | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or not 1 <= self.k <= 10**9:
            raise InputError(f"k must be at least 1, a whole number, got {self.k!r}")
        for name, low in (("min_score", self.min_score), ("min_z", self.min_z)):
            if low is not None and not (isinstance(low, int | float) and math.isfinite(low)):
                raise InputError(f"{name} must be a finite number, got {low!r}")
        if self.fold is not None and not (isinstance(self.fold, int | float) and -1 < self.fold <= 1):
            raise InputError(f"fold is a similarity above -1 and at most 1, got {self.fold!r}")


@dataclass
class Pick:
    """A selected candidate by its position, its score and z-score, and the candidates that are folded into it."""

    position: int
    score: float
    z: float
    folded: list[int] = field(default_factory=list)


def pair_parts(images: Sequence[float], texts: Sequence[float]) -> list[Part]:
    """Compose each image with each text; the summands of a query with their weights.

    With m the smaller of the largest image weight and the largest text weight, the pair of image i and text j gets
    m · (image weight i / sum of image weights) · (text weight j / sum of text weights). What the largest image weight
    exceeds m by goes to the images alone, in the same proportions; likewise for texts. So weights of one are the plain
    composed query, two images are averaged, and a text of weight 2 adds the text alone to the composed query.

    Args:
        images: positive weight of each image.
        texts: positive weight of each text.

    Example:
        >>> pair_parts([1.0], [2.0])
        [Part(image=0, text=0, weight=1.0), Part(image=None, text=0, weight=1.0)]
    """
    top_image, top_text = max(images, default=0.0), max(texts, default=0.0)
    shared = min(top_image, top_text)
    image_shares, text_shares = [w / sum(images) for w in images], [w / sum(texts) for w in texts]
    parts = [
        Part(i, j, shared * share * other)
        for i, share in enumerate(image_shares)
        for j, other in enumerate(text_shares)
        if shared
    ]
    parts += [Part(i, None, (top_image - shared) * share) for i, share in enumerate(image_shares)]
    parts += [Part(None, j, (top_text - shared) * share) for j, share in enumerate(text_shares)]
    return [part for part in parts if part.weight]


def combine_vectors(vectors: Tensor, weights: Sequence[float]) -> Tensor:
    """The L2-normalised weighted sum of query vectors (P, E) → (E,); negative weights push away.

    Raises:
        InputError: if the vectors cancel out, or one is not finite.
    """
    total: Tensor = (vectors.double() * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0)
    length = torch.linalg.vector_norm(total)
    if not bool(length.isfinite()):
        raise InputError("the query is not finite: check the model's weights")
    if length < 1e-6 * max(map(abs, weights)):
        raise InputError("the parts of the query cancel each other out: change a weight")
    combined: Tensor = (total / length).float()
    return combined


def score_candidates(query: Tensor, candidates: Tensor) -> Tensor:
    """Scores (C,) of candidates (C, K, E): the maximum dot product over K, independent of a candidate's position.

    In NumPy, which stays on one thread: so few numbers cost less than it takes to wake others.
    """
    return torch.from_numpy((candidates.float().numpy() * query.float().numpy()).sum(2).max(1))


def select(
    query: Tensor,
    candidates: Tensor,
    ids: Sequence[str],
    selection: Selection,
    groups: Sequence[object | None] | None = None,
    background: tuple[float, float] = (0.0, 1.0),
) -> list[Pick]:
    """Select hits from the nearest candidates, best first, equal scores by id.

    Args:
        query: (E,), unit norm.
        candidates: (C, K, E), in any order.
        ids: of the candidates.
        selection: what becomes a hit.
        groups: value of the group column of each candidate; None where it is empty, which is a group of its own.
        background: mean and standard deviation of the query's scores, from ``score_statistics``.
    """
    scores = score_candidates(query, candidates)
    values, (mean, deviation) = scores.tolist(), background
    threshold = selection.fold - 1e-6 if selection.fold is not None else float("inf")  # a square may be 1 - 1e-7
    directions = F.normalize(candidates.float().mean(1), dim=1)
    picks: list[Pick] = []
    seen: set[object] = set()
    for position in sorted(range(len(values)), key=lambda n: (-values[n], ids[n])):
        score, z = values[position], (values[position] - mean) / deviation if deviation > 0 else 0.0
        if len(picks) == selection.k or any(
            low is not None and value < low for low, value in ((selection.min_score, score), (selection.min_z, z))
        ):
            break
        if selection.fold is not None and picks:
            kept = directions[[pick.position for pick in picks]]
            similar = ((kept * directions[position]).sum(1) >= threshold).nonzero()[:, 0].tolist()
            if similar:
                picks[similar[0]].folded.append(position)
                continue
        group = groups[position] if groups is not None else None
        if group is not None and group in seen:
            continue
        seen.add(group)
        picks.append(Pick(position, score, z))
    return picks


def score_statistics(query: Tensor, sample: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a query's (E,) scores over the background sample (S, K, E)."""
    scores = (sample.numpy() @ query.float().numpy()).max(1)  # a product of matrices: no rank depends on its last bits
    return (float(scores.mean(dtype=float)), float(scores.std(dtype=float))) if len(scores) else (0.0, 0.0)


def parse_where(where: Where, kinds: Mapping[str, Kind]) -> list[Condition]:
    """Conditions that hits must all satisfy.

    An empty cell equals no value and is on no side of a number.

    Args:
        where: ``["category=dress", "price<=50"]``, or ``{"category": ["dress", "skirt"]}`` for equality alone.
        kinds: what each column of the index holds.

    Raises:
        InputError: for a column that the index lacks, or a value that cannot be in it.

    Example:
        >>> print(*parse_where(["colour=red|blue", "price<=50"], {"colour": "text", "price": "number"}))
        colour=red|blue price<=50.0
    """
    where = [where] if isinstance(where, str) else where or ()
    if not isinstance(where, Mapping | Sequence) or not all(isinstance(one, str) for one in where):
        raise InputError(f"where is a list of conditions, or a mapping from column to value, got {where!r:.80}")
    if not all(one.isascii() or one == one.encode("utf-8", "ignore").decode() for one in where):
        raise InputError(f"where {str(where)!a:.80} is no Unicode")
    if isinstance(where, Mapping):
        raw = [(column, "=", _listed(value)) for column, value in where.items()]
    else:
        raw = [_split_condition(text) for text in where]
    return [_check_condition(column, operator, values, kinds) for column, operator, values in raw]


def _listed(value: "Value | Sequence[Value]") -> list[Value]:
    return [value] if isinstance(value, str | float | int) or not isinstance(value, Sequence) else list(value)


def _split_condition(text: str) -> tuple[str, str, list[Value]]:
    match = _CONDITION.fullmatch(text)
    if not match:
        raise InputError(f"filter {text!r}: expected COLUMN=VALUE, COLUMN=A|B, COLUMN!=VALUE or COLUMN<=NUMBER")
    column, operator, value = match.groups()
    return column, operator, list(value.split("|")) if operator in ("=", "!=") else [value]


def _check_condition(column: str, operator: str, values: Sequence[Value], kinds: Mapping[str, Kind]) -> Condition:
    if column not in kinds:
        raise InputError(f"filter: the index has no column {column!r}; columns: {', '.join(kinds) or 'none'}")
    kind: Kind = kinds[column]
    if operator not in ("=", "!=") and kind != "number":
        raise InputError(f"filter on {column!r}: the column holds {kind}s, {operator} compares numbers")
    try:
        return Condition(column, next(o for o in get_args(Operator) if o == operator), tuple(map(_READ[kind], values)))
    except (ValueError, TypeError):
        raise InputError(f"filter on {column!r}: expected a {kind}, got {'|'.join(map(str, values))!r}") from None


def _read_boolean(value: Value) -> bool:
    if isinstance(value, str) and value.lower() not in ("true", "false"):
        raise ValueError
    return value.lower() == "true" if isinstance(value, str) else bool(value)


def _read_number(value: Value) -> float:
    number = float(value)
    if math.isnan(number) or (isinstance(value, str) and "_" in value):
        raise ValueError
    return number


_READ: Mapping[Kind, Callable[[Value], Value]] = {"text": str, "number": _read_number, "boolean": _read_boolean}
