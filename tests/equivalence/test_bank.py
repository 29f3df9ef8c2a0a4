"""A bank row is what the model gives now; a bank that is not whole, or of another model, is never used."""

import ctypes
import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_backbones import TINY, tiny_backbone
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import anonymous
from spn4cir import bank as banks
from spn4cir import store
from spn4cir.backbone import Backbone
from spn4cir.backbones import BACKBONES
from spn4cir.backbones.clip4cir import CLIP4CIR
from spn4cir.bank import Bank, fingerprint, load_or_build, stored_parts
from spn4cir.checkpoints import save_model
from spn4cir.errors import InputError
from spn4cir.files import locked
from spn4cir.images import ImageSource, open_image, pixel_hash
from spn4cir.store import StoredRows
from spn4cir.train import train
from spn4cir.types import Composed, ImageFeatures, Tokens


class Maker:
    """Builds banks of the toy dataset's training images and counts the images that are encoded."""

    def __init__(self, toy, backbone: Backbone, root: Path):  # type: ignore[no-untyped-def]
        self.toy, self.backbone, self.root, self.encoded = toy, backbone, root, 0
        backbone.freeze_image_side()
        self.images, self.ids = ImageSource(toy.image, backbone.transform), toy.training_images()
        self.hashes = {i: pixel_hash(open_image(toy.image(i))) for i in self.ids}
        encode = backbone.encode_image
        backbone.encode_image = lambda pixels: (self._count(len(pixels)), encode(pixels))[1]  # type: ignore[method-assign]

    def _count(self, images: int) -> None:
        self.encoded += images

    def __call__(self, batch_size: int = 256, dtype: str = "float32") -> Bank:
        hashes = {i: self.hashes[i] for i in self.ids}
        return load_or_build(self.backbone, self.images, hashes, self.root, batch_size, stored_parts(dtype))

    def name(self, dtype: str = "float32") -> str:
        return fingerprint(self.backbone, {i: self.hashes[i] for i in self.ids}, stored_parts(dtype))


@pytest.fixture
def make(toy, backbone: Backbone, tmp_path: Path) -> Maker:  # type: ignore[no-untyped-def]
    return Maker(toy, backbone, tmp_path / "banks")


def live(make: Maker, ids: list[str]):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return make.backbone.encode_image(make.images.stack(ids))


def test_rows_equal_live_encoding(make: Maker) -> None:
    """In the same blocks exactly, one image at a time closely; another image's row is far."""
    bank, unique = make(), list(dict.fromkeys(make.hashes.values()))
    first = [next(i for i in make.ids if make.hashes[i] == h) for h in unique]
    features = live(make, first)
    assert torch.equal(bank.reference.whole(), features.reference) and torch.equal(bank.target, features.target)
    for image_id in make.ids[:5]:
        alone, row = live(make, [image_id]), bank.rows[image_id]
        torch.testing.assert_close(bank.reference[[row]], alone.reference, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bank.target[row], alone.target[0], rtol=1e-5, atol=1e-5)
        assert (bank.target[row - 1] - alone.target[0]).abs().max() > 1e-3  # negative control


def test_block_size_does_not_matter(make: Maker, tmp_path: Path) -> None:
    """Ragged small blocks give the same rows, to rounding."""
    whole, make.root = make(), tmp_path / "other"
    torch.testing.assert_close(make(batch_size=7).target, whole.target, rtol=1e-5, atol=1e-5)


def test_equal_pixels_share_a_row(make: Maker) -> None:
    """A copy under another name is encoded once and is no negative of its original; other images are apart."""
    bank = make()
    assert bank.rows["twin"] == bank.rows["i00"] != bank.rows["i01"]
    assert len(bank.target) == make.encoded == len(make.ids) - 1 == len(set(bank.rows.values()))


def test_a_second_use_reads_the_file(make: Maker) -> None:
    """Nothing but one image is encoded again, to see that it still fits, and the bits are the same."""
    first, encoded = make(), make.encoded
    second = make()
    assert make.encoded == encoded + 1 and torch.equal(first.target, second.target)


