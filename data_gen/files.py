"""Files of the steps: JSONL in, JSONL out, written to the side and renamed, each with a note of what made it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spn4cir.errors import InputError
from spn4cir.files import write_text

Row = dict[str, Any]


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a file; a torn last line is left out.

    Raises:
        InputError: if the file is missing, or another line is no JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run the step before this one") from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn, or nothing
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object")
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """All rows or none; a note of what made the file before goes first, so that it never speaks for these rows."""
    path.with_suffix(".done.json").unlink(missing_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Appender:
    """Append-only rows that survive a kill: what is torn at the end is cut off when the file is opened again."""

    def __init__(self, path: Path):
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                with path.open("r+b") as file:
                    file.truncate(whole)
        self._file = path.open("a", encoding="utf-8")

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows as one block and flush them."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def digest(settings: Mapping[str, Any], *inputs: Path) -> str:
    """A short name for settings and the content of input files."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in inputs:
        if not path.is_file():
            raise InputError(f"{path} is missing: run the step before this one")
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def is_done(path: Path, made_by: str) -> bool:
    """Whether ``path`` was finished by exactly these settings and inputs."""
    note = path.with_suffix(".done.json")
    try:
        return path.is_file() and json.loads(note.read_text(encoding="utf-8"))["made_by"] == made_by
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no note, or a damaged one: do it again


def weights_digest(folder: Path) -> str | None:
    """A short name for the weights in a model folder, by names, sizes and ends of files; None if it is no folder."""
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(f"{path.name}{path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(path.stat().st_size - (1 << 20), 0))
            total.update(file.read())
    return total.hexdigest()[:16]


def mark_done(path: Path, made_by: str, **about: Any) -> None:
    """Note that ``path`` is finished."""
    write_text(path.with_suffix(".done.json"), json.dumps({"made_by": made_by, **about}, indent=1) + "\n")
