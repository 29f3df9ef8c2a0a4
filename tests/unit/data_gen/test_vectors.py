"""Stored vectors: the same bytes however often they were interrupted and however many processes made them."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import Toy
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from spn4cir import store as stores
from spn4cir.backbones import build_backbone
from spn4cir.data_gen.matchers import Matcher, identify, load_matcher
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.data_gen.windows import encode_vectors, open_store
from spn4cir.distributed import Processes, own_device
from spn4cir.errors import InputError
from spn4cir.files import write_jsonl
from spn4cir.images import ImageSource
from spn4cir.store import EmbeddingStore

WIDTH, AT_ONCE = 5, 3


class Counting:
    """A tiny matcher that notes how many images it saw."""

    def __init__(self, wait: float = 0.0):
        torch.manual_seed(0)
        layer = nn.Linear(12, WIDTH)
        self.seen: list[int] = []

        def encode(pixels: Tensor) -> Tensor:
            time.sleep(wait)
            self.seen.append(len(pixels))
            return nn.functional.normalize(layer(pixels.flatten(1)), dim=1)

        self.matcher = Matcher(layer, transform, encode, {"kind": "tiny", "model": "x", "weights": None}, "all of it")


def transform(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture.resize((2, 2)), np.float32).transpose(2, 0, 1) / 255)


def config_of(folder: Path, toy: Toy, **settings: Any) -> GenerateConfig:
    config = GenerateConfig(output=str(folder), **{"match_batch_size": AT_ONCE, **settings})
    if not config.file("images.jsonl").exists():
        write_jsonl(config.file("images.jsonl"), ({"image_id": i, "pixels": i} for i in toy.training_images()))
    return config


def encoded(folder: Path, toy: Toy, matcher: Matcher | None = None, processes: Processes | None = None) -> Any:
    config, ids = config_of(folder, toy), toy.training_images()
    matcher = matcher or Counting().matcher
    store = open_store(config, ids, matcher.made_by)
    return encode_vectors(store, toy, ids, lambda: matcher, processes or Processes())


def key_of(config: GenerateConfig, ids: Sequence[str], matcher: dict[str, Any]) -> str:
    return open_store(config, ids, matcher).key


def by_hand(toy: Toy) -> Tensor:
    """All images in blocks of three, without any of the machinery."""
    matcher, ids = Counting().matcher, toy.training_images()
    images = ImageSource(toy.image, matcher.transform)
    return torch.cat([matcher.encode(images.stack(ids[n : n + AT_ONCE])) for n in range(0, len(ids), AT_ONCE)])


def finished(folder: Path) -> bytes:
    """The one file of vectors; nothing of the work is left beside it."""
    [store] = (folder / "vectors").iterdir()
    assert sorted(path.name for path in store.iterdir()) == ["store.json", "vectors.npy"]
    return (store / "vectors.npy").read_bytes()


@pytest.fixture
def whole(tmp_path: Path, toy: Toy) -> bytes:
    """The bytes of an uninterrupted run."""
    encoded(tmp_path / "whole", toy)
    return finished(tmp_path / "whole")


def test_every_image_once(tmp_path: Path, toy: Toy) -> None:
    """Row n is image n's vector, bit by bit; after that nothing is encoded, and what is read lies on the disk."""
    counting = Counting()
    found = encoded(tmp_path / "x", toy, counting.matcher)
    path = next((tmp_path / "x" / "vectors").glob("*/vectors.npy"))
    assert str(path) in Path("/proc/self/maps").read_text()
    assert found.dtype == np.float32 and found.shape == (41, WIDTH)
    assert torch.equal(torch.from_numpy(found), by_hand(toy))
    assert not torch.equal(torch.from_numpy(found), by_hand(toy).flip(0))
    assert counting.seen == [1] + [3] * 13 + [2]  # the first image tells the width
    again = Counting()
    np.testing.assert_array_equal(encoded(tmp_path / "x", toy, again.matcher), found)
    assert again.seen == []
    found[0] = 7  # a reader's slip does not reach the file
    assert torch.equal(torch.from_numpy(encoded(tmp_path / "x", toy)), by_hand(toy))


