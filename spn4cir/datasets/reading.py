"""Annotation files of others: where they lie, and their entries, field by field. Every error names the place."""

import os
import re
from collections.abc import Callable, Container, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from spn4cir.dataset import Check
from spn4cir.errors import InputError
from spn4cir.files import read_json, refuse_special_file, short

T = TypeVar("T")
PLAIN = re.compile(r"\w[\w.-]*")  # a file name without folders
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # the first wins where a picture is there twice


def find_root(
    name: str, given: str | None, aliases: Sequence[str], inside: Sequence[Sequence[str]], source: str
) -> Path:
    """The folder of a dataset: below ``given``, else below SPN4CIR_DATA, else below ``data``; or that folder itself.

    Args:
        name: of the dataset, and of its folder; ``aliases`` are other names of the folder.
        given: the folder that a person named, or None.
        inside: groups of paths; a folder that holds one of each group is preferred to one of the first group only.
        source: what is expected and where it comes from, for the ``InputError`` if no folder holds one of the first.
    """
    base = Path(given or os.environ.get("SPN4CIR_DATA") or "data")
    below = [base / folder for folder in (name, *aliases)]
    places = [base, *below] if given else [*below, base]
    for groups in (inside, inside[:1]):
        for place in places:
            if all(any((place / path).is_dir() for path in group) for group in groups):
                return place
    raise InputError(f"{name}: {base if given else base / name} does not hold the dataset: expected there {source}")


class Entry:
    """One object of an annotation file, its fields checked as they are read. Raises ``InputError`` if it is none."""

    def __init__(self, path: Path, where: object, value: object):
        self.path, self.where = path, where
        if not isinstance(value, dict):
            raise InputError(f"{path}, entry {where}: expected an object, got {short(value)}")
        self._value: dict[str, Any] = value

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def error(self, key: str, what: str) -> InputError:
        """The error to raise about a field."""
        return InputError(f"{self.path}, entry {self.where}, field {key!r}: {what}")

    def get(self, key: str, kind: type[T], what: str) -> T:
        """A field of a type. Raises ``InputError`` if it is missing or of another type."""
        if key not in self._value:
            raise self.error(key, "is missing")
        value = self._value[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.error(key, f"expected {what}, got {short(value)}")
        return value

    def text(self, key: str) -> str:
        """A text."""
        return self.get(key, str, "a text")

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        found: list[str] = self.get(key, list, "a list of texts")
        if wrong := [value for value in found if not isinstance(value, str)]:
            raise self.error(key, f"expected a list of texts, got {short(wrong[0])} in it")
        return found

    def number(self, key: str) -> int:
        """A whole number."""
        return self.get(key, int, "a whole number")

    def entry(self, key: str) -> "Entry":
        """An object inside this one."""
        return Entry(self.path, f"{self.where}, field {key!r}", self.get(key, dict, "an object"))

    def image_id(self, key: str, known: Container[str] | None = None, place: object = "") -> str:
        """A name of an image: no path, and among ``known`` if that is given, which lies in ``place``."""
        return self._named(key, self.text(key), known, place)

    def image_ids(self, key: str, known: Container[str] | None = None, place: object = "") -> list[str]:
        """A list of names of images."""
        return [self._named(key, value, known, place) for value in self.texts(key)]

    def _named(self, key: str, value: str, known: Container[str] | None, place: object) -> str:
        if not PLAIN.fullmatch(value):
            raise self.error(key, f"{short(value)} is no image id: letters, digits, '.', '_' and '-' only")
        if known is not None and value not in known:
            raise self.error(key, f"{short(value)} is not in {place}")
        return value


def read_entries(path: Path, source: str = "") -> list[Entry]:
    """The objects of a JSON list. Raises ``InputError`` if it is no list, or one of them is no object."""
    values = read_json(path, source)
    if not isinstance(values, list):
        raise InputError(f"{path}: expected a list, got {short(values)}")
    return [Entry(path, number, value) for number, value in enumerate(values)]


def read_ids(path: Path, source: str = "") -> list[str]:
    """A JSON list of image ids. Raises ``InputError`` for one that is no id, or that occurs twice."""
    values = read_json(path, source)
    if not isinstance(values, list):
        raise InputError(f"{path}: expected a list of image ids, got {short(values)}")
    seen: set[str] = set()
    for number, value in enumerate(values):
        if not isinstance(value, str) or not PLAIN.fullmatch(value):
            raise InputError(f"{path}, entry {number}: {short(value)} is no image id")
        if value in seen:
            raise InputError(f"{path}, entry {number}: {value!r} occurs twice")
        seen.add(value)
    return values


def inner_path(path: Path, key: str, value: object) -> PurePosixPath:
    """A relative path given by a file, that stays below its root. Raises ``InputError`` otherwise."""
    inner = PurePosixPath(value) if isinstance(value, str) and value and "\\" not in value else None
    if inner is None or inner.is_absolute() or ".." in inner.parts or not inner.parts:
        raise InputError(f"{path}, entry {key!r}: {short(value)} is no path below the dataset's root")
    return inner


def read_first_line(path: Path) -> str:
    """The words of a text file's first line; nothing if it is missing. Raises ``InputError`` if it cannot be read."""
    try:
        refuse_special_file(path)
        with path.open(encoding="utf-8-sig") as file:
            return " ".join(file.readline(4096).split())
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"caption {path} cannot be read: {error}") from None


def list_pictures(*folders: Path) -> dict[str, Path]:
    """Pictures by name without suffix; of several with one name, the one with the earlier suffix, then folder."""
    found = [folder / item.name for folder in folders if folder.is_dir() for item in os.scandir(folder)]
    by_suffix = {suffix: [path for path in found if path.suffix.lower() == suffix] for suffix in SUFFIXES}
    return {path.stem: path for paths in reversed(by_suffix.values()) for path in reversed(paths)}


def attempt(checks: list[Check], what: str, needed: bool, read: Callable[[], T]) -> T | None:
    """What ``read`` gives; or None, and its error among the checks."""
    try:
        return read()
    except InputError as error:
        checks.append(Check(what, 0, None, "problem" if needed else "note", (str(error),)))
        return None


def readable(read: Callable[[], T]) -> T | None:
    """What ``read`` gives, or None where it cannot be read: for lists that leave out what a check reports."""
    return attempt([], "", False, read)
