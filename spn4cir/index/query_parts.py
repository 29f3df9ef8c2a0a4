"""The parts of a query: its pictures and texts with their weights, before they are embedded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from spn4cir.errors import InputError
from spn4cir.model import MAX_TEXT
from spn4cir.selection import Part, combine_vectors, pair_parts
from spn4cir.types import ImageRef

NEGATIVE = 0.5
"""Weight of what a query shall be unlike, or without, if none is given: a whole one drowns what it is taken from."""
MOST_WEIGHT = 1e6


@dataclass(frozen=True)
class QueryParts:
    """What a query is made of: P parts, each an image, a text or both, with its weight."""

    images: list[Image.Image | None]
    texts: list[str | None]
    weights: list[float]

    def combine(self, vectors: Tensor) -> Tensor:
        """Embeddings of the parts (P, E) → the query (E,), unit norm. Raises ``InputError`` if they cancel out."""
        return combine_vectors(vectors, self.weights)


def split_query(
    image: Any, text: Any, unlike: Any, without: Any, open_image: Callable[[Any], Image.Image]
) -> QueryParts:
    """The parts of a query as ``SearchableIndex.search`` takes it, its pictures opened by ``open_image``.

    Raises:
        InputError: for a query without image and text, a weight out of range, or a text that is empty or too long.
    """
    images, texts = weighted(image, 1.0), weighted(text, 1.0)
    negative_images, negative_texts = weighted(unlike, NEGATIVE), weighted(without, NEGATIVE)
    if not images and not texts:
        raise InputError("a search needs an image or a text to look for")
    for given in (images, texts, negative_images, negative_texts):
        if wrong := [weight for _, weight in given if not 0 < weight < MOST_WEIGHT]:
            raise InputError(
                f"weights must be positive numbers below {MOST_WEIGHT:g}, got {wrong[0]}: use unlike or without to "
                "subtract"
            )
    parts = pair_parts([weight for _, weight in images], [weight for _, weight in texts])
    parts += [Part(len(images) + n, None, -weight) for n, (_, weight) in enumerate(negative_images)]
    parts += [Part(None, len(texts) + n, -weight) for n, (_, weight) in enumerate(negative_texts)]
    words = [_check_text(one) for one, _ in texts + negative_texts]
    pictures = [open_image(one) for one, _ in images + negative_images]
    return QueryParts(
        [None if part.image is None else pictures[part.image] for part in parts],
        [None if part.text is None else words[part.text] for part in parts],
        [part.weight for part in parts],
    )


def weighted(given: Any, default: float) -> list[tuple[Any, float]]:
    """Images or texts, one or several, each with its weight."""
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str | tuple) else [given]
    parts: list[tuple[Any, float]] = []
    for one in several:
        if isinstance(one, tuple) and not isinstance(one, ImageRef):
            if len(one) != 2 or isinstance(one[1], bool) or not isinstance(one[1], int | float):
                raise InputError("a tuple is an image or a text with its weight, a number: give several as a list")
            parts.append((one[0], float(one[1])))
        elif one is not None:
            parts.append((one, default))
    return parts


def _check_text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"a text must say something, got {text!r}")
    if text.encode("utf-8", "ignore").decode() != text:
        raise InputError(f"a text is no Unicode: {text!a:.60}")
    if len(text) > MAX_TEXT:
        raise InputError(f"a text has {len(text)} characters; models read a sentence: at most {MAX_TEXT}")
    return text