def test_the_embedded_matcher(tmp_path: Path, toy: Toy) -> None:
    """Bit by bit what the old loop made: blocks of 256 target vectors of the clip4cir backbone."""
    config, ids = config_of(tmp_path / "x", toy, match_batch_size=256), toy.training_images()
    store = open_store(config, ids, identify("embedded"))
    assert store.open() is None
    found = encode_vectors(store, toy, ids, lambda: load_matcher("embedded"), Processes())
    backbone = build_backbone("clip4cir", model="embedded", pretrained=None).eval()
    with torch.inference_mode():
        expected = backbone.encode_target(ImageSource(toy.image, backbone.transform).stack(ids))[:, 0]
    assert torch.equal(torch.from_numpy(found), expected)
    stored = open_store(config, ids, identify("embedded")).open()
    assert stored is not None and torch.equal(stored["vectors"].whole(), expected)


def test_made_by(tmp_path: Path, toy: Toy) -> None:
    """Other images, another order, another matcher or block size are other vectors; a window or a seed is not."""
    config, ids, matcher = config_of(tmp_path, toy), toy.training_images(), {"kind": "tiny", "weights": "a"}
    base = key_of(config, ids, matcher)
    for same in ({"window": [2, 5]}, {"seed": 7}, {"pairs_per_image": 9}, {"words": 3}):
        assert key_of(config_of(tmp_path, toy, **same), ids, matcher) == base
    others = [
        key_of(config_of(tmp_path, toy, match_batch_size=4), ids, matcher),
        key_of(config, ids[::-1], matcher),
        key_of(config, ids[1:], matcher),
        key_of(config, ids, {**matcher, "weights": "b"}),
    ]
    write_jsonl(config.file("images.jsonl"), [{"image_id": i, "pixels": "other"} for i in ids])
    others.append(key_of(config, ids, matcher))
    assert len({base, *others}) == 6


def test_other_vectors_stay(tmp_path: Path, toy: Toy) -> None:
    """Another matcher's vectors, or its unfinished ones, are not touched."""
    folder = tmp_path / "x"
    encoded(folder, toy)
    old = {path: path.read_bytes() for path in folder.glob("vectors/*/*")}
    (folder / "vectors" / "0123").mkdir()
    (folder / "vectors" / "0123" / "vectors.npy").write_bytes(b"other")
    other = Counting().matcher
    other.made_by = {"kind": "tiny", "model": "y"}
    encoded(folder, toy, other)
    assert len(old) == 2 and all(path.read_bytes() == content for path, content in old.items())
    assert (folder / "vectors" / "0123" / "vectors.npy").read_bytes() == b"other"
    assert len(list(folder.glob("vectors/*/store.json"))) == 2


class Killed(BaseException):
    """What no code catches."""


