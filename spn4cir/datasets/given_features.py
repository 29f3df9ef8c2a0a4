"""Pairs whose images and texts are given as features: arrays of numbers beside a list of classes."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from spn4cir.datasets.pair_splits import Pair, PairSource
from spn4cir.errors import InputError
from spn4cir.images import StoredBytes
from spn4cir.types import VECTOR, ImageRef

GIVEN = ("images.npy", "texts.npy", "labels.txt")
CLASSES = ("class_vectors.npy", "classes.txt")
ROWS_AT_ONCE = 65536


class GivenFeatures:
    """A folder with ``images.npy`` (N, D_v), ``texts.npy`` (N, D_t) and ``labels.txt``, one class in each line.

    ``splits.txt`` may name the split of each pair. ``class_vectors.npy`` (C, D_c) may hold a vector for each class of
    ``classes.txt``. Arrays are memory-mapped. An image is then the bytes of an ``.npy`` file of one row, and a text is
    its numbers with spaces between them.

    Raises ``InputError`` that names the file if one is missing, or their lengths differ, or a number is not finite.
    """

    def __init__(self, root: Path):
        self.root = root
        self.images, self.texts = self._array(GIVEN[0]), self._array(GIVEN[1])
        self.labels = self._lines(GIVEN[2])
        self.splits = self._lines("splits.txt") if (root / "splits.txt").exists() else [""] * len(self.labels)
        counts = {GIVEN[0]: len(self.images), GIVEN[1]: len(self.texts), "splits.txt": len(self.splits)}
        for name, count in counts.items():
            if count != len(self.labels):
                raise InputError(f"{root / name} has {count} rows, {GIVEN[2]} {len(self.labels)}: one for each pair")
        if empty := [row for row, label in enumerate(self.labels, 1) if not label]:
            raise InputError(f"{root / GIVEN[2]}, line {empty[0]}: the class is empty")
        stat = (root / GIVEN[0]).stat()
        self._stamp = stat.st_size, stat.st_mtime_ns

    def _array(self, name: str) -> Any:
        path = self.root / name
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise InputError(f"{path} is missing: given features are {', '.join(GIVEN)}") from None
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
            raise InputError(f"{path}: expected an array of numbers, a row for each, got {getattr(found, 'shape', '')}")
        for start in range(0, len(found), ROWS_AT_ONCE):
            with np.errstate(over="ignore"):
                finite = np.isfinite(np.asarray(found[start : start + ROWS_AT_ONCE], np.float32)).all(1)
            if not finite.all():
                row = start + int(np.flatnonzero(~finite)[0]) + 1
                raise InputError(f"{path}, row {row}: a number is not finite, or too large for float32")
        return found

    def _lines(self, name: str) -> list[str]:
        path = self.root / name
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except FileNotFoundError:
            raise InputError(f"{path} is missing: given features are {', '.join(GIVEN)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as UTF-8: {error}") from None

    def source(self) -> PairSource:
        """All pairs; ids are row numbers from 1 on."""
        pairs = [
            Pair(str(row + 1), numbers_as_text(self.texts[row]), label, split)
            for row, (label, split) in enumerate(zip(self.labels, self.splits, strict=True))
        ]
        return PairSource(pairs, self.find, self._class_vectors())

    def find(self, image_id: str) -> ImageRef:
        """The row of ``images.npy`` as the bytes of a file of its own."""
        path, row = self.root / GIVEN[0], int(image_id) - 1
        stored = StoredBytes(self._read, "row", row, str(path.absolute()), self._stamp)
        return ImageRef(stored, name=f"{path}, row {image_id}")

    def _read(self, column: str, row: int) -> bytes:
        file = io.BytesIO()
        np.save(file, np.asarray(self.images[row], np.float32), allow_pickle=False)
        return file.getvalue()

    def _class_vectors(self) -> dict[str, list[float]]:
        path = self.root / CLASSES[0]
        if not path.exists():
            return {}
        vectors, names = self._array(CLASSES[0]), self._lines(CLASSES[1])
        if len(vectors) != len(names) or len(set(names)) < len(names):
            raise InputError(f"{path} has {len(vectors)} rows: {CLASSES[1]} must name as many different classes")
        return {name: [float(x) for x in row] for name, row in zip(names, vectors, strict=True)}


def numbers_as_text(row: Any) -> str:
    """Numbers of float32 as a text that gives them back exactly, and that no model takes for words."""
    return VECTOR + " ".join(f"{float(x):.9g}" for x in np.asarray(row, np.float32))
