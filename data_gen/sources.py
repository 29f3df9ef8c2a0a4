"""Where images are sampled from: tar shards of the webdataset format, or a folder.

``tarfile`` steps from header to header, so that only the chosen images are read, where the ``datasets`` library reads
all shards. Nothing is unpacked by the names in a tar; links, devices and folders in it are passed over.
"""

import hashlib
import heapq
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import glob  # pathlib's wants a folder to start from
from pathlib import Path
from typing import BinaryIO

from spn4cir.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
BRACES = re.compile(r"\{([^{}]*)\}")
TEXT_LIMIT = 1 << 20  # bytes of a member that tells address or caption


@dataclass(frozen=True)
class Candidate:
    """An image that may be taken: a range of bytes in a shard, or a file (then ``start`` is 0)."""

    name: str  # of shard and sample, or the path below the folder; it decides on the hash
    source: Path
    start: int
    size: int
    suffix: str
    about: tuple[int, int] | None = None  # start and size of the JSON beside it
    text: tuple[int, int] | None = None  # and of the text
    key: str = ""  # the hash, by which its copy is called

    @property
    def copy_name(self) -> str:
        """Path of the copy below the output: by hash, never by a name that a tar gives."""
        return f"images/{self.key[:2]}/{self.key}{self.suffix}"

    def open(self) -> BinaryIO:
        """The bytes of the picture; fewer if the file is cut short."""
        return io.BytesIO(_read(self.source, self.start, self.size))

    def image_ids(self) -> list[str]:
        """Ids that the image may have, the best first: the address in the JSON beside it, its name, its copy's name."""
        from spn4cir.datasets.pictures import safe_name

        return [text for text in (self._address(), self.name, self.copy_name) if safe_name(text)]

    def caption(self) -> str:
        """What the text beside it says on its first line that is not empty, else the JSON's caption; may be empty."""
        if not self.start:  # a file
            from spn4cir.datasets.reading import read_first_line

            path = self.source.with_suffix(".txt")
            return "" if path.is_symlink() else read_first_line(path)
        text = _read(self.source, *self.text).decode("utf-8-sig", "replace") if self.text else ""
        lines = (" ".join(line.split()) for line in text.splitlines())
        return next(filter(None, lines), "") or " ".join(self._told("caption").split())

    def _address(self) -> str:
        return self._told("url")

    def _told(self, key: str) -> str:
        with suppress(ValueError, RecursionError):  # of a damaged JSON
            told = json.loads(_read(self.source, *self.about)) if self.about and self.about[1] <= TEXT_LIMIT else None
            if isinstance(told, dict) and isinstance(found := told.get(key), str):
                return found
        return ""


def _read(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


class Smallest:
    """The ``keep`` candidates whose keyed hashes are smallest, whatever order they come in."""

    def __init__(self, keep: int):
        self._keep, self._heap, self._held = keep, list[int](), dict[int, Candidate]()
        self.total = 0

    def add(self, name: str, candidate: Candidate) -> None:
        """Consider one; of two of the same name, the first counts."""
        hashed = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=12)
        number = int.from_bytes(hashed.digest(), "big")
        if number in self._held:
            return
        self.total += 1
        if len(self._heap) == self._keep and number > -self._heap[0]:
            return
        heapq.heappush(self._heap, -number)
        self._held[number] = candidate
        if len(self._heap) > self._keep:
            del self._held[-heapq.heappop(self._heap)]

    def sorted(self) -> list[Candidate]:
        """Those that are held, smallest hash first, with it as their key."""
        return [replace(self._held[number], key=f"{number:024x}") for number in sorted(self._held)]


def expand(pattern: str) -> list[Path]:
    """Files that braces (``{00..12}``, ``{a,b}``) and wildcards name. Raises ``InputError`` for none, or namesakes."""
    files = []
    for name in _braces(pattern):
        found = sorted(glob(name)) if any(sign in name for sign in "*?[") else [name]  # noqa: PTH207
        if not found:
            raise InputError(f"shards: no file matches {name}")
        files += [Path(one) for one in found]
    names: dict[str, Path] = {}
    for path in dict.fromkeys(files):
        if not path.is_file():
            raise InputError(f"shards: {path} is missing")
        if path.name in names:
            raise InputError(f"shards: {names[path.name]} and {path} are called the same: a sample goes by their names")
        names[path.name] = path
    return list(names.values())


