"""A catalogue of one's own: a folder of pictures, or a table of them, without any triplet.

Which files are refused: those whose names hold control characters, backslashes or bytes that are no Unicode, and those
that lie outside the root, be it by a path or by a link.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from spn4cir.dataset import Check, Dataset
from spn4cir.datasets.pictures import SUFFIXES, safe_name, stray_links, walk
from spn4cir.datasets.reading import inner_path
from spn4cir.datasets.tables import SUFFIXES as TABLES
from spn4cir.datasets.tables import find_table, read_table
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

ROLES = {
    "image": ("image", "path", "image_path", "file"),
    "id": ("image_id", "id"),
    "caption": ("caption", "description", "text"),
    "category": ("category",),
    "title": ("title",),
}
ASKED = {name: (name,) for name in ("reference", "modification", "target", "group")}
QUERIES = "queries.csv (or .jsonl) with the columns reference, modification and target, and group if there are groups"


@dataclass
class Contents:
    """Image ids with their paths below the root, and what is known about them."""

    paths: dict[str, str]
    captions: dict[str, str] = field(default_factory=dict)
    categories: dict[str, str] | None = None
    titles: dict[str, str] = field(default_factory=dict)
    texts: bool = False
    notes: list[str] = field(default_factory=list)


class Catalogue(Dataset):
    """A folder of pictures, whose ids are their paths below it; or a table with a column of such paths.

    In a folder, the first folder of a path is the category, and ``captions.csv`` (or .jsonl; columns image and caption)
    or the first line of ``shoes/a.txt`` beside ``shoes/a.png`` describes a picture. A table (CSV, TSV, JSONL, Parquet)
    has a column image, and may have image_id, caption, category and title; its paths start from its own folder. A
    folder that holds a table called ``catalogue`` is read by it. Queries, if there are any, are in ``queries.csv``.

    Args:
        root: the folder or the table; None looks in SPN4CIR_DATA, then in data, for a folder ``catalogue``.

    Raises:
        InputError: if there is neither.
    """

    name = "catalogue"
    has_triplets = False

    def __init__(self, root: str | None = None):
        place = Path(root) if root else Path(os.environ.get("SPN4CIR_DATA") or "data") / self.name
        if place.is_file() and place.suffix.lower() in TABLES:
            self.root: Path = place.parent
            self._table: Path | None = place
        elif place.is_dir():
            self.root, self._table = place, find_table(place, self.name)
        else:
            raise InputError(
                f"{self.name}: {place} is no folder of pictures and no table: give --data-root FOLDER, or a file of "
                f"{', '.join(TABLES)}"
            )
        self._queries = find_table(self.root, "queries")
        self.protocols: Mapping[str, tuple[str, ...]] = (  # type: ignore[misc]
            {"val": (f"{self.name}/val",)} if self._queries else {}
        )

    @cached_property
    def _contents(self) -> Contents:
        found = _of_table(self._table) if self._table else _of_folder(self.root)
        if not found.paths:
            more = f": {found.notes[0]}" if found.notes else ""
            raise InputError(f"{self.name}: {self._table or self.root} holds no pictures ({', '.join(SUFFIXES)}){more}")
        return found

    def find_image(self, image_id: str) -> ImageRef:
        """The picture of an image; where it should lie, if it is missing. Raises ``InputError`` for an unknown id."""
        if image_id not in self._contents.paths:
            raise InputError(f"{self.name}: unknown image id {short(image_id)}")
        return ImageRef(self.root / self._contents.paths[image_id])

    def list_training_images(self) -> list[str]:
        """All images: of a folder sorted, of a table in its order."""
        return list(self._contents.paths)

    def read_triplets(self) -> list[Triplet]:
        """None: nobody annotated any."""
        return []

    def label(self, image_id: str) -> str:
        """The title, where the table has one; else the id."""
        return self._contents.titles.get(image_id) or image_id

    def category(self, image_id: str) -> str:
        """The table's category, or the first folder of the path."""
        categories = self._contents.categories
        if categories is None:
            return image_id.partition("/")[0] if "/" in image_id else ""
        return categories.get(image_id, "")

    def caption(self, image_id: str) -> str:
        """What the table, the file of captions or the text beside the picture says, on one line."""
        given = self._contents.captions.get(image_id, "")
        return given or (self._text_beside(image_id) if self._contents.texts else "")

    def _text_beside(self, image_id: str) -> str:
        path = (self.root / self._contents.paths[image_id]).with_suffix(".txt")
        if path.is_symlink():  # might lead anywhere
            return ""
        try:
            with path.open(encoding="utf-8-sig") as file:
                return _one_line(file.readline(4096))
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"caption {path} cannot be read: {error}") from None

    def notes(self) -> list[str]:
        """What was left out."""
        return [f"{self.name}: {note}" for note in self._contents.notes]

    def checks(self) -> list[Check]:
        """How many images there are, how many are described by a file, and what was left out."""
        found = self._contents
        checks = [Check("images", len(found.paths)), Check("images described in a table", len(found.captions))]
        return checks + [Check(note, 1, None, "note") for note in found.notes]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """``catalogue/val``: the queries of ``queries.csv``, ranked over all images without the reference.

        Rows that ask the same of the same reference are one query with several targets.
        """
        if not self._queries:
            raise InputError(
                f"{self.name}: nobody has annotated any query: to evaluate on your own, write {self.root}/{QUERIES}; "
                "training does without by --selection holdout"
            )
        chosen = self.choose_protocol(split, protocol)
        asked: dict[tuple[str, str, str], list[str]] = {}
        columns = read_table(self._queries, ASKED, ("reference", "modification", "target"))
        groups = columns.get("group", [""] * len(columns["target"]))
        rows = zip(columns["reference"], columns["modification"], columns["target"], groups, strict=True)
        for row, (reference, text, target, group) in enumerate(rows, 1):
            for column, image_id in (("reference", reference), ("target", target)):
                if image_id not in self._contents.paths:
                    raise _wrong(self._queries, row, column, f"{short(image_id)} is no image of the {self.name}")
            if not text.strip():
                raise _wrong(self._queries, row, "modification", "is empty")
            if reference == target:
                raise _wrong(self._queries, row, "target", "is the reference, which is not ranked")
            asked.setdefault((reference, text.strip(), group), []).append(target)
        if not asked:
            raise InputError(f"{self._queries} holds no query")
        return Benchmark(
            name=chosen,
            gallery=tuple(self._contents.paths),
            queries=tuple(
                Query(r, text, tuple(dict.fromkeys(t)), (group,) if group else ())
                for (r, text, group), t in asked.items()
            ),
            exclude_reference=True,
            measures=recall_measures(1, 5, 10, 50, primary=(10, 50)),
        )