def kill_at(place: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Die before or after the so-many-th change of a file; returns what has been passed."""
    passed: list[str] = []

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **words: Any) -> Any:
            for moment in ("before", "after"):
                if moment == "after":
                    result = call(*args, **words)
                if len(passed) == place:
                    raise Killed  # a dead process changes nothing
                passed.append(f"{moment} {name}")
                if len(passed) == place:
                    raise Killed
            return result

        return wrapped

    for owner, name in ((EmbeddingStore, "create"), (EmbeddingStore, "write"), (EmbeddingStore, "flush"),
                        (EmbeddingStore, "finish"), (os, "replace"), (os, "fsync")):  # fmt: skip
        monkeypatch.setattr(owner, name, around(name, getattr(owner, name)))
    return passed


def test_killed_anywhere(tmp_path: Path, toy: Toy, whole: bytes) -> None:
    """At each point between two changes of a file: going on gives the same bytes and encodes no noted block again."""
    place, seen, names = 1, set(), set[str]()
    while True:
        folder = tmp_path / f"killed {place}"
        with pytest.MonkeyPatch.context() as patch:
            passed = kill_at(place, patch)
            try:
                encoded(folder, toy)
                break
            except Killed:
                names.add(passed[-1])
        blocks = min(sum(name == "after flush" for name in passed), 14)
        counting = Counting()
        encoded(folder, toy, counting.matcher)
        assert finished(folder) == whole
        assert sum(counting.seen) <= 41 - AT_ONCE * blocks + 1
        seen.add(blocks)
        place += 1 if place < 12 or place > 52 else 5  # each point of the first two and last two blocks
    assert seen >= {0, 1, 2, 13, 14}
    assert names == {
        f"{m} {n}" for m in ("before", "after") for n in ("create", "write", "flush", "finish", "replace", "fsync")
    }


def encode_and_die(folder: Path, toy: Toy) -> None:
    """For a forked process: one that is killed while it holds the lock of progress bars would keep it for ever."""
    tqdm.set_lock(threading.RLock())
    encoded(folder, toy, Counting(0.02).matcher)


def test_sigkill(tmp_path: Path, toy: Toy, whole: bytes) -> None:
    """Killed by the system at random moments, again and again, until it is through."""
    folder, draw, context = tmp_path / "x", random.Random(4), multiprocessing.get_context("fork")
    kills = 0
    for attempt in range(60):
        process = context.Process(target=encode_and_die, args=(folder, toy))
        process.start()
        process.join(draw.uniform(0.02, 0.15) * (1 + attempt / 5))  # a busy machine gets further too
        if process.exitcode is None and process.pid:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert kills >= 2 and process.exitcode == 0
    assert finished(folder) == whole


class Threads(Processes):
    """Processes that are threads of this one."""

    def __init__(self, index: int, barrier: threading.Barrier):
        self.index, self.count, self._barrier = index, barrier.parties, barrier

    def wait(self) -> None:
        self._barrier.wait(20)


def in_parallel(folder: Path, toy: Toy, count: int) -> list[int]:
    """How many images each process encoded."""
    config_of(folder, toy)
    barrier, counters, wrong = threading.Barrier(count), [Counting() for _ in range(count)], list[BaseException]()

    def run(index: int) -> None:
        try:
            encoded(folder, toy, counters[index].matcher, Threads(index, barrier))
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    return [sum(counter.seen) for counter in counters]


@pytest.mark.parametrize(("count", "images"), [(2, [22, 20]), (3, [16, 14, 12]), (20, [4] + [3] * 12 + [2] + [0] * 6)])
def test_several_processes(tmp_path: Path, toy: Toy, whole: bytes, count: int, images: list[int]) -> None:
    """They share the blocks and give the same file; more processes than blocks do no harm."""
    assert in_parallel(tmp_path / "x", toy, count) == images  # the first encodes one image for the width
    assert finished(tmp_path / "x") == whole


def test_another_number_of_processes_goes_on(tmp_path: Path, toy: Toy, whole: bytes) -> None:
    """What one process began, three finish; each block is encoded once."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(28, patch)
        encoded(tmp_path / "x", toy)
    assert 0 < sum(in_parallel(tmp_path / "x", toy, 3)) < 41
    assert finished(tmp_path / "x") == whole


def test_a_damaged_file_is_made_anew(tmp_path: Path, toy: Toy, whole: bytes) -> None:
    """Vectors that were cut off or removed after they were finished; work in progress whose rows are gone."""
    folder = tmp_path / "x"
    encoded(folder, toy)
    path = next(folder.glob("vectors/*/vectors.npy"))
    path.write_bytes(whole[:-4])
    encoded(folder, toy)
    assert finished(folder) == whole
    path.unlink()
    encoded(folder, toy)
    assert finished(folder) == whole
    path.unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(28, patch)
        encoded(folder, toy)
    path.unlink()
    assert (path.parent / "begun.json").is_file()
    encoded(folder, toy)
    assert finished(folder) == whole


def test_a_full_disk(tmp_path: Path, toy: Toy, whole: bytes) -> None:
    """Beforehand: how much is needed and free. In the middle: one line; what was encoded stays."""
    with pytest.MonkeyPatch.context() as patch:
        wide = Counting().matcher
        wide._vectors = lambda pixels: nn.functional.normalize(torch.ones(len(pixels), 5000), dim=1)
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=8e5))
        with pytest.raises(InputError, match=r"encoding 41 images needs 0\.00082 GB in .* 0\.0008 GB are free"):
            encoded(tmp_path / "wide", toy, wide)
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=83e4))
        assert encoded(tmp_path / "wide", toy, wide).shape == (41, 5000)
    fsync, calls = os.fsync, iter(range(99))

    def full(number: int) -> None:
        if next(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"vectors\.npy cannot be written: No space left .* goes on from there"):
            encoded(tmp_path / "x", toy)
    counting = Counting()
    encoded(tmp_path / "x", toy, counting.matcher)
    assert sum(counting.seen) == 41 - 6 * AT_ONCE
    assert finished(tmp_path / "x") == whole


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 2.0])
def test_a_vector_that_is_none(tmp_path: Path, toy: Toy, value: float) -> None:
    """Not finite, without direction or not of unit norm: the image is named, and the block is not noted."""
    layer, draw = nn.Linear(1, 1), iter(range(99))

    def encode(pixels: Tensor) -> Tensor:
        found = torch.eye(WIDTH)[: len(pixels)]
        if next(draw) == 3:
            found[1] *= value
        return found

    matcher = Matcher(layer, transform, encode, {"kind": "tiny", "model": "x"}, "all of it")
    image = toy.training_images()[2 * AT_ONCE + 1]
    with pytest.raises(
        InputError, match=rf"image .*{image}\.png: its vector by tiny x has the length (nan|inf|0|2), not 1"
    ):
        encoded(tmp_path / "x", toy, matcher)
    note = json.loads(next((tmp_path / "x").glob("vectors/*/begun.json")).read_text())
    assert note["done"] == "11" + 12 * "0"


