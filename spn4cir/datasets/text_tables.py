"""CSV and TSV tables as programs really export them: their encoding, separator, quotes and rows, one line at a time."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TextIO

from spn4cir.errors import InputError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CELL_LIMIT = 1 << 27  # characters
CLOSE = "close the quote, or write it twice"
_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{1,3}")


def table_suffix(path: Path) -> str:
    """The suffix that says the format, in lower case; that of ``x.csv.gz`` is ``.csv``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, unpacked if its name ends in .gz."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def find_encoding(path: Path, given: str | None = None) -> str:
    """Return the encoding of a text file: the given one, or UTF-8, UTF-16 or cp1252, the first that it can be.

    Raises ``InputError`` if it can be none of these, if it is cut short within a letter, or if Python does not know
    the given one.
    """
    try:
        if given:
            return codecs.lookup(given).name
        with open_bytes(path) as file:
            head = file.read(4096)
            if bom := next((bom for bom in BOMS if head.startswith(bom)), None):
                return BOMS[bom]
            zeros = head[::2].count(0), head[1::2].count(0)
            if max(zeros) > len(head) / 8:  # more than a quarter of one half
                return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
            if sum(zeros):
                line = head[: head.index(b"\0")].count(b"\n") + 1
                raise InputError(f"{path}, line {line}: holds a byte of zero, which no text has")
            file.seek(0)
            return _utf8_or_cp1252(path, file)
    except LookupError:
        raise InputError(
            f"{path}: Python knows no encoding {given!r}: give one such as utf-8, cp1252 or gb18030"
        ) from None


def _utf8_or_cp1252(path: Path, file: BinaryIO) -> str:
    utf8, cp1252 = codecs.getincrementaldecoder("utf-8")(), codecs.getincrementaldecoder("cp1252")()
    failed, foreign, lines = False, False, 1  # whether the file is no UTF-8; whether it holds letters of UTF-8
    while part := file.read(1 << 20):
        if not failed:
            try:
                foreign |= not utf8.decode(part).isascii()
                lines += part.count(b"\n")
                continue
            except UnicodeDecodeError as error:
                failed, before = True, error.object[: error.start]
                if foreign or not before.isascii():
                    line = lines + before.count(b"\n")
                    what = "is no UTF-8, and letters before it are: save all of the file in one encoding"
                    raise InputError(f"{path}, line {line} {what}, or name it, such as encoding=gb18030") from None
                file.seek(0)
                continue
        try:
            cp1252.decode(part)
        except UnicodeDecodeError:
            break
    else:
        if failed:
            return "cp1252"
        try:
            utf8.decode(b"", final=True)
            return "utf-8"
        except UnicodeDecodeError:
            raise InputError(f"{path} is cut short within a letter of UTF-8: fetch it again") from None
    what = "is neither UTF-8, UTF-16 nor cp1252"
    raise InputError(f"{path} {what}: save it as UTF-8, or name its encoding, such as encoding=gb18030")


class _Lines:
    """The lines of a text, as ``csv.reader`` takes them, with those of the current record, which can be given back."""

    def __init__(self, file: TextIO):
        self._file, self._waiting, self.taken, self.number = file, deque[str](), list[str](), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._file)
        self.taken.append(line)
        self.number += 1
        return line

    def give_back(self) -> str:
        """Keep the first line of the record only; the others are read again."""
        first, *others = self.taken
        self._waiting.extendleft(reversed(others))
        self.number -= len(others)
        self.taken = [first]
        return first