def _of_folder(root: Path) -> Contents:
    found = walk(root)
    contents = Contents({image_id: image_id for image_id in found.ids}, texts=found.has_texts)
    if found.links:
        contents.notes.append(
            f"{len(found.links)} links to folders, or out of {root}, are not followed, such as {found.links[0]!r}"
        )
    if found.unsafe:
        contents.notes.append(
            f"{len(found.unsafe)} pictures are left out since their names hold control characters, backslashes or no "
            f"Unicode, such as {found.unsafe[0]!a}"
        )
    if found.own:
        contents.notes.append(
            f"{len(found.own)} folders are passed over since they hold files of data generation, such as "
            f"{short(found.own[0])}"
        )
    path = find_table(root, "captions")
    if path:
        columns = read_table(
            path, {"image": (*ROLES["image"], *ROLES["id"]), "caption": ROLES["caption"]}, ("image", "caption")
        )
        given = zip(columns["image"], columns["caption"], strict=True)
        captions = {image_id.removeprefix("./"): _one_line(text) for image_id, text in given}
        contents.captions = {i: text for i, text in captions.items() if i in contents.paths}
        lost = [i for i in captions if i not in contents.paths]
        if lost:
            contents.notes.append(f"{path} describes {len(lost)} images that are not there, such as {short(lost[0])}")
    return contents


def _of_table(path: Path) -> Contents:
    columns = read_table(path, ROLES, ("image",))
    inner = [str(_inner(path, row, value)) for row, value in enumerate(columns["image"], 1)]
    ids = columns.get("id", inner)
    contents = Contents({})
    for row, (image_id, place) in enumerate(zip(ids, inner, strict=True), 1):
        if not safe_name(image_id):
            raise _wrong(path, row, "image_id", f"{image_id!a:.60} is empty or holds control characters")
        if image_id in contents.paths:
            raise _wrong(path, row, "image_id", f"{short(image_id)} occurs twice")
        contents.paths[image_id] = place
    stray = stray_links(path.parent, {place.rpartition("/")[0] or "." for place in inner})
    for row, place in enumerate(inner if stray else (), 1):
        if place in stray or (place.rpartition("/")[0] or ".") in stray:
            raise _wrong(path, row, "image", f"{short(place)} is a link that leaves {path.parent}")
    contents.captions = {i: _one_line(t) for i, t in _known(ids, columns.get("caption", ()))}
    contents.categories = dict(_known(ids, columns.get("category", ())))
    contents.titles = {i: _one_line(t) for i, t in _known(ids, columns.get("title", ()))}
    return contents


def _known(ids: Sequence[str], values: Sequence[str]) -> list[tuple[str, str]]:
    """Image ids with what a column says of them, where it says something; nothing where there is no such column."""
    return [(image_id, value) for image_id, value in zip(ids, values, strict=True) if value.strip()] if values else []


def _inner(path: Path, row: int, value: str) -> object:
    try:
        inner = inner_path(path, str(row), value)
    except InputError:
        inner = None
    if inner is None or not safe_name(str(inner)):
        told = f"{value!a:.60} is no path below {path.parent}, relative to it and without control characters"
        raise _wrong(path, row, "image", told)
    return inner


def _wrong(path: Path, row: int, column: str, what: str) -> InputError:
    return InputError(f"{path}, row {row}, column {column!r}: {what}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
