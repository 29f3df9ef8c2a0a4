"""CSV, TSV, JSON, JSONL and Parquet tables, read as columns of texts. Every error names the file and the row."""

from __future__ import annotations

import ast
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from spn4cir.datasets.json_tables import read_json_rows
from spn4cir.datasets.table_settings import TableSettings, fill_template, known_shape
from spn4cir.datasets.text_tables import TextTable, read_errors, table_suffix
from spn4cir.errors import InputError
from spn4cir.files import short

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")
Roles: TypeAlias = Mapping[str, Sequence[str]]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".json")
BOXES = ("box", "bbox")  # columns that may hold lists of numbers
KEYS = ("image", "reference", "target", "targets")  # roles that name images
ENGLISH = "en"  # of texts in several languages, those whose tag begins so are read


def find_table(folder: Path, stem: str, suffixes: Sequence[str] = SUFFIXES) -> Path | None:
    """The table of that name in a folder, whatever its format; of several, the first by suffix, unpacked ones first."""
    names = [f"{stem}{suffix}{packed}" for packed in ("", ".gz") for suffix in suffixes]
    return next((path for name in names if (path := folder / name).is_file()), None)


@dataclass
class Table:
    """A table in memory: cells by column, as they are stored.

    Args:
        path: the file.
        cells: column → one value for each row.
        settings: how to read it; of a known shape, what that says.
        shape: name of the known shape, or empty.
        notes: what a person should know about how it was read.
    """

    path: Path
    cells: Mapping[str, Sequence[Any]]
    settings: TableSettings = field(default_factory=TableSettings)
    shape: str = ""
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.cells.values()), ()))

    def find(self, role: str, names: Sequence[str], needed: bool = False) -> str | None:
        """The column of a role. Raises ``InputError`` if it is needed, or was named, and is not there."""
        named = self.settings.names_of(role, names)
        if needed and not self.settings.is_given(role) and find_column(self.path, list(self.cells), named) is None:
            there = ", ".join(map(str, self.cells)) or "none"
            what = f"one column must be called {' or '.join(named)}; there are: {there:.200}"
            raise InputError(f"{self.path}: {what}; say which by '{self.path.name}?{role}=COLUMN'")
        return find_column(self.path, list(self.cells), named, needed or self.settings.is_given(role))

    def find_several(self, role: str, names: Sequence[str]) -> list[str]:
        """The columns of a role: all that were named, else the one that is there. Raises ``InputError`` as ``find``."""
        given: str | None = getattr(self.settings, role, None)
        if role == "image" and self.settings.template:
            return []
        if given is None or (found := find_column(self.path, list(self.cells), (given.strip().lower(),))):
            return [column] if (column := found if given else self.find(role, names)) is not None else []
        return [
            column
            for name in given.split("|")
            if (column := find_column(self.path, list(self.cells), (name.strip().lower(),), not self.shape))
        ]

    def texts(self, column: str) -> list[tuple[str, ...]]:
        """All texts in each cell of a column, none of which is empty. Raises ``InputError`` for other values."""
        read = partial(cell_texts, self.path)
        return [read(row, column, cell) for row, cell in enumerate(self.cells[column], 1)]

    def text(self, column: str) -> list[str]:
        """One text for each row, as it is written: the first of several, empty for none."""
        if column.strip().lower() in BOXES:
            return [_numbers(self.path, row, column, cell) for row, cell in enumerate(self.cells[column], 1)]
        return [
            cell if isinstance(cell, str) else next(iter(cell_texts(self.path, row, column, cell)), "")
            for row, cell in enumerate(self.cells[column], 1)
        ]

    def fill(self, template: str) -> list[str]:
        """A path for each row, by a template; empty for a row that lacks one of its cells."""
        known: dict[str, list[str]] = {}

        def cells_of(name: str) -> list[str]:
            if name not in known:
                column = find_column(self.path, list(self.cells), (name.lower(),), needed=True)
                known[name] = self.text(column) if column is not None else []
            return known[name]

        def path(row: int) -> str:
            is_empty = False

            def cell(name: str) -> str:
                nonlocal is_empty
                is_empty |= not (value := cells_of(name)[row].strip())
                return value

            filled = fill_template(template, cell)
            return "" if is_empty else filled

        return [path(row) for row in range(len(self))]

    def select(self, names: Sequence[str]) -> pyarrow.Table:
        """Some columns, in the types that they are stored in; a column of several types as texts."""
        import pyarrow as pa

        columns = {}
        for name in names:
            try:
                columns[name] = pa.array(self.cells[name])
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                columns[name] = pa.array([None if cell is None else str(cell) for cell in self.cells[name]])
        return pa.table(columns)


