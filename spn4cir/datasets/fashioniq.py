"""FashionIQ: shop photographs of dresses, shirts and tops, with two captions for each pair.

Source: Wu et al., "The Fashion IQ dataset: retrieving images by combining side information and relative
natural language feedback", CVPR 2021.
"""

from collections.abc import Container
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import ClassVar, TypeAlias

from spn4cir.dataset import Check, Dataset, ImageRole, Level
from spn4cir.datasets.reading import PLAIN, attempt, find_root, list_pictures, read_entries, read_ids, readable
from spn4cir.errors import InputError
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

Row: TypeAlias = "tuple[str, str, list[str]]"
CATEGORIES = ("dress", "shirt", "toptee")
SPLITS = ("train", "val", "test")
SOURCE = "github.com/XiaoxiaoGuo/fashion-iq (its README says how to fetch the images)"
EXPECTED = f"captions/, image_splits/ and the pictures as images/ID.png or .jpg, from {SOURCE}"
PUBLISHED_TRIPLETS = {"train": (5985, 5988, 6027), "val": (2017, 2038, 1961), "test": (2024, 2038, 2056)}
PUBLISHED_IMAGES = {"train": (11452, 19036, 16121), "val": (3817, 6346, 5373), "test": (3818, 6346, 5374)}


class FashionIQ(Dataset):
    """``captions/cap.{category}.{split}.json``, ``image_splits/split.{category}.{split}.json`` and pictures.

    Pictures are ``images/{id}.png``, or another suffix, or in a folder per category of ``images`` or ``resized_image``.

    The root is searched in SPN4CIR_DATA, then in data/fashioniq, if it is None. Raises ``InputError`` if it is missing.
    """

    name = "fashioniq"
    as_published = True
    protocols: ClassVar = {
        "val": (
            "fashioniq/original", "fashioniq/original-noref", "fashioniq/val-union", "fashioniq/val-union-ref",
        ),
    }  # fmt: skip

    def __init__(self, root: str | None = None):
        inside = (("captions", "image_splits"), ("images", "resized_image"))
        self.root: Path = find_root(self.name, root, ("fashionIQ_dataset", "fashionIQ"), inside, EXPECTED)

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Pictures by id; folders are listed once."""
        parts = ("images", *(f"{base}/{category}" for base in ("images", "resized_image") for category in CATEGORIES))
        return list_pictures(*(self.root / part for part in parts))

    def find_image(self, image_id: str) -> ImageRef:
        """The picture of an image; where it should lie, if it is missing."""
        if not PLAIN.fullmatch(image_id):
            raise InputError(f"{self.name}: {image_id!r} is no image id")
        if not self._files:
            raise InputError(f"{self.name}: {self.root} holds no pictures: expected there {EXPECTED}")
        return ImageRef(self._files.get(image_id, self.root / "images" / f"{image_id}.png"))

    def list_training_images(self) -> list[str]:
        """All images of the train split files and of the training triplets."""
        listed = (i for category in CATEGORIES for i in self._listed(category, "train"))
        return list(dict.fromkeys([*self._named(), *listed]))

    def category(self, image_id: str) -> str:
        """Dress, shirt or toptee; of an image that is listed under several, the last."""
        return self._categories.get(image_id, "")

    @cached_property
    def _categories(self) -> dict[str, str]:
        named = {i: c for c in CATEGORIES for row in self._rows(c, "train") for i in row[:2]}
        return named | {i: c for c in CATEGORIES for i in self._listed(c, "train")}

    def read_triplets(self) -> list[Triplet]:
        """Dress, shirt, toptee in file order; the text is one of both captions in either order, or one alone."""
        rows = ((reference, target, _variants(given)) for reference, target, given in self._train_rows())
        return [Triplet(reference, (target,), texts) for reference, target, texts in rows if texts]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """One gallery per category; metrics are means over the three."""
        chosen = self.choose_protocol(split, protocol)
        is_union = chosen.startswith("fashioniq/val-union")
        exclude_reference = chosen in ("fashioniq/original-noref", "fashioniq/val-union")
        queries: list[Query] = []
        images: dict[str, None] = {}
        for category in CATEGORIES:
            if is_union:
                rows = self._rows(category, split)
                gallery = tuple(dict.fromkeys(i for row in rows for i in row[:2]))
            else:
                gallery = tuple(self._listed(category, split))
                rows = self._rows(category, split, set(gallery))
            same = [number for number, row in enumerate(rows) if row[0] == row[1]]
            if same and exclude_reference:
                where = f"{self._captions(category, split)}, entry {same[0]}, field 'target'"
                raise InputError(f"{where}: is the reference, which {chosen} does not rank")
            images |= dict.fromkeys(gallery)
            # the text is "c0 and c1" even where one of them is empty, as in published evaluations
            queries += [Query(row[0], " and ".join(row[2]), (row[1],), (category,), gallery) for row in rows]
        measures = recall_measures(10, 50, primary=(10, 50), over="candidates")
        return Benchmark(chosen, tuple(images), tuple(queries), exclude_reference, measures, macro=CATEGORIES)

    def notes(self) -> list[str]:
        """How many training triplets have no caption at all; nothing where there are no training triplets."""
        bare = sum(not _variants(texts) for _, _, texts in (readable(self._train_rows) or []))
        return [f"{self.name}: {bare} training triplets without any caption are left out"] if bare else []

    def _captions(self, category: str, split: str) -> Path:
        return self.root / "captions" / f"cap.{category}.{split}.json"

    def _split_file(self, category: str, split: str) -> Path:
        return self.root / "image_splits" / f"split.{category}.{split}.json"

    def _listed(self, category: str, split: str) -> list[str]:
        return read_ids(self._split_file(category, split), SOURCE)

    def _rows(self, category: str, split: str, known: Container[str] | None = None) -> list[Row]:
        """Reference, target ("" in test) and the two captions, stripped; images must be among ``known``."""
        rows = []
        for entry in read_entries(self._captions(category, split), SOURCE):
            texts = [text.strip(".?, ") for text in entry.texts("captions")]
            if len(texts) != 2:
                raise entry.error("captions", f"expected 2 captions, got {len(texts)}")
            reference, target = entry.image_id("candidate"), "" if split == "test" else entry.image_id("target")
            for field, image_id in (("candidate", reference), ("target", target)):
                if known is not None and image_id not in known:
                    raise entry.error(field, f"{image_id!r} is not in {self._split_file(category, split)}")
            rows.append((reference, target, texts))
        return rows

    def _train_rows(self) -> list[Row]:
        return [row for category in CATEGORIES for row in self._rows(category, "train")]

    def _named(self) -> list[str]:
        return list(dict.fromkeys(i for row in self._train_rows() for i in row[:2]))

    def image_roles(self) -> list[ImageRole]:
        """What training triplets name, what val ranks, and the rest; what cannot be read is left out."""
        named = dict.fromkeys(readable(self._named) or [])
        listed = {
            split: dict.fromkeys(i for c in CATEGORIES for i in (readable(partial(self._listed, c, split)) or []))
            for split in SPLITS
        }
        return [
            ImageRole("named by training triplets", list(named), True),
            ImageRole("val galleries", list(listed["val"]), True),
            ImageRole("other images of train", [i for i in listed["train"] if i not in named], False),
            ImageRole("test galleries", list(listed["test"]), False),
        ]

    def checks(self) -> list[Check]:
        """Counts by split and category, ids that no split lists, empty captions, overlap of val and train."""
        checks: list[Check] = []
        listed: dict[str, set[str]] = {split: set() for split in SPLITS}
        used: dict[str, set[str]] = {split: set() for split in SPLITS}
        same, empty = [], []
        for split, (number, category) in product(SPLITS, enumerate(CATEGORIES)):
            what, needed = f"{split} {category}", split != "test"
            read_listed, read_rows = partial(self._listed, category, split), partial(self._rows, category, split)
            if (ids := attempt(checks, f"{what}: split file", needed, read_listed)) is not None:
                checks.append(Check.counted(f"{what}: images listed", len(ids), PUBLISHED_IMAGES[split][number]))
                listed[split] |= set(ids)
            if (rows := attempt(checks, f"{what}: captions", needed, read_rows)) is not None:
                checks.append(Check.counted(f"{what}: triplets", len(rows), PUBLISHED_TRIPLETS[split][number]))
                used[split] |= {i for row in rows for i in row[:2] if i}
                same += [f"{what}, entry {n}" for n, row in enumerate(rows) if row[0] == row[1]]
                empty += [f"{what}, entry {n}" for n, row in enumerate(rows) if not all(row[2])]
        everything = set().union(*listed.values())
        for split in SPLITS:
            lost = sorted(used[split] - everything) if listed[split] else []
            level: Level = "problem" if split == "val" else "note"
            checks.append(Check.listed(f"{split}: ids in captions that no split lists", lost, level))
        checks.append(Check.listed("reference equal to target", same))
        checks.append(Check.listed("triplets with an empty caption", empty, expected=None))
        leaks = (("train triplets", used["train"], 400), ("train split files", listed["train"], 811))
        for where, train, published in leaks:
            leak = sorted(listed["val"] & train)
            checks.append(Check.listed(f"val gallery images also in {where}", leak, expected=published))
        return checks


def _variants(texts: list[str]) -> tuple[str, ...]:
    """What training draws from: both captions in either order, or one of them; only the one that says something."""
    first, second = texts
    if first and second:
        return f"{first} and {second}", f"{second} and {first}", first, second
    return (first or second,) if first or second else ()