def test_an_image_that_is_gone(tmp_path: Path, toy: Toy, whole: bytes) -> None:
    """It is named; once it is back, the work goes on."""
    path = Path(str(toy.image(toy.training_images()[20])))
    path.rename(tmp_path / "away.png")
    with pytest.raises(InputError, match=rf"image .*{path.name} is missing"):
        encoded(tmp_path / "x", toy)
    (tmp_path / "away.png").rename(path)
    counting = Counting()
    encoded(tmp_path / "x", toy, counting.matcher)
    assert sum(counting.seen) == 41 - 6 * AT_ONCE and finished(tmp_path / "x") == whole


def test_images_that_do_not_stack(tmp_path: Path, toy: Toy) -> None:
    """A preprocessing without a size is refused by name of the images."""
    matcher, sizes = Counting().matcher, iter(range(2, 99))
    matcher.transform = lambda picture: torch.zeros(3, 2, next(sizes))
    matcher._vectors = lambda pixels: torch.eye(WIDTH)[: len(pixels)]
    with pytest.raises(InputError, match=r"images twin … i01 do not become equally large"):
        encoded(tmp_path / "x", toy, matcher)


def test_decoding_is_ahead_but_bounded(tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block is encoded, the next one is decoded, and no more: memory does not grow with the dataset."""
    counting, decoded, most = Counting(0.01), list[str](), list[int]()
    image = toy.image
    monkeypatch.setattr(toy, "image", lambda image_id: decoded.append(image_id) or image(image_id))
    inner = counting.matcher._vectors

    def encode(pixels: Tensor) -> Tensor:
        time.sleep(0.03)  # long enough for all decoding that was asked for
        most.append(len(decoded) - 1 - sum(counting.seen[1:]))
        return inner(pixels)

    counting.matcher._vectors = encode
    encoded(tmp_path / "x", toy, counting.matcher)
    assert max(most[1:]) == 2 * AT_ONCE


@pytest.fixture(autouse=True)
def each_block_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than what was written in some seconds."""
    monkeypatch.setattr(stores, "SECONDS", -1)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bits are compared with what is computed on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for each process of a machine; more processes than GPUs share them."""
    assert own_device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert own_device() == device


def test_too_many_at_once(tmp_path: Path, toy: Toy) -> None:
    """A device without room for a block: one line that names the setting."""
    matcher = Counting().matcher

    def encode(pixels: Tensor) -> Tensor:
        if len(pixels) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.eye(WIDTH)[:1]

    matcher._vectors = encode
    with pytest.raises(InputError, match="3 images at once are too many for the memory of cpu: lower match_batch_size"):
        encoded(tmp_path / "x", cast(Toy, toy), matcher)
