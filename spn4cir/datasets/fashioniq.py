"""FashionIQ: shop photographs of dresses, shirts and tops, with two captions for each pair.

Source: Wu et al., "The Fashion IQ dataset: retrieving images by combining side information and relative
natural language feedback", CVPR 2021.
"""

import os
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import ClassVar, TypeAlias

from spn4cir.dataset import Check, Dataset, ImageRole, Level
from spn4cir.datasets.reading import PLAIN, attempt, find_root, read_entries, read_ids
from spn4cir.errors import InputError
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

Row: TypeAlias = "tuple[str, str, list[str]]"
CATEGORIES = ("dress", "shirt", "toptee")
SPLITS = ("train", "val", "test")
SUFFIXES = {".png": 0, ".jpg": 1, ".jpeg": 2, ".webp": 3}
SOURCE = "github.com/XiaoxiaoGuo/fashion-iq (its README says how to fetch the images)"
EXPECTED = f"captions/, image_splits/ and the pictures as images/ID.png or .jpg, from {SOURCE}"
PUBLISHED_TRIPLETS = {"train": (5985, 5988, 6027), "val": (2017, 2038, 1961), "test": (2024, 2038, 2056)}
PUBLISHED_IMAGES = {"train": (11452, 19036, 16121), "val": (3817, 6346, 5373), "test": (3818, 6346, 5374)}


