"""Annotated triplets of one's own in a table: references, modification texts and targets, of any number."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spn4cir.dataset import Check, ImageRole
from spn4cir.datasets.contents import Contents, read_contents
from spn4cir.datasets.locating import inner, refuse_links, wrong
from spn4cir.datasets.own import OwnImages
from spn4cir.datasets.rows import HUB, SAVED, Rows
from spn4cir.datasets.table_settings import TableSettings
from spn4cir.datasets.tables import find_table
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.triplets import TripletTable

ROLES = {
    "reference": ("reference", "q_img", "candidate"),
    "targets": ("target", "targets", "t_img"),
    "texts": ("modification", "modifications", "q_text", "text", "texts", "caption", "captions"),
    "negatives": ("negatives", "hns"),
}
IMAGES = "catalogue"  # name of the table or folder of images beside a table of triplets


class Pairs(OwnImages):
    """A table of triplets, memory-mapped: columns reference, target, modification, and negatives if there are any.

    Images are what the columns reference and target hold, if that is bytes; else those of the table or folder called
    ``catalogue`` beside the table, by their ids; else files, by paths from the table's folder. docs/datasets.md lists
    all forms of the table and names of its columns.
    """

    name = "pairs"

    @cached_property
    def _rows(self) -> Rows:
        place = Path(self._place)
        if self._place.startswith(HUB) or any((place / name).is_file() for name in SAVED):
            return Rows(self._place)
        if table := place if place.is_file() else find_table(place, "triplets"):
            return Rows(str(table), [table], ROLES, self._settings)
        files = [path for path in sorted(place.rglob("*.parquet")) if IMAGES not in path.relative_to(place).parts[0]]
        if files:
            return Rows(self._place, files)
        raise InputError(f"{self.name}: {place} holds no triplets.csv, .tsv, .jsonl or .parquet, and no Parquet file")

    @cached_property
    def _columns(self) -> dict[str, str]:
        """Column of ``TripletTable`` → column of the file."""
        how = self._settings
        found = {
            role: self._rows.find(how.names_of(role, names), role != "negatives" or how.is_given(role))
            for role, names in ROLES.items()
        }
        return {role: column for role, column in found.items() if column}

    @cached_property
    def _triplets(self) -> TripletTable:
        triplets = TripletTable.from_columns({role: self._rows.ids(name) for role, name in self._columns.items()})
        if not len(triplets):
            raise InputError(f"{self._rows.place} holds no triplet")
        if incomplete := triplets.find_incomplete():
            row, role = incomplete
            more = " as the reference is" if role == "texts" else ""
            raise wrong(self._rows.name(row), self._columns[role], f"is empty{more}")
        return triplets

    def _where(self, image_id: str) -> str:
        """The first row that names an image."""
        return self._rows.name(next(n for n, triplet in enumerate(self._triplets) if image_id in triplet.image_ids))

    def read_triplets(self) -> TripletTable:
        """The rows of the table, none of which is in memory."""
        found = self._contents
        unknown = [i for i in self._triplets.image_ids if i not in found.places and i not in found.names]
        if unknown:
            raise InputError(f"{self._where(unknown[0])}: {short(unknown[0])} is no image of the {IMAGES} beside it")
        return _rename(self._triplets, self.further_names) if self.further_names else self._triplets

    @cached_property
    def _contents(self) -> Contents:
        stored = [column for role in ("reference", "targets") if self._rows.is_image(column := self._columns[role])]
        if stored:
            return _stored_images(self._rows, self.root or Path(), stored)
        if self.root is None:
            what = "columns reference and target hold no images, and no folder is beside it"
            raise InputError(f"{self._rows.place}: {what}")
        beside = find_table(self.root, IMAGES) or self.root / IMAGES
        if beside.exists():
            return read_contents(beside, TableSettings(encoding=self._settings.encoding, strict=self._settings.strict))
        contents, ids = Contents(self.root), self._triplets.image_ids

        def where(number: int) -> str:
            return self._where(ids[number])

        places = [inner(self.root, where, number, "of images", image_id) for number, image_id in enumerate(ids)]
        refuse_links(self.root, places, "of images", where)
        contents.add(ids, places, {}, where)
        return contents

    def image_roles(self) -> list[ImageRole]:
        """As for any dataset; but training does without images beside the table that no triplet names."""
        training, *galleries = super().image_roles()
        named = list(dict.fromkeys(self._triplets.image_ids))
        others = set(training.image_ids).difference(named)
        roles = [ImageRole("named by training triplets", named, True)]
        roles += [ImageRole("others beside the triplets", [i for i in training.image_ids if i in others], False)]
        return [*(role for role in roles if role.image_ids), *galleries]

    def notes(self) -> list[str]:
        """How the table was read, and what was left out of the images."""
        return [f"{self.name}: {note}" for note in self._rows.notes] + super().notes()

    def checks(self) -> list[Check]:
        """The number of triplets, and what is known of their images."""
        return [Check("training triplets", len(self._triplets)), *super().checks()]


def _rename(triplets: TripletTable, names: Mapping[str, str]) -> TripletTable:
    """The triplets by the ids of images, where they name some by further names; in memory."""
    import pyarrow as pa

    def ids(column: str) -> list[Any]:
        return [
            names.get(value, value)
            if isinstance(value, str)
            else value and list(dict.fromkeys(names.get(i, i) for i in value))
            for value in triplets.table.column(column).to_pylist()
        ]

    table = triplets.table
    for column in ("reference", "targets", "negatives"):
        place, kind = table.column_names.index(column), table.schema.field(column).type
        table = table.set_column(place, column, pa.chunked_array([pa.array(ids(column), kind)]))
    return TripletTable(table, triplets.rows)


def _stored_images(rows: Rows, root: Path, columns: list[str]) -> Contents:
    """Images in columns of the table, each once, by their paths. Raises ``InputError`` for a path of two images."""
    import pyarrow as pa

    ids = pa.concat_arrays([chunk for column in columns for chunk in rows.ids(column).chunks]).dictionary_encode()
    sizes = np.concatenate([rows.sizes(column).fill_null(0).to_numpy() for column in columns])
    codes = ids.indices.to_numpy()
    first = np.unique(codes, return_index=True)[1]  # of each code, which are 0, 1, …

    def where(number: int) -> str:
        return rows.name(int(first[number]) % len(rows))

    if len(other := np.flatnonzero(sizes != sizes[first[codes]])):
        row, code = int(other[0]) % len(rows), int(codes[other[0]])
        path = short(ids.dictionary[code].as_py())
        raise wrong(rows.name(row), columns[0], f"{path} is another image than in {where(code)}: one path, one image")
    contents = Contents(root, rows=rows)
    places = [(columns[at // len(rows)], at % len(rows)) for at in first.tolist()]
    contents.add(ids.dictionary.to_pylist(), places, {}, where)
    return contents
