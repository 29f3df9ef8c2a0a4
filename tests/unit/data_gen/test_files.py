"""Files of the steps."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from spn4cir.data_gen.steps import Journal, cut_torn, digest, is_done, mark_done
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import read_jsonl, write_jsonl

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


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_torn_tail_is_cut(path: Path, cut: int) -> None:
    """Nothing but whole lines is left; a file that is whole, or not there, is not touched."""
    write_jsonl(path, [{"a": 1}, {"b": "äö€😀"}])
    whole = path.read_bytes()
    cut_torn(path)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-cut])
    cut_torn(path)
    assert path.read_bytes() in (whole[:9], b"") and (path.read_bytes() == b"") == (len(whole) - cut < 9)
    cut_torn(path.with_name("none"))
    assert not path.with_name("none").exists()


BLOCKS = {n: [{"n": n, "text": "äö€😀\u2028"}, {"n": -n}][: n % 3] for n in range(5)}  # an empty one among them


def process(index: int = 0, count: int = 1) -> Processes:
    """One of several processes that wait for nobody."""
    return cast(Processes, SimpleNamespace(index=index, count=count, wait=lambda: None))


def journal_of(path: Path, made_by: str = "x", index: int = 0) -> Journal:
    return Journal(path, made_by, process(index))


def test_a_journal_gives_rows_by_block(path: Path) -> None:
    """In whatever order blocks are added; it knows which are there; removed, nothing is left."""
    journal = journal_of(path)
    assert 3 not in journal and list(journal.rows()) == []
    for n in (3, 0, 4, 1, 2):
        journal.add(n, BLOCKS[n])
        assert n in journal
    journal.close()
    again = journal_of(path)
    assert list(again.rows()) == [row for n in range(5) for row in BLOCKS[n]]
    assert all(n in again for n in BLOCKS) and 5 not in again
    again.remove()
    assert list(path.parent.iterdir()) == []


def test_a_journal_torn_anywhere(path: Path) -> None:
    """Cut at any byte, whole blocks are known, the torn one is not, and what is added makes the journal as it was."""
    journal = journal_of(path)
    ends = []
    for n, rows in BLOCKS.items():
        journal.add(n, rows)
        ends.append(journal.path.stat().st_size)
    journal.close()
    whole = journal.path.read_bytes()
    for size in range(len(whole)):
        journal.path.write_bytes(whole[:size])
        again = journal_of(path)
        assert [n for n in BLOCKS if n in again] == [n for n, end in enumerate(ends) if end <= size]
        for n, rows in BLOCKS.items():
            if n not in again:
                again.add(n, rows)
        again.close()
        assert again.path.read_bytes() == whole


def test_two_writers(path: Path) -> None:
    """Each has a file of its own; opened again, either knows the blocks of both, merged in their order."""
    writers = [journal_of(path, index=i) for i in (0, 1)]
    for n, rows in BLOCKS.items():
        writers[n % 2].add(n, rows)
    for writer in writers:
        writer.close()
    assert writers[0].path != writers[1].path
    for index in (0, 1, 2):  # a third process, too, if there are more next time
        again = journal_of(path, index=index)
        assert list(again.rows()) == [row for n in range(5) for row in BLOCKS[n]]
        again.close()
    journal_of(path).remove()
    assert list(path.parent.iterdir()) == []


def test_a_journal_of_other_settings_is_not_touched(path: Path) -> None:
    """Neither read nor repaired nor removed."""
    other = journal_of(path, "other")
    other.add(0, [{"a": 1}])
    other.close()
    torn = other.path.read_bytes() + b'{"block": 1'
    other.path.write_bytes(torn)
    journal = journal_of(path)
    assert 0 not in journal
    journal.remove()
    assert other.path.read_bytes() == torn


def test_a_line_that_is_no_block_is_passed_over(path: Path) -> None:
    """Damage in the middle costs that block, not the others."""
    journal = journal_of(path)
    for n in (0, 1, 2):
        journal.add(n, BLOCKS[n])
    journal.close()
    lines = journal.path.read_bytes().split(b"\n")
    lines[1] = b"\x00" * len(lines[1])
    journal.path.write_bytes(b"\n".join(lines))
    again = journal_of(path)
    assert [n in again for n in (0, 1, 2)] == [True, False, True]
    again.add(1, BLOCKS[1])
    again.close()
    assert list(journal_of(path).rows()) == [row for n in (0, 1, 2) for row in BLOCKS[n]]


def test_a_full_disk_leaves_whole_blocks(path: Path) -> None:
    """A block that does not fit is not there in part; one line says so; with room again the journal goes on."""
    journal = journal_of(path)
    journal.add(0, BLOCKS[2])
    size = journal.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, before[1]))  # a real limit: some bytes still fit
    try:
        with pytest.raises(InputError, match=r"partial\.jsonl cannot be written: File too large; what is in it stays"):
            journal.add(1, BLOCKS[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert journal.path.stat().st_size == size and 1 not in journal
    journal.add(1, BLOCKS[1])
    journal.close()
    assert list(journal_of(path).rows()) == [*BLOCKS[2], *BLOCKS[1]]


def test_a_journal_where_nothing_can_be_written(tmp_path: Path) -> None:
    """Known before any work is done."""
    with pytest.raises(InputError, match="cannot be written"):
        journal_of(tmp_path / "missing" / "rows.jsonl")


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
    write_jsonl(path, [{"a": 2}])
    mark_done(path, "x", rows=3)
    write_jsonl(path, ROWS)
    assert not is_done(path, "x")  # the note was of what stood there before
    mark_done(path, "x", rows=3)
    assert is_done(path, "x") and not is_done(path, "y")
    path.rename(path.with_name("away"))
    assert not is_done(path, "x")  # no file
    path.with_name("away").rename(path)
    note = path.with_suffix(".done.json")
    for old in ("{torn", "[]", '{"made_by": "x"}', '{"made_by": "x", "outputs": {}}', '{"made_by": "x", "outputs": 1}'):
        note.write_text(old)  # damaged, or of a version that did not look at the file
        assert not is_done(path, "x")
    note.unlink()
    assert not is_done(path, "x")


@pytest.mark.parametrize("harm", [lambda b: b[:9], lambda b: b + b"{}\n", lambda b: b.replace(b"1", b"2"), None])
@pytest.mark.parametrize("which", [0, 1])
def test_done_is_of_these_bytes(
    path: Path, which: int, harm: Callable[[bytes], bytes] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was cut at a line, lengthened, changed or lost since is made again, and a line says so."""
    beside = path.with_name("beside.png")
    write_jsonl(path, ROWS)
    beside.write_bytes(b"1234567890")
    mark_done(path, "x", beside)
    assert is_done(path, "x") and capsys.readouterr().out == ""
    harmed = (path, beside)[which]
    if harm is None:
        harmed.unlink()
    else:
        harmed.write_bytes(harm(harmed.read_bytes()))
    assert not is_done(path, "x")
    assert capsys.readouterr().out == f"{harmed} is not the file that was finished: it is made again\n"