class FashionIQ(Dataset):
    """``captions/cap.{category}.{split}.json``, ``image_splits/split.{category}.{split}.json`` and pictures.

    Pictures are ``images/{id}.png``, or another suffix, or in a folder per category of ``images`` or ``resized_image``.

    Args:
        root: folder of the dataset; None looks in SPN4CIR_DATA, then in data/fashioniq.

    Raises:
        InputError: if there is no such folder.
    """

    name = "fashioniq"
    protocols: ClassVar = {"val": ("fashioniq/original", "fashioniq/original-noref", "fashioniq/val-union")}

    def __init__(self, root: str | None = None):
        inside = (("captions", "image_splits"), ("images", "resized_image"))
        self.root: Path = find_root(self.name, root, ("fashionIQ_dataset", "fashionIQ"), inside, EXPECTED)

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Picture by name without suffix; folders are listed once, and earlier suffixes win."""
        folders = [self.root / "images", *(self.root / "images" / c for c in CATEGORIES)]
        folders += [self.root / "resized_image" / c for c in CATEGORIES]
        found: dict[str, tuple[int, Path]] = {}
        for folder in (f for f in folders if f.is_dir()):
            for item in os.scandir(folder):
                stem, dot, suffix = item.name.rpartition(".")
                place = SUFFIXES.get(dot + suffix.lower())
                if place is not None and (stem not in found or place < found[stem][0]):
                    found[stem] = (place, folder / item.name)
        return {stem: path for stem, (_, path) in found.items()}

    def find_image(self, image_id: str) -> ImageRef:
        """The picture of an image; where it should lie, if it is missing."""
        if not PLAIN.fullmatch(image_id):
            raise InputError(f"{self.name}: {image_id!r} is no image id")
        if not self._files:
            raise InputError(f"{self.name}: {self.root} holds no pictures: expected there {EXPECTED}")
        return ImageRef(self._files.get(image_id, self.root / "images" / f"{image_id}.png"))

    def list_training_images(self) -> list[str]:
        """All images of the train split files and of the training triplets."""
        listed = [i for category in CATEGORIES for i in self._listed(category, "train")]
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
        rows = [row for category in CATEGORIES for row in self._rows(category, "train")]
        return [
            Triplet(reference, (target,), texts) for reference, target, given in rows if (texts := _variants(given))
        ]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """One gallery per category; metrics are means over the three."""
        chosen = self.choose_protocol(split, protocol)
        queries: list[Query] = []
        galleries: list[tuple[str, ...]] = []
        for category in CATEGORIES:
            path, rows = self._captions(category, split), self._rows(category, split)
            gallery = list(dict.fromkeys(i for reference, target, _ in rows for i in (reference, target)))
            if not chosen.endswith("/val-union"):
                gallery = self._listed(category, split)
                self._check_listed(category, split, rows, set(gallery))
            same = [number for number, row in enumerate(rows) if row[0] == row[1]]
            if same and not chosen.endswith("/original"):
                raise InputError(
                    f"{path}, entry {same[0]}, field 'target': is the reference, which {chosen} does not rank"
                )
            galleries.append(tuple(gallery))
            # the text is "c0 and c1" even where one of them is empty, as in published evaluations
            queries += [
                Query(ref, " and ".join(texts), (target,), (category,), galleries[-1]) for ref, target, texts in rows
            ]
        return Benchmark(
            name=chosen,
            gallery=tuple(dict.fromkeys(i for ids in galleries for i in ids)),
            queries=tuple(queries),
            exclude_reference=not chosen.endswith("/original"),
            measures=recall_measures(10, 50, primary=(10, 50), over="candidates"),
            macro=CATEGORIES,
        )

    def notes(self) -> list[str]:
        """How many training triplets have no caption at all; nothing where there are no training triplets."""
        rows = attempt([], "", False, lambda: [row for c in CATEGORIES for row in self._rows(c, "train")]) or []
        bare = sum(not _variants(texts) for _, _, texts in rows)
        return [f"{self.name}: {bare} training triplets without any caption are left out"] if bare else []

    def _captions(self, category: str, split: str) -> Path:
        return self.root / "captions" / f"cap.{category}.{split}.json"

    def _split_file(self, category: str, split: str) -> Path:
        return self.root / "image_splits" / f"split.{category}.{split}.json"

    def _check_listed(self, category: str, split: str, rows: Sequence[Row], known: set[str]) -> None:
        """Raises ``InputError`` for a reference or target that the split file lacks."""
        for number, row in enumerate(rows):
            for field, image_id in zip(("candidate", "target"), row[:2], strict=True):
                if image_id not in known:
                    raise InputError(
                        f"{self._captions(category, split)}, entry {number}, field {field!r}: {image_id!r} is not in "
                        f"{self._split_file(category, split)}"
                    )

    def _listed(self, category: str, split: str) -> list[str]:
        return read_ids(self._split_file(category, split), SOURCE)

    def _rows(self, category: str, split: str) -> list[Row]:
        """Reference, target ("" in test) and the two captions, stripped."""
        rows = []
        for entry in read_entries(self._captions(category, split), SOURCE):
            texts = [text.strip(".?, ") for text in entry.texts("captions")]
            if len(texts) != 2:
                raise entry.error("captions", f"expected 2 captions, got {len(texts)}")
            target = "" if split == "test" else entry.image_id("target")
            rows.append((entry.image_id("candidate"), target, texts))
        return rows

    def _named(self) -> list[str]:
        rows = [row for category in CATEGORIES for row in self._rows(category, "train")]
        return list(dict.fromkeys(i for row in rows for i in row[:2]))

    def image_roles(self) -> list[ImageRole]:
        """What training triplets name, what val ranks, and the rest; what cannot be read is left out."""
        ignored: list[Check] = []
        named = attempt(ignored, "", False, self._named) or []
        listed: dict[str, list[str]] = {}
        for split in SPLITS:
            ids = [attempt(ignored, "", False, partial(self._listed, category, split)) or [] for category in CATEGORIES]
            listed[split] = list(dict.fromkeys(i for of_category in ids for i in of_category))
        known = set(named)
        return [
            ImageRole("named by training triplets", named, True),
            ImageRole("val galleries", listed["val"], True),
            ImageRole("other images of train", [i for i in listed["train"] if i not in known], False),
            ImageRole("test galleries", listed["test"], False),
        ]

    def checks(self) -> list[Check]:
        """Counts by split and category, ids that no split lists, empty captions, overlap of val and train."""
        checks: list[Check] = []
        listed: dict[str, set[str]] = {split: set() for split in SPLITS}
        used: dict[str, set[str]] = {split: set() for split in SPLITS}
        same, empty = [], []
        for split, (number, category) in product(SPLITS, enumerate(CATEGORIES)):
            what, needed = f"{split} {category}", split != "test"
            ids = attempt(checks, f"{what}: split file", needed, partial(self._listed, category, split))
            if ids is not None:
                checks.append(Check.counted(f"{what}: images listed", len(ids), PUBLISHED_IMAGES[split][number]))
                listed[split] |= set(ids)
            rows = attempt(checks, f"{what}: captions", needed, partial(self._rows, category, split))
            if rows is not None:
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
