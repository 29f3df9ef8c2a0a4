"""The words of the project as types.

Shape legend, used everywhere: B batch · N candidates · L reference tokens · D token width · K target vectors ·
E embedding width · Q queries · G gallery images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from spn4cir.errors import InputError

if TYPE_CHECKING:  # so that commands can name these types without waiting for torch
    from torch import Tensor

Tokens: TypeAlias = "dict[str, Tensor]"
"""Tokenised texts: each value has B rows."""


@dataclass(frozen=True)
class Triplet:
    """A training example. One of ``modifications`` is drawn each time it is seen."""

    reference: str
    target: str
    modifications: tuple[str, ...]
    generated: bool = False


@dataclass(frozen=True)
class Query:
    """One question of a benchmark: reference image + modification text, and which images answer it.

    ``group`` is what results are broken down by (an attribute, a category); ``subset`` are the images of the small
    ranking that some protocols add, reference included.
    """

    reference: str
    modification: str
    targets: tuple[str, ...]
    group: str = ""
    subset: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A protocol as data: everything that decides a number, but the model."""

    name: str
    gallery: tuple[str, ...]
    queries: tuple[Query, ...]
    exclude_reference: bool
    ks: tuple[int, ...]
    subset_ks: tuple[int, ...] = ()
    selection: tuple[str, ...] = ("R@1",)
    """Metrics whose mean selects the best checkpoint."""

    def __post_init__(self) -> None:
        known = set(self.gallery)
        if len(known) != len(self.gallery):
            raise InputError(f"{self.name}: the gallery names an image twice")
        for number, query in enumerate(self.queries):
            missing = [i for i in (query.reference, *query.targets, *query.subset) if i not in known]
            if missing:
                raise InputError(f"{self.name}: query {number} names {missing[0]!r}, which the gallery lacks")


class ImageFeatures(NamedTuple):
    """What one pass over an image gives: ``reference`` (B, L, D) for ``compose``, ``target`` (B, K, E), unit norm."""

    reference: Tensor
    target: Tensor


@dataclass
class Composed:
    """A composed query (B, E), unit norm, and what a backbone's own extra losses need."""

    query: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)


class Dataset(Protocol):
    """Raw files turned into triplets and benchmarks; no tensors, and no word of any file format outside."""

    name: str

    def path(self, image_id: str) -> Path:
        """Where an image lies. Raises ``InputError`` for an unknown id."""

    def training_images(self) -> list[str]:
        """All images that training may touch."""

    def triplets(self) -> list[Triplet]:
        """Annotated training triplets, in file order."""

    def benchmark(self, split: str) -> Benchmark:
        """The protocol of one split. Raises ``InputError`` for an unknown split."""

    def label(self, image_id: str) -> str:
        """What to show a person for an image."""
