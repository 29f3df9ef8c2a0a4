"""Files of the steps."""

import os
from pathlib import Path

import pytest

from data_gen.files import Appender, digest, is_done, mark_done, read_jsonl, write_jsonl
from spn4cir.errors import InputError

ROWS = [{"a": 1}, {"b": "ä\u2028"}, {"c": [None, 1.5]}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_rows_come_back(path: Path) -> None:
    """Text of any script, line separators within a text included."""
    write_jsonl(path, ROWS)
    assert read_jsonl(path) == ROWS
    write_jsonl(path, [])
    assert read_jsonl(path) == []


def test_writing_is_whole_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash among the rows, or before the rename, leaves the old file."""
    write_jsonl(path, ROWS)

    def broken() -> object:
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, broken())  # type: ignore[arg-type]
    assert read_jsonl(path) == ROWS

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, [{"a": 2}])
    assert read_jsonl(path) == ROWS


@pytest.mark.parametrize("cut", range(1, 17))
def test_a_torn_tail_is_left_out(path: Path, cut: int) -> None:
    """Wherever a kill cut the last line, within a letter of several bytes too, the whole lines are read."""
    write_jsonl(path, [{"a": 1}, {"b": "äö€😀"}])
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_jsonl(path) == [{"a": 1}]


@pytest.mark.parametrize("cut", range(1, 17))
def test_the_appender_repairs_a_torn_tail(path: Path, cut: int) -> None:
    """What is torn is cut off, and new rows stand on lines of their own."""
    write_jsonl(path, [{"a": 1}, {"b": "äö€😀"}])
    path.write_bytes(path.read_bytes()[:-cut])
    file = Appender(path)
    file.add([{"c": 3}, {"d": 4}])
    file.close()
    assert read_jsonl(path) == [{"a": 1}, {"c": 3}, {"d": 4}]


def test_the_appender_keeps_what_is_whole(path: Path) -> None:
    """A new file is made, an existing one continued, a file that is all torn emptied; rows are there before close."""
    file = Appender(path)
    file.add([{"a": 1}])
    assert read_jsonl(path) == [{"a": 1}]
    file.close()
    Appender(path).add([{"b": 2}])
    assert read_jsonl(path) == [{"a": 1}, {"b": 2}]
    path.write_bytes(b'{"a": ')
    Appender(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [b'{"a": ', b"[1]", b"3", b"", b'{"a": "\xff"}'])
def test_a_damaged_line_in_the_middle_is_named(path: Path, line: bytes) -> None:
    """Anything but an object before the last newline is an error with file and line."""
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2"):
        read_jsonl(path)


def test_a_missing_file_names_the_step_before(path: Path) -> None:
    """Running a step too early says so."""
    with pytest.raises(InputError, match=r"rows\.jsonl is missing: run the step before this one"):
        read_jsonl(path)


def test_digest_depends_on_settings_and_contents(tmp_path: Path) -> None:
    """Equal settings in any order and equal contents give equal names; each change another one."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x")
    second.write_text("x")
    base = digest({"k": 1, "l": 2}, first)
    assert base == digest({"l": 2, "k": 1}, second)
    second.write_text("y")
    assert len({base, digest({"k": 1, "l": 3}, first), digest({"k": 1, "l": 2}, second), digest({"k": 1, "l": 2})}) == 4


def test_done_is_of_these_settings(path: Path) -> None:
    """A step is done if its file and its note are there and the note is of the same making."""
    assert not is_done(path, "x")
    mark_done(path, "x", rows=3)
    assert not is_done(path, "x")  # no file
    write_jsonl(path, ROWS)
    assert not is_done(path, "x")  # the note was of what stood there before
    mark_done(path, "x", rows=3)
    assert is_done(path, "x") and not is_done(path, "y")
    path.with_suffix(".done.json").write_text("{torn")
    assert not is_done(path, "x")
    path.with_suffix(".done.json").unlink()
    assert not is_done(path, "x")
