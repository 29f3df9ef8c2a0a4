"""Looking at image files, classes of equal pixels, and the published file of classes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spn4cir import identity
from spn4cir.errors import InputError
from spn4cir.identity import Inspected, canonical_ids, inspect_images, read_optimized, write_optimized
from spn4cir.images import open_image, pixel_hash
from spn4cir.types import ImageRef


def noise(seed: int = 0, width: int = 24, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def refs(paths: dict[str, Path]) -> dict[str, ImageRef]:
    return {image_id: ImageRef(path) for image_id, path in paths.items()}


def look(paths: dict[str, Path], **options: object) -> dict[str, Inspected]:
    return inspect_images(refs(paths), show=False, **options)  # type: ignore[arg-type]


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """37 images: 30 different ones, 7 copies."""
    paths = {f"i{n}": tmp_path / f"i{n}.png" for n in range(37)}
    for n, path in enumerate(paths.values()):
        noise(n % 30).save(path)
    return paths


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files are decoded."""
    opened: list[Path] = []
    decode = identity.decode
    monkeypatch.setattr(identity, "decode", lambda path: (opened.append(path), decode(path))[1])
    return opened


# --- looking at files


@pytest.mark.parametrize("workers", [1, 3, None])
@pytest.mark.parametrize("block", [1, 5, 16, 100])
def test_order_and_hashes(
    pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch, workers: int | None, block: int
) -> None:
    """Whatever the workers and the blocks, ragged ones too: the hash of each image, in the order that was given."""
    monkeypatch.setattr(identity, "BLOCK", block)
    backwards = dict(reversed(pictures.items()))
    found = look(backwards, workers=workers)
    assert [(i, one.pixels) for i, one in found.items()] == [
        (i, pixel_hash(open_image(p))) for i, p in backwards.items()
    ]
    assert all(one == Inspected(one.pixels, "", "", (24, 24), False, one.small) for one in found.values())


def test_nothing_to_look_at() -> None:
    """No image, no entry."""
    assert look({}) == {}


def test_ids_that_share_a_file(pictures: dict[str, Path], decoded: list[Path]) -> None:
    """A file is decoded once, and each of its ids has the result."""
    found = look({"a": pictures["i1"], "b": pictures["i2"], "c": pictures["i1"]})
    assert list(found) == ["a", "b", "c"] and found["a"] == found["c"] != found["b"]
    assert len(decoded) == 2


def test_what_is_under_way_is_bounded(pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images there are, few are handed out before their results are taken."""
    monkeypatch.setattr(identity, "BLOCK", 1)
    monkeypatch.setattr(identity, "AHEAD", 2)
    taken: list[ImageRef] = []
    monkeypatch.setattr(identity, "_look", lambda image, known, read: taken.append(image))
    blocks = identity._blocks(list(refs(pictures).values()), {}, identity.decode, workers=2)
    for number, _ in enumerate(blocks, 1):
        assert len(taken) <= number + 3
    assert number == len(taken) == 37


def test_an_interrupt_ends_it(pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is dropped, not worked off."""
    monkeypatch.setattr(identity, "BLOCK", 1)
    taken: list[Path] = []

    def interrupted(path: Path, known: object, read: object) -> None:
        taken.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(identity, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        look(pictures, workers=1)
    assert len(taken) <= 5


# --- what is wrong with a file

FORMATS: dict[str, dict[str, object]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG"},
    "progressive.jpg": {"format": "JPEG", "progressive": True},
    "webp": {"format": "WEBP", "lossless": True},
    "lossy.webp": {"format": "WEBP"},
    "gif": {"format": "GIF"},
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.95])
def test_a_cut_file_is_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    """Cut in its header, in the middle or shortly before its end; whole, it is no problem."""
    path = tmp_path / f"a.{suffix}"
    noise(0, 64, 64).save(path, **FORMATS[suffix])  # type: ignore[arg-type]
    assert look({"a": path})["a"].problem == ""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    pixels, problem, detail = look({"a": path})["a"][:3]
    assert (pixels, problem) == ("", "truncated") and detail and "\n" not in detail


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_cut_is_whole_or_a_problem(tmp_path: Path, suffix: str) -> None:
    """Wherever a file ends it is unreadable, then truncated, then (only its last bytes missing) the same picture."""
    whole = tmp_path / f"a.{suffix}"
    noise(0, 16, 16).save(whole, **FORMATS[suffix])  # type: ignore[arg-type]
    content, right = whole.read_bytes(), look({"a": whole})["a"]
    paths = {str(cut): tmp_path / f"{cut}.{suffix}" for cut in range(len(content))}
    for cut, path in enumerate(paths.values()):
        path.write_bytes(content[:cut])
    found = list(look(paths).values())
    problems = [one.problem for one in found]
    assert problems == sorted(problems, key=["unreadable", "truncated", ""].index)
    assert problems.count("unreadable") <= 12 and problems.count("") <= 20
    assert all(one == right for one in found if not one.problem)


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path, "PNG")


