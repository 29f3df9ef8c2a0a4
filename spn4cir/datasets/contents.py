"""What pictures of one's own there are: ids, where each one lies, and what tables say of it.

Which files are refused: those whose names hold control characters, backslashes or bytes that are no Unicode, and those
that lie outside the root, be it by a path or by a link.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from spn4cir.datasets.captions import load_captions, match_captions
from spn4cir.datasets.html_text import strip_html
from spn4cir.datasets.locating import NameRow, inner, refuse_links
from spn4cir.datasets.locating import wrong as wrong
from spn4cir.datasets.picture_rows import PictureRows, read_picture_rows
from spn4cir.datasets.pictures import safe_name, walk
from spn4cir.datasets.roles import BOX_ROLES, CORNERS, IMAGES, ROLES, ROLES_OF_ROWS
from spn4cir.datasets.rows import HUB, SAVED, Rows, holds_images
from spn4cir.datasets.table_settings import TableSettings
from spn4cir.datasets.tables import BOXES, SUFFIXES, find_table, load_table
from spn4cir.datasets.text_tables import table_suffix
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import ImageRef

if TYPE_CHECKING:
    import pyarrow

Box: TypeAlias = tuple[int, int, int, int]
Place: TypeAlias = str | tuple[str, int]
Columns: TypeAlias = Mapping[str, Sequence[str]]


@dataclass
class Contents:
    """Images and what is known of them: an image is a picture, or a crop of one, and may have several names.

    Args:
        root: folder that paths start from.
        places: image id → a path below ``root``, or a column and a row of ``rows``.
        captions: image id → all captions, in the order of the rows.
        categories: image id → category; None where nothing says any.
        titles, boxes: image id → title, crop box.
        names: further name → image id, of rows that share a picture.
        rows: the table that holds pictures.
        texts: whether there are texts beside pictures.
        notes: what was left out, a line each.
        tables: tables of paths.
        rows_of: image id → its rows, numbered through all tables.
        settings: how the tables are read.
        image_rows: number of rows that hold an image.
    """

    root: Path
    places: dict[str, Place] = field(default_factory=dict)
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    categories: dict[str, str] | None = None
    titles: dict[str, str] = field(default_factory=dict)
    boxes: dict[str, Box] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    rows: Rows | None = None
    texts: bool = False
    notes: list[str] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    rows_of: dict[str, list[int]] = field(default_factory=dict)
    settings: TableSettings = field(default_factory=TableSettings)
    image_rows: int = 0
    _known: dict[tuple[Place, Box | None], str] = field(default_factory=dict)

    @property
    def first_rows(self) -> list[int]:
        """The row that each image first occurs in."""
        return [rows[0] for rows in self.rows_of.values()]

    def other_columns(self) -> list[pyarrow.Table]:
        """Tables below each other that say more of the images, in the order of ``places``; none for a plain folder."""
        if self.rows is None:
            import pyarrow

            roles, tables, start, first = {**ROLES, **BOX_ROLES}, list[pyarrow.Table](), 0, self.first_rows
            for path in self.tables:
                table = load_table(path, roles, self.settings)
                own = [row - start for row in first if 0 <= row - start < len(table)]
                used = {name for role, names in roles.items() for name in table.find_several(role, names)}
                rest = [name for name in table.cells if name not in used]
                # Arrow counts no rows where there is no column
                tables.append(table.select(rest).take(own) if rest else pyarrow.table({"": pyarrow.nulls(len(own))}))
                start += len(table)
            return tables if any(table.column_names != [""] for table in tables) else []
        stored, known = self.rows.data.data.table, {self.rows.find(names) for names in ROLES_OF_ROWS.values()}
        names = [
            name for name in stored.column_names if not (name in known or self.rows.is_image(name) or name[:2] == "__")
        ]
        return [stored.select(names).take(self.first_rows)]

    def image(self, image_id: str) -> ImageRef:
        """The image of a known id, or of a further name."""
        image_id = self.names.get(image_id, image_id)
        place, box = self.places[image_id], self.boxes.get(image_id)
        if isinstance(place, str):
            return ImageRef(self.root / place, box)
        assert self.rows is not None
        return self.rows.image(*place, box)

    def add(
        self,
        ids: Sequence[str],
        places: Sequence[Place],
        columns: Columns,
        where: NameRow,
        captions: Sequence[Iterable[str]] = (),
        rows: Sequence[int] | None = None,
    ) -> None:
        """Add rows of a table that hold an image.

        Rows with the same picture and the same crop are one image: its id is that of the first row, and it keeps the
        ids of the others as further names, and the captions of all. Raises ``InputError`` for an id that cannot be one,
        or that is that of another picture.

        Args:
            ids, places: of each row.
            columns: role → a text of each row.
            where: row → what messages call it.
            captions: all captions of each row; empty if there are none.
            rows: numbers of the rows within their tables; None counts them.
        """
        categories = self.categories = self.categories or {}
        for row, (image_id, place) in enumerate(zip(ids, places, strict=True)):
            if not safe_name(image_id):
                raise wrong(where(row), "image_id", f"{image_id!a:.60} is empty or holds control characters")
            box = _box(columns, row, where)
            own = self._known.setdefault((place, box), image_id)
            is_taken = image_id in self.places or image_id in self.names
            if is_taken and (self.names.get(image_id, image_id) != own or self._key(own) != (place, box)):
                what = f"{short(image_id)} occurs twice, with another picture: one id, one picture"
                raise wrong(where(row), "image_id", what)
            if image_id != own:
                self.names[image_id] = own
            elif not is_taken:
                self.places[own] = place
                if box:
                    self.boxes[own] = box
            self.rows_of.setdefault(own, []).append(rows[row] if rows else row)
            if captions and (texts := [line for text in captions[row] if (line := one_line(strip_html(text)))]):
                self.captions[own] = tuple(dict.fromkeys([*self.captions.get(own, ()), *texts]))
            for role, known in (("category", categories), ("title", self.titles)):
                text = columns[role][row] if role in columns else ""
                if role == "title":
                    text = one_line(strip_html(text))
                if text.strip():
                    known.setdefault(own, text)
        self.image_rows += len(ids)

    def _key(self, image_id: str) -> tuple[Place, Box | None]:
        return self.places[image_id], self.boxes.get(image_id)

    def add_captions(self, path: Path) -> None:
        """Add captions of a file to pictures of a folder. Raises ``InputError`` in strict mode if some are of none."""
        found, lost = match_captions(path, load_captions(path, self.settings), self.places)
        self.captions.update(found)
        if lost:
            what = f"{path} describes {len(lost)} images that are not there, such as {short(lost[0])}"
            if self.settings.strict:
                raise InputError(f"{what}: take these lines out, or add the pictures")
            self.notes.append(what)


def read_contents(place: Path | str, settings: TableSettings | None = None) -> Contents:
    """The pictures of a folder, a table or a hub name. Raises ``InputError`` that names the file and the row."""
    path, how = Path(place), settings or TableSettings()
    if str(place).startswith(HUB):
        from huggingface_hub.constants import HF_HUB_CACHE

        return _of_rows(Rows(str(place)), Path(HF_HUB_CACHE), how)
    if how.table:
        if not (listed := sorted(file for file in path.glob(how.table) if file.is_file())):
            raise InputError(f"{path}: there is no table {how.table} below it")
        return _of_tables(path, listed, how)
    table = find_table(path, "catalogue") if path.is_dir() else path
    if table is None:
        if any((path / name).is_file() for name in SAVED):
            return _of_rows(Rows(str(path)), path, how)
        folders = [path, *sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink())]
        listed = [found for folder in folders if (found := find_table(folder, "metadata", SUFFIXES[:4]))]
        return _of_tables(path, listed, how) if listed and not how.captions else _of_folder(path, how)
    suffix = table_suffix(table)
    if suffix == ".tar" or (suffix == ".parquet" and holds_images(table, IMAGES)):
        return _of_rows(Rows(str(table), [table]), table.parent, how)
    return _of_tables(table.parent, [table], how)


def _of_folder(root: Path, settings: TableSettings) -> Contents:
    found = walk(root)
    if found.data and not found.ids:
        return _of_rows(Rows(str(root), [root / name for name in found.data]), root, settings)
    places: dict[str, Place] = {image_id: image_id for image_id in found.ids}
    contents = Contents(root, places, texts=found.has_texts, settings=settings)
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
    path = root / settings.captions if settings.captions else find_table(root, "captions")
    if path is not None:
        contents.add_captions(path)
    if found.others:
        contents.notes.append(f"{found.others.total()} files are passed over: {found.describe_others()}")
    return contents


def _of_tables(root: Path, tables: Sequence[Path], settings: TableSettings) -> Contents:
    """Tables of paths, each relative to the folder of its table, or to the root if they were named by ``table``."""
    contents, before = Contents(root, tables=list(tables), settings=settings), 0
    for path in tables:
        folder = root if settings.table else path.parent
        read = read_picture_rows(load_table(path, {**ROLES, **BOX_ROLES}, settings), folder)
        contents.notes += read.notes if read.rows else [f"{path}: no row names an image", *read.notes]
        prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        below = [f"{prefix}{place}" for place in read.paths]
        ids = _ids_of_known(contents, below, read) if read.is_known and read.ids else read.ids
        contents.add(ids or below, below, read.columns, read.where, read.captions, [before + row for row in read.rows])
        if not ids and not prefix:  # what a row calls a picture is a name of it too
            for image_id, name in zip(below, read.named, strict=True):
                if name not in contents.places and safe_name(name):
                    contents.names.setdefault(name, contents.names.get(image_id, image_id))
        refuse_links(folder, read.paths, "image", read.where)
        before += read.count
    return contents


def _ids_of_known(contents: Contents, places: Sequence[str], read: PictureRows) -> list[str]:
    """Ids of a known shape, where several pictures may share one: further ones get a number behind it."""
    seen: dict[str, list[str]] = {}
    made = []
    for image_id, place in zip(read.ids, places, strict=True):
        own = seen.setdefault(image_id, [])
        if place not in own:
            own.append(place)
        number = own.index(place) + 1
        made.append(image_id if number == 1 else f"{image_id}/{number}")
    if several := [image_id for image_id, own in seen.items() if len(own) > 1]:
        what = f"{len(several)} ids name several pictures, which are called {several[0]}, {several[0]}/2 and so on"
        contents.notes.append(f"{read.path}: {what}")
    return made


def _of_rows(rows: Rows, root: Path, settings: TableSettings) -> Contents:
    """Images that are stored in a table, or at the paths that it gives."""
    named = {
        role: rows.find(settings.names_of(role, names), settings.is_given(role))
        for role, names in ROLES_OF_ROWS.items()
        if role not in ("image", "caption")
    }
    columns = {role: rows.texts(column) for role, column in named.items() if column}
    captions = rows.captions(settings.names_of("caption", ROLES_OF_ROWS["caption"]), settings.is_given("caption"))
    stored = [column for column in rows.data.column_names if rows.is_image(column)]
    known = [column for column in stored if column.strip().lower() in settings.names_of("image", IMAGES)]
    listed = rows.find(settings.names_of("image", ROLES["image"]))
    if not known and not listed and len(stored) != 1:
        rows.find(settings.names_of("image", IMAGES), needed=True)
    contents, paths = Contents(root, rows=rows, settings=settings), [""] * len(rows)
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
    if "id" not in columns and len(set(zip(ids, places, strict=True))) > len(set(ids)):
        contents.notes.append(f"{rows.place}: paths of images occur twice: ids are splits and rows instead")
        ids = [rows.row_id(row) for row in range(len(rows))]
    contents.add(ids, places, columns, rows.name, captions)
    return contents


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


def one_line(text: str) -> str:
    """The words of a text, with one space between them."""
    return " ".join(text.split())
