"""Files of the steps: JSONL in, JSONL out, written to the side and renamed, each with a note of what made it."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from spn4cir.data_gen.processes import Processes
from spn4cir.errors import InputError
from spn4cir.files import write_text

Row = dict[str, Any]


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a file; a torn last line is left out.

    Raises:
        InputError: if the file is missing, or another line is no JSON object.
    """
    return list(stream_jsonl(path))


def stream_jsonl(path: Path) -> Iterator[Row]:
    """Rows of a file one by one, for files that would fill the memory; otherwise as ``read_jsonl``."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run the step before this one") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # torn
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise InputError(f"{path}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: expected an object")
            yield row


def count_lines(path: Path) -> int:
    """How many lines a file holds; none if it is not there."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """All rows or none, in a stream; the note of what made the old file goes first: it must not speak for these."""
    path.with_suffix(".done.json").unlink(missing_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


class Journal:
    """Blocks of rows as they get ready, in files that survive a kill: a block is whole, or it is done again.

    Each process appends to a file of its own, one line a block, and knows the blocks of all files that are there. Only
    places in files are held in memory, not rows.

    Args:
        out: the file that the blocks will make up; the journal lies beside it.
        made_by: digest of settings and inputs; journals of another one are not touched.
        processes: who writes.

    Raises:
        InputError: where a file cannot be written; what was written before stays.
    """

    def __init__(self, out: Path, made_by: str, processes: Processes):
        self._pattern = f"{out.stem}.{made_by}.*.partial.jsonl"
        self._folder, self._places = out.parent, dict[int, tuple[Path, int]]()
        own = out.with_name(self._pattern.replace("*", str(processes.index)))
        cut_torn(own)
        processes.wait()  # nobody reads what another one still cuts
        for path in sorted(out.parent.glob(self._pattern)):
            self._scan(path)
        self.path = own
        try:
            self._file = own.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{own} cannot be written: {error.strerror}") from None
        processes.wait()  # nobody writes what another one still scans

    def _scan(self, path: Path) -> None:
        place = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    block = json.loads(line)["block"] if line.endswith(b"\n") else None
                except (ValueError, KeyError, TypeError):
                    block = None
                if isinstance(block, int):
                    self._places[block] = (path, place)
                place += len(line)

    def __contains__(self, block: int) -> bool:
        return block in self._places

    def add(self, block: int, rows: Sequence[Row]) -> None:
        """Append a block; it is on its way to the disk when this returns."""
        place = self._file.seek(0, os.SEEK_END)
        line = json.dumps({"block": block, "rows": list(rows)}, ensure_ascii=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(place)
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; what is in it stays, and the same command goes on "
                "from there"
            ) from None
        self._places[block] = (self.path, place)

    def close(self) -> None:
        """Close this process's file."""
        self._file.close()

    def rows(self) -> Iterator[Row]:
        """All rows by block, of other processes too if the journal was opened after they closed theirs."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _ in self._places.values()}}
            for block in sorted(self._places):
                path, place = self._places[block]
                files[path].seek(place)
                yield from json.loads(files[path].readline())["rows"]

    def remove(self) -> None:
        """Remove all files of this journal: their rows are elsewhere now."""
        self.close()
        for path in self._folder.glob(self._pattern):
            path.unlink(missing_ok=True)


def cut_torn(path: Path) -> None:
    """Cut off what follows the last newline of a file, if it is there."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def digest(settings: Mapping[str, Any], *inputs: Path) -> str:
    """A short name for settings and the content of input files."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in inputs:
        if not path.is_file():
            raise InputError(f"{path} is missing: run the step before this one")
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                total.update(part)
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