class TextTable:
    """The head line of a table, and its rows as an iterator.

    A quote that is never closed, or that swallows lines which hold rows of their own, is read as a letter; in strict
    mode it is an error instead. Raises ``InputError`` that names the file and the line.

    Args:
        path: a file of CSV or TSV, or either with .gz.
        find_keys: head line → positions of the columns that a row must fill to hold an image; empty if there are none.
            The separator is the one with which it finds some.
        strict: whether a doubtful line is an error.
        encoding: of the file; None finds it.

    Attributes:
        join_last: whether separators too many belong to the text in the last column.
        complete: whether rows with fewer fields than the head line are an error.
        allow_short: whether rows with fewer fields than the head line are no error in strict mode.
    """

    def __init__(
        self,
        path: Path,
        find_keys: Callable[[Sequence[str]], Sequence[int]],
        strict: bool = False,
        encoding: str | None = None,
    ):
        self.path, self._strict, self.join_last, self.complete, self.allow_short = path, strict, False, False, False
        self.encoding = find_encoding(path, encoding)
        self.notes = list[str]()
        if self.encoding not in ("utf-8", "utf-8-sig") and not encoding:
            name = self.encoding if self.encoding == "cp1252" else "UTF-16"
            what = "if letters are wrong, save it as UTF-8, or name its encoding, such as ?encoding=gb18030"
            self.notes.append(f"{path} is read as {name}; {what}")
        self._kinds = set[str]()  # of the cells of the key columns so far
        self._repaired = list[int]()
        self._find_head(find_keys)

    def _find_head(self, find_keys: Callable[[Sequence[str]], Sequence[int]]) -> None:
        with self._open() as file:
            line, self._skip = file.readline(CELL_LIMIT), 0
            if declared := re.fullmatch(r"sep=(.)\s*", line):  # as Excel writes it
                line, self._skip = file.readline(CELL_LIMIT), 1
            while line and not line.strip():
                line, self._skip = file.readline(CELL_LIMIT), self._skip + 1
        usual = "\t" if table_suffix(self.path) == ".tsv" else ","
        separators = [declared[1]] if declared else [usual, *(s for s in SEPARATORS if s != usual)]
        heads = {s: [name.strip() for name in _split(line, s)] for s in separators}
        found = next((s for s in separators if find_keys(heads[s])), None)
        self.separator = found or max(separators, key=lambda s: len(heads[s]))
        self.names = heads[self.separator]
        self._keys = find_keys(self.names)
        self._mark = SEPARATORS.get(self.separator, "separators")

    def _open(self) -> TextIO:
        return io.TextIOWrapper(open_bytes(self.path), encoding=self.encoding, newline="")

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """The number of the line that each row begins on, from 1 on, and as many texts as there are columns."""
        csv.field_size_limit(CELL_LIMIT)
        with self._open() as file:
            lines = _Lines(file)
            for _ in range(self._skip + 1):
                next(lines, None)
            reader = self._reader(lines)
            while True:
                lines.taken = []
                try:
                    fields: list[str] | None = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    fields = None
                    if not lines.taken or "limit" in str(error):
                        raise InputError(f"{self.path}, line {lines.number}: {error}") from None
                start = lines.number - len(lines.taken) + 1
                swallows = len(lines.taken) > 1 and self._find_swallowed(lines.taken) is not None
                if fields is None or (swallows and not self._breaks_a_name(fields)):
                    fields = self._read_literally(lines, start)
                    reader = self._reader(lines)
                elif self._strict and len(lines.taken) > 1:
                    self._refuse_doubtful(lines.taken, fields, start)
                if any(field.strip() for field in fields):
                    yield start, self._fit(fields, start)
        if self._repaired:
            more = f", and so do {len(self._repaired) - 1} more lines" if self._repaired[1:] else ""
            what = f"opens a quote that swallows rows{more}; it is read as a letter: {CLOSE}"
            self.notes.append(f"{self.path}, line {self._repaired[0]} {what}")

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self.separator, strict=True)

    def _find_swallowed(self, taken: Sequence[str]) -> int | None:
        """Which line of a record, after its first, holds an image of its own."""
        first = self._kind(_split(taken[0], self.separator, quoted=False))
        return next((n for n, line in enumerate(taken) if n and self._holds_image(line, first)), None)

    def _breaks_a_name(self, fields: Sequence[str]) -> bool:
        """Whether it is names of pictures that hold line ends, and nothing of other columns."""
        broken = [place for place, field in enumerate(fields) if "\n" in field or "\r" in field]
        own = all(place in self._keys and self.separator not in fields[place] for place in broken)
        return own and len(fields) == len(self.names)

    def _is_usual(self, fields: Sequence[str]) -> bool:
        """Whether a row names a file by a suffix that rows before it name files by."""
        kind = self._kind(fields)
        return "." in kind and kind in self._kinds

    def _refuse_doubtful(self, taken: Sequence[str], fields: Sequence[str], start: int) -> None:
        """Raise ``InputError`` for a record of several lines that name more pictures than the record does."""
        kinds = {*self._kinds, self._kind(fields)}
        if any("." in kind for kind in kinds):
            named = [sum(_kind_of_cell(f.strip(' "')) in kinds for f in fields)]
            named += [sum(_kind_of_cell(f.strip(' "')) in kinds for f in line.split(self.separator)) for line in taken]
            is_doubtful = sum(named[1:]) > named[0]
        else:
            split = [_split(line, self.separator, quoted=False) for line in taken[1:]]
            is_doubtful = any(len(one) > 1 and self._kind(one) in kinds - {"", "text"} for one in split)
        if is_doubtful:
            what = (
                f"a quote is opened, and the lines up to {start + len(taken) - 1} in it name more images than one row"
            )
            raise InputError(f"{self.path}, line {start}: {what}: {CLOSE}")

    def _holds_image(self, line: str, first: str) -> bool:
        fields = _split(line, self.separator, quoted=False)
        kind = self._kind(fields)
        if not kind or kind not in {*self._kinds, first} or len(fields) < min(2, len(self.names)):
            return False
        return len(fields) >= len(self.names) or "." in kind

    def _kind(self, fields: Sequence[str]) -> str:
        """What stands in the key columns: suffixes of files, numbers, words; empty if one of them is."""
        if any(place >= len(fields) for place in self._keys):
            return ""
        cells = [fields[place].strip().strip('"').strip() for place in self._keys]
        return " ".join(map(_kind_of_cell, cells)) if all(cells) else ""

    def _read_literally(self, lines: _Lines, start: int) -> list[str]:
        """The first line of a record, its quotes as letters. Raises ``InputError`` where that is no row either."""
        swallowed = self._find_swallowed(lines.taken)
        if swallowed is not None:
            line = start + swallowed
            if self._strict:
                what = f"a quote is opened, and line {line}, which holds an image, stands inside it"
                raise InputError(f"{self.path}, line {start}: {what}: {CLOSE}")
            self._repaired.append(start)
        first = lines.give_back()
        fields = _split(first, self.separator, quoted=False)
        if len(fields) != len(self.names):
            loosely = _split(first, self.separator)
            fields = loosely if len(loosely) == len(self.names) or len(loosely) > 1 == len(fields) else fields
        is_torn = swallowed is None and (first.count('"') % 2 == 1)
        if is_torn and (len(fields) != len(self.names) or not first.endswith(("\n", "\r"))):
            what = "a quote is opened and not closed, or text follows it"
            raise InputError(f"{self.path}, line {start}: {what}: the file is cut short, or {CLOSE}")
        return [_unquote(field) for field in fields]

    def _fit(self, fields: list[str], line: int) -> list[str]:
        """As many fields as the head line has. Raises ``InputError`` if there are more, or a key is cut off."""
        count = len(self.names)
        if len(fields) > count:
            if not self.join_last:
                what = f"rows have more fields than the head line: texts with {self._mark} need quotes"
                raise InputError(
                    f"{self.path}, line {line}: {what}, or give join_last=true if they are in the last column"
                )
            if self._strict and self._kind(fields) not in (self._kinds or {self._kind(fields)}):
                what = "has more fields than the head line, and names no image as other lines do"
                raise InputError(
                    f"{self.path}, line {line} {what}: texts with {SEPARATORS[self.separator]} need quotes"
                )
            fields = [*fields[: count - 1], self.separator.join(fields[count - 1 :])]
        if self.complete and len(fields) < count:
            what = f"{len(fields)} of {count} fields: the file is cut short, or a field is missing"
            raise InputError(f"{self.path}, line {line}: {what}")
        if self._strict and len(fields) < count and not self.allow_short and not self._is_usual(fields):
            what = f"has {len(fields)} of the {count} fields of the head line, and names no image as other lines do"
            raise InputError(f"{self.path}, line {line} {what}: complete it, or leave strict out")
        if self.separator == "|":
            fields = [field.strip() for field in fields]
        fields = [*fields, *[""] * (count - len(fields))]
        if kind := self._kind(fields):
            self._kinds.add(kind)
        return fields


def _kind_of_cell(cell: str) -> str:
    if " " not in cell and (found := _SUFFIX.fullmatch(PurePosixPath(cell.partition("?")[0]).suffix.lower())):
        return found[0]
    return "number" if cell.isdigit() else "word" if not any(letter.isspace() for letter in cell) else "text"


def _split(line: str, separator: str, quoted: bool = True) -> list[str]:
    """The fields of one line, whose quotes mean something or not."""
    line = line.rstrip("\r\n")
    if not quoted:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return line.split(separator)


def _unquote(field: str) -> str:
    """A field without the quotes around it, if there are none inside."""
    inner = field[1:-1]
    return inner if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "") else field


def read_errors(path: Path, error: Exception) -> InputError:
    """The error to raise where a file cannot be opened, unpacked or decoded."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing")
    what = (
        "is cut short, or no gzip" if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile) else "cannot be read"
    )
    return InputError(f"{path} {what} as a table: {' '.join(str(error).split())[:200]}")
