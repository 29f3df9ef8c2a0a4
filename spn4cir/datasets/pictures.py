"""Pictures in a folder: one walk over its names, no look at any single file."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from spn4cir.errors import InputError
from spn4cir.pixels import picture_suffixes

DATA_SUFFIXES = (".parquet", ".tar")
NOT_DATA = ("captions", "queries")  # tables beside pictures, which say something of them
OURS = re.compile(r"(captions|queries|catalogue|metadata)\.(csv|tsv|jsonl|parquet)|(skip_list|optimized_images)\.json")
"""Files beside pictures that are read, and so are not passed over."""
PLAIN_SUFFIX = re.compile(r"\.[a-z0-9_-]{1,12}")  # any other is part of a name, which may hold what no message may
HEIF, JXL = "pip install 'spn4cir[heif]'", "pip install 'spn4cir[jxl]'"
TABLE = "name it to read it: --data-root FOLDER/NAME"
ADVICE = {
    ".heic": HEIF, ".heif": HEIF, ".hif": HEIF, ".jxl": JXL, ".avif": "pip install 'pillow>=11.3'",
    ".svg": "draw it as PNG first", ".svgz": "draw it as PNG first", ".eps": "draw it as PNG first",
    ".pdf": "draw its pages as PNG first", ".csv": TABLE, ".tsv": TABLE, ".jsonl": TABLE,
}  # fmt: skip
"""What makes files of a suffix readable."""
OWN = frozenset({"images.done.json", "images.jsonl", "images.cache.jsonl"})  # mark a folder that data generation wrote

# Names go into JSON, HTML, logs and shells: no control characters, no line separators, no marks that turn the direction
# of text, no backslash (a separator elsewhere), nothing that is no Unicode (a name that cannot be written down again).
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe_name(text: str) -> bool:
    """Whether a text may be the id of an image: not empty, on one line, and the same wherever it is written."""
    return bool(text) and len(text) <= 2000 and not _UNSAFE.search(text)


@dataclass
class Pictures:
    """Sorted paths below a root: ``ids`` of pictures, ``data`` that may hold some; the other lists are left out.

    ``special`` are pipes, sockets and devices; ``others`` counts files of which nothing is read, by suffix.
    """

    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    has_texts: bool = False

    def describe_others(self) -> str:
        """How many files of each suffix are passed over, and what would make them readable; empty if there are none."""
        counts = sorted(self.others.items(), key=lambda item: (item[0] not in ADVICE, -item[1], item[0]))
        return ", ".join(
            f"{n} {suffix} ({ADVICE[suffix]})" if suffix in ADVICE else f"{n} {suffix}" for suffix, n in counts
        )


def walk(root: Path) -> Pictures:
    """All pictures below a folder, by suffix: all that Pillow opens. Hidden names are passed over, and folders of ours.

    Links to pictures below the root are followed; all others, and links to folders, are not. Raises ``InputError`` for
    a folder that cannot be read.
    """
    found, real, todo, suffixes = Pictures(), os.path.realpath(root), [""], picture_suffixes()
    while todo:
        inner = todo.pop()
        try:
            with os.scandir(root / inner) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            raise InputError(f"folder {root / inner} cannot be read: {error.strerror}") from None
        if inner and any(entry.name in OWN for entry in entries):
            found.own.append(inner)
            continue
        for entry in entries:
            name = f"{inner}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                todo.append(f"{name}/")
            elif entry.is_symlink() and (entry.is_dir() or not _below(entry.path, real)):
                found.links.append(name)
            elif not entry.is_file():
                found.special.append(name)
            elif (suffix := Path(entry.name.lower()).suffix) in suffixes:
                (found.ids if safe_name(name) else found.unsafe).append(name)
            elif entry.name.endswith(".txt"):
                found.has_texts = True
            elif entry.name.lower().endswith(DATA_SUFFIXES) and entry.name.partition(".")[0] not in NOT_DATA:
                found.data.append(name)
            elif not OURS.fullmatch(entry.name):
                found.others[suffix if PLAIN_SUFFIX.fullmatch(suffix) else "without suffix"] += 1
    for names in (found.ids, found.links, found.unsafe, found.own, found.data, found.special):
        names.sort()
    return found


def _below(path: str, real: str) -> bool:
    return os.path.realpath(path).startswith(real.rstrip(os.sep) + os.sep)


def stray_links(root: Path, inner: set[str]) -> set[str]:
    """Of folders below the root, given by their paths: names in them, or themselves, that lead out of it.

    Each folder is listed once, so that a million files in a few folders cost a few calls.
    """
    real, stray = os.path.realpath(root), set[str]()
    for folder in sorted(inner):
        place = root / folder
        if not place.is_dir():
            continue  # its pictures are missing, which is said of each
        if not _below(f"{os.path.realpath(place)}/x", real):
            stray.add(folder)
            continue
        with os.scandir(place) as listing:
            names = [entry.name for entry in listing if entry.is_symlink() and not _below(entry.path, real)]
        stray |= {f"{folder}/{name}".removeprefix("./") for name in names}
    return stray