def corrupt(path: Path) -> None:
    noise().save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[45:60] = bytes(15)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("make", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("no image, though long enough to be one\n" * 9),
    lambda path: path.mkdir(),
    lambda path: os.mkfifo(path),
    lambda path: path.symlink_to(path),
    bomb,
    corrupt,
], ids=["empty", "text", "folder", "pipe", "circle of links", "bomb", "corrupt"])  # fmt: skip
def test_unreadable(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Whatever a file holds, it stops nothing, and one line says what is wrong, also where a name says otherwise."""
    path = tmp_path / "truncated.png"
    make(path)
    noise().save(tmp_path / "good.png")
    found = look({"bad": path, "good": tmp_path / "good.png"})
    assert found["bad"][:2] == ("", "unreadable") and found["bad"].detail and "\n" not in found["bad"].detail
    assert found["good"].pixels and not found["good"].problem


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be read is unreadable (root may read all, so the error is made here)."""
    noise().save(tmp_path / "a.png")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(identity, "decode", refuse)
    assert look({"a": tmp_path / "a.png"})["a"].problem == "unreadable"


def test_missing(tmp_path: Path) -> None:
    """No file, a link to nowhere, a file in the place of a folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("none.png", "link", "file/a.png"):
        assert look({"a": tmp_path / name})["a"].problem == "missing"


# --- images that are not files


def test_bytes_and_boxes(pictures: dict[str, Path], tmp_path: Path, decoded: list[Path]) -> None:
    """An image of bytes hashes as its file does, and is in no cache; a part of a file is another image."""
    path, cache = pictures["i1"], tmp_path / "cache.jsonl"
    images = {
        "file": ImageRef(path),
        "bytes": ImageRef(path.read_bytes, name="row 1"),
        "part": ImageRef(path, (2, 3, 10, 12)),
        "cut": ImageRef(lambda: path.read_bytes()[:200], name="row 2"),
        "none": ImageRef(lambda: b"", name="row 3"),
    }
    first = inspect_images(images, cache, show=False)
    assert first["file"] == first["bytes"] and not first["file"].problem
    assert first["part"].pixels == pixel_hash(open_image(path).crop((2, 3, 10, 12))) != first["file"].pixels
    assert (first["cut"].problem, first["none"].problem) == ("truncated", "unreadable")
    assert len(cache.read_text().splitlines()) == 2 and len(decoded) == 5
    again = inspect_images(images, cache, show=False)
    assert [one[:2] for one in again.values()] == [one[:2] for one in first.values()] and len(decoded) == 8


# --- the cache


def test_what_is_known_is_not_opened(pictures: dict[str, Path], tmp_path: Path, decoded: list[Path]) -> None:
    """A second look opens nothing, from another folder too; a new image is added."""
    cache = tmp_path / "deep" / "cache.jsonl"
    some = dict(list(pictures.items())[:20])
    first = look(some, cache=cache)
    assert len(decoded) == 20 == len(cache.read_text().splitlines())
    assert look(some, cache=cache) == first == look(some)
    assert len(decoded) == 40  # the look without the cache
    look(pictures, cache=cache)
    assert len(decoded) == 57


def test_relative_paths_are_known_too(
    pictures: dict[str, Path], tmp_path: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache does not mix up files of the same relative name in two folders."""
    cache, other = tmp_path / "cache.jsonl", tmp_path / "other"
    other.mkdir()
    shutil.copy2(pictures["i1"], other / "i0.png")
    monkeypatch.chdir(tmp_path)
    here = look({"a": Path("i0.png")}, cache=cache)
    monkeypatch.chdir(other)
    there = look({"a": Path("i0.png")}, cache=cache)
    assert here != there and len(decoded) == 2
    assert look({"a": pictures["i0"]}, cache=cache) == here and len(decoded) == 2


def replace_keeping_size(path: Path) -> None:
    Image.frombytes("RGB", (2, 2), bytes(12)).save(path, "BMP")
    os.utime(path, ns=(1, 1))


def replace_keeping_time(path: Path) -> None:
    Image.frombytes("RGB", (2, 9), bytes(54)).save(path, "BMP")
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [replace_keeping_size, replace_keeping_time])
def test_a_changed_file_is_seen(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Another time or another size: decoded again, and then the new one is known."""
    path, cache = tmp_path / "a.bmp", tmp_path / "cache.jsonl"
    Image.frombytes("RGB", (2, 2), bytes(range(12))).save(path)
    os.utime(path, ns=(0, 0))
    before = look({"a": path}, cache=cache)
    change(path)
    after = look({"a": path}, cache=cache)
    assert after == look({"a": path}) != before
    assert look({"a": path}, cache=cache) == after and len(cache.read_text().splitlines()) == 2


def test_a_file_that_changes_meanwhile_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels may be of before and its time of after."""
    path, cache = tmp_path / "a.png", tmp_path / "cache.jsonl"
    noise().save(path)
    decode = identity.decode
    monkeypatch.setattr(identity, "decode", lambda p: (decode(p), os.utime(p.path, ns=(5, 5)))[0])
    assert look({"a": path}, cache=cache)["a"].pixels and cache.read_text() == ""


def test_problems_are_not_kept(tmp_path: Path, decoded: list[Path]) -> None:
    """A broken file is looked at each time."""
    (tmp_path / "a.png").write_bytes(b"")
    for _ in range(2):
        look({"a": tmp_path / "a.png", "b": tmp_path / "none.png"}, cache=tmp_path / "cache.jsonl")
    assert len(decoded) == 4 and (tmp_path / "cache.jsonl").read_text() == ""


@pytest.mark.parametrize("cut", [1, 2, 40, 150])
def test_a_torn_cache(pictures: dict[str, Path], tmp_path: Path, decoded: list[Path], cut: int) -> None:
    """What a kill tore off the last line is decoded again, and stands on a line of its own."""
    cache = tmp_path / "cache.jsonl"
    right = look(pictures, cache=cache)
    cache.write_bytes(cache.read_bytes()[:-cut])
    decoded.clear()
    assert look(pictures, cache=cache) == right and len(decoded) == 1
    assert look(pictures, cache=cache) == right and len(decoded) == 1


DAMAGES: list[Callable[[dict[str, object]], object]] = [
    lambda row: [row],
    lambda row: None,
    lambda row: {**row, "pixels": "0" * 63},
    lambda row: {**row, "pixels": 7},
    lambda row: {**row, "mtime_ns": "soon"},
    lambda row: {**row, "path": None},
    lambda row: {name: value for name, value in row.items() if name != "size"},
    lambda row: {**row, "by": "0/pillow 1.0"},  # another decoder may give other pixels
    lambda row: {**row, "by": row["by"].replace("2/", "1/")},  # as our own reading of pixels did before
    lambda row: {**row, "small": "f"},
    lambda row: {**row, "small": "ff"},
    lambda row: {**row, "extent": [24]},
    lambda row: {**row, "plain": None},
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache(
    pictures: dict[str, Path], tmp_path: Path, decoded: list[Path], damage: Callable[[dict[str, object]], object]
) -> None:
    """A line that is not whole or of another version is as good as none; the others count."""
    cache = tmp_path / "cache.jsonl"
    right = look(pictures, cache=cache)
    lines = cache.read_text().splitlines()
    lines[3] = json.dumps(damage(json.loads(lines[3])))
    cache.write_text("\n".join([*lines, "", "\x00\xff", "[" * 100_000, ""]), encoding="latin-1")
    decoded.clear()
    assert look(pictures, cache=cache) == right and len(decoded) == 1


def test_two_processes_add_to_one_cache(pictures: dict[str, Path], tmp_path: Path, decoded: list[Path]) -> None:
    """Both have the file open at once; all lines are whole."""
    cache, names = tmp_path / "cache.jsonl", list(pictures)
    with identity._Cache(cache, []) as one, identity._Cache(cache, []) as two:
        for n, name in enumerate(names):
            image = ImageRef(pictures[name])
            stamp = identity.image_stamp(image)
            assert stamp is not None
            (one if n % 2 else two).add(image, stamp, inspect_images({name: image}, show=False)[name])
    decoded.clear()
    assert look(pictures, cache=cache) == look(pictures) and len(decoded) == 37


def test_without_a_place_for_the_cache(
    pictures: dict[str, Path], tmp_path: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be made, a folder in its place, a read-only one that holds it, a full disk: no crash."""
    right = look(pictures)
    assert look(pictures, cache=pictures["i0"] / "cache.jsonl") == right
    assert look(pictures, cache=tmp_path) == right
    cache = tmp_path / "cache.jsonl"
    look(pictures, cache=cache)
    decoded.clear()

    def refuse(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert look(pictures, cache=cache) == right and not decoded  # what it knows still helps
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        assert look(pictures, cache=tmp_path / "other.jsonl") == right


# --- classes


def test_first_of_each_class() -> None:
    """In order; what has no hash stands for itself."""
    hashes = {"c": "1", "a": "2", "b": "1", "x": "", "d": "2", "y": "", "e": "3"}
    assert list(canonical_ids(hashes).items()) == [
        ("c", "c"), ("a", "a"), ("b", "c"), ("x", "x"), ("d", "a"), ("y", "y"), ("e", "e"),
    ]  # fmt: skip
    assert canonical_ids({}) == {}


# --- the published file

CANONICAL = {"c": "c", "a ä\n": "a ä\n", "b": "c", "d": "a ä\n", "e": "e"}
PATHS = refs({name: Path("images") / f"{name}.png" for name in CANONICAL})


def test_published_shape_and_back(tmp_path: Path) -> None:
    """Three parts, classes in order of first occurrence; it reads as it was written, and nothing is left beside it."""
    path = tmp_path / "optimized_images.json"
    write_optimized(path, CANONICAL, PATHS)
    assert json.loads(path.read_text()) == [
        ["c", "a ä\n", "e"],
        ["images/c.png", "images/a ä\n.png", "images/e.png"],
        {"c": 0, "a ä\n": 1, "b": 0, "d": 1, "e": 2},
    ]
    assert list(read_optimized(path).items()) == list(CANONICAL.items())
    assert list(tmp_path.iterdir()) == [path]
    write_optimized(path, {}, {})
    assert read_optimized(path) == {}


def test_a_canonical_image_may_come_later(tmp_path: Path) -> None:
    """In a published file, too, the canonical name need not be the first of its class."""
    write_optimized(tmp_path / "o.json", {"b": "a", "c": "c", "a": "a"}, PATHS | refs({"a": Path("a")}))
    assert read_optimized(tmp_path / "o.json") == {"b": "a", "c": "c", "a": "a"}
    assert json.loads((tmp_path / "o.json").read_text())[0] == ["a", "c"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """A chain of classes, a canonical image without a path: one line, and the old file is whole."""
    path = tmp_path / "o.json"
    write_optimized(path, CANONICAL, PATHS)
    before = path.read_bytes()
    with pytest.raises(InputError, match="'b' is to stand for 'a', but does not stand for itself"):
        write_optimized(path, {"a": "b", "b": "c", "c": "c"}, PATHS)
    with pytest.raises(InputError, match="'z' has no path"):
        write_optimized(path, {"z": "z"}, PATHS)
    assert path.read_bytes() == before


GOOD: list[object] = [["a", "b"], ["x/a.png", "../b"], {"a": 0, "b": 1, "c": 0}]


@pytest.mark.parametrize(("content", "told"), [
    ('[["a"', "is not valid JSON, or cut short"),
    ("", "is not valid JSON, or cut short"),
    (b"\xff\xfe\xfd", "is not valid JSON, or cut short"),
    ("[" * 100_000, "is not valid JSON, or cut short"),
    ({"a": 0}, "expected an array of 3 parts .* found dict"),
    (GOOD[:2], "expected an array of 3 parts .* found an array of 2"),
    ([*GOOD, 0], "found an array of 4"),
    ([{"a": 0}, *GOOD[1:]], "part 1: expected an array of strings, found dict"),
    ([GOOD[0], "ab", GOOD[2]], "part 2: expected an array of strings, found str"),
    ([["a", 7], *GOOD[1:]], "part 1, entry 1: expected a string, found 7"),
    ([GOOD[0], ["x", None], GOOD[2]], "part 2, entry 1: expected a string, found None"),
    ([GOOD[0], ["x"], GOOD[2]], "part 2: 1 paths for the 2 names"),
    ([*GOOD[:2], [0, 1]], "part 3: expected an object, found list"),
    ([*GOOD[:2], {"a": 0, "b": 1, "c": "0"}], "part 3, entry 'c': expected a class id, found '0'"),
    ([*GOOD[:2], {"a": 0, "b": 1, "c": 0.0}], "part 3, entry 'c': expected a class id"),
    ([*GOOD[:2], {"a": False, "b": 1}], "part 3, entry 'a': expected a class id, found False"),
    ([*GOOD[:2], {"a": 0, "b": 1, "c": 2}], "part 3, entry 'c': class id 2 is not in 0 to 1"),
    ([*GOOD[:2], {"a": 0, "b": 1, "c": -1}], "part 3, entry 'c': class id -1"),
    ([*GOOD[:2], {"a": 0, "b": 0}], "part 1, entry 1: part 3 maps 'b' to class 0"),
    ([*GOOD[:2], {"a": 0, "c": 1}], "part 1, entry 1: part 3 lacks 'b'"),
    ([["a", "a"], *GOOD[1:]], "part 1, entry 1: part 3 maps 'a' to class 0"),
    ('[["a"], ["x"], {"a": 0, "b": 0, "b": 0}]', "the key \"b\" occurs twice"),
    ([*GOOD[:2], {"a": 0, "b": 1, "c\nd" * 50: 2}], r"part 3, entry 'c\\nd"),
])  # fmt: skip
def test_a_damaged_file_is_an_error_of_one_line(tmp_path: Path, content: object, told: str) -> None:
    """File, part and entry are named."""
    path = tmp_path / "o.json"
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    with pytest.raises(InputError, match=told) as caught:
        read_optimized(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 200


def test_names_are_only_names(tmp_path: Path) -> None:
    """Negative control: a good file whose paths lead nowhere, or out of the folder, reads all the same."""
    path = tmp_path / "o.json"
    path.write_text(json.dumps(GOOD))
    assert read_optimized(path) == {"a": "a", "b": "b", "c": "a"}
    with pytest.raises(InputError, match="is missing"):
        read_optimized(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_optimized(tmp_path)