def change_weights(make: Maker) -> None:
    with torch.no_grad():
        next(p for p in make.backbone.image_state().values()).flatten()[0].add_(1e-3)


def change_transform(make: Maker) -> None:
    make.backbone.transform = replace(make.backbone.transform, pad_ratio=None)


def change_pixels(make: Maker) -> None:
    make.hashes["i03"] = "0" * 64


def change_order(make: Maker) -> None:
    make.ids = [*make.ids[1:], make.ids[0]]


@pytest.mark.parametrize("change", [change_weights, change_transform, change_pixels, change_order])
def test_what_a_bank_depends_on_names_it(make: Maker, change) -> None:  # type: ignore[no-untyped-def]
    """Image-side weights, preprocessing, pixels and order: a change of any gives another bank."""
    before, _ = make.name(), make()
    change(make)
    encoded = make.encoded
    make()
    assert make.name() != before and make.encoded > encoded


def test_the_text_side_does_not_name_a_bank(make: Maker) -> None:
    """Negative control: text-side weights may move, as they do in stage 2, and the bank stays valid."""
    before = make.name()
    with torch.no_grad():
        make.backbone.clip.positional_embedding.add_(1.0)  # type: ignore[union-attr, operator]
    assert make.name() == before


def test_half_the_storage_is_close(make: Maker) -> None:
    """A float16 bank has its own name, half the bytes and nearly the same rows."""
    wide, narrow = make(), make(dtype="float16")
    assert narrow.fingerprint != wide.fingerprint and narrow.target.dtype == torch.float16
    torch.testing.assert_close(narrow.target.float(), wide.target, rtol=1e-3, atol=1e-4)
    assert not torch.equal(narrow.target.float(), wide.target)  # negative control


# --- builds that are killed, and several at once ----------------------------------------------------------------------


SCRIPT = Path(__file__).parent / "bank_script.py"
FILES = {"target.npy", "reference.npy", "store.json"}


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bank_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _load_script()
N, BLOCK = len(script.IDS), 5  # the last block is ragged


def interrupt() -> None:
    raise KeyboardInterrupt


