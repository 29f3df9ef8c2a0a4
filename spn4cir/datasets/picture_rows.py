"""The rows of a table that hold an image: its path, its id, its captions and what else is said of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spn4cir.datasets.locating import ADDRESS, PictureFinder, first_of_cell, refuse_addresses
from spn4cir.datasets.roles import BOX_ROLES, ROLES
from spn4cir.datasets.tables import Table

_SAYS = re.compile(r"\w")  # a cell of a stray quote or a dash names nothing
URLS = ("url", "image_url", "image src", "images")  # columns of addresses, of which one says what to do with them


@dataclass
class PictureRows:
    """Rows of a table that hold an image, in its order.

    Args:
        path: the table.
        count: number of all rows.
        rows: numbers of those that hold an image, from 0 on; all other values are one for each of these.
        paths: below the folder; ``named`` is what the table says.
        ids: empty if there is no column of ids.
        columns: role → texts, for category, title and boxes.
        captions: all captions.
        is_known: whether the table is of a known shape.
        notes: what was left out.
    """

    path: Path
    count: int
    rows: list[int]
    paths: list[str]
    named: list[str]
    ids: list[str]
    columns: Mapping[str, Sequence[str]]
    captions: list[tuple[str, ...]]
    is_known: bool
    notes: list[str]

    def where(self, number: int) -> str:
        """What messages call a row."""
        return f"{self.path}, row {self.rows[number] + 1}"


def read_picture_rows(table: Table, folder: Path) -> PictureRows:
    """Read the rows that hold an image, and find each picture below the folder.

    Raises ``InputError`` that names the file and the row, such as for addresses whose pictures are not there.
    """
    notes, template = list(table.notes), table.settings.template
    if table.shape:
        notes.append(f"{table.path} is read as a table of {table.shape}")
    if template:
        column, cells = "image", table.fill(template)
    else:
        column = _image_column(table)
        cells = table.text(column)
    kept = [row for row, cell in enumerate(cells) if _SAYS.search(cell)]
    if len(kept) < len(cells):
        notes.append(f"{table.path}: {len(cells) - len(kept)} rows name no image and are left out")
    first = [first_of_cell(cells[row]) if not template else (cells[row], 0) for row in kept]
    if further := sum(others for _, others in first):
        notes.append(f"{table.path}: cells hold {further} further images, which are left out")
    found = PictureRows(
        table.path, len(cells), kept, [], [name for name, _ in first], [], {}, [], bool(table.shape), notes
    )
    found.paths, missing = PictureFinder(folder).find(found.named, column, found.where)
    if missing == len(kept) and kept:
        captions = table.find_several("caption", ROLES["caption"])
        caption = captions[0] if captions else None
        raise refuse_addresses(table.path, column, caption, folder, found.named[0], found.where(0))
    if missing:
        notes.append(f"{table.path}: {missing} addresses have no picture of that name below {folder}")
    _read_texts(table, found)
    return found


def _image_column(table: Table) -> str:
    column = table.find("image", ROLES["image"])
    if column is None:
        lower = {name.strip().lower(): name for name in table.cells}
        urls = next((lower[name] for name in URLS if name in lower), None)
        if urls is not None and any(ADDRESS.match(text) for text in table.text(urls)):
            return urls
        column = table.find("image", ROLES["image"], needed=True)
    assert column is not None
    return column


def _read_texts(table: Table, found: PictureRows) -> None:
    """Fill in ids, columns and captions."""
    if (column := table.find("id", ROLES["id"])) is not None:
        cells = table.text(column)
        found.ids = [cells[row] for row in found.rows]
    columns: dict[str, list[str]] = {}
    for role in ("category", "title"):
        if several := table.find_several(role, ROLES[role]):
            texts = [table.text(name) for name in several]
            columns[role] = [next((t for t in cells if t.strip()), "") for cells in zip(*texts, strict=True)]
    given = [table.texts(name) for name in table.find_several("caption", ROLES["caption"])]
    captions = [tuple(text for cell in cells for text in cell) for cells in zip(*given, strict=True)]
    if (same := table.find("same", ())) is not None:
        _fill_same(table.text(same), columns, captions)
    for role, names in BOX_ROLES.items():
        if (box := table.find(role, names)) is not None:
            columns[role] = table.text(box)
    found.columns = {role: [cells[row] for row in found.rows] for role, cells in columns.items()}
    found.captions = [captions[row] for row in found.rows] if captions else []


def _fill_same(keys: Sequence[str], columns: Mapping[str, list[str]], captions: list[tuple[str, ...]]) -> None:
    """Give rows of the same key the texts of the first row that has them, where they have none."""
    for cells in columns.values():
        first: dict[str, str] = {}
        for row, key in enumerate(keys):
            if cells[row].strip():
                first.setdefault(key, cells[row])
            elif key:
                cells[row] = first.get(key, "")
    known: dict[str, tuple[str, ...]] = {}
    for row, key in enumerate(keys if captions else ()):
        if captions[row]:
            known.setdefault(key, captions[row])
        elif key:
            captions[row] = known.get(key, ())
