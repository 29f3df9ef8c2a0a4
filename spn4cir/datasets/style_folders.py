"""Photographs and the same photographs in other styles, in the layout of FreestyleRet's data (DSR).

Source: Li et al., "FreestyleRet: Retrieving Images from Style-Diversified Queries", ECCV 2024.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple, TypeVar

from spn4cir.dataset import Check, Dataset, ImageRole, Level
from spn4cir.datasets.pictures import safe_name, stray_links
from spn4cir.datasets.reading import Entry, attempt, find_root, inner_path, list_pictures, read_entries, read_first_line
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

T = TypeVar("T")
PHOTOS, TEXTS = "images", "text"  # folders
STYLES = ("sketch", "art", "mosaic")  # folders, and kinds of queries
LAYOUT = "images/, sketch/, art/, mosaic/, text/, train.json and test.json"
KINDS = (*STYLES, "text", *(f"{style} + text" for style in STYLES))
SPLITS = ("train", "val", "test")
TEST_EVERY, VAL_EVERY = 5, 20  # every fifth photograph is test, every twentieth of the others val
GROUP = 24  # photographs that are ranked together in the published evaluation: those of a batch


class StyleItem(NamedTuple):
    """A photograph, by its path below ``images/``, and its caption's path below ``text/``, if it has one."""

    photo: PurePosixPath
    caption: PurePosixPath | None

    @property
    def name(self) -> str:
        """The path without the suffix: the same in every style."""
        return str(self.photo.with_suffix(""))