def begin(root: Path, blocks: int, dtype: str = "float32") -> Path:
    """A build that is interrupted after so many blocks; its folder."""
    model = script.Blockwise(blocks, interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.build(model, root, dtype=dtype)
    assert model.encoded == min(blocks * BLOCK, N)
    name = fingerprint(model, dict(zip(script.IDS, script.IDS, strict=True)), stored_parts(dtype))
    return root / name


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is put on disk and noted."""
    monkeypatch.setattr(store, "SECONDS", -1)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of a build that nobody interrupted."""
    return content(tmp_path / "whole" / script.build(script.Blockwise(), tmp_path / "whole").fingerprint)


def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Killed by the system in its fourth block: the next one encodes the rest, and looks at the first image."""
    root = tmp_path / "banks"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, SCRIPT, root, "3"], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (lock,) = root.glob("*.lock")  # nobody was left to remove it, and nobody holds it
    folder = lock.with_suffix("")
    assert {path.name for path in folder.iterdir()} == FILES - {"store.json"} | {"begun.json"}
    model = script.Blockwise()
    bank = script.build(model, root)
    assert model.encoded == N - 3 * BLOCK + 1
    assert content(folder) == whole and whole.keys() == FILES and list(root.iterdir()) == [folder]
    assert bank.target.equal(script.build(model, root).target) and model.encoded == N - 3 * BLOCK + 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("blocks", [0, 1, 4])
def test_an_interrupted_build_goes_on(tmp_path: Path, noted: None, blocks: int, dtype: str) -> None:
    """Before its first, second and last block; in another block size nothing is taken over, and bytes differ."""
    made = script.build(script.Blockwise(), tmp_path / "whole", dtype=dtype).fingerprint
    expected = content(tmp_path / "whole" / made)
    for batch_size in (BLOCK, 4):
        folder, model = begin(tmp_path / f"in {batch_size}", blocks, dtype), script.Blockwise()
        script.build(model, folder.parent, batch_size, dtype)
        assert model.encoded == (N - blocks * BLOCK + (blocks > 0) if batch_size == BLOCK else N)
        same = [content(folder)[name] == expected[name] for name in sorted(FILES)]
        assert same == ([True] * 3 if batch_size == BLOCK else [False] * 3)


def test_a_build_that_ended_before_its_last_word_encodes_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """All rows are there and noted; only the name of the note is not the last one yet."""
    model = script.Blockwise()
    folder = tmp_path / "whole" / script.build(model, tmp_path / "whole").fingerprint
    (folder / "store.json").rename(folder / "begun.json")
    script.build(model, folder.parent)
    assert model.encoded == 2 and content(folder) == whole  # it looks at the first image each time


@pytest.mark.parametrize(("seconds", "notes"), [(5.0, 1), (-1, 6)])
def test_notes_are_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, notes: int) -> None:
    """A build of less than some seconds writes to disk once, whatever the number of blocks."""
    synced: list[int] = []
    monkeypatch.setattr(store, "SECONDS", seconds)
    monkeypatch.setattr(os, "fsync", synced.append)
    script.build(script.Blockwise(), tmp_path)
    assert len(synced) == 2 * notes  # each of two arrays


def edit_note(folder: Path, **changes: object) -> None:
    note = json.loads((folder / "begun.json").read_text())
    (folder / "begun.json").write_text(json.dumps({**note, **changes}))


def edit_array(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(folder / "target.npy", change(np.load(folder / "target.npy")))


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "begun.json").unlink(),
    lambda folder: (folder / "begun.json").write_text(""),
    lambda folder: (folder / "begun.json").write_text((folder / "begun.json").read_text()[:30]),
    lambda folder: (folder / "begun.json").write_text("[15]"),
    lambda folder: edit_note(folder, done="1110"),
    lambda folder: edit_note(folder, done="111000"),
    lambda folder: edit_note(folder, done="11x00"),
    lambda folder: edit_note(folder, done=11100),
    lambda folder: edit_note(folder, rows=24),
    lambda folder: edit_note(folder, arrays=stored_parts("float16")),
    lambda folder: edit_array(folder, lambda a: a[:-1]),
    lambda folder: edit_array(folder, lambda a: a.astype(np.float64)),
    lambda folder: edit_array(folder, lambda a: a[..., :-1]),
    lambda folder: edit_array(folder, lambda a: a.reshape(N, 2, 4)),
    lambda folder: edit_array(folder, lambda a: np.roll(a, 1, 0)),
    lambda folder: (folder / "reference.npy").unlink(),
    lambda folder: (folder / "target.npy").write_bytes((folder / "target.npy").read_bytes()[:-1]),
    lambda folder: (folder / "target.npy").write_bytes(b""),
], ids=[
    "no note", "empty", "torn", "list", "too few", "too many", "no digit", "number", "other images", "other parts",
    "rows", "type", "width", "shape", "other model", "no array", "cut", "nothing in it",
])  # fmt: skip
def test_what_does_not_fit_is_made_anew(
    tmp_path: Path, noted: None, whole: dict[str, bytes], spoil: Callable[[Path], object]
) -> None:
    """Note, number and shape and type of rows, and the first of them; as it was it is taken over."""
    for change in (lambda folder: None, spoil):  # the first is the negative control
        folder, model = begin(tmp_path / f"{change is spoil}", 3), script.Blockwise()
        change(folder)
        script.build(model, folder.parent)
        assert content(folder) == whole
        assert model.encoded in ((N, N + 1) if change is spoil else (N - 3 * BLOCK + 1,))


def test_what_earlier_releases_left_is_no_matter(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Arrays of zeros without any note, in the folder itself; the temporary folder of another process is left alone."""
    folder, model = begin(tmp_path / "banks", 0), script.Blockwise()
    for place in (folder, folder.with_name(f"{folder.name}.1.tmp")):
        place.mkdir()
        np.save(place / "target.npy", np.zeros((N, 1, 8), np.float32))
        np.save(place / "reference.npy", np.zeros((N, 1, 8), np.float32))
    script.build(model, folder.parent)
    assert content(folder) == whole and model.encoded == N and len(list(folder.parent.iterdir())) == 2


def test_features_that_stop_being_finite_leave_nothing(tmp_path: Path, noted: None) -> None:
    """What was noted goes as well: with other weights it would have another name."""
    folder = begin(tmp_path, 2)
    model = script.Blockwise(1, lambda: setattr(model, "factor", torch.inf))
    with pytest.raises(InputError, match="not finite"):
        script.build(model, tmp_path)
    assert not folder.exists() and list(tmp_path.iterdir()) == []


def test_a_build_that_goes_on_needs_room_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted) -> None:  # type: ignore[no-untyped-def]
    """One line, and what is there stays; with just enough room it goes on."""
    folder, model = begin(tmp_path, 3), script.Blockwise()
    needed = (N - 3 * BLOCK) * 2 * 8 * 4
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free < needed:
            with pytest.raises(InputError, match=r"the bank needs .* GB"):
                script.build(model, tmp_path)
            assert (folder / "begun.json").is_file()
    script.build(model, tmp_path)
    assert model.encoded == N - 3 * BLOCK + 2  # it looked at the first image twice


