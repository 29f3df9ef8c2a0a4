"""Images whose pixels are equal: found by content in one parallel pass, kept in the published optimized_images.json.

Time is linear in the number of images: each is decoded once and reduced to the hash of its pixels, and equal hashes are
one class. Only as many decoded images as there are workers are in memory at any time.
"""

import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from spn4cir.distributed import cpu_count
from spn4cir.errors import InputError
from spn4cir.files import read_json, write_text
from spn4cir.images import StoredBytes, decode, is_vector, pixel_hash, read_content, read_vector
from spn4cir.near_duplicates import GRID, near_duplicate_ids, small_version
from spn4cir.types import ImageRef

Problem: TypeAlias = Literal["", "missing", "truncated", "unreadable"]
Stamp: TypeAlias = tuple[int, int]  # size in bytes and time of the last change in nanoseconds

PUBLISHED_CLASSES = "optimized_images.json"
BLOCK = 16  # images that a worker takes at once: small ones would otherwise cost more to hand out than to decode
AHEAD = 4  # blocks that are handed out for each worker: a large image does not stop the others
MADE_BY = f"2/pillow {PIL.__version__}"
"""The version of our own reading of pixels, which changes with it, and Pillow's: their hashes do not mix."""
MARKS = ((b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"), (b"\xff\xd8\xff", b"\xff\xd9"))  # begins with, ends with


class Inspected(NamedTuple):
    """What one look at an image file gave: the hash of its pixels, or else what is wrong and what the decoder said.

    ``size`` is width and height, ``is_plain`` whether there is one colour only, ``small`` what ``small_version`` gives.
    """

    pixels: str
    problem: Problem = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    is_plain: bool = False
    small: str = ""


def inspect_images(
    images: Mapping[str, ImageRef],
    cache: Path | None = None,
    workers: int | None = None,
    show: bool = True,
    own_mode: bool = False,
) -> dict[str, Inspected]:
    """Decode every image once and hash its pixels, of given features its numbers; no broken image stops it.

    A file is *truncated* if it begins as PNG, JPEG, GIF or WebP and the end mark is missing (of a WebP: it is shorter
    than it says), or the decoder ran out of data, as it also does where a damaged length promises too much. Everything
    else that does not decode is *unreadable*, a file cut within its first bytes included. A file that only lacks what
    follows its last pixel decodes, and is whole.

    Args:
        images: image id → where its pixels come from; ids may share one.
        cache: JSONL file of images that were decoded before; those whose size and time are the same are not opened
            again. Several processes may share it. Where it cannot be read or written, all goes on without it.
        workers: threads (decoders and hashes run outside the interpreter's lock); by default one for each core.
        own_mode: hash pictures as ``images.keep_mode`` gives them, instead of as RGB.
    """
    read = partial(decode, own_mode=True) if own_mode else decode
    sources = list(dict.fromkeys(images.values()))
    found: dict[ImageRef, Inspected] = {}
    with (
        _Cache(cache, sources, own_mode) as kept,
        tqdm(total=len(sources), desc="check images", unit="image", leave=False, disable=not show) as bar,
    ):
        for block, results in _blocks(sources, kept.known, read, cpu_count() if workers is None else workers):
            for source, (inspected, stamp) in zip(block, results, strict=True):
                found[source] = inspected
                if stamp is not None:
                    kept.add(source, stamp, inspected)
            bar.update(len(block))
    return {image_id: found[source] for image_id, source in images.items()}


def canonical_ids(hashes: Mapping[str, str]) -> dict[str, str]:
    """Image id → the first id with equal pixels, in order; an image without a hash stands for itself."""
    first: dict[str, str] = {}
    return {i: first.setdefault(pixels, i) if pixels else i for i, pixels in hashes.items()}


def group_near_duplicates(found: Mapping[str, Inspected]) -> dict[str, str]:
    """Image id → the first id that shows the same picture, be it at another size or quality.

    Images of equal pixels are one class, and so are those that ``near_duplicate_ids`` finds; broken ones have none.
    """
    sound = {i: one for i, one in found.items() if not one.problem}
    equal = canonical_ids({i: one.pixels for i, one in sound.items()})
    similar = near_duplicate_ids({i: (sound[i].small, sound[i].size) for i in dict.fromkeys(equal.values())})
    return {i: similar[first] for i, first in equal.items()}


def read_optimized(path: Path) -> dict[str, str]:
    """Name → canonical name from an ``optimized_images.json``, in the order of the file; its paths are not opened.

    The file is a JSON array of three parts: canonical names, their paths, and an object of name → position of the
    canonical name in the first part. Raises ``InputError`` that names the part and the entry if it is damaged.
    """
    parts = read_json(path)
    if not isinstance(parts, list) or len(parts) != 3:
        told = f"an array of {len(parts)}" if isinstance(parts, list) else type(parts).__name__
        raise InputError(f"{path}: expected an array of 3 parts (names, paths, name → class), found {told}")
    names, places, classes = parts
    for number, part in enumerate((names, places), 1):
        if not isinstance(part, list):
            raise InputError(f"{path}, part {number}: expected an array of strings, found {type(part).__name__}")
        for entry, value in enumerate(part):
            if not isinstance(value, str):
                raise InputError(f"{path}, part {number}, entry {entry}: expected a string, found {value!r:.60}")
    if len(names) != len(places):
        raise InputError(f"{path}, part 2: {len(places)} paths for the {len(names)} names of part 1")
    if not isinstance(classes, dict):
        raise InputError(f"{path}, part 3: expected an object, found {type(classes).__name__}")
    for name, number in classes.items():
        if type(number) is not int:  # a bool is none
            raise InputError(f"{path}, part 3, entry {name!r:.60}: expected a class id, found {number!r:.60}")
        if not 0 <= number < len(names):
            raise InputError(f"{path}, part 3, entry {name!r:.60}: class id {number} is not in 0 to {len(names) - 1}")
    for number, name in enumerate(names):
        if classes.get(name) != number:
            told = f"maps {name!r:.60} to class {classes[name]}" if name in classes else f"lacks {name!r:.60}"
            raise InputError(f"{path}, part 1, entry {number}: part 3 {told}, whose canonical name it is")
    return {name: names[number] for name, number in classes.items()}


def write_optimized(path: Path, canonical: Mapping[str, str], images: Mapping[str, ImageRef]) -> None:
    """Write classes as ``optimized_images.json``, numbered as they first occur, whole or not at all.

    ``canonical`` is what ``canonical_ids`` gives, ``images`` are those of the canonical names, whose files are written
    as they are given. Raises ``InputError`` if a canonical name does not stand for itself, or has no path.
    """
    number: dict[str, int] = {}
    for name, stands in canonical.items():
        if canonical.get(stands) != stands:
            raise InputError(f"{path}: {stands!r} is to stand for {name!r}, but does not stand for itself")
        if stands not in images:
            raise InputError(f"{path}: canonical image {stands!r} has no path")
        number.setdefault(stands, len(number))
    classes = {name: number[stands] for name, stands in canonical.items()}
    write_text(path, json.dumps([list(number), [Path(str(images[name])).as_posix() for name in number], classes]))


Read: TypeAlias = Callable[[ImageRef], Image.Image]
Known: TypeAlias = tuple[Stamp, Inspected]
Looked: TypeAlias = "tuple[Inspected, Stamp | None]"  # a result, and the stamp to remember it under, if it is to be


def _blocks(
    images: Sequence[ImageRef], known: Mapping[str, Known], read: Read, workers: int
) -> Iterator[tuple[Sequence[ImageRef], list[Looked]]]:
    """Blocks of images with their results, in order, a bounded number of them under way."""
    Image.init()  # PIL loads its plugins at the first file that needs one, and threads beside may miss them
    todo = (images[start : start + BLOCK] for start in range(0, len(images), BLOCK))
    pool = ThreadPoolExecutor(workers, "inspect")
    try:
        waiting: deque[tuple[Sequence[ImageRef], Future[list[Looked]]]] = deque()
        while True:
            for block in islice(todo, AHEAD * workers - len(waiting)):
                looked = pool.submit(lambda part: [_look(image, known, read) for image in part], block)
                waiting.append((block, looked))
            if not waiting:
                return
            block, future = waiting.popleft()
            yield block, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _look(image: ImageRef, known: Mapping[str, Known], read: Read) -> Looked:
    stamp = image_stamp(image)
    if stamp is not None and (before := known.get(_key(image))) and before[0] == stamp:
        return before[1], None
    inspected = _inspect(image, read)
    unchanged = stamp is not None and not inspected.problem and image_stamp(image) == stamp
    return inspected, stamp if unchanged else None


def _key(image: ImageRef) -> str:
    """The name of an image in the cache: its file, or its place in one, its box if it has one, and how it is read."""
    part = f"{image.box or ''}{' as published' if image.as_published else ''}"
    if isinstance(stored := image.source, StoredBytes):
        return f"{stored.file}, {stored.column}, {stored.row}{part}"
    return "" if image.path is None else f"{image.path.absolute()}{part}"


def image_stamp(image: ImageRef) -> Stamp | None:
    """The stamp of a regular file, or of the files around stored bytes; None for anything else."""
    if isinstance(image.source, StoredBytes):
        return image.source.stamp
    if image.path is None:
        return None
    try:
        told = image.path.stat()
    except (OSError, ValueError):
        return None
    return (told.st_size, told.st_mtime_ns) if stat.S_ISREG(told.st_mode) else None


def _inspect(image: ImageRef, read: Read) -> Inspected:
    try:
        if image.path and not image.path.is_file() and image.path.exists():  # a pipe would wait for ever
            return Inspected("", "unreadable", "not a regular file")
        try:
            picture = read(image)
        except UnidentifiedImageError:
            if not is_vector(image):
                raise
            return Inspected(hashlib.sha256(read_vector(image).numpy().tobytes()).hexdigest())
        extrema = picture.getextrema()
        is_plain = all(low == high for low, high in (extrema if isinstance(extrema[0], tuple) else [extrema]))
        return Inspected(pixel_hash(picture), "", "", picture.size, is_plain, small_version(picture))
    except (FileNotFoundError, NotADirectoryError) as error:
        return Inspected("", "missing", _line(error))
    except Exception as error:  # foreign data in a dozen decoders: whatever one of them raises is said of this file
        return Inspected("", "truncated" if _ends_early(image, _line(error)) else "unreadable", _line(error))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _ends_early(image: ImageRef, said: str) -> bool:
    if "truncated" in said.replace(str(image), "").lower():
        return True
    try:
        data = read_content(image)
    except (OSError, ValueError):
        return False
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b"\0;")
    return any(data.startswith(begin) and end not in data for begin, end in MARKS)


class _Cache:
    """Hashes that are known from before, and a file to which new ones are added a line at a time."""

    def __init__(self, file: Path | None, images: Sequence[ImageRef], own_mode: bool = False):
        self._made_by = f"{MADE_BY}, own mode" if own_mode else MADE_BY  # both kinds of hashes share a file
        self.known: dict[str, Known] = {}
        self._descriptor: int | None = None
        if file is None:
            return
        wanted, line = {_key(image) for image in images}, b"\n"
        with suppress(OSError):  # a cache only saves time
            with suppress(FileNotFoundError), file.open("rb") as lines:
                for line in lines:
                    row = _cache_row(line, self._made_by)
                    if row is not None and row[0] in wanted:
                        self.known[row[0]] = row[1:]  # the last line of an image wins
            file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if not line.endswith(b"\n"):  # torn
                self._write(b"\n")

    def add(self, image: ImageRef, stamp: Stamp, seen: Inspected) -> None:
        """Remember an image, by one write so that lines of several processes do not mix."""
        row = {"path": _key(image), "size": stamp[0], "mtime_ns": stamp[1], "pixels": seen.pixels, "by": self._made_by}
        row |= {"extent": seen.size, "plain": seen.is_plain, "small": seen.small}
        self._write(json.dumps(row).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        try:
            if self._descriptor is not None and os.write(self._descriptor, line) < len(line):
                self._close()
        except OSError:
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> "_Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _cache_row(line: bytes, made_by: str) -> tuple[str, Stamp, Inspected] | None:
    """Path, stamp and what was seen; None if the line is torn, damaged, from another version or of the other kind."""
    try:
        row = json.loads(line)
        path, size, time, pixels, by = (row[name] for name in ("path", "size", "mtime_ns", "pixels", "by"))
        (width, height), is_plain, small = row["extent"], row["plain"], row["small"]
        levels = bytes.fromhex(small)
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    numbers = all(type(number) is int for number in (size, time, width, height))
    whole = numbers and type(path) is str and type(pixels) is str and len(pixels) == 64 and type(is_plain) is bool
    if not whole or len(levels) not in (0, 3 * GRID * GRID) or by != made_by or not line.endswith(b"\n"):
        return None
    return path, (size, time), Inspected(pixels, "", "", (width, height), is_plain, small)
