"""Tables that Hugging Face ``datasets`` opens without a script, memory-mapped: their columns, and the images in them.

Parquet, CSV, JSONL and tar files are converted once, into the cache of ``datasets``; a saved folder is read in place.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from glob import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spn4cir.datasets.table_settings import TableSettings
from spn4cir.datasets.tables import Roles, cell_texts, find_column, stream_text
from spn4cir.datasets.text_tables import table_suffix
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.images import StoredBytes
from spn4cir.types import ImageRef

if TYPE_CHECKING:
    import pyarrow

HUB = "hf:"  # before a name on the Hugging Face hub
SAVED = ("state.json", "dataset_dict.json")  # a folder that save_to_disk wrote holds one of these
READERS: Mapping[str, tuple[str, dict[str, str]]] = {
    ".parquet": ("parquet", {}),
    ".tar": ("webdataset", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
}
SPLITS = ("train", "validation", "test")
SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")


class Rows:
    """The rows of a table, one split after the other. Raises ``InputError`` if ``datasets`` cannot read it.

    Args:
        place: what messages call it: a file, a folder that ``save_to_disk`` wrote, or ``hf:`` and a hub name.
        files: the files of one format that it consists of; the first word train, validation or test in a path below
            the folder is the split, train if there is none. Empty for a saved folder and a hub name.
        roles, settings: of a single CSV or TSV table, as for ``tables.load_table``; a doubtful line is an error.
    """

    def __init__(
        self, place: str, files: Sequence[Path] = (), roles: Roles | None = None, settings: TableSettings | None = None
    ):
        self.place, self._read_from, self.notes = place, dict[str, Any](), list[str]()
        if files and table_suffix(files[0]) in (".csv", ".tsv"):
            self.data, self.notes = _read_texts(files[0], roles or {}, settings or TableSettings())
            splits: Mapping[str, Any] = {"train": self.data}
        else:
            splits, self.data = _open(place, files)
        self._splits = _starts({name: len(part) for name, part in splits.items()})
        counts = {f"{place}, {name}" if len(splits) > 1 else place: len(part) for name, part in splits.items()}
        if len(files) > 1 and files[0].suffix.lower() == ".parquet":
            from pyarrow import parquet

            ordered = sorted(files, key=lambda path: SPLITS.index(_split_of(path, place)))
            counts = {str(path): parquet.read_metadata(path).num_rows for path in ordered}
        self._parts = _starts(counts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read_from": {}}  # another process maps the files itself

    def __len__(self) -> int:
        return len(self.data)

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """A column as it lies on the disk."""
        return self.data.data.column(name)

    def find(self, names: Sequence[str], needed: bool = False) -> str | None:
        """The column that ``find_column`` finds."""
        return find_column(self.place, self.data.column_names, names, needed)

    def name(self, row: int) -> str:
        """What messages call a row: its file and its number in it, from 1 on; of a tar the name of the sample."""
        if "__url__" in self.data.column_names:
            return f"{self._cell('__url__', row)}, {self._cell('__key__', row)}"
        return "{}, row {}".format(*_locate(self._parts, row))

    def row_id(self, row: int) -> str:
        """The split and the number of a row in it, from 1 on."""
        return "{}/{}".format(*_locate(self._splits, row))

    def texts(self, name: str) -> list[str]:
        """A column as texts, those of a list joined by spaces, a null as an empty one. Else raises ``InputError``."""
        import pyarrow as pa

        kind, classes = self.column(name).type, getattr(self.data.features[name], "names", None)
        if pa.types.is_struct(kind) or self.is_image(name):
            raise InputError(f"{self.place}, column {name!r}: expected texts, got {short(str(kind))}")
        values = ([value] if not isinstance(value, list) else value for value in self.column(name).to_pylist())

        def as_text(part: Any) -> str:
            return str(part) if classes is None else classes[part] if part >= 0 else ""  # -1 is no class

        return [" ".join(as_text(part) for part in parts if part is not None) for parts in values]

    def captions(self, names: Sequence[str], needed: bool = False) -> list[tuple[str, ...]]:
        """All captions of each row: of the column of one of these names, else of that field of the JSON beside a
        picture in a tar; nothing without either. Raises ``InputError`` if a needed column is missing.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        column, values = self.find(names), None
        if column is not None and not pa.types.is_struct(self.column(column).type):
            values = self.column(column).to_pylist()
        elif beside := self.find(("json",)):
            kind = self.column(beside).type
            fields = [kind.field(n).name for n in range(kind.num_fields)] if pa.types.is_struct(kind) else []
            field = find_column(self.place, fields, names)
            values = None if field is None else pc.struct_field(self.column(beside), field).to_pylist()
        if values is None:
            if needed:
                self.find(names, needed)
            return []
        return [cell_texts(Path(self.place), row, column or "json", value) for row, value in enumerate(values, 1)]

    def is_image(self, name: str) -> bool:
        """Whether a column holds bytes of images, alone or with their paths, as ``datasets`` writes them."""
        return _holds_bytes(self.column(name).type)

    def ids(self, name: str) -> pyarrow.ChunkedArray:
        """A column of (lists of) texts, as it is on the disk; of images paths, or rows. Else raises ``InputError``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.column(name)
        kind = column.type
        if self.is_image(name):
            paths = self.paths(name)
            if not paths.null_count:
                return paths
            return pc.coalesce(paths, pa.array([f"{self.row_id(row)}/{name}" for row in range(len(self))]))
        if pa.types.is_integer(kind) or pa.types.is_null(kind):
            return column.cast(pa.string())
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        value = kind.value_type if is_list else kind
        if pa.types.is_string(value) or pa.types.is_large_string(value) or (is_list and pa.types.is_null(value)):
            return column
        raise InputError(f"{self.place}, column {name!r}: expected texts or lists of texts, got {short(str(kind))}")

    def paths(self, name: str) -> pyarrow.ChunkedArray:
        """The paths in a column of images; nulls where there are none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.column(name)
        is_struct = pa.types.is_struct(column.type)
        return pc.struct_field(column, "path") if is_struct else pa.chunked_array([pa.nulls(len(self), pa.string())])

    def sizes(self, name: str) -> pyarrow.ChunkedArray:
        """The number of bytes of each image in a column; null where there is none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.column(name)
        return pc.binary_length(pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column)

    def image(self, column: str, row: int, box: tuple[int, int, int, int] | None = None) -> ImageRef:
        """The image in a column and a row."""
        return ImageRef(StoredBytes(self._read, column, row, *self._files), box, self.name(row))

    def _cell(self, column: str, row: int) -> Any:
        if column not in self._read_from:  # kept since column() takes time for each of its chunks
            self._read_from[column] = self.column(column)
        return self._read_from[column][row].as_py()

    def _read(self, column: str, row: int) -> bytes:
        value = self._cell(column, row)
        data: bytes | None = value["bytes"] if isinstance(value, dict) else value
        if not data:
            raise OSError("the row holds no image")
        return data

    @cached_property
    def _files(self) -> tuple[str, tuple[int, int] | None]:
        """The first Arrow file, and the stamp of all."""
        files = [Path(file["filename"]) for file in self.data.cache_files]
        if not files:
            return "", None
        stats = [file.stat() for file in files]
        return str(files[0].absolute()), (sum(one.st_size for one in stats), max(one.st_mtime_ns for one in stats))


def holds_images(path: Path, names: Sequence[str]) -> bool:
    """Whether a Parquet file has bytes of images in one of these columns; False if it is none."""
    from pyarrow import ArrowException, parquet

    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError, ArrowException):  # names of columns may be no UTF-8
        return False
    return any(field.name.strip().lower() in names and _holds_bytes(field.type) for field in schema)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(n).name for n in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open(place: str, files: Sequence[Path]) -> tuple[Mapping[str, Any], Any]:
    """The splits by name, and all of them as one. No script is run: ``datasets`` itself has the readers."""
    import datasets

    suffixes = {path.suffix.lower() for path in files}
    if len(suffixes) > 1 or not suffixes <= READERS.keys():
        raise InputError(f"{place} holds files of several formats, {', '.join(sorted(suffixes))}: name one of them")
    try:
        if files:
            reader, given = READERS[suffixes.pop()]
            options: dict[str, Any] = dict(given)
            named = {s: [escape(str(path)) for path in files if _split_of(path, place) == s] for s in SPLITS}
            found = datasets.load_dataset(reader, data_files={s: named[s] for s in SPLITS if named[s]}, **options)
        elif place.startswith(HUB):
            found = datasets.load_dataset(place.removeprefix(HUB))
        else:
            found = datasets.load_from_disk(place)
        splits = found if isinstance(found, dict) else {"train": found}
        return splits, datasets.concatenate_datasets(list(splits.values()))
    except Exception as error:  # a dozen readers of foreign data: whatever one of them raises is said of this place
        raise _described(place, error) from None


def _read_texts(path: Path, roles: Roles, settings: TableSettings) -> tuple[Any, list[str]]:
    """A text table mapped into memory, whose cells are texts as they are written; and notes on how it is read."""
    import datasets

    names, _, notes = stream_text(path, roles, settings)
    if not names:
        raise InputError(f"{path} is empty")
    told = path.stat()
    given = {"path": str(path), "roles": roles, "settings": settings, "stamp": (told.st_size, told.st_mtime_ns)}
    features = datasets.Features({name: datasets.Value("string") for name in names})
    try:
        return datasets.Dataset.from_generator(_generate_rows, features, gen_kwargs=given), notes
    except Exception as error:  # as in _open
        raise _described(str(path), error) from None


def _generate_rows(path: str, roles: Roles, settings: TableSettings, stamp: object) -> Iterator[dict[str, str]]:
    yield from stream_text(Path(path), roles, settings)[1]


def _described(place: str, error: BaseException) -> InputError:
    """The error to raise where ``datasets`` fails."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        cause = cause.__cause__ or cause.__context__
    said = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    return InputError(f"{place} cannot be read as a table of datasets: {said[:200]}")


def _split_of(path: Path, place: str) -> str:
    """The split that a file's path below its folder, or its name, speaks of."""
    name = path.stem if str(path) == place else path.relative_to(place).as_posix()
    found = SPLIT.search(name.lower())
    return found[1] if found else "train"


def _starts(counts: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """Names of parts, and the row that each begins with, then the row after the last one."""
    return list(counts), list(accumulate(counts.values(), initial=0))


def _locate(parts: tuple[list[str], list[int]], row: int) -> tuple[str, int]:
    """The part that a row is in, and its number there, from 1 on."""
    names, starts = parts
    part = bisect_right(starts, row) - 1
    return names[part], row - starts[part] + 1
