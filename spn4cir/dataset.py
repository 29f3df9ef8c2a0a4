"""What a dataset is: four methods to write, and the report on its files."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeAlias

from spn4cir.errors import InputError
from spn4cir.provenance import Provenance
from spn4cir.triplets import TripletTable
from spn4cir.types import Benchmark, ImageRef, Triplet

if TYPE_CHECKING:
    import pyarrow

Level: TypeAlias = Literal["fact", "note", "problem"]


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

    A subclass sets ``name`` and ``protocols`` and writes ``find_image``, ``list_training_images``, ``read_triplets``
    and ``read_benchmark``. The methods that everyone else calls, ``image``, ``training_images``, ``triplets`` and
    ``benchmark``, add the images of ``extra_images`` and leave out those of ``skip_reasons``.

    Attributes:
        protocols: ids of each split, the default first.
        root: folder of the files, if they have one.
        data_root: where a person said that the files lie, if anybody did.
        has_triplets: whether training triplets come with the files.
        as_published: whether pictures are decoded as published figures were made: see ``ImageRef``.
        skip_reasons: image ids that the skip list leaves out, each with the reason.
        further_names: name → image id, where an image has several names, such as products that share a picture.
        extra_images: further images that training may use, by id; ``extra_check`` is the command that checks them.
    """

    name: ClassVar[str]
    protocols: ClassVar[Mapping[str, tuple[str, ...]]]
    root: Path | None = None
    data_root: str | None = None
    has_triplets: bool = True
    as_published: ClassVar[bool] = False
    skip_reasons: Mapping[str, str] = {}
    extra_images: Mapping[str, ImageRef] = {}
    extra_check: str = ""
    further_names: Mapping[str, str] = {}

    @abstractmethod
    def find_image(self, image_id: str) -> ImageRef:
        """The image, or the place where its file should be. Raises ``InputError`` for an unknown id."""

    @abstractmethod
    def list_training_images(self) -> list[str]:
        """All images that training may use."""

    @abstractmethod
    def read_triplets(self) -> Sequence[Triplet]:
        """Annotated training triplets, in file order."""

    @abstractmethod
    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """A protocol of a split, its default if none is named. Raises ``InputError`` for an unknown one."""

    def image(self, image_id: str) -> ImageRef:
        """The image of an id. Raises ``InputError`` for an unknown id."""
        if image_id in self.extra_images:
            return self.extra_images[image_id]
        found = self.find_image(image_id)
        return found._replace(as_published=found.as_published or self.as_published)

    def training_images(self) -> list[str]:
        """All images that training may use, without skipped ones, extra ones last."""
        return [i for i in (*self.list_training_images(), *self.extra_images) if i not in self.skip_reasons]

    def triplets(self) -> Sequence[Triplet]:
        """Annotated training triplets without those that name a skipped image, in file order."""
        triplets, skipped = self.read_triplets(), self.skip_reasons
        if isinstance(triplets, TripletTable) and skipped:
            return triplets.without_images(skipped)
        return [t for t in triplets if not skipped.keys() & t.image_ids] if skipped else triplets

    def benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """A protocol of a split, without skipped images then called ``NAME+skip``. Raises ``InputError`` if unknown."""
        whole = self.read_benchmark(split, protocol and protocol.removesuffix("+skip"))
        return without_images(whole, self.skip_reasons)

    def label(self, image_id: str) -> str:
        """What to show a person for an image."""
        return image_id

    def category(self, image_id: str) -> str:
        """The category of an image, where the files have one; else empty."""
        return ""

    def caption(self, image_id: str) -> str:
        """The caption that came with an image; else empty."""
        return ""

    def class_vectors(self) -> Mapping[str, Sequence[float]]:
        """A vector of numbers for each class, as side information, where the files have one; else nothing."""
        return {}

    def captions(self, image_id: str) -> tuple[str, ...]:
        """All captions that came with an image, the first of which is ``caption``."""
        caption = self.caption(image_id)
        return (caption,) if caption else ()

    def other_columns(self) -> Sequence[pyarrow.Table]:
        """Tables that say more of the listed training images, one row each and in that order, below each other."""
        return ()

    def check_command(self, image_id: str) -> str:
        """The command that lists all broken images like this one."""
        if image_id in self.extra_images:
            return self.extra_check
        return f"spn4cir-data check --dataset {self.name}{self.place_option()}"

    def place_option(self) -> str:
        """The option of all commands that says where the files lie, with a space before it; empty for the default."""
        return f" --data-root {shlex.quote(self.data_root)}" if self.data_root else ""

    def provenance(self) -> Provenance | None:
        """The images as a catalogue with folders of its own; None for a published dataset, whose name says it all."""
        return None

    def file(self, name: str) -> Path:
        """A file that a person names: as it stands, or below the dataset's folder."""
        path = Path(name)
        return path if self.root is None or path.is_file() else self.root / path

    def notes(self) -> list[str]:
        """What a person should know about what is read and what is left out, a line each."""
        return []

    def checks(self) -> list[Check]:
        """Counts of the annotations beside the published ones, and their faults; raises nothing."""
        counts = {"training triplets": self.read_triplets(), "training images": self.list_training_images()}
        return [Check(what, len(found)) for what, found in counts.items()]

    def image_roles(self) -> list[ImageRole]:
        """All images by what they are for, skipped ones included; an image may have several roles."""
        galleries = {f"{split} gallery": list(self.read_benchmark(split).image_ids) for split in self.protocols}
        images = {"of training": self.list_training_images(), **galleries}
        return [ImageRole(name, ids, True) for name, ids in images.items()]

    def triplet_entry(self, triplet: Triplet, place: Callable[[str], str] = str) -> dict[str, object]:
        """A generated triplet in the published JSON shape; ``place`` gives the path of an image's picture."""
        return {"target": triplet.targets[0], "candidate": triplet.reference, "captions": list(triplet.texts)}

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


def without_images(benchmark: Benchmark, skipped: Collection[str]) -> Benchmark:
    """A benchmark without some images; queries whose reference or all of whose targets are skipped go too."""
    lost = [i for i in benchmark.image_ids if i in skipped]
    if not lost:
        return benchmark
    kept_candidates: dict[int, tuple[str, ...]] = {}

    def keep(ids: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(i for i in ids if i not in skipped)

    queries = []
    for query in benchmark.queries:
        targets = keep(query.targets)
        if query.reference not in skipped and (targets or not query.targets):
            if id(query.candidates) not in kept_candidates:  # one tuple may serve thousands of queries
                kept_candidates[id(query.candidates)] = keep(query.candidates)
            queries.append(replace(query, targets=targets, candidates=kept_candidates[id(query.candidates)]))
    name, gallery = f"{benchmark.name}+skip", keep(benchmark.gallery)
    return replace(benchmark, name=name, gallery=gallery, queries=tuple(queries), skipped=len(lost))
