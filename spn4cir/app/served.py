"""An index as a server holds it: its model in memory, its encoder, its thumbnails; and a query from outside."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor

from spn4cir.app.batching import BatchedEncoder
from spn4cir.app.limits import Limits, Refused, read_upload
from spn4cir.errors import InputError
from spn4cir.files import refuse_special_file
from spn4cir.images import takes_own_mode
from spn4cir.index.query_parts import split_query
from spn4cir.index.searchable import Hit, SearchableIndex
from spn4cir.model import open_picture
from spn4cir.selection import Selection, Where
from spn4cir.types import ImageRef

SIDE = 256
"""Pixels of a thumbnail's longer side."""
THUMBNAILS = 4096
"""Thumbnails kept in memory, some 5 kB each."""
CATEGORY = "category"
MOST_VALUES, LEAST_IMAGES = 200, 5
"""Values of a column that are offered to choose from, and images of each on average."""
T = TypeVar("T")


@dataclass(frozen=True)
class ClientQuery:
    """A query from outside: pixels and texts; ``members`` are ids of the index that are left out of the hits.

    Attributes:
        images: pixels (3, H, W) of pictures, as ``Model.pixels`` gives them, each alone or with its weight.
        unlike: pixels of pictures.
        texts, without: texts.
        members: ids of the index.
        selection: how many hits, cut-offs, groups and folding.
        where: conditions on columns.
    """

    images: Sequence[Tensor | tuple[Tensor, float]] = ()
    texts: Sequence[str] = ()
    unlike: Sequence[Tensor] = ()
    without: Sequence[str] = ()
    members: Sequence[str] = ()
    selection: Selection = field(default_factory=Selection)
    where: Where = ()