def test_two_that_build_the_same_bank_at_once(tmp_path: Path) -> None:
    """Whoever is second waits, and takes what the first has made; another bank is nobody's to wait for."""
    inside, go = threading.Event(), threading.Event()
    first = script.Blockwise(2, lambda: (inside.set(), go.wait(20)))
    second, other = script.Blockwise(), script.Blockwise()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(script.build, first, tmp_path)
        assert inside.wait(20)
        two = pool.submit(script.build, second, tmp_path)
        script.build(other, tmp_path, dtype="float16")
        assert not two.done() and second.encoded == 0 and other.encoded == N
        go.set()
        assert one.result(20).target.equal(two.result(20).target)
    assert (first.encoded, second.encoded) == (N, 1) and not list(tmp_path.glob("*.lock"))


def most_inside(path: Path, lock: Callable[[Path], AbstractContextManager[None]]) -> int:
    """How many of four threads were in there at once, at most."""
    inside, most = [], []

    def enter(_: int) -> None:
        with lock(path):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(200)))
    return max(most)


def test_a_lock_is_held_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although its file is removed and made again each time; an error lets go of it."""
    path = tmp_path / "lock"
    assert most_inside(path, locked) == 1 and not path.exists()
    assert most_inside(path, lambda _: nullcontext()) > 1  # negative control
    with pytest.raises(KeyError), locked(path):
        assert path.is_file()
        raise KeyError
    with locked(path):
        pass
    with pytest.raises(InputError, match="cannot be written"), locked(tmp_path / "nowhere" / "lock"):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)  # a system without such locks
    with locked(path), locked(path):
        assert not path.exists()


# --- where targets lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 10, 23, 30])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shares_of_a_bank_are_the_bank(tmp_path: Path, processes: int, dtype: str) -> None:
    """One after the other, none larger than N / processes rounded up, nothing copied; the last may be empty."""
    bank = script.build(script.Blockwise(), tmp_path, dtype=dtype)
    shares = [bank.shard(process, processes) for process in range(processes)]
    assert torch.cat([share.target for share in shares]).equal(bank.target)
    size, sizes = -(-N // processes), [len(share.target) for share in shares]
    assert sizes == [max(0, min(size, N - n * size)) for n in range(processes)] and sum(sizes) == N
    for share in shares:
        assert (share.total, share.rows, share.fingerprint) == (N, bank.rows, bank.fingerprint)
        assert share.reference is bank.reference and share.target.dtype == bank.target.dtype
        assert share.target.equal(bank.target[share.first : share.first + len(share.target)])
        if len(share.target):
            assert share.target.data_ptr() == bank.target[share.first :].data_ptr()
    assert processes == 1 or not shares[0].target.equal(shares[1].target)  # negative control


def test_a_share_is_of_a_process_that_there_is(tmp_path: Path) -> None:
    bank = script.build(script.Blockwise(), tmp_path)
    for process, processes in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"process {process} of {processes}"):
            bank.shard(process, processes)
    with pytest.raises(ValueError, match="cannot be shared out again"):
        bank.shard(1, 2).shard(0, 2)


@pytest.mark.parametrize("room", [True, False])
def test_targets_go_to_the_device_if_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    """Else they stay on disk; of a share, only its own bytes are asked about."""
    bank, meta, asked = script.build(script.Blockwise(), tmp_path).shard(2, 3), torch.device("meta"), []
    monkeypatch.setattr(banks, "fits_in_memory", lambda size, device: (asked.append((size, device)), room)[1])
    moved = bank.to(meta)
    assert asked == [(7 * 8 * 4, meta)] and (moved.device, moved.resident) == (meta, room)
    assert moved.target.device == (meta if room else torch.device("cpu")) and (moved.first, moved.total) == (16, N)
    if not room:
        assert moved.target.data_ptr() == bank.target.data_ptr()
    stays = bank.to(torch.device("cpu"))
    assert stays.resident and stays.target.data_ptr() == bank.target.data_ptr()


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than half of what is free on the device or kept there by torch for later; a CPU reads from disk anyway."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70)
    cuda = torch.device("cuda")
    assert (
        banks.fits_in_memory(49, cuda)
        and not banks.fits_in_memory(50, cuda)
        and banks.fits_in_memory(10**18, torch.device("cpu"))
    )


def test_images_that_are_added_come_after(tmp_path: Path) -> None:
    """Rows of the first images stay, to the bit where their block was full; so do those of equal pixels."""
    model, ids = script.Blockwise(), script.IDS
    short, long = script.build(model, tmp_path, ids=ids[:12]), script.build(model, tmp_path, ids=ids)
    assert short.rows.items() <= long.rows.items() and list(long.rows.values()) == list(range(N))
    assert long.target[:10].equal(short.target[:10])
    assert not long.target[:12].equal(short.target)  # negative control: the last block was not full
    torch.testing.assert_close(long.target[:12], short.target, rtol=1e-3, atol=0)
    rows = banks.assign_rows({"a": "x", "b": "y", "c": "x"})
    assert banks.assign_rows({"a": "x", "b": "y", "c": "x", "d": "y", "e": "z"}) == {**rows, "d": 1, "e": 2}


# --- rows on disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A file of nine rows, and what is in it."""
    values = np.random.default_rng(0).normal(size=(9, 3, 4)).astype(np.float16)
    np.save(tmp_path / "rows.npy", values)
    return tmp_path / "rows.npy", values


