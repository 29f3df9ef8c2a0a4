"""Files written whole or not at all, and read with an error that names them."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from spn4cir.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it. Raises ``InputError`` where it cannot be written."""
    beside = path.with_name(path.name + ".tmp")
    try:
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a lock file, which is removed on exit; the system releases the lock of a process that is killed.

    Without effect on a system or a disk that has no such locks.

    Args:
        path: of the lock file.
        busy: error message if another process holds it; empty to wait for that process.

    Raises:
        InputError: if another process holds the lock and ``busy`` is given, or the file cannot be written.
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
            if not _is_at(path, file.fileno()):
                continue  # whoever had it has removed it: what is at the path now is another's
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that is at a path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sha256_of_files(*paths: Path) -> str:
    """SHA-256, in hexadecimal digits, of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


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


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which the decoder would silently keep the last of two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InputError(f"{path}: the key {short(twice)} occurs twice in one object")
    return found


def short(value: object) -> str:
    """A value as it stands in a message: one line, not too long."""
    shown = json.dumps(value, default=str, ensure_ascii=True)
    return shown if len(shown) <= 60 else shown[:57] + "..."