class ServedIndex:
    """An index that many clients search at once.

    Args:
        index: what is searched.
        address: of the index; its last part is its name.
        number: of the index on this server, from 0.
        limits: what is taken.

    Attributes:
        name: of the index.
        own_mode: whether the model takes pictures in their own mode (``images.keep_mode``).
        describes: whether the model describes pictures, such as by their style.
        encoder: of queries.
    """

    def __init__(self, index: SearchableIndex, address: str, number: int, limits: Limits):
        self.index, self.number, self.limits = index, number, limits
        self.name = address.rstrip("/").rpartition("/")[2] or address
        self.own_mode = takes_own_mode(index.model.backbone.transform)  # loads the model now, not at the first search
        self.describes = bool(index.describe(Image.new("RGB", (SIDE, SIDE), "white"))[0])
        self.encoder = BatchedEncoder(index.model.embed_queries, limits.batch_size, limits.waiting)
        self.thumbnail = lru_cache(THUMBNAILS)(self._draw_thumbnail)

    def refresh(self) -> None:
        """Read the newest commit of the index. Raises ``Refused`` if the index has been removed or is damaged."""
        try:
            changed = self.index.refresh_if_changed()
            if changed:
                self.index.find_image("")  # reads the tables of the new commit, where it is damaged here and now
                self.index.check_selection((), Selection())
        except InputError as error:
            print(f"index {self.name}: {error}", flush=True)  # with its path, which clients are not to see
            what = "has been removed, is damaged or is of another model"
            raise Refused(503, f"the index {self.name} {what}: once it is back, searches work again") from None
        if changed:
            self.thumbnail.cache_clear()

    def submit(self, question: ClientQuery) -> Future[Tensor]:
        """Check a query and queue it to be encoded → the query (E,), later.

        Raises:
            InputError: for a query that is empty or too long, a column that the index lacks, or a value out of range.
            Refused: if too many queries wait, or the index is gone.
        """
        self.refresh()
        limit = self.limits.parts
        for what, given in (("pictures", [*question.images, *question.unlike]),
                            ("texts", [*question.texts, *question.without])):  # fmt: skip
            if len(given) > limit:
                raise Refused(422, f"a query has {len(given)} {what}: at most {limit}")
        if question.selection.k > self.limits.hits:
            raise Refused(422, f"k is {question.selection.k}: at most {self.limits.hits}")
        self.index.check_selection(question.where, question.selection)
        parts = split_query(
            list(question.images), list(question.texts), list(question.unlike), list(question.without), lambda one: one
        )
        return self.encoder.submit(parts)

    def select(self, query: Tensor, question: ClientQuery) -> list[Hit]:
        """The hits of an encoded query (E,)."""
        members = [one for one in question.members if self.index.find_image(one) is not None]
        return self.index.search_vector(query, question.selection, question.where, exclude=members)

    def search(self, question: ClientQuery) -> list[Hit]:
        """The hits of a query. Raises ``InputError`` and ``Refused`` as ``submit``."""
        return self.select(self.submit(question).result(), question)

    def upload_pixels(self, data: bytes, count: int) -> Tensor:
        """Decode and transform an upload of ``count`` pixels → (3, H, W). Raises ``Refused`` as ``read_upload``."""
        with self.limits.decoding.hold(count):
            return self.index.model.pixels(read_upload(data, self.limits, self.own_mode))

    def member_pixels(self, image_id: str) -> Tensor:
        """Decode and transform an image of the index → (3, H, W). Raises ``Refused`` for an id that the index lacks."""
        return self.use_member(image_id, self.index.model.pixels)

    def use_member(self, image_id: str, use: Callable[[Image.Image], T]) -> T:
        """Decode an image of the index and use it; the picture is not kept. Raises ``Refused`` as ``member_pixels``."""
        self.refresh()
        image = self.index.find_image(image_id)
        if image is None:
            raise Refused(404, f"the index {self.name} has no image {image_id!r:.80}")
        try:
            with self.limits.decoding.hold(_count_pixels(image)):
                return use(open_picture(image, self.own_mode))
        except InputError as error:
            print(f"index {self.name}: {error}", flush=True)
            raise Refused(404, f"the picture of {image_id!r:.80} is missing or does not decode") from None

    def describe(self, picture: Image.Image) -> dict[str, float]:
        """What the model sees in a picture, by name, the most likely first; {} for a model that describes nothing."""
        seen = self.index.describe(picture)[0] if self.describes else {}
        return dict(sorted(seen.items(), key=lambda one: -one[1]))

    def address(self, image_id: str) -> str:
        """The address of an image's thumbnail on this server."""
        return f"/image/{quote(image_id, safe='')}" + (f"?index={self.number}" if self.number else "")

    def sample(self, count: int) -> list[Hit]:
        """Some images of the index to begin with: those nearest to vectors of the background sample."""
        vectors = self.index.background  # (S, K, E)
        hits: dict[str, Hit] = {}
        for row in torch.linspace(0, max(len(vectors) - 1, 0), min(count, len(vectors))).long().tolist():
            hits.update({hit.id: hit for hit in self.index.search_vector(vectors[row, 0], Selection(1))})
        return list(hits.values())

    def categories(self) -> list[str]:
        """Values of the column ``category``; none if there is no such column, or it does not group the images."""
        if self.index.kinds.get(CATEGORY) != "text":
            return []
        values = [str(value) for value in self.index.column_values(CATEGORY)]
        groups = 1 < len(values) <= min(MOST_VALUES, len(self.index) / LEAST_IMAGES)
        return values if groups else []

    def _draw_thumbnail(self, image_id: str) -> bytes:
        return self.use_member(image_id, encode_thumbnail)


def _count_pixels(image: ImageRef) -> int:
    """The pixels of a picture by its header; 0 for one that does not decode."""
    source = image.source
    with suppress(Exception):  # foreign bytes; decoding says what is wrong
        if isinstance(source, Path):
            refuse_special_file(source)
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source())) as header:
            return header.width * header.height
    return 0


def encode_thumbnail(picture: Image.Image, side: int = SIDE) -> bytes:
    """A small copy of a picture as WebP."""
    small = picture.convert("RGBA" if "A" in picture.mode else "RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=85)
    return data.getvalue()


def open_served(addresses: Sequence[str], limits: Limits) -> list[ServedIndex]:
    """Open indexes to serve; one or two. Raises ``InputError`` if one is missing or damaged, or its model is."""
    from spn4cir.index.local import Index

    return [ServedIndex(Index.open(place), place, number, limits) for number, place in enumerate(addresses)]


def public_hit(served: ServedIndex, hit: Hit) -> dict[str, Any]:
    """A hit as the service answers it: without the path of its file, with the address of its thumbnail."""
    columns = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in hit.columns.items()}
    return {
        "id": hit.id,
        "score": hit.score,
        "z": hit.z,
        "image": served.address(hit.id),
        "columns": columns,
        "folded": list(hit.folded),
    }


def title_of(hit: Hit) -> str:
    """What a person calls a hit: its title, or the last part of its id."""
    title = hit.columns.get("title")
    return str(title) if title else Path(hit.id).name
