"""CSV, TSV, JSONL and Parquet tables, read as columns of texts. Every error names the file and the row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spn4cir.errors import InputError
from spn4cir.files import parse_row, short

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
BOXES = ("box", "bbox")  # columns that may hold lists of numbers


def find_table(folder: Path, stem: str) -> Path | None:
    """The table of that name in a folder, whatever its format; of several, the first by ``SUFFIXES``."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)


def read_table(path: Path, roles: Mapping[str, Sequence[str]], needed: Sequence[str]) -> dict[str, list[str]]:
    """Return role → one text for each row; an empty cell is an empty text, and a role without a column has no entry.

    Raises ``InputError`` if the file cannot be read, a needed column is missing, or a cell holds no text.

    Args:
        path: the table; its suffix says the format.
        roles: role → names that its column may have, the first that is there counts; case does not matter.
        needed: roles that must be there.
    """
    frame = _frame(path)
    columns = {role: find_column(path, list(frame.columns), names, role in needed) for role, names in roles.items()}
    return {
        role: [_text(path, row, column, cell) for row, cell in enumerate(frame[column].tolist(), 1)]
        for role, column in columns.items()
        if column is not None
    }


def read_other_columns(path: Path, roles: Mapping[str, Sequence[str]]) -> pyarrow.Table:
    """The columns of a table that have none of these roles, in the types that they are stored in."""
    import pyarrow as pa

    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
        used = {find_column(path, table.column_names, names) for names in roles.values()}
        return table.select([name for name in table.column_names if name not in used])
    frame = _frame(path)
    used = {find_column(path, list(frame.columns), names) for names in roles.values()}
    columns = {}
    for name in (name for name in frame.columns if name not in used):
        try:
            columns[str(name)] = pa.array(frame[name], from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # a column of several types
            columns[str(name)] = pa.array(frame[name].astype(str))
    return pa.table(columns)


def find_column(place: object, columns: Sequence[T], names: Sequence[str], needed: bool = False) -> T | None:
    """The first of these columns that is there, in any case, or None. Raises ``InputError`` if a needed one is not."""
    known = {str(column).strip().lower(): column for column in reversed(columns)}
    found = next((known[name] for name in names if name in known), None)
    if found is None and needed:
        there = ", ".join(map(str, columns)) or "none"
        raise InputError(f"{place}: one column must be called {' or '.join(names)}; there are: {there:.200}")
    return found


def _frame(path: Path) -> Any:
    """The table as pandas reads it, nothing guessed: what looks like a number or like nothing stays a text."""
    import pandas

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is no table: known are {', '.join(SUFFIXES)}")
    try:
        if suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                rows = [parse_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
            return pandas.DataFrame(rows, dtype=object)
        if suffix == ".parquet":
            return pandas.read_parquet(path)
        separator = "," if suffix == ".csv" else "\t"
        frame = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if len(frame) and not isinstance(frame.index, pandas.RangeIndex):
            # the first row has more fields than the head line has: pandas made names of rows of them
            raise _too_many(path, "")
        return frame
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:  # the readers' own errors are of these two kinds
        if found := re.search(r"in (line \d+), saw \d+", str(error)):  # more fields than in the rows before it
            raise _too_many(path, f", {found[1]}") from None
        raise InputError(f"{path} cannot be read as a table: {' '.join(str(error).split())[:200]}") from None


def _too_many(path: Path, where: str) -> InputError:
    mark = "commas" if path.suffix.lower() == ".csv" else "tabs"
    return InputError(f"{path}{where}: rows have more fields than the head line: texts with {mark} need quotes")


def _text(path: Path, row: int, column: object, cell: object) -> str:
    if isinstance(cell, str):
        return cell
    if str(column).strip().lower() in BOXES and isinstance(cell, Iterable):  # a list, or an array
        return " ".join(map(str, cell))
    if cell is None or cell != cell:  # pandas' empty cell is not equal to itself
        return ""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    raise InputError(f"{path}, row {row}, column {str(column)!r}: expected a text, got {short(cell)}")
