"""The words of the project as types.

Shape legend, used everywhere: B batch · N candidates · L reference tokens · D token width · K target vectors ·
E embedding width · Q queries · G gallery images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeAlias

from spn4cir.errors import InputError

if TYPE_CHECKING:  # so that commands can name these types without waiting for torch
    from torch import Tensor

Level: TypeAlias = Literal["fact", "note", "problem"]
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
    ranking that some protocols add, reference included. ``targets`` is empty where the answer is not public; ``name``
    is what a submission calls the query.
    """

    reference: str
    modification: str
    targets: tuple[str, ...]
    group: str = ""
    subset: tuple[str, ...] = ()
    name: str = ""


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
    """Metrics whose mean selects the best checkpoint; of several, the mean is also reported, as ``Rmean``."""
    group_gallery: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the queries of a group are ranked over, where that is not the whole gallery."""
    mean_over_groups: bool = False
    """Whether the metrics are unweighted means over groups, rather than over all queries."""

    def __post_init__(self) -> None:
        known = {"": frozenset(self.gallery)}
        known |= {group: frozenset(ids) for group, ids in self.group_gallery.items()}
        for group, ids in {"": self.gallery, **self.group_gallery}.items():
            if len(known[group]) != len(ids):
                raise InputError(f"{self.name}: the gallery {group and group + ' '}names an image twice")
            if not known[group] <= known[""]:
                raise InputError(f"{self.name}: the gallery of {group} is no part of the whole")
        for number, query in enumerate(self.queries):
            own = known.get(query.group, known[""])
            missing = [i for i in (query.reference, *query.targets, *query.subset) if i not in own]
            if missing:
                raise InputError(f"{self.name}: query {number} names {missing[0]!r}, which the gallery lacks")
            if self.exclude_reference and set(query.targets) == {query.reference}:
                raise InputError(
                    f"{self.name}: query {number} has no target but its reference {query.reference!r}, "
                    "which is not ranked"
                )

    @property
    def silent_groups(self) -> list[str]:
        """Groups that have a gallery but no query, so that a mean over all groups is impossible."""
        asked = {query.group for query in self.queries}
        return [group for group in self.group_gallery if group not in asked]

    @property
    def answered(self) -> bool:
        """Whether every query's targets are known, so that metrics can be computed."""
        return all(query.targets for query in self.queries)


class ImageFeatures(NamedTuple):
    """What one pass over an image gives: ``reference`` (B, L, D) for ``compose``, ``target`` (B, K, E), unit norm."""

    reference: Tensor
    target: Tensor


@dataclass
class Composed:
    """A composed query (B, E), unit norm, and what a backbone's own extra losses need.

    ``parts`` are what stands for reference and text, (B, E) each, where the query is their normalised sum.
    """

    query: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    parts: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Check:
    """One line of a report on a dataset's files: what was looked at, how many were found, how many are published."""

    what: str
    found: int
    expected: int | None = None
    level: Level = "fact"
    """``problem`` stands in the way of training; ``note`` is worth knowing."""
    examples: tuple[str, ...] = ()

    @classmethod
    def counted(cls, what: str, found: int, published: int) -> Check:
        """A count beside the published one."""
        return cls(what, found, published, "fact" if found == published else "note")

    @classmethod
    def listed(cls, what: str, examples: Iterable[str], level: Level = "note", expected: int | None = 0) -> Check:
        """Things that were found; of that level if there are any."""
        found = tuple(examples)
        return cls(what, len(found), expected, level if found else "fact", found)


class ImageRole(NamedTuple):
    """Images by what they are for, and whether training cannot do without them."""

    name: str
    image_ids: list[str]
    needed: bool


class Dataset(ABC):
    """Raw files turned into triplets and benchmarks; no tensors, and no word of any file format outside.

    ``protocols`` are the ids of each split, the default first. ``root`` is the folder of the files, if they have one.
    ``skipped`` are images that the person who runs this leaves out. ``annotated`` says whether training triplets come
    with the files.
    """

    name: ClassVar[str]
    protocols: ClassVar[Mapping[str, tuple[str, ...]]]
    root: Path | None = None
    skipped: frozenset[str] = frozenset()
    annotated: bool = True

    @abstractmethod
    def path(self, image_id: str) -> Path:
        """Where an image lies, or should. Raises ``InputError`` for an unknown id."""

    @abstractmethod
    def training_images(self) -> list[str]:
        """All images that training may touch."""

    @abstractmethod
    def triplets(self) -> list[Triplet]:
        """Annotated training triplets, in file order."""

    @abstractmethod
    def benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """A protocol of a split, its default if none is named. Raises ``InputError`` for an unknown one."""

    def label(self, image_id: str) -> str:
        """What to show a person for an image."""
        return image_id

    def category(self, image_id: str) -> str:
        """What kind of thing an image shows, where the files say so; else empty."""
        return ""

    def caption(self, image_id: str) -> str:
        """A description of an image that came with it; else empty."""
        return ""

    def check_command(self, image_id: str) -> str:
        """The command that tells of all broken images like this one."""
        return f"spn4cir-data check --dataset {self.name}"

    def file(self, name: str) -> Path:
        """A file that a person names: as it stands, or below the dataset's folder."""
        path = Path(name)
        return path if self.root is None or path.is_file() else self.root / path

    def notes(self) -> list[str]:
        """What a person should know about what is read and what is not, a line each."""
        return []

    def checks(self) -> list[Check]:
        """What a look at the annotations finds, counts against the published ones included; raises nothing."""
        return [Check("training triplets", len(self.triplets())), Check("training images", len(self.training_images()))]

    def image_roles(self) -> list[ImageRole]:
        """All images by what they are for; an image may have several roles."""
        galleries = [
            ImageRole(f"{split} gallery", list(self.benchmark(split).gallery), True) for split in self.protocols
        ]
        return [ImageRole("of training", self.training_images(), True), *galleries]

    def write_submission(
        self, folder: Path, ranked: Mapping[str, Sequence[str]], within: Mapping[str, Sequence[str]]
    ) -> list[Path]:
        """Write what an evaluation server takes: by query name, the first images of the gallery and of the subset."""
        raise InputError(f"{self.name} has no evaluation server: there is no submission to write")

    def check_submission(self, path: Path) -> str:
        """One line on a submission file that is sound. Raises ``InputError`` that names what is not."""
        raise InputError(f"{self.name} has no evaluation server: there is no submission to check")

    def choose_protocol(self, split: str, protocol: str | None) -> str:
        """The id that is meant. Raises ``InputError`` that names the known ones."""
        if split not in self.protocols:
            raise InputError(f"{self.name} has no split {split!r}; known: {', '.join(self.protocols)}")
        known = self.protocols[split]
        if protocol not in (None, *known):
            raise InputError(f"{self.name} has no protocol {protocol!r} for split {split}; known: {', '.join(known)}")
        return protocol or known[0]
