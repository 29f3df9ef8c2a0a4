"""Stores of embeddings: written in blocks by one or several processes, whole or not used at all."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spn4cir import store as stores
from spn4cir.errors import InputError
from spn4cir.store import BEGUN, EmbeddingStore

N, BLOCK = 11, 4  # the last block is ragged
DTYPES = {"wide": "float32", "narrow": "float16"}


def values(start: int) -> dict[str, Tensor]:
    """A block whose numbers are those of its rows."""
    rows = torch.arange(start, min(start + BLOCK, N))
    return {"wide": rows[:, None].float().expand(-1, 3), "narrow": rows.half()[:, None, None].expand(-1, 2, 5)}


def store_of(root: Path, **changes: Any) -> EmbeddingStore:
    given = {"key": "k", "rows": N, "dtypes": DTYPES, "block": BLOCK, "what": "the toy", "advice": "make room"}
    return EmbeddingStore(root, **{**given, **changes})


def make(root: Path, *starts: int) -> EmbeddingStore:
    """A store with these blocks on disk."""
    store = store_of(root)
    store.create({"wide": (3,), "narrow": (2, 5)})
    for start in starts:
        store.write(start, values(start))
    store.flush()
    return store


def content(store: EmbeddingStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Several arrays, in any order of blocks, as numpy stores them; a second reader finds them by key."""
    store = store_of(tmp_path)
    assert store.open() is None and store.missing() == [0, 4, 8]
    for start in (8, 0, 4):
        store.write(start, values(start))
    arrays = store.finish()
    assert arrays["wide"].whole().tolist() == [[float(n)] * 3 for n in range(N)]
    assert arrays["narrow"][[10, 2]][:, 1, 4].tolist() == [10.0, 2.0]
    again = store_of(tmp_path).open()
    assert again is not None and all(again[name].whole().equal(arrays[name].whole()) for name in DTYPES)
    np.save(tmp_path / "plain.npy", arrays["wide"].whole().numpy())
    assert (store.folder / "wide.npy").read_bytes() == (tmp_path / "plain.npy").read_bytes()
    assert not list(tmp_path.glob("*.lock")) and {p.name for p in store.folder.iterdir()} == {
        "wide.npy", "narrow.npy", "store.json",
    }  # fmt: skip


@pytest.mark.parametrize("change", [
    {"key": "other"}, {"rows": N + 1}, {"dtypes": {**DTYPES, "wide": "float16"}},
    {"dtypes": {**DTYPES, "more": "float32"}}, {"dtypes": {"wide": "float32"}},
])  # fmt: skip
def test_another_store_is_not_this_one(tmp_path: Path, change: dict[str, Any]) -> None:
    """Neither whole nor begun; of a whole one the block may differ, of one that was begun it may not."""
    make(tmp_path, 4)
    assert store_of(tmp_path).missing() == [0, 8] and len(store_of(tmp_path, **change).missing()) == 3
    assert store_of(tmp_path, block=2).open(BEGUN) is None
    make(tmp_path, 0, 4, 8).finish()
    assert store_of(tmp_path, **change).open() is None
    assert store_of(tmp_path).open() is not None and store_of(tmp_path, block=2).open() is not None


def test_several_write_at_once(tmp_path: Path) -> None:
    """Each notes its own blocks alone, whoever is first; the bytes are those of one, and all have to be there."""
    first, second = make(tmp_path), store_of(tmp_path)
    first.write(0, values(0))
    second.write(4, values(4))
    assert store_of(tmp_path).missing() == [0, 4, 8]  # nothing is noted before it is on disk
    second.flush()
    assert store_of(tmp_path).missing() == [0, 8]
    with pytest.raises(AssertionError, match="missing"):
        first.finish()
    assert store_of(tmp_path).open() is None
    second.write(8, values(8))
    second.flush()
    first.finish()
    alone = make(tmp_path / "alone", 0, 4, 8)
    alone.finish()
    assert content(first) == content(alone)


def test_a_block_is_noted_after_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sync of the arrays fails: the note says that no block is there, and the same command goes on."""
    store = make(tmp_path, 0)
    store.write(4, values(4))
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"wide\.npy cannot be written: No space left"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        store.flush()
    assert json.loads((store.folder / BEGUN).read_text())["done"] == "100"
    store.flush()
    assert json.loads((store.folder / BEGUN).read_text())["done"] == "110"


def test_how_often_it_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every block where no time may be lost; else not before it is asked to."""
    for seconds, missing in ((-1, [4, 8]), (5.0, [0, 4, 8])):
        monkeypatch.setattr(stores, "SECONDS", seconds)
        make(tmp_path).write(0, values(0))
        assert store_of(tmp_path).missing() == missing


def test_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    """Of another shape or type than the array they go to."""
    store = make(tmp_path)
    for wide in (values(0)["wide"][:, :2], values(0)["wide"].double()):
        with pytest.raises(AssertionError, match="rows of another kind"):
            store.write(0, {"wide": wide})


@pytest.mark.parametrize("done", [(), (0,), (0, 8)])
def test_room_is_asked_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: tuple[int, ...]
) -> None:
    """A byte too few is said before anything is written, and what is there stays."""
    store = make(tmp_path, *done)
    needed = (N - sum(len(values(start)["wide"]) for start in done)) * (3 * 4 + 2 * 5 * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert len(store.missing()) == 3 - len(done)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    before = content(store)
    with pytest.raises(InputError, match=r"the toy needs \S+ GB in .* GB are free: make room"):
        store.missing()
    assert content(store) == before
    if not done:
        with pytest.raises(InputError, match="the toy needs"):
            store_of(tmp_path, key="new").create({"wide": (3,), "narrow": (2, 5)})
        assert [path.name for path in tmp_path.iterdir()] == ["k"]