def load_table(path: Path, roles: Roles, settings: TableSettings | None = None) -> Table:
    """Read a table, whose format its suffix says; with .gz behind it, it is unpacked.

    Raises ``InputError`` that names the file, and the line where it can, if it cannot be read.

    Args:
        path: the table.
        roles: role → names that its column may have; those of ``KEYS`` tell where a row begins.
        settings: which columns mean what, and how to read; None leaves it to the names of the columns.
    """
    given = settings or TableSettings()
    suffix = table_suffix(path)
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is no table: known are {', '.join(SUFFIXES)}, also with .gz behind it")

    def effective(names: Sequence[str]) -> tuple[str, TableSettings]:
        if "image" not in roles:
            return "", given
        shape, known = known_shape(names, given)
        plain = find_column(path, names, roles["image"])  # a column that people have added is meant
        return (shape, known) if plain is None or known.image == plain else ("", given)

    try:
        cells, notes = _READERS.get(suffix, _read_text)(path, given, roles, effective)
    except (OSError, ValueError, EOFError, zlib.error) as error:  # InputError is a ValueError
        raise error if isinstance(error, InputError) else read_errors(path, error) from None
    shape, chosen = effective(list(cells))
    return Table(path, cells, chosen, shape, notes)


Effective: TypeAlias = Callable[[Sequence[str]], tuple[str, TableSettings]]
Cells: TypeAlias = dict[str, Sequence[Any]]


def open_text(path: Path, given: TableSettings, roles: Roles, effective: Effective) -> tuple[TextTable, list[str]]:
    """Open a text table; and return names of its columns, each once, empty for a column without a name."""

    def find_keys(names: Sequence[str]) -> list[int]:
        settings = effective(names)[1]
        wanted = [settings.names_of(role, roles[role]) for role in KEYS if role in roles and role != "image"]
        wanted += settings.key_names(roles["image"]) if "image" in roles else []
        found = [find_column(path, names, one) for one in wanted]
        return [names.index(name) for name in found if name is not None] if None not in found else []

    opened, names = TextTable(path, find_keys, given.strict, given.encoding), list[str]()
    opened.join_last = given.join_last or effective(opened.names)[1].join_last
    opened.complete = given.complete
    for name in opened.names:
        copies = sum(before == name or before.startswith(f"{name}.") for before in names)
        names.append(f"{name}.{copies}" if name and name in names else name)
    if twice := next((name for name in opened.names if name and opened.names.count(name) > 1), None):
        opened.notes.append(f"{path}: the column {twice!r} occurs twice; the second is called '{twice}.1'")
    return opened, names


def _read_text(path: Path, given: TableSettings, roles: Roles, effective: Effective) -> tuple[Cells, list[str]]:
    opened, names = open_text(path, given, roles, effective)
    rows = [fields for _, fields in opened.rows()]
    return {name: [row[place] for row in rows] for place, name in enumerate(names) if name}, opened.notes


def stream_text(
    path: Path, roles: Roles, settings: TableSettings
) -> tuple[list[str], Iterator[dict[str, str]], list[str]]:
    """Names of the columns of a text table, its rows one at a time, and notes; errors as of ``load_table``."""
    try:
        strict = replace(settings, strict=True)  # as notes on rows are made when it is too late to read them
        opened, names = open_text(path, strict, roles, lambda there: ("", strict))
        opened.allow_short = not settings.strict
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise error if isinstance(error, InputError) else read_errors(path, error) from None

    def rows() -> Iterator[dict[str, str]]:
        try:
            for _, fields in opened.rows():
                yield {name: text for name, text in zip(names, fields, strict=True) if name}
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise error if isinstance(error, InputError) else read_errors(path, error) from None

    return [name for name in names if name], rows(), opened.notes


def _read_json(path: Path, given: TableSettings, roles: Roles, effective: Effective) -> tuple[Cells, list[str]]:
    rows = read_json_rows(path, given.encoding)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}, []


