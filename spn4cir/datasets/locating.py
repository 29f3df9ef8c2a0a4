"""Which picture a cell of a table means: a path, the end of a path, an id, or an address on the web."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from spn4cir.datasets.pictures import safe_name, stray_links, walk
from spn4cir.datasets.reading import inner_path
from spn4cir.datasets.tables import read_table
from spn4cir.datasets.text_tables import table_suffix
from spn4cir.errors import InputError
from spn4cir.files import short

NameRow: TypeAlias = Callable[[int], str]
ADDRESS = re.compile(r"(?:https?|s3|gs|ftp)://|//[\w.-]+/", re.IGNORECASE)
SEVERAL = re.compile(r"\s*[,;|\s]\s*(?=(?:https?:)?//)")  # between addresses in one cell
TRIED = 32  # rows whose paths are looked at before the whole folder is listed
MAPS = ("images", "images/images", "images/metadata/images", "metadata/images")  # tables of image_id and path
FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}  # of img2dataset


class PictureFinder:
    """The pictures below a folder, by their paths and by the ends of their paths.

    The folder is listed only if some of the first cells are no paths of pictures.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def _paths(self) -> dict[str, list[str]]:
        """Name of a file, and name without suffix, both in lower case → paths below the folder."""
        found: dict[str, list[str]] = {}
        for path in walk(self.folder).ids:
            name = PurePosixPath(path.lower())
            for key in {name.name, name.stem}:
                found.setdefault(key, []).append(path)
        return found

    @cached_property
    def _map(self) -> dict[str, str]:
        """Image id → path, as a table beside the pictures says it."""
        files = (self.folder / f"{name}{suffix}" for name in MAPS for suffix in (".csv", ".csv.gz"))
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            return {}
        roles = {"id": ("image_id",), "image": ("path", "file_name")}
        with suppress(InputError):
            columns = read_table(path, roles, tuple(roles))
            return dict(zip(columns["id"], columns["image"], strict=True))
        return {}

    def find(self, values: Sequence[str], column: str, where: NameRow) -> tuple[list[str], int]:
        """The path below the folder of each cell, and how many addresses of no picture there are.

        A cell that means no picture keeps the path that it gives, whose picture is missing. Raises ``InputError`` for a
        path that leaves the folder, and for a name of several pictures.
        """
        names = [_file_name(value) for value in values]
        is_address = [ADDRESS.match(value) is not None for value in values]
        _refuse_namesakes(names, values, is_address, column, where)
        paths = [inner(self.folder, where, row, column, name) for row, name in enumerate(names)]
        step = max(1, len(paths) // TRIED)
        if not any(is_address) and all((self.folder / path).is_file() for path in paths[::step]):
            return paths, 0
        missing, found = 0, []
        for row, path in enumerate(paths):
            place = self._find_one(path, column, where, row) or self._find_mapped(values[row], column, where, row)
            missing += is_address[row] and place is None
            found.append(path if place is None else place)
        return found, missing

    def _find_one(self, path: str, column: str, where: NameRow, row: int) -> str | None:
        lower = path.lower()
        candidates = self._paths.get(PurePosixPath(lower).name, [])
        if path in candidates:
            return path
        ends = [one for one in candidates if _ends(one, path)] or [
            one for one in candidates if _ends(one.lower(), lower)
        ]
        if len(ends) > 1:
            what = f"{short(path)} may be {short(ends[0])} or {short(ends[1])}"
            raise wrong(
                where(row), column, f"{what}: give paths, such as by image={PurePosixPath(ends[0]).parent}/{{{column}}}"
            )
        return ends[0] if ends else None

    def _find_mapped(self, value: str, column: str, where: NameRow, row: int) -> str | None:
        path = self._map.get(value.strip())
        if path is None:
            return None
        path = inner(self.folder, where, row, column, path)
        return self._find_one(path, column, where, row) or path


def _ends(path: str, end: str) -> bool:
    """Whether a path ends in another one, with or without the suffix."""
    return f"/{path}".endswith(f"/{end}") or f"/{path.rpartition('.')[0]}".endswith(f"/{end}")


def _refuse_namesakes(
    names: Sequence[str], values: Sequence[str], is_address: Sequence[bool], column: str, where: NameRow
) -> None:
    """Raise ``InputError`` for two addresses whose files have the same name, of which a folder holds one only."""
    seen: dict[str, str] = {}
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        if is_address[row] and seen.setdefault(name, urlsplit(value).path) != urlsplit(value).path:
            what = f"the files of {short(seen[name])} and {short(urlsplit(value).path)} have the same name"
            raise wrong(where(row), column, f"{what}: download the pictures by img2dataset, or give a column of paths")


def first_of_cell(value: str) -> tuple[str, int]:
    """The first of several addresses in a cell, and how many others there are."""
    value = value.strip()
    parts = SEVERAL.split(value) if ADDRESS.match(value) else [value]
    return parts[0], len(parts) - 1


def _file_name(value: str) -> str:
    """The name of the file at an address; any other path as it stands."""
    if not ADDRESS.match(value):
        return value
    return unquote(PurePosixPath(urlsplit(value).path).name) or "no name"


def refuse_addresses(path: Path, column: str, caption: str | None, folder: Path, example: str, row: str) -> InputError:
    """The error to raise about a table of addresses whose pictures lie nowhere."""
    how = f"img2dataset --url_list {shlex.quote(str(path))} --input_format {FORMATS[table_suffix(path)]}"
    how += f" --url_col {shlex.quote(column)}" + (f" --caption_col {shlex.quote(caption)}" if caption else "")
    what = f"{short(example)} is an address, and no picture below {folder} is called {_file_name(example)!a:.60}"
    then = f"download them by '{how} --output_format webdataset --output_folder OUT', and give --data-root OUT"
    return wrong(row, column, f"{what}: {then}")


def inner(folder: Path, where: NameRow, row: int, column: str, value: str) -> str:
    """A path below a folder, as a table gives it. Raises ``InputError`` that names the row."""
    with suppress(InputError):
        if safe_name(path := str(inner_path(folder, column, value))):
            return path
    told = f"{value!a:.60} is no path below {folder}, relative to it and without control characters"
    told += ": write / and no backslash" if "\\" in value else ""
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
