"""Images of one's own as a dataset, whatever they are read from, and queries of one's own about them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from spn4cir.dataset import Check, Dataset
from spn4cir.datasets.contents import Contents, read_contents, wrong
from spn4cir.datasets.reading import read_first_line
from spn4cir.datasets.rows import HUB
from spn4cir.datasets.table_settings import TableSettings, read_place
from spn4cir.datasets.tables import SUFFIXES as TABLES
from spn4cir.datasets.tables import find_table, load_table
from spn4cir.datasets.text_tables import table_suffix
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.provenance import Provenance
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

if TYPE_CHECKING:
    import pyarrow

FILES = (*TABLES, ".tar")
STEMS = ("catalogue", "metadata", "triplets")  # tables that a folder is read by, so its name suffices
ASKED = {
    **{name: (name,) for name in ("reference", "modification", "target", "group")},
    "negative": ("negative", "negatives"),
    "need": ("need",),
}
OPTIONAL = ("group", "negative", "need")
QUERIES = "queries.csv (or .jsonl) with the columns reference, modification and target, and if you like group, negative"
QUERIES += " (a wrong answer) and need (equal for phrasings of one need)"


class OwnImages(Dataset):
    """What datasets of one's own have in common: where they lie, their images, and queries in ``queries.csv``.

    The root is a folder, a file, or ``hf:`` and a hub name, each perhaps with settings behind a question mark, or a
    file ``catalogue.yaml`` that holds settings (``table_settings.read_place``); None looks in SPN4CIR_DATA, then in
    data, for a folder of the dataset's name. Raises ``InputError`` if there is none.
    """

    def __init__(self, root: str | None = None):
        given = root or str(Path(os.environ.get("SPN4CIR_DATA") or "data") / self.name)
        self._place, self._settings = read_place(given)
        place = Path(self._place)
        if place.is_file() and table_suffix(place) in FILES:
            self.root = place.parent
        elif place.is_dir():
            self.root = place
        elif not self._place.startswith(HUB):
            what = f"give --data-root FOLDER, or a file of {', '.join(FILES)}, or {HUB}OWNER/NAME"
            raise InputError(f"{self.name}: {place} is no folder of pictures and no table: {what}")
        self._queries = find_table(self.root, "queries") if self.root else None
        self.protocols = {"val": (f"{self.name}/val",)} if self._queries else {}  # type: ignore[misc]

    @cached_property
    def _contents(self) -> Contents:
        found = read_contents(self._place, self._settings)
        if not found.places:
            more = f": {found.notes[0]}" if found.notes else ""
            raise InputError(
                f"{self.name}: {self._place} holds no pictures (.png, .jpg and all others that Pillow opens){more}"
            )
        return found

    @cached_property
    def _provenance(self) -> Provenance:
        path, place = Path(self._place), self._place
        name = place.removeprefix(HUB)
        if not place.startswith(HUB):
            place = str(path.absolute())
            folder, stem = (path.parent, path.stem) if path.is_file() else (path, "")
            own = "" if stem in ("", *STEMS, self.name) else f"-{stem}"
            name = f"{folder.resolve().name}{own}"
        return Provenance.of(self.name, name, place, self.list_training_images(), self.find_image)

    def provenance(self) -> Provenance:
        """Names and contents of the pictures, which say whose triplets and runs are."""
        return self._provenance

    @property
    def further_names(self) -> Mapping[str, str]:  # type: ignore[override]
        """Name → image id: of rows that share a picture, all but the first."""
        return self._contents.names

    def find_image(self, image_id: str) -> ImageRef:
        """The picture of an image; where it should lie, if it is missing. Raises ``InputError`` for an unknown id."""
        if image_id not in self._contents.places and image_id not in self._contents.names:
            raise InputError(f"{self.name}: unknown image id {short(image_id)}")
        return self._contents.image(image_id)

    def list_training_images(self) -> list[str]:
        """All images: of a folder sorted, of a table in its order."""
        return list(self._contents.places)

    def label(self, image_id: str) -> str:
        """The title, where the table has one; else the id."""
        return self._contents.titles.get(image_id) or image_id

    def category(self, image_id: str) -> str:
        """The table's category, or the first folder of the path."""
        categories = self._contents.categories
        if categories is None:
            return image_id.partition("/")[0] if "/" in image_id else ""
        return categories.get(image_id, "")

    def other_columns(self) -> Sequence[pyarrow.Table]:
        """What the table says beside caption, category and title."""
        return self._contents.other_columns()

    def caption(self, image_id: str) -> str:
        """The first of ``captions``, or nothing."""
        return next(iter(self.captions(image_id)), "")

    def captions(self, image_id: str) -> tuple[str, ...]:
        """What the table, the file of captions or the text beside the picture says, a line each; else the title."""
        if given := self._contents.captions.get(image_id):
            return given
        path = (self._contents.root / image_id).with_suffix(".txt")  # only of a plain folder
        has_text = self._contents.texts and not path.is_symlink()  # a link might lead anywhere
        text = (read_first_line(path) if has_text else "") or self._contents.titles.get(image_id, "")
        return (text,) if text else ()

    def triplet_entry(self, triplet: Triplet, place: Callable[[str], str] = str) -> dict[str, object]:
        """The shape of out-of-domain images, which says where their pictures are."""
        reference, target = str(triplet.reference), triplet.targets[0]
        paths = {"reference": place(reference), "target": place(target)}
        return {**paths, "reference_name": reference, "target_name": target, "captions": list(triplet.texts)}

    def notes(self) -> list[str]:
        """What was left out."""
        return [f"{self.name}: {note}" for note in self._contents.notes]

    def checks(self) -> list[Check]:
        """How many images there are, how many are described by a file, and what was left out."""
        found = self._contents
        described = len({*found.captions, *found.titles})
        checks = [Check("images", len(found.places)), Check("images described in a table", described)]
        if captions := sum(map(len, found.captions.values())) - len(found.captions):
            checks.append(Check("further captions of these", captions))
        if found.image_rows:
            checks.append(Check("rows that hold an image", found.image_rows))
        if found.names:
            checks.append(Check("further names of images", len(found.names)))
        return checks + [Check(note, 1, None, "note") for note in found.notes]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """``queries.csv`` over all images but the reference; rows of one question are a query with several targets."""
        if not self._queries:
            what = f"to evaluate on your own, write {self.root}/{QUERIES}; training does without by --holdout 0.1"
            raise InputError(f"{self.name}: nobody has annotated any query: {what}")
        chosen = self.choose_protocol(split, protocol)
        asked: dict[tuple[str, str, str], _Question] = {}
        for row, cells in enumerate(self._read_queries(self._queries), 1):
            where = f"{self._queries}, row {row}"
            text, group, need = (cells[name][0] for name in ("modification", "group", "need"))
            (reference,), (target,), negatives = (
                self._find_images(where, column, cells[column]) for column in ("reference", "target", "negative")
            )
            for column, image_ids in (("target", (target,)), ("negative", negatives)):
                if reference in image_ids:
                    raise wrong(where, column, "is the reference, which is not ranked")
            if not text.strip():
                raise wrong(where, "modification", "is empty")
            if not (target or any(negatives)):
                raise wrong(where, "target", "is empty, and the row names no wrong answer")
            question = asked.setdefault((reference, text.strip(), group), _Question(where))
            question.add(where, target, negatives, need)
        if not asked:
            raise InputError(f"{self._queries} holds no query")
        queries = tuple(question.query(*about) for about, question in asked.items())
        gallery, measures = tuple(self._contents.places), recall_measures(1, 5, 10, 50, primary=(10, 50))
        return Benchmark(chosen, gallery, queries, exclude_reference=True, measures=measures)

    def _find_images(self, where: str, column: str, cell: Sequence[str]) -> tuple[str, ...]:
        """Image ids of a cell, whose names may be further ones. Raises ``InputError`` for what is no image."""
        found = tuple(self.further_names.get(name, name) for name in cell)
        for image_id in found:
            if image_id not in self._contents.places and (image_id or column == "reference"):
                raise wrong(where, column, f"{short(image_id)} is no image of the {self.name}")
        return found

    def _read_queries(self, path: Path) -> Iterator[dict[str, tuple[str, ...]]]:
        """Each row of ``queries.csv`` by column: one text, empty for a blank cell; of ``negative`` one or more."""
        how = TableSettings(encoding=self._settings.encoding, strict=self._settings.strict)
        table = load_table(path, ASKED, how)
        columns = {name: table.find(name, names, name not in OPTIONAL) for name, names in ASKED.items()}
        texts = {
            name: table.texts(column) if name == "negative" else [(text,) for text in table.text(column)]
            for name, column in columns.items()
            if column is not None
        }
        for row in range(len(table)):
            cells = {name: texts[name][row] if name in texts else () for name in ASKED}
            yield {name: tuple(filter(str.strip, cell)) or ("",) for name, cell in cells.items()}


class _Question:
    """What the rows of one reference, modification and group say."""

    def __init__(self, where: str):
        self.where, self.need = where, ""
        self.targets: dict[str, None] = {}  # in the order of the rows
        self.negatives: dict[str, None] = {}

    def add(self, where: str, target: str, negatives: Sequence[str], need: str) -> None:
        """Add a row; empty cells say nothing. Raises ``InputError`` if it contradicts the rows before."""
        if need and self.need and need != self.need:
            raise wrong(where, "need", f"is {short(need)}, and in another row of this query {short(self.need)}")
        self.need = self.need or need
        self.targets |= {target: None} if target else {}
        self.negatives |= {negative: None for negative in negatives if negative}
        if both := self.targets.keys() & self.negatives.keys():
            raise wrong(where, "negative", f"{short(both.pop())} is a target of this query too")

    def query(self, reference: str, text: str, group: str) -> Query:
        """The query. Raises ``InputError`` if no row names a target."""
        if not self.targets:
            raise wrong(self.where, "target", "is empty, and so it is in all rows of this query")
        tags = (group,) if group else ()
        return Query(reference, text, (*self.targets,), tags, negatives=(*self.negatives,), need=self.need)