class _Lazy(Mapping[str, Sequence[Any]]):
    """Columns of an Arrow table as lists, each made when it is asked for."""

    def __init__(self, path: Path, table: pyarrow.Table):
        self._path, self._table = path, table

    def __getitem__(self, name: str) -> Sequence[Any]:
        if name not in self._table.column_names:
            raise KeyError(name)
        try:
            return self._table.column(name).to_pylist()  # type: ignore[no-any-return]
        except ValueError as error:  # bytes that are no UTF-8
            raise InputError(f"{self._path}, column {name!r} is damaged: {error}: fetch the file again") from None

    def __iter__(self) -> Any:
        return iter(self._table.column_names)

    def __len__(self) -> int:
        return int(self._table.num_columns)


def _read_parquet(path: Path, given: TableSettings, roles: Roles, effective: Effective) -> tuple[Any, list[str]]:
    from pyarrow import parquet

    return _Lazy(path, parquet.ParquetFile(path).read()), []


_READERS = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}


def read_table(
    path: Path, roles: Roles, needed: Sequence[str], settings: TableSettings | None = None
) -> dict[str, list[str]]:
    """Return role → one text for each row; an empty cell is an empty text, and a role without a column has no entry.

    Raises ``InputError`` if the file cannot be read, a needed column is missing, or a cell holds no text.

    Args:
        path: the table; its suffix says the format.
        roles: role → names that its column may have, the first that is there counts; case does not matter.
        needed: roles that must be there.
        settings: as for ``load_table``.
    """
    table = load_table(path, roles, settings)
    columns = {role: table.find(role, names, role in needed) for role, names in roles.items()}
    return {role: table.text(column) for role, column in columns.items() if column is not None}


def find_column(place: object, columns: Sequence[T], names: Sequence[str], needed: bool = False) -> T | None:
    """The first of these columns that is there, in any case, or None. Raises ``InputError`` if a needed one is not."""
    known = {str(column).strip().lower(): column for column in reversed(columns)}
    found = next((known[name] for name in names if name in known), None)
    if found is None and needed:
        there = ", ".join(map(str, columns)) or "none"
        raise InputError(f"{place}: one column must be called {' or '.join(names)}; there are: {there:.200}")
    return found


def cell_texts(path: Path, row: int, column: object, cell: Any) -> tuple[str, ...]:
    """The texts that a cell holds, in order; of texts in several languages the English ones, if there are any.

    Raises ``InputError`` for a cell that holds anything else.
    """
    if isinstance(cell, str):
        return _listed(cell) if cell[:1] + cell[-1:] == "[]" else (cell,) if cell.strip() else ()
    if cell is None or (isinstance(cell, float) and cell != cell):
        return ()
    if isinstance(cell, int) and not isinstance(cell, bool):
        return (str(cell),)
    if isinstance(cell, Mapping) and isinstance(cell.get("value"), str | int):
        return cell_texts(path, row, column, cell["value"])
    if isinstance(cell, Iterable) and not isinstance(cell, bytes | Mapping):
        parts = list(cell)
        english = [part for part in parts if isinstance(part, Mapping) and _is_english(part)]
        return tuple(text for part in english or parts for text in cell_texts(path, row, column, part))
    raise InputError(f"{path}, row {row}, column {str(column)!r}: expected a text, got {short(_shown(cell))}")


def _listed(cell: str) -> tuple[str, ...]:
    """The texts of a list that is written as JSON or Python writes one; of anything else the cell itself."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(cell)
            if isinstance(found, list) and all(isinstance(text, str) for text in found):
                return tuple(text for text in found if text.strip())
    return (cell,)


def _is_english(part: Mapping[str, Any]) -> bool:
    return str(part.get("language_tag", "")).lower().startswith(ENGLISH)


def _shown(cell: Any) -> Any:
    return f"{len(cell)} bytes" if isinstance(cell, bytes) else cell


def _numbers(path: Path, row: int, column: str, cell: Any) -> str:
    if isinstance(cell, Iterable) and not isinstance(cell, str | bytes | Mapping):  # a list, or an array
        return " ".join(map(str, cell))
    return next(iter(cell_texts(path, row, column, cell)), "")
