"""A store of embeddings: arrays of N rows on disk under a key, written in blocks, resumed after a kill, memory-mapped.

Its folder holds ``{name}.npy`` for each array, and a note with a digit for each block, 1 once the block is on disk:
``begun.json`` until all are, and from then on ``store.json``. Several processes may write blocks of one store.
"""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from spn4cir.errors import InputError
from spn4cir.files import locked, open_array, write_text

WHOLE, BEGUN = "store.json", "begun.json"
SECONDS = 5.0
"""How much work a killed process may lose: so often it syncs what it has written, and notes it."""


class StoredRows:
    """Rows of a ``.npy`` file, memory-mapped. Raises ``ValueError``, ``OSError`` or ``EOFError`` if it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self._array = open_array(path, "c")

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """A copy of these rows, in the type they are stored in."""
        return torch.from_numpy(np.ascontiguousarray(self._array[list(rows)]))

    def __len__(self) -> int:
        return len(self._array)

    def __reduce__(self) -> tuple[type, tuple[Path]]:  # else a copy of the whole array would go to a worker process
        return StoredRows, (self.path,)

    @property
    def dtype(self) -> str:
        """Name of the type that numbers are stored in."""
        return str(self._array.dtype)

    def whole(self) -> Tensor:
        """All rows as a tensor that lies on disk."""
        return torch.from_numpy(self._array)


@dataclass
class EmbeddingStore:
    """Named arrays (rows, …) in the folder ``root / key``.

    Args:
        root: folder of stores.
        key: digest of everything that the arrays depend on.
        rows: of each array.
        dtypes: name of each array → ``float32`` or ``float16``.
        block: rows written at once; a store that was begun with another number begins anew.
        what: the store, in an error message.
        advice: what to do where the disk has no room for it.
    """

    root: Path
    key: str
    rows: int
    dtypes: Mapping[str, str]
    block: int
    what: str
    advice: str
    _written: list[int] = field(default_factory=list, init=False)
    _noted: float = field(default_factory=time.monotonic, init=False)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.root / self.key

    @property
    def _starts(self) -> range:
        return range(0, self.rows, self.block)

    def lock(self) -> AbstractContextManager[None]:
        """Wait until no other process makes this store, and keep others from it."""
        self.root.mkdir(parents=True, exist_ok=True)
        return locked(self.root / f"{self.key}.lock")

    def open(self, note: str = WHOLE) -> dict[str, StoredRows] | None:
        """The arrays by name; with the note ``BEGUN`` those of an unfinished store. None if missing or damaged."""
        try:
            arrays = {name: StoredRows(self.folder / f"{name}.npy") for name in self.dtypes}
        except (ValueError, OSError, EOFError):
            return None
        right = all(len(array) == self.rows and array.dtype == self.dtypes[name] for name, array in arrays.items())
        return arrays if right and self._digits(note) else None

    def missing(self) -> list[int]:
        """First rows of the blocks that are not on disk. Raises ``InputError`` if it has no room for them."""
        digits, arrays = self._digits(BEGUN), self.open(BEGUN)
        if not digits or arrays is None:
            return list(self._starts)
        missing = [start for start, digit in zip(self._starts, digits, strict=True) if digit == "0"]
        rows = sum(min(self.block, self.rows - start) for start in missing)
        self._check_room(sum(array.whole()[0].nbytes for array in arrays.values()) * rows)
        return missing

    def create(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Replace what is there by empty arrays, given the shape of their rows. Raises ``InputError`` without space."""
        self.remove()
        self.root.mkdir(parents=True, exist_ok=True)
        sizes = [math.prod(shape) * np.dtype(self.dtypes[name]).itemsize for name, shape in shapes.items()]
        self._check_room(self.rows * sum(sizes))
        self.folder.mkdir()
        for name, shape in shapes.items():
            path = self.folder / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", np.dtype(self.dtypes[name]), (self.rows, *shape))
        digits = "0" * len(self._starts)
        write_text(self.folder / BEGUN, f'{self._about}, "block": {self.block}, "done": "{digits}"}}')

    def write(self, start: int, values: Mapping[str, Tensor]) -> None:
        """Write the rows from ``start`` on; creates missing arrays. Raises ``InputError`` if the disk has no room."""
        if not (self.folder / BEGUN).is_file():
            self.create({name: tuple(value.shape[1:]) for name, value in values.items()})
        for name, value in values.items():
            path, content = self.folder / f"{name}.npy", value.contiguous().numpy()
            array = open_array(path)
            assert isinstance(array, np.memmap)
            assert (array.dtype, array.shape[1:]) == (content.dtype, content.shape[1:]), "rows of another kind"
            with _writing(path) as file:  # through a memory map a full disk would end the process unheard
                file.seek(array.offset + start * content[0].nbytes)
                file.write(content.view(np.uint8).data)
        self._written.append(start // self.block)
        if time.monotonic() - self._noted > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sync what this process has written to disk, then note it."""
        for name in self.dtypes:
            with _writing(self.folder / f"{name}.npy") as file:
                os.fsync(file.fileno())
        note = self.folder / BEGUN
        first = note.stat().st_size - len('"}') - len(self._starts)
        with _writing(note) as file:  # only these digits, as other processes write theirs
            for block in self._written:
                file.seek(first + block)
                file.write(b"1")
        self._written.clear()
        self._noted = time.monotonic()

    def finish(self) -> dict[str, StoredRows]:
        """Note that all blocks are there, and return the arrays; other processes have flushed before."""
        self.flush()
        assert not self.missing(), "a block of rows is missing"
        os.replace(self.folder / BEGUN, self.folder / WHOLE)
        arrays = self.open()
        assert arrays, "the store is damaged"
        return arrays

    def remove(self) -> None:
        """Remove all files of this store."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    @property
    def _about(self) -> str:
        """The beginning of a note."""
        return json.dumps({"rows": self.rows, "arrays": dict(self.dtypes)}, sort_keys=True).removesuffix("}")

    def _digits(self, note: str) -> str:
        """A digit for each block; empty for a note of other arrays. Of a finished store the block may differ."""
        try:
            text = (self.folder / note).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        blocks = r'\d+, "done": "(1+)' if note == WHOLE else f'{self.block}, "done": "([01]{{{len(self._starts)}}})'
        found = re.fullmatch(rf'{re.escape(self._about)}, "block": {blocks}"}}', text)
        return found[1] if found else ""

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if needed > free:
            sizes = f"{needed / 1e9:.3g} GB in {self.root}, and {free / 1e9:.3g} GB are free"
            raise InputError(f"{self.what} needs {sizes}: {self.advice}")


@contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into. Raises ``InputError`` where the disk refuses."""
    try:
        with path.open("r+b") as file:
            yield file
    except OSError as error:
        advice = "what is in it stays, and the same command goes on from there"
        raise InputError(f"{path} cannot be written: {error.strerror}; {advice}") from None
