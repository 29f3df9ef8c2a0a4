"""Search, whatever holds the vectors: queries as people make them in, hits out."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.images import takes_own_mode
from spn4cir.index.query_parts import QueryParts, split_query, weighted
from spn4cir.model import Model, Picture, open_picture
from spn4cir.selection import (
    Condition,
    Kind,
    Pick,
    Selection,
    Value,
    Where,
    parse_where,
    score_statistics,
    select,
)
from spn4cir.types import ImageRef

SPARE = 16  # candidates fetched beyond those needed
ROUNDING = 1e-5  # two ways to add up a dot product of unit vectors in float32 differ by less


@dataclass(frozen=True)
class Hit:
    """A result of a search.

    Args:
        id: of the image.
        score: dot product of unit vectors, from -1 to 1.
        z: standard deviations above the query's mean score over the background sample.
        path: of the picture; None for one that has no file of its own.
        columns: what is known about the image.
        folded: ids of near-duplicates, best first.
    """

    id: str
    score: float
    z: float
    path: Path | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    folded: tuple[str, ...] = ()


ImageQuery: TypeAlias = "Picture | Hit"
Images: TypeAlias = "ImageQuery | tuple[ImageQuery, float] | Sequence[ImageQuery | tuple[ImageQuery, float]]"
Texts: TypeAlias = "str | tuple[str, float] | Sequence[str | tuple[str, float]]"


class Nearest(NamedTuple):
    """Candidates of a query.

    ``ids``, ``vectors`` (C, K, E), ``paths`` and ``columns`` are of the candidates; ``floor`` is a score that no image
    exceeds which is not among them, minus infinity if there is none.
    """

    ids: list[str]
    vectors: Tensor
    paths: Sequence[Path | None]
    columns: Sequence[Mapping[str, Any]]
    floor: float


class SearchableIndex(ABC):
    """An index that finds the images nearest to a query; a subclass says where the vectors are."""

    model: Model

    @property
    @abstractmethod
    def kinds(self) -> Mapping[str, Kind]:
        """What each column holds."""

    @property
    @abstractmethod
    def background(self) -> Tensor:
        """Vectors (S, K, E) of the background sample."""

    @abstractmethod
    def nearest(
        self, query: Tensor, count: int, conditions: Sequence[Condition] = (), exclude: Collection[str] = ()
    ) -> Nearest:
        """About ``count`` candidates of a query (E,), those of the highest scores, that satisfy all conditions."""

    @abstractmethod
    def find_image(self, image_id: str) -> ImageRef | None:
        """The picture of an image; None for an id that the index lacks."""

    @abstractmethod
    def __len__(self) -> int: ...

    def refresh_if_changed(self) -> bool:
        """Read the newest commit where there is one, and say whether there was; an engine always searches the newest.

        Raises:
            InputError: if the index has been removed since, or is of another model.
        """
        return False

    def column_values(self, column: str) -> list[Value]:
        """The values of a column, in order; an engine looks at images near the background sample alone.

        Raises:
            InputError: for a column that the index lacks.
        """
        self.check_selection((), Selection(group=column))
        direction = F.normalize(self.background.mean((0, 1)), dim=0)
        rows = self.nearest(direction, len(self.background)).columns
        return sorted({row[column] for row in rows if row.get(column) is not None})

    def search(
        self,
        image: Images | None = None,
        text: Texts | None = None,
        k: int = 10,
        *,
        unlike: Images | None = None,
        without: Texts | None = None,
        where: Where = (),
        group: str | None = None,
        min_score: float | None = None,
        min_z: float | None = None,
        fold: float | None = None,
    ) -> list[Hit]:
        """Find the k images that fit a query best, best first, equal scores by id.

        An image is an id of the index, a hit, a file or a decoded picture; an id takes precedence over a file. Images
        and texts may be several, and each a tuple with its weight: see ``embed``. Images of the index that are part of
        the query are left out of the hits.

        Args:
            image: reference images.
            text: modification texts; or what to find, without an image.
            k: number of hits.
            unlike: images to be unlike.
            without: texts of what to be without.
            where: conditions on columns that hits satisfy: ``["category=dress", "price<=50"]``, or a mapping from
                column to value or values.
            group: column of which each value occurs in one hit only, such as a product's id.
            min_score: lowest score.
            min_z: lowest z-score: a cut-off relative to how this query scores a fixed sample of the index.
            fold: similarity from which near-duplicates are folded into the best of them.

        Raises:
            InputError: for a query without image and text, a picture that does not decode, a column that the index
                lacks, or a value out of range.

        Example:
            >>> import spn4cir
            >>> index = spn4cir.Index.open("pictures.index")  # doctest: +SKIP
            >>> index.search("shoes/7.jpg", "but in red", k=3, where=["price<=50"])  # doctest: +SKIP
        """
        selection = Selection(k, min_score, min_z, fold, group)
        self.check_selection(where, selection)  # before a model is loaded
        query = self.embed(image, text, unlike=unlike, without=without)
        members, paths = self.own_pictures(image, unlike)
        return self.search_vector(query, selection, where, exclude=members, exclude_paths=paths)

    def own_pictures(self, image: Images | None, unlike: Images | None) -> tuple[list[str], list[str]]:
        """Ids, and real paths, of a query's pictures, which are left out of its hits."""
        pictures = [one for part in (image, unlike) for one, _ in weighted(part, 1.0)]
        members = [image_id for one in pictures if (image_id := self._member(one)) is not None]
        return members, [os.path.realpath(one) for one in pictures if isinstance(one, str | Path)]

    def embed(
        self,
        image: Images | None = None,
        text: Texts | None = None,
        *,
        unlike: Images | None = None,
        without: Texts | None = None,
    ) -> Tensor:
        """Embed a query of weighted parts → (E,), unit norm.

        Each image is composed with each text, and the embeddings are averaged by weight; if the texts' largest weight
        exceeds the images', the texts alone are added with the difference, and the reverse (``selection.pair_parts``).
        What to be unlike, or without, is subtracted, with a weight of 0.5 if none is given.

        Raises:
            InputError: as ``search``.
        """
        parts = self.query_parts(image, text, unlike=unlike, without=without)
        return parts.combine(self.model.embed_queries(parts.images, parts.texts))

    def query_parts(
        self,
        image: Images | None = None,
        text: Texts | None = None,
        *,
        unlike: Images | None = None,
        without: Texts | None = None,
    ) -> QueryParts:
        """The parts of a query, pictures decoded, which ``embed`` embeds and combines.

        So the parts of several queries can be embedded at once.

        Raises:
            InputError: as ``search``.
        """
        return split_query(image, text, unlike, without, self._open)

    def describe(self, image: Images) -> list[dict[str, float]]:
        """What the model sees in a query's pictures, by name: for ``freestyle`` the weights of the styles.

        Raises:
            InputError: as ``search``.
        """
        return self.model.describe_images([self._open(one) for one, _ in weighted(image, 1.0)])

    def search_vector(
        self,
        query: Tensor,
        selection: Selection,
        where: Where = (),
        exclude: Collection[str] = (),
        exclude_paths: Collection[str] = (),
    ) -> list[Hit]:
        """Find the images that fit a query (E,) best; more candidates are fetched until no other could be a hit.

        Args:
            query: unit norm, such as ``embed`` gives.
            selection: how many hits, cut-offs, groups and folding.
            where: conditions on columns.
            exclude: ids of the index that are left out.
            exclude_paths: real paths of pictures that are left out.

        Raises:
            InputError: for a column that the index lacks, or a query of another width.
        """
        conditions, group = self.check_selection(where, selection), selection.group
        statistics = self._statistics(query)
        low = _lowest(selection, statistics)
        hits, seen, left_out, count = list[Hit](), set[Value](), list(exclude), selection.k + SPARE
        while True:
            remaining = replace(selection, k=selection.k - len(hits))
            others = [Condition(group, "!=", tuple(seen))] if group is not None and seen else []
            candidates = _without_paths(
                self.nearest(query, count, [*conditions, *others], left_out), set(exclude_paths)
            )
            groups = [row.get(group) for row in candidates.columns] if group is not None else None
            picks = select(query, candidates.vectors, candidates.ids, remaining, groups, statistics)
            least = picks[-1].score if len(picks) == remaining.k else low
            if candidates.floor == float("-inf") or least > candidates.floor + ROUNDING:
                hits += [_hit(candidates, pick) for pick in picks]
                return sorted(hits, key=lambda hit: (-hit.score, hit.id))  # an approximate search may have missed some
            sure = [pick for pick in picks if pick.score > candidates.floor + ROUNDING]
            is_exact = group is not None and self.kinds[group] != "number"  # large numbers may be equal as floats
            if groups is not None and is_exact and selection.fold is None and sure:  # go on in other groups only
                hits += [_hit(candidates, pick) for pick in sure]
                seen |= {value for pick in sure if (value := groups[pick.position]) is not None}
                left_out += [candidates.ids[pick.position] for pick in sure]
            else:
                count *= 4

    def check_selection(self, where: Where, selection: Selection) -> list[Condition]:
        """The conditions. Raises ``InputError`` for a column that the index lacks."""
        if selection.group is not None and not (isinstance(selection.group, str) and selection.group in self.kinds):
            raise InputError(f"group: the index has no column {selection.group!r}; columns: {', '.join(self.kinds)}")
        return parse_where(where, self.kinds)

    def _statistics(self, query: Tensor) -> tuple[float, float]:
        if query.shape != self.background.shape[2:]:
            width = self.background.shape[2]
            raise InputError(f"a query has {width} numbers in this index, got a tensor of shape {tuple(query.shape)}")
        return score_statistics(query, self.background)

    def _member(self, image: ImageQuery) -> str | None:
        """The id of an image of the index; None for any other picture."""
        if isinstance(image, Hit):
            return image.id
        return image if isinstance(image, str) and self.find_image(image) is not None else None

    def _open(self, image: ImageQuery) -> Image.Image:
        image_id, own_mode = self._member(image), takes_own_mode(self.model.backbone.transform)
        if image_id is not None:
            image_ref = self.find_image(image_id)
            if image_ref is None:
                raise InputError(f"{image_id!r} is not in the index")
            return open_picture(image_ref, own_mode)
        assert not isinstance(image, Hit)
        if isinstance(image, str) and not os.path.exists(image):  # noqa: PTH110 - it does not raise for a long name
            raise InputError(f"{short(image)} is neither an id of the index nor a file")
        return open_picture(image, own_mode)


def _hit(candidates: Nearest, pick: Pick) -> Hit:
    n, folded = pick.position, tuple(candidates.ids[n] for n in pick.folded)
    return Hit(candidates.ids[n], pick.score, pick.z, candidates.paths[n], candidates.columns[n], folded)


def _without_paths(candidates: Nearest, paths: Collection[str]) -> Nearest:
    """The same candidates without the pictures at these paths."""
    places = enumerate(candidates.paths) if paths else ()
    kept = [n for n, path in places if path is None or os.path.realpath(path) not in paths]
    if not paths or len(kept) == len(candidates.ids):
        return candidates
    part, columns = [candidates.paths[n] for n in kept], [candidates.columns[n] for n in kept]
    return Nearest([candidates.ids[n] for n in kept], candidates.vectors[kept], part, columns, candidates.floor)


def _lowest(selection: Selection, statistics: tuple[float, float]) -> float:
    """The lowest score that a hit may have."""
    mean, deviation = statistics
    low = -float("inf") if selection.min_score is None else selection.min_score
    if selection.min_z is not None:
        low = max(low, mean + selection.min_z * deviation)
    return low