@pytest.mark.parametrize("asked", [[4], [8, 0, 3], [2, 2, 2], list(range(9)), [5, 1, 5, 0]])
def test_rows_are_read_in_the_order_asked(numbers: tuple[Path, np.ndarray], asked: list[int]) -> None:
    """Any order, repeated ones too; in the stored type; a copy, so that nothing that is done to it reaches the next."""
    rows = StoredRows(numbers[0])
    found = rows[asked]
    assert found.dtype == torch.float16 and found.tolist() == [numbers[1][n].tolist() for n in asked]
    found += 1
    assert rows[asked].tolist() == [numbers[1][n].tolist() for n in asked] != found.tolist()
    assert len(rows) == 9 and rows.whole().tolist() == numbers[1].tolist()
    assert np.load(numbers[0]).tolist() == numbers[1].tolist()


def test_rows_that_are_not_there(numbers: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(IndexError):
        StoredRows(numbers[0])[[9]]


def big(folder: Path, rows: int = 300_000) -> StoredRows:
    """A sparse file of 300,000 rows of 64 kB, 20 GB that take no disk; a few rows are not zero."""
    array = np.lib.format.open_memmap(folder / "big.npy", "w+", np.float16, (rows, 64, 512))
    array[:: rows // 3, :, 0] = 1
    array.flush()
    return StoredRows(folder / "big.npy")


def doubled(rows: StoredRows, asked: list[int]) -> Tensor:
    return rows[asked] * 2


def test_another_process_is_given_the_path(tmp_path: Path) -> None:
    """What goes to a process that is started afresh is some bytes, and it reads the same rows from the same file."""
    rows = big(tmp_path)
    sent = pickle.dumps(rows)
    assert len(sent) < 500
    asked = [0, 100_000, 7, 200_000, 0]
    assert pickle.loads(sent)[asked].equal(rows[asked]) and rows[asked][:, 0, 0].tolist() == [1, 1, 0, 1, 1]


@pytest.mark.skipif(not anonymous(os.getpid()), reason="the system does not tell anonymous memory")
def test_reading_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    """Hundreds of rows, one batch after the other, leave no trace; where all are kept there is one."""
    rows, chance = big(tmp_path), random.Random(0)
    rows[[0]]
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier tests freed may be used again, and shows no growth
    before = anonymous(os.getpid())
    for _ in range(8):
        batch = rows[chance.sample(range(len(rows)), 32)]  # 2 MB
    assert batch.shape == (32, 64, 512) and anonymous(os.getpid()) - before < 8_000  # kB, where 16,384 were read
    kept = rows[list(range(560))]  # negative control
    assert len(kept) == 560 and anonymous(os.getpid()) - before > 25_000


# --- banks that are not right -----------------------------------------------------------------------------------------


def test_a_bank_of_another_model_is_made_anew(make: Maker, tmp_path: Path) -> None:
    """Files put under this model's name: seen by its first row, whichever part differs, and replaced."""
    own, name = make(), make.name()
    features = {"target": own.target.clone(), "reference": own.reference.whole().clone()}  # type: ignore[union-attr]
    for part, other in (("target", None), ("reference", None), ("target", torch.nan), (None, None)):
        for stored, values in features.items():
            changed = values.roll(1, 0) if stored == part else values
            np.save(make.root / name / f"{stored}.npy", changed.numpy() if other is None else changed.numpy() * other)
        encoded = make.encoded
        again = make()
        assert again.target.equal(features["target"]) and again.reference.whole().equal(features["reference"])  # type: ignore[union-attr]
        # where it differs one looks again before removing it; where nothing does it is used as it is
        assert make.encoded - encoded == (2 + 40 if part else 1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 40}', '{"rows": 41, "arrays": {}}'])
def test_a_note_that_does_not_fit_is_no_note(make: Maker, text: str) -> None:
    """Emptied by a power cut, or of another bank: made anew, where a whole note saves the encoding."""
    make()
    encoded = make.encoded
    (make.root / make.name() / "store.json").write_text(text)
    make()
    assert make.encoded == encoded + 40
    make()
    assert make.encoded == encoded + 41


@pytest.mark.parametrize("part", ["target", "reference"])
@pytest.mark.parametrize("kept", [0, 20, 200, -1])
def test_a_file_that_is_cut_off_is_made_anew(make: Maker, part: str, kept: int) -> None:
    """Nothing left, half a header, little data, one byte too few."""
    good = make()
    whole, path = good.target.clone(), make.root / make.name() / f"{part}.npy"
    path.write_bytes(path.read_bytes()[:kept])
    encoded = make.encoded
    assert torch.equal(make().target, whole) and make.encoded == encoded + 40


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_a_disk_without_room_is_said_before_anything_is_written(
    make: Maker, monkeypatch: pytest.MonkeyPatch, dtype: str, size: int
) -> None:
    """One line with what is needed and what to do; nothing is left; with just enough room it is built."""
    needed = 40 * 2 * 128 * size
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            assert make(dtype=dtype).target.shape == (40, 1, 128)
            continue
        monkeypatch.setattr(np.lib.format, "open_memmap", lambda *_: pytest.fail("written"))
        with pytest.raises(InputError, match=r"the bank needs .* GB .* are free: set SPN4CIR_RUNS") as raised:
            make(dtype=dtype)
        assert "\n" not in str(raised.value) and list(make.root.iterdir()) == []
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("factor", "narrow", "wide"), [(1.0, True, True), (1e6, False, True), (torch.inf, False, False)]
)
def test_features_that_are_not_finite_are_no_bank(make: Maker, factor: float, narrow: bool, wide: bool) -> None:
    """Too large for half precision, or for any: one line, and nothing is left; what fits is stored."""
    encode = make.backbone.encode_image

    def large(pixels: Tensor) -> ImageFeatures:
        features = encode(pixels)
        return ImageFeatures(features.reference * factor, features.target)

    make.backbone.encode_image = large  # type: ignore[method-assign]
    for dtype, fits in (("float16", narrow), ("float32", wide)):
        if fits:
            assert make(dtype=dtype).reference.whole().isfinite().all()  # type: ignore[union-attr]
            continue
        with pytest.raises(InputError, match=rf"reference features .* not finite in {dtype}: set bank.dtype") as raised:
            make(dtype=dtype)
        assert "\n" not in str(raised.value) and not list(make.root.iterdir())


# --- names and probes -------------------------------------------------------------------------------------------------


def encoded(backbone: Backbone, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(backbone.encode_image(pixels))


@pytest.mark.parametrize("name", TINY)
def test_a_name_depends_on_all_that_images_are_encoded_with(name: str, tmp_path: Path) -> None:
    """Weight by weight: what moves ``encode_image`` gives another name; what stage 2 trains moves neither."""
    backbone = tiny_backbone(name, tmp_path)
    backbone.freeze_image_side()
    parts, pixels = stored_parts("float32"), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    named, given = fingerprint(backbone, {}, parts), encoded(backbone, pixels)
    side, trained = backbone.image_state().keys(), {n for n, p in backbone.named_parameters() if p.requires_grad}
    moving = set()
    for key, value in backbone.state_dict().items():
        before = value.clone()
        with torch.no_grad():
            value.add_(1 if not value.is_floating_point() else torch.rand(value.shape))
        moved = not all(torch.equal(a, b) for a, b in zip(encoded(backbone, pixels), given, strict=True))
        assert (fingerprint(backbone, {}, parts) != named) == (key in side), key
        assert key in side or not moved, key
        assert key not in trained or (not moved and key not in side), key
        moving |= {key} if moved else set()
        value.copy_(before)
    assert fingerprint(backbone, {}, parts) == named and trained
    assert len(moving) > 10 and moving <= side


class Forgetful(CLIP4CIR):
    """Encodes images through a layer that it does not name, and that queries move."""

    name = "forgetful"
    right = False

    def __init__(self, train_clip: bool = True):
        super().__init__()
        self.options = {"train_clip": train_clip}
        self.layer = torch.nn.Linear(128, 128)
        torch.nn.init.eye_(self.layer.weight)
        self.shake = torch.nn.Dropout()

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        features = super().encode_image(pixels)
        return ImageFeatures(features.reference, F.normalize(self.layer(features.target), dim=-1))

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        found = super().compose(reference, tokens)
        return found if self.right else Composed(F.normalize(self.layer(found.query), dim=-1))

    def image_side(self) -> list[torch.nn.Module | torch.nn.Parameter]:
        return [*super().image_side(), *([self.layer] if self.right else [])]


class Shaky(Forgetful):
    """Encodes images in another way while it trains: a layer without weights is nobody's to freeze."""

    right, share = True, 0.5

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        features = super().encode_image(pixels)
        return ImageFeatures(F.dropout(features.reference, self.share, self.shake.training), features.target)

    def train(self, mode: bool = True) -> "Shaky":
        Backbone.train(self, mode)
        return self


@pytest.mark.parametrize(("kind", "right"), [
    (Forgetful, False), (type("Right", (Forgetful,), {"right": True}), True),
    (Shaky, False), (type("Still", (Shaky,), {"share": 0.0}), True),
], ids=["forgetful", "right", "shaky", "still"])  # fmt: skip
def test_a_stale_bank_stops_the_run(configure, tmp_path: Path, monkeypatch, kind, right: bool) -> None:  # type: ignore[no-untyped-def]
    """One line that says so, before anything of the run is saved; a model that keeps its promise is let through."""
    monkeypatch.setitem(BACKBONES, kind.name, kind)
    save_model(tmp_path / "init", kind(), {})
    config = configure(
        init=str(tmp_path / "init"), backbone=kind.name, output=str(tmp_path / "run"), max_steps=2, dropout=True,
        eval_every=0,
    )  # fmt: skip
    if right:
        assert (train(config, 2) / "result.json").is_file()
        return
    with pytest.raises(InputError, match=r"forgetful: encode_image .*the bank is stale") as raised:
        train(config, 2)
    assert "\n" not in str(raised.value)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "metrics.jsonl"}