class StyleFolders(Dataset):
    """``images/``, ``sketch/``, ``art/``, ``mosaic/`` and ``text/`` with equal names, and a list of each split.

    ``train.json``, ``val.json`` and ``test.json`` are lists of {"image": "a/b.jpg", "caption": "a/b.txt"}, which are
    paths below ``images/`` and ``text/``. Without ``val.json``, every twentieth photograph of train is val. Without any
    of them, every fifth photograph of ``dataset.json`` is test. Image ids are paths below the root: ``sketch/a/b.png``.
    A picture may have another suffix than its photograph, and a photograph may lack a style or a caption.

    The root is searched in SPN4CIR_DATA, then in data, if it is None. Raises ``InputError`` if files are missing.

    Attributes:
        source: where the files come from; ``aliases`` are other names of the folder.
        published: number of photographs by split, where it is known.
        kinds: kinds of queries in triplets and benchmarks; each is a tag.
    """

    source: ClassVar[str]
    aliases: ClassVar[Sequence[str]] = ()
    published: ClassVar[Mapping[str, int]] = {}
    kinds: Sequence[str] = KINDS

    def __init__(self, root: str | None = None):
        self.root: Path = find_root(self.name, root, self.aliases, ((PHOTOS,),), f"{LAYOUT}, from {self.source}")
        self._splits, self._notes = read_splits(self.root, self.source)
        items = [item for split in SPLITS for item in self._splits[split]]
        missing = {item.name: f"{PHOTOS}/{item.photo}" for item in items}
        self._photos = {**missing, **find_pictures(self.root, PHOTOS, items)}
        self._styled = {style: find_pictures(self.root, style, items) for style in STYLES}
        self._names = {i: name for ids in (self._photos, *self._styled.values()) for name, i in ids.items()}
        self._captions_of = {item.name: f"{TEXTS}/{item.caption}" for item in items if item.caption}
        refuse_stray(self.root, [*self._names, *self._captions_of.values()])
        self.protocols = {  # type: ignore[misc]
            split: (f"{self.name}/{split}", f"{self.name}/{split}-batch{GROUP}")[: 1 + (len(items) >= GROUP)]
            for split, items in self._splits.items()
            if split != "train"
        }

    @cached_property
    def _captions(self) -> dict[str, str]:
        """Name → caption, where there is one."""
        found = {name: read_first_line(self.root / path) for name, path in self._captions_of.items()}
        return {name: caption for name, caption in found.items() if caption}

    def find_image(self, image_id: str) -> ImageRef:
        """The picture of an image; where it should lie, if it is missing. Raises ``InputError`` for an unknown id."""
        if image_id not in self._names:
            raise InputError(f"{self.name}: unknown image id {short(image_id)}")
        return ImageRef(self.root / image_id)

    def list_training_images(self) -> list[str]:
        """The photographs of train, which are the targets of training."""
        return self._photos_of("train")

    def _photos_of(self, split: str) -> list[str]:
        return [self._photos[item.name] for item in self._splits[split]]

    def _queries(self, item: StyleItem) -> Iterator[tuple[str, str | None, str | None]]:
        """Kind, reference and text of each query for a photograph."""
        caption = self._captions.get(item.name)
        for kind in self.kinds:
            has_text, style = kind.endswith(TEXTS), kind.removesuffix(f" + {TEXTS}")
            reference = self._styled[style].get(item.name) if style != TEXTS else None
            if (reference or style == TEXTS) and (caption or not has_text):
                yield kind, reference, caption if has_text else None

    def read_triplets(self) -> list[Triplet]:
        """All kinds of queries for each photograph of train; the label is the style, or "text" for a text alone."""
        return [
            Triplet(reference, (self._photos[item.name],), (text,) if text else (), kind.removesuffix(f" + {TEXTS}"))
            for item in self._splits["train"]
            for kind, reference, text in self._queries(item)
        ]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """``NAME/val`` or ``NAME/test``: all photographs of the split are ranked, and metrics are means over kinds.

        ``NAME/test-batch24`` is the published evaluation, whose numbers are not comparable: photographs are ranked
        within groups of 24, drawn by a fixed seed, and those that are left over do not count.
        """
        chosen = self.choose_protocol(split, protocol)
        is_grouped = chosen.endswith(f"-batch{GROUP}")
        gallery = self._photos_of(split)
        groups = draw_groups(gallery) if is_grouped else []
        candidates = {photo: group for group in groups for photo in group}
        if is_grouped:
            gallery = list(candidates)
        ranked = frozenset(gallery)
        queries = tuple(
            Query(reference, text, (photo,), (kind,), candidates.get(photo, ()))
            for item in self._splits[split]
            if (photo := self._photos[item.name]) in ranked
            for kind, reference, text in self._queries(item)
        )
        used = {query.tags[0] for query in queries}
        measures = recall_measures(1, 5, primary=(1,), over="candidates" if is_grouped else "gallery")
        macro = tuple(kind for kind in self.kinds if kind in used)
        return Benchmark(chosen, tuple(gallery), queries, exclude_reference=False, measures=measures, macro=macro)

    def label(self, image_id: str) -> str:
        """The path below the style's folder, without suffix."""
        return self._names.get(image_id, image_id)

    def caption(self, image_id: str) -> str:
        """The caption of the photograph, of which the image may be a drawing; else empty."""
        return self._captions.get(self._names.get(image_id, ""), "")

    def notes(self) -> list[str]:
        """How the photographs were split if no list says it, and which were listed twice."""
        return [f"{self.name}: {note}" for note in self._notes]

    def checks(self) -> list[Check]:
        """Photographs of each split, those that lack a style or a caption, and what the notes say."""
        checks = [Check(note, 1, None, "note") for note in self._notes]
        for split in SPLITS:
            names = [item.name for item in self._splits[split]]
            count, published = len(names), self.published.get(split, len(names))
            level: Level = "fact" if count == published else "note"
            checks.append(Check(f"{split}: photographs", count, self.published.get(split), level))
            parts: dict[str, Mapping[str, str]] = {**self._styled}
            captions = attempt(checks, f"{split}: captions", split != "test", lambda: self._captions)
            if captions is not None:
                parts["caption"] = captions
            for part, found in parts.items():
                lacking = [name for name in names if name not in found]
                checks.append(Check.listed(f"{split}: photographs without {part}", lacking))
        return checks

    def image_roles(self) -> list[ImageRole]:
        """Photographs of each split, and their other styles."""
        roles = [ImageRole(f"photographs of {split}", self._photos_of(split), split != "test") for split in SPLITS]
        for split in SPLITS:
            names = [item.name for item in self._splits[split]]
            styled = [ids[name] for ids in self._styled.values() for name in names if name in ids]
            roles.append(ImageRole(f"other styles of {split}", styled, split != "test"))
        return roles


