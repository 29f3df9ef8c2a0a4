"""Files written whole or not at all, and read with an error that names them."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from spn4cir.errors import InputError

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, Any]
_HEADERS = Lock()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a path to write to, which replaces ``path`` unless an error occurs. Raises ``InputError`` if it cannot."""
    beside = path.with_name(path.name + ".tmp")
    try:
        try:
            yield beside
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it. Raises ``InputError`` where it cannot be written."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


def refuse_special_file(path: Path) -> None:
    """Raise ``OSError`` for a pipe, a socket or a device, whose opening may wait for ever; pass a missing file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # opening it says what is wrong
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError("not a regular file")


def hash_files(*paths: Path, prefix: bytes = b"") -> str:
    """Return the SHA-256, in hexadecimal, of a prefix and the contents of files, one after the other."""
    digest = hashlib.sha256(prefix)
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()


def open_array(path: Path, mode: Literal["r", "c"] | None = "r") -> "np.ndarray[Any, Any]":
    """Map a ``.npy`` file into memory, or read it whole for the mode None; never unpickles.

    One thread reads a header at a time, because Python 3.11 parses literals in one thread only (its issue 106905).
    Raises ``ValueError``, ``OSError`` or ``EOFError`` if it is damaged.
    """
    import numpy as np

    with _HEADERS:
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
        return array


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a lock file, which is removed on exit; the system releases the lock of a process that is killed.

    Without effect on a system or a disk that has no such locks. Where another process holds the lock, raises
    ``InputError`` with the message ``busy``, or waits if that is empty.
    """
    try:
        import fcntl
    except ImportError:  # not this kind of system
        yield
        return
    while True:
        try:
            file = path.open("a")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise InputError(busy) from None
            except OSError:  # not this kind of disk
                pass
            try:
                if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    continue  # whoever had it has removed it: what is at the path now is another's
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def read_json(path: Path, source: str = "") -> Any:
    """The content of a JSON file. Raises ``InputError`` if it is missing or damaged, or names a key twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_object, path))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing{source and f': it comes from {source}'}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise InputError(f"{path} is not valid JSON, or cut short: {error}") from None


def read_jsonl(path: Path) -> list[Row]:
    """Return the rows of a JSONL file but for a torn last line. Raises ``InputError`` for another that is no object."""
    return list(stream_jsonl(path))


def stream_jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows that ``read_jsonl`` returns, one at a time, for files larger than memory."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run the step before this one") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # torn
            yield parse_row(path, number, line)


def parse_row(path: Path, number: int, line: str | bytes) -> Row:
    """Return the object in a line of a JSONL file. Raises ``InputError`` that names the line."""
    try:
        row = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise InputError(f"{path}, line {number}: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number}: expected an object, got {short(row)}")
    return row


def count_lines(path: Path) -> int:
    """Return the number of lines of a file; 0 if it is missing."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows or none, as they come. Raises ``InputError`` where the file cannot be written."""
    with replaced(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which the decoder would silently keep the last of two values."""
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise InputError(f"{path}: the key {short(twice[0])} occurs twice in one object")
    return dict(pairs)


def short(value: object) -> str:
    """A value as it stands in a message: one line, not too long."""
    shown = json.dumps(value, default=str, ensure_ascii=True)
    return shown if len(shown) <= 60 else shown[:57] + "..."