def _braces(pattern: str) -> Iterator[str]:
    if not (found := BRACES.search(pattern)):
        yield pattern
        return
    parts = found[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        parts = [str(n).zfill(width) for n in range(int(bounds[1]), int(bounds[2]) + 1)]
    for part, rest in itertools.product(parts, _braces(pattern[found.end() :])):
        yield pattern[: found.start()] + part + rest


def shard_candidates(shards: Sequence[Path]) -> Iterator[Candidate]:
    """Pictures of all shards, with where their bytes lie. Raises ``InputError`` if one is cut short or no plain tar."""
    from tqdm import tqdm

    for shard in tqdm(shards, "look through shards", unit="shard"):
        try:
            with tarfile.open(shard, "r:") as tar:
                yield from _of_shard(shard, tar)
        except (tarfile.TarError, EOFError, ValueError) as error:
            advice = "fetch it again, unpack .gz, or leave it out"
            raise InputError(f"{shard} is no plain tar, or cut short: {error}: {advice}") from None
        except OSError as error:
            raise InputError(f"{shard} cannot be read: {error.strerror}") from None


def _of_shard(shard: Path, tar: tarfile.TarFile) -> Iterator[Candidate]:
    """A sample is a run of members whose names are equal up to the first dot behind the last slash."""
    for key, group in itertools.groupby(_members(shard, tar), key=lambda member: member[0]):
        found = {suffix: place for _, suffix, place in group}
        suffix = next((suffix for suffix in PICTURES if suffix in found), None)
        if suffix is not None:
            text = found.get(".txt")
            text = text if text is not None and text[1] <= TEXT_LIMIT else None
            yield Candidate(f"{shard.name}/{key}", shard, *found[suffix], suffix, found.get(".json"), text)


def _members(shard: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Sample, suffix, and start and size of each regular member."""
    end, last = shard.stat().st_size, -1
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep the headers of the whole shard
        if not last < member.offset <= member.offset_data <= member.offset_data + member.size <= end:
            raise tarfile.ReadError(f"the member at byte {member.offset} ends behind the end, or before its beginning")
        last = member.offset
        folder, slash, name = member.name.rpartition("/")
        stem, dot, rest = name.partition(".")
        if member.isreg() and not member.issparse() and stem:
            yield f"{folder}{slash}{stem}", f"{dot}{rest}".lower(), (member.offset_data, member.size)
    if any(_read(shard, tar.offset, tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f"what stands at byte {tar.offset} is no header")


def folder_candidates(folder: Path, listed: str | None) -> Iterator[Candidate]:
    """Pictures below a folder; or those that a list names, there or not. Raises ``InputError`` for a name outside."""
    from spn4cir.datasets.pictures import safe_name, stray_links, walk
    from spn4cir.datasets.reading import inner_path
    from spn4cir.pixels import picture_suffixes

    if not folder.is_dir():
        raise InputError(f"folder {folder} is missing")
    if listed is None:
        names = walk(folder).ids
    else:
        try:
            lines = Path(listed).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"list {listed} cannot be read: {error}") from None
        names = [str(inner_path(Path(listed), str(n), line.strip())) for n, line in enumerate(lines, 1) if line.strip()]
        stray = stray_links(folder, {name.rpartition("/")[0] or "." for name in names})
        wrong = [n for n in names if n in stray or (n.rpartition("/")[0] or ".") in stray or not safe_name(n)]
        if wrong:
            raise InputError(f"list {listed}: {wrong[0]!a} leads out of {folder}, or holds control characters")
        unknown = [name for name in names if Path(name.lower()).suffix not in picture_suffixes()]
        if unknown:
            raise InputError(f"list {listed}: {unknown[0]!a} is no picture that Pillow opens, such as .png and .jpg")
    for name in names:
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        yield Candidate(name, path, 0, size, f".{name.rpartition('.')[2].lower()}")