def read_splits(root: Path, source: str) -> tuple[dict[str, list[StyleItem]], list[str]]:
    """The photographs of each split, each in one split only; and notes of what no list says."""
    whole, notes = root / "dataset.json", list[str]()
    if whole.is_file() and not any((root / f"{split}.json").is_file() for split in SPLITS):
        splits = split_items(read_items(whole, source))
        notes.append(f"{whole} is split by position, as there is no train.json: every fifth photograph is test")
    else:
        listed = [split for split in SPLITS if split != "val" or (root / "val.json").is_file()]
        splits = {split: read_items(root / f"{split}.json", source) for split in listed}
    seen, repeated = set[str](), list[StyleItem]()
    for split in (split for split in ("test", "val", "train") if split in splits):  # test keeps what is listed twice
        kept = list[StyleItem]()
        for item in splits[split]:
            (repeated if item.name in seen else kept).append(item)
            seen.add(item.name)
        splits[split] = kept
    if repeated:
        notes.append(f"{len(repeated)} photographs are listed twice, such as {repeated[0].name}: each counts once")
    if "val" not in splits:
        splits["val"], splits["train"] = take_every(VAL_EVERY, splits["train"])
        notes.append(f"there is no val.json: every twentieth photograph of train.json, {len(splits['val'])}, is val")
    return splits, notes


def split_items(items: Sequence[T]) -> dict[str, list[T]]:
    """Split by position: every fifth is test, every twentieth of the others val."""
    test, others = take_every(TEST_EVERY, items)
    val, train = take_every(VAL_EVERY, others)
    return {"train": train, "val": val, "test": test}


def take_every(step: int, items: Sequence[T]) -> tuple[list[T], list[T]]:
    """The first item and every ``step``-th after it; and the others."""
    return list(items[::step]), [item for n, item in enumerate(items) if n % step]


def read_items(path: Path, source: str) -> list[StyleItem]:
    """The photographs of a list. Raises ``InputError`` that names the entry if a path is none, or leaves its folder."""
    return [
        StyleItem(_inner_path(entry, "image"), _inner_path(entry, "caption") if _has_caption(entry) else None)
        for entry in read_entries(path, source)
    ]


def _has_caption(entry: Entry) -> bool:
    return "caption" in entry and entry.get("caption", object, "a path") is not None


def _inner_path(entry: Entry, key: str) -> PurePosixPath:
    value = entry.text(key)
    with suppress(InputError):
        if safe_name(value):
            return inner_path(entry.path, key, value)
    raise entry.error(key, f"{value!a:.60} is no path below the dataset's root, without control characters")


def find_pictures(root: Path, folder: str, items: Sequence[StyleItem]) -> dict[str, str]:
    """Name → image id of each photograph's picture in a folder, whatever its suffix; the listed one comes first."""
    found: dict[str, str] = {}
    by_folder: dict[PurePosixPath, tuple[dict[str, Path], set[str]]] = {}
    for item in items:
        inner = PurePosixPath(folder) / item.photo.parent
        if inner not in by_folder:
            place = root / inner
            names = {path.name for path in place.iterdir()} if place.is_dir() else set()
            by_folder[inner] = list_pictures(place), names
        pictures, names = by_folder[inner]
        if item.photo.name in names:
            found[item.name] = str(inner / item.photo.name)
        elif item.photo.stem in pictures:
            found[item.name] = str(inner / pictures[item.photo.stem].name)
    return found


def refuse_stray(root: Path, paths: Sequence[str]) -> None:
    """Raise ``InputError`` for the first path below the root that leads out of it by a link."""
    parents = {path: path.rpartition("/")[0] for path in paths}
    stray = stray_links(root, set(parents.values()))
    for path, parent in parents.items():
        if path in stray or parent in stray:
            raise InputError(f"{root / path} is a link, or lies behind a link, that leaves {root}: copy it there")


def draw_groups(photos: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of 24, drawn by a fixed seed; those that are left over are in none."""
    drawn = random.Random(f"batch{GROUP}").sample(list(photos), len(photos))
    return [tuple(drawn[start : start + GROUP]) for start in range(0, len(drawn) - GROUP + 1, GROUP)]
