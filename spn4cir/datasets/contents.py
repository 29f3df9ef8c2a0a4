"""What pictures of one's own there are: ids, where each one lies, and what tables say of it.

Which files are refused: those whose names hold control characters, backslashes or bytes that are no Unicode, and those
that lie outside the root, be it by a path or by a link.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from spn4cir.datasets.pictures import safe_name, stray_links, walk
from spn4cir.datasets.reading import inner_path
from spn4cir.datasets.rows import HUB, SAVED, Rows, holds_images
from spn4cir.datasets.tables import BOXES, find_table, read_other_columns, read_table
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import ImageRef

if TYPE_CHECKING:
    import pyarrow

Box: TypeAlias = tuple[int, int, int, int]
Place: TypeAlias = str | tuple[str, int]
Columns: TypeAlias = Mapping[str, Sequence[str]]
NameRow: TypeAlias = Callable[[int], str]
ROLES = {
    "image": ("image", "path", "image_path", "file", "file_name"),
    "id": ("image_id", "id"),
    "caption": ("caption", "description", "text"),
    "category": ("category",),
    "title": ("title",),
}
CORNERS = ("x0", "y0", "x1", "y1")
BOX_ROLES = {name: (name,) for name in (*CORNERS, *BOXES)}
IMAGES = (*ROLES["image"], "img", "jpg", "jpeg", "png", "webp")  # names of columns that hold the bytes of images


@dataclass
class Contents:
    """Image ids with where they lie: a path below ``root``, or a column and a row of ``rows``; what is known of them.

    ``texts`` says whether there are texts beside pictures; ``notes`` say what was left out.
    """

    root: Path
    places: dict[str, Place] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    categories: dict[str, str] | None = None
    titles: dict[str, str] = field(default_factory=dict)
    boxes: dict[str, Box] = field(default_factory=dict)
    rows: Rows | None = None
    texts: bool = False
    notes: list[str] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)

    def other_columns(self) -> list[pyarrow.Table]:
        """Tables below each other that say more of the images, in the order of ``places``; none for a plain folder."""
        if self.rows is None:
            return [read_other_columns(path, {**ROLES, **BOX_ROLES}) for path in self.tables]
        table, used = self.rows.data.data.table, {self.rows.find(names) for names in _roles_of_rows().values()}
        names = [
            name for name in table.column_names if not (name in used or self.rows.is_image(name) or name[:2] == "__")
        ]
        return [table.select(names)]

    def image(self, image_id: str) -> ImageRef:
        """The image of a known id."""
        place, box = self.places[image_id], self.boxes.get(image_id)
        if isinstance(place, str):
            return ImageRef(self.root / place, box)
        assert self.rows is not None
        return self.rows.image(*place, box)

    def add(self, ids: Sequence[str], places: Sequence[Place], columns: Columns, where: NameRow) -> None:
        """Add the rows of a table, which ``where`` gives names for messages; ``columns`` are role → a text of each row.

        Raises ``InputError`` for an id that cannot be one, or that occurs twice.
        """
        for row, (image_id, place) in enumerate(zip(ids, places, strict=True)):
            if not safe_name(image_id):
                raise wrong(where(row), "image_id", f"{image_id!a:.60} is empty or holds control characters")
            if image_id in self.places:
                raise wrong(where(row), "image_id", f"{short(image_id)} occurs twice")
            self.places[image_id] = place
            if box := _box(columns, row, where):
                self.boxes[image_id] = box
        self.captions.update((i, one_line(t)) for i, t in _known(ids, columns.get("caption", ())))
        self.categories = {**(self.categories or {}), **dict(_known(ids, columns.get("category", ())))}
        self.titles.update((i, one_line(t)) for i, t in _known(ids, columns.get("title", ())))


def read_contents(place: Path | str) -> Contents:
    """The pictures of a folder, a table or a hub name. Raises ``InputError`` that names the file and the row."""
    path = Path(place)
    if str(place).startswith(HUB):
        from huggingface_hub.constants import HF_HUB_CACHE

        return _of_rows(Rows(str(place)), Path(HF_HUB_CACHE))
    table = find_table(path, "catalogue") if path.is_dir() else path
    if table is None:
        if any((path / name).is_file() for name in SAVED):
            return _of_rows(Rows(str(path)), path)
        folders = [path, *sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink())]
        listed = [found for folder in folders if (found := find_table(folder, "metadata"))]
        return _of_tables(path, listed) if listed else _of_folder(path)
    suffix = table.suffix.lower()
    if suffix == ".tar" or (suffix == ".parquet" and holds_images(table, IMAGES)):
        return _of_rows(Rows(str(table), [table]), table.parent)
    return _of_tables(table.parent, [table])


def _of_folder(root: Path) -> Contents:
    found = walk(root)
    if found.data and not found.ids:
        return _of_rows(Rows(str(root), [root / name for name in found.data]), root)
    contents = Contents(root, {image_id: image_id for image_id in found.ids}, texts=found.has_texts)
    alone = ": give one as --data-root to read it"
    unsafe = "pictures are left out since their names hold control characters, backslashes or no Unicode"
    for names, what, show, advice in (
        (found.links, f"links to folders, or out of {root}, are not followed", repr, ""),
        (found.unsafe, unsafe, ascii, ""),
        (found.own, "folders are passed over since they hold files of data generation", short, ""),
        (found.data, "tables are passed over since there are pictures beside them", short, alone),
        (found.special, "pipes, sockets, devices or broken links are not opened", short, ""),
    ):
        if names:
            contents.notes.append(f"{len(names)} {what}, such as {show(names[0])}{advice}")
    if path := find_table(root, "captions"):
        roles = {"image": (*ROLES["image"], *ROLES["id"]), "caption": ROLES["caption"]}
        columns = read_table(path, roles, tuple(roles))
        given = zip(columns["image"], columns["caption"], strict=True)
        captions = {image_id.removeprefix("./"): one_line(text) for image_id, text in given}
        contents.captions = {i: text for i, text in captions.items() if i in contents.places}
        if lost := [i for i in captions if i not in contents.places]:
            contents.notes.append(f"{path} describes {len(lost)} images that are not there, such as {short(lost[0])}")
    if found.others:
        contents.notes.append(f"{found.others.total()} files are passed over: {found.describe_others()}")
    return contents


def _of_tables(root: Path, tables: Sequence[Path]) -> Contents:
    """Tables of paths, each relative to the folder of its table."""
    contents = Contents(root, tables=list(tables))
    for path in tables:
        columns = read_table(path, {**ROLES, **BOX_ROLES}, ("image",))

        def where(row: int, path: Path = path) -> str:
            return f"{path}, row {row + 1}"

        places = [inner(path.parent, where, row, "image", value) for row, value in enumerate(columns["image"])]
        prefix = "" if path.parent == root else f"{path.parent.relative_to(root).as_posix()}/"
        below = [f"{prefix}{place}" for place in places]
        contents.add(columns.get("id", below), below, columns, where)
        refuse_links(path.parent, places, "image", where)
    return contents


def _of_rows(rows: Rows, root: Path) -> Contents:
    """Images that are stored in a table, or at the paths that it gives."""
    named = {role: rows.find(names) for role, names in _roles_of_rows().items() if role != "image"}
    columns = {role: rows.texts(column) for role, column in named.items() if column}
    stored = [column for column in rows.data.column_names if rows.is_image(column)]
    known = [column for column in stored if column.strip().lower() in IMAGES]
    listed = rows.find(ROLES["image"])
    if not known and not listed and len(stored) != 1:
        rows.find(IMAGES, needed=True)
    contents, paths = Contents(root, rows=rows), [""] * len(rows)
    places: list[Place] = [""] * len(rows)
    for column in known or stored[: not listed]:
        sizes, names = rows.sizes(column).to_pylist(), rows.paths(column).to_pylist()
        for row, (size, name) in enumerate(zip(sizes, names, strict=True)):
            paths[row] = paths[row] or name or ""
            if not places[row] and (size or not name):
                places[row] = column, row
    if listed and not known:
        paths = rows.texts(listed)
    outside = [row for row, place in enumerate(places) if not place]
    for row in outside:
        path = Path(paths[row])
        shown = path.relative_to(root).as_posix() if path.is_absolute() and path.is_relative_to(root) else paths[row]
        places[row] = paths[row] = inner(root, rows.name, row, listed or stored[0], shown)
    refuse_links(root, [paths[row] for row in outside], "image", lambda n: rows.name(outside[n]))
    ids = columns.get("id") or [path or rows.row_id(row) for row, path in enumerate(paths)]
    if "id" not in columns and len(set(ids)) < len(ids):
        contents.notes.append(f"{rows.place}: paths of images occur twice: ids are splits and rows instead")
        ids = [rows.row_id(row) for row in range(len(rows))]
    contents.add(ids, places, columns, rows.name)
    return contents


def _roles_of_rows() -> dict[str, tuple[str, ...]]:
    return {**ROLES, **BOX_ROLES, "caption": (*ROLES["caption"], "txt"), "category": ("category", "label")}


def _box(columns: Columns, row: int, where: NameRow) -> Box | None:
    """Left, upper, right, lower in pixels, as x0, y0, x1, y1 or a box; a bbox is left, upper, width, height."""
    names = CORNERS if columns.keys() >= {*CORNERS} else [name for name in BOXES if name in columns][:1]
    text = " ".join(columns[name][row] for name in names)
    parts = re.findall(r"[^\s,;()\[\]]+", text)
    if not parts:
        return None
    name = names[0]
    try:
        left, upper, right, lower = (float(part) for part in parts)
        if name == "bbox":
            right, lower = left + right, upper + lower
        box = round(left), round(upper), round(right), round(lower)
    except (ValueError, OverflowError):
        raise wrong(where(row), name, f"{short(text)} are not four numbers") from None
    if not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise wrong(where(row), name, f"{short(text)} is no box of left, upper, right, lower") from None
    return box


def _known(ids: Sequence[str], values: Sequence[str]) -> list[tuple[str, str]]:
    """Image ids with what a column says of them, where it says something; nothing where there is no such column."""
    return [(image_id, value) for image_id, value in zip(ids, values, strict=True) if value.strip()] if values else []


def inner(folder: Path, where: NameRow, row: int, column: str, value: str) -> str:
    """A path below a folder, as a table gives it. Raises ``InputError`` that names the row."""
    with suppress(InputError):
        if safe_name(path := str(inner_path(folder, column, value))):
            return path
    told = f"{value!a:.60} is no path below {folder}, relative to it and without control characters"
    raise wrong(where(row), column, told)


def refuse_links(folder: Path, places: Sequence[str], column: str, where: NameRow) -> None:
    """Raise ``InputError`` for the first path below a folder that leads out of it by a link."""
    parents = [place.rpartition("/")[0] or "." for place in places]
    stray = stray_links(folder, set(parents))
    for row, (place, parent) in enumerate(zip(places, parents, strict=True) if stray else ()):
        if place in stray or parent in stray:
            raise wrong(where(row), column, f"{short(place)} is a link that leaves {folder}")


def wrong(where: str, column: str, what: str) -> InputError:
    """The error to raise about a cell of a table."""
    return InputError(f"{where}, column {column!r}: {what}")


def one_line(text: str) -> str:
    """The words of a text, with one space between them."""
    return " ".join(text.split())
