"""Files written whole or not at all."""

import gc
import hashlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spn4cir.errors import InputError
from spn4cir.files import hash_files, locked, open_array, write_text


def test_writes_and_replaces(tmp_path: Path) -> None:
    """The text stands in the file, as UTF-8, and nothing beside it."""
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "new ä\n")
    assert path.read_bytes() == "new ä\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_in_the_middle_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename, the old text is still whole."""
    path = tmp_path / "a.json"
    write_text(path, "old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("place", ["nowhere/a.json", "folder", "file/a.json"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    """A missing folder, a folder in the place of the file, a file in the place of the folder: nothing is left."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{place} cannot be written: [A-Z]"):
        write_text(tmp_path / place, "text")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_lock_that_nobody_waits_for(tmp_path: Path) -> None:
    """The caller's error while another one holds it; free again afterwards, and also for those who wait."""
    path = tmp_path / "lock"
    with locked(path, "another run works here"):
        with pytest.raises(InputError, match="another run works here"), locked(path, "another run works here"):
            pytest.fail("two hold it")
        assert path.is_file()
    assert not path.exists()
    with locked(path, "busy"):
        pass


def test_digest_of_files(tmp_path: Path) -> None:
    """That of their contents together, and nothing of their names."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * (1 << 22) + b"b")
    two.write_bytes(b"c")
    assert hash_files(one) == hashlib.sha256(one.read_bytes()).hexdigest()
    assert hash_files(one, two) == hashlib.sha256(one.read_bytes() + b"c").hexdigest() != hash_files(two, one)


def test_arrays_are_opened_by_several_threads(tmp_path: Path) -> None:
    """A thread that gives way while it reads a header, as it may in collecting garbage: Python 3.11 fails there."""
    path, whole, wrong = tmp_path / "x.npy", np.arange(6, dtype="f4").reshape(3, 2), list[Exception]()
    np.save(path, whole)

    def read() -> None:
        try:
            for _ in range(100):
                assert (open_array(path) == whole).all() and (open_array(path, None) == whole).all()
        except Exception as error:
            wrong.append(error)

    threads, before = [threading.Thread(target=read) for _ in range(4)], gc.get_threshold()
    gc.callbacks.append(give_way := lambda *_: time.sleep(0))
    gc.set_threshold(20, 2, 2)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(give_way)
    assert not wrong
