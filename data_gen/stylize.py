"""Draw photographs in other styles: sketch, art and mosaic, for retrieval by queries of any style.

examples:
  python data_gen/stylize.py                                    # the embedded emoji → data/styles
  python data_gen/stylize.py --folder my/photos --output data/my_styles --workers 8
  python data_gen/stylize.py --dataset fashioniq --data-root data/fashioniq --output data/fashioniq_styles
  spn4cir-data check --dataset styles --data-root data/my_styles
"""

import html
import json
import multiprocessing
import os
import shlex
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from PIL import Image

from spn4cir.config import parse, recipes_folder
from spn4cir.data_gen.draw import html_page, image_tag, save_png
from spn4cir.data_gen.steps import STAYS, cut_torn
from spn4cir.data_gen.style_filters import FILTERS, draw_art, draw_mosaic, draw_sketch
from spn4cir.data_gen.style_plan import Photo, plan_photos
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError, run_command
from spn4cir.files import Row, hash_files, locked, read_json, write_jsonl, write_text
from spn4cir.types import ImageRef

AHEAD = 4  # photographs that wait for each worker
SHOWN = 160  # pixels of a picture on the sheet
NOTE, SHEET = "stylize.json", "sheet.html"  # whose styles they are; a page to look at
LOG, UNFINISHED = "drawn.jsonl", "drawn.partial.jsonl"  # what each photograph was drawn from, and its files' hashes


@dataclass
class StylizeConfig:
    """What is drawn of which photographs.

    Args:
        dataset: name of a dataset; its training images are drawn, and the targets of its val and test queries.
        data_root: where its files lie.
        folder: a folder of pictures instead, or any other form of a catalogue; captions.csv beside them is read.
        output: folder to fill, which the dataset styles opens.
        max_side: larger photographs are shrunk to this longer side.
        divisor: of each side, for a mosaic.
        rows: photographs on the sheet.
        workers: processes that draw.
    """

    dataset: str = "emoji"
    data_root: str | None = None
    folder: str | None = None
    output: str = "data/styles"
    max_side: int = 512
    divisor: int = 16
    rows: int = 12
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("max_side", "divisor", "rows", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.folder and self.data_root:
            raise InputError("give either --folder FOLDER, or --dataset NAME and --data-root PLACE")


def stylize(config: StylizeConfig) -> None:
    """Fill the output folder with photographs, their other styles and captions, in the layout of ``StyleFolders``.

    The same pictures and settings give the same files (with the same Pillow and numpy), whatever the number of workers.
    What was drawn of the same pixels with the same settings is kept. Killed at any time, the same command goes on. The
    lists of the splits are written last.

    Raises ``InputError`` if there are too few pictures, or the folder holds other files.
    """
    from tqdm import tqdm

    from spn4cir.datasets.style_folders import SPLITS
    from spn4cir.datasets.styles import Styles

    dataset, out = _open_source(config), Path(config.output)
    for note in dataset.notes():
        print(note)
    _make_folder(out, dataset)
    with locked(out / ".lock", f"another run works in {out}: wait for it, or give another --output"):
        _claim(out, dataset)
        photos = plan_photos(dataset, out / "images.cache.jsonl")
        lists = {out / f"{split}.json": _list_photos(photos, split) for split in SPLITS}
        drawn = read_log(out)
        todo = [photo for photo in photos if not _is_drawn(out, photo, drawn.get(photo.name), config)]
        if todo or any(not path.is_file() or path.read_bytes() != text.encode() for path, text in lists.items()):
            for path in lists:  # without them the folder is unfinished
                path.unlink(missing_ok=True)
        cut_torn(out / UNFINISHED)
        for photo, row in tqdm(_draw(config, todo), "draw", len(todo), unit="photo", disable=not todo):
            drawn[photo.name] = row
            _append(out / UNFINISHED, row)
        _write_captions(out, photos)
        _write_sheet(out, photos, config.rows)
        write_jsonl(out / LOG, (drawn[photo.name] for photo in photos))
        (out / UNFINISHED).unlink(missing_ok=True)
        for path, text in lists.items():
            write_text(path, text)
    counts = Counter(photo.split for photo in photos)
    told = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
    print(f"stylize: {len(photos)} photographs ({told}), {len(todo)} drawn now → {out}; look at {out / SHEET}")
    print(f"next: spn4cir-data check --dataset {Styles.name} --data-root {shlex.quote(str(out))}")


def _open_source(config: StylizeConfig) -> Dataset:
    from spn4cir.datasets import load_dataset
    from spn4cir.datasets.catalogue import Catalogue

    if not config.folder:
        return load_dataset(config.dataset, config.data_root)
    try:
        return load_dataset(Catalogue.name, config.folder)
    except InputError as error:
        raise InputError(str(error).replace("--data-root", "--folder")) from None


def _make_folder(out: Path, dataset: Dataset) -> None:
    """Make the output folder. Raises ``InputError`` if it lies in the source, or the source in it."""
    if dataset.root:
        inner, root = out.resolve(), dataset.root.resolve()
        if inner.is_relative_to(root) or root.is_relative_to(inner):
            raise InputError(f"--output {out} and the pictures in {dataset.root} would mix: give another --output")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {out} cannot be made: {error.strerror}") from None


def _claim(out: Path, dataset: Dataset) -> None:
    """Note in the folder whose styles it holds. Raises ``InputError`` if it holds those of others, or other files."""
    note, source = out / NOTE, {"dataset": dataset.name, "root": str(dataset.root.resolve()) if dataset.root else None}
    if note.is_file():
        before = read_json(note)
        if before != source:
            of = f"{before.get('root') or before.get('dataset')}" if isinstance(before, dict) else "another source"
            raise InputError(f"--output {out} holds the styles of {of}: give another, or delete it")
    elif any(path.name != ".lock" for path in out.iterdir()):
        raise InputError(f"--output {out} is not empty and holds no styles: give another folder")
    else:
        write_text(note, json.dumps(source) + "\n")


def read_log(out: Path) -> dict[str, Row]:
    """Name → what was drawn of a photograph the last time; damaged lines are passed over."""
    rows: dict[str, Row] = {}
    for path in (out / LOG, out / UNFINISHED):
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if isinstance(row["files"], dict):
                    rows[row["name"]] = row
    return rows


def _is_drawn(out: Path, photo: Photo, row: Row | None, config: StylizeConfig) -> bool:
    """Whether a photograph was drawn of the same pixels with the same settings, and its files are as then."""
    from spn4cir.datasets.style_folders import PHOTOS, STYLES

    if row is None or row.get("made_by") != _made_by(config, photo):
        return False
    paths = [f"{folder}/{photo.name}.png" for folder in (PHOTOS, *STYLES)]
    return all((out / path).is_file() and hash_files(out / path) == row["files"].get(path) for path in paths)


def _made_by(config: StylizeConfig, photo: Photo) -> str:
    """A short name for everything that decides what is drawn."""
    settings = [photo.pixels, config.max_side, config.divisor, FILTERS]
    return sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _draw(config: StylizeConfig, photos: Sequence[Photo]) -> Iterator[tuple[Photo, Row]]:
    """Draw photographs, here or in other processes: each with its row of the log, in order."""
    jobs = ((photo, partial(draw_styles, config, photo._replace(image=_portable(photo.image)))) for photo in photos)
    if config.workers == 1:
        yield from ((photo, job()) for photo, job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    pool = ProcessPoolExecutor(config.workers, context, _end_with_parent)
    try:
        waiting: deque[tuple[Photo, Future[Row]]] = deque()
        for photo, job in jobs:
            waiting.append((photo, pool.submit(job)))
            if len(waiting) == AHEAD * config.workers:
                yield waiting[0][0], waiting.popleft()[1].result()
        yield from ((photo, row.result()) for photo, row in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _portable(image: ImageRef) -> ImageRef:
    """The image as another process can read it: bytes that a function returns are read here."""
    if isinstance(image.source, Path):
        return image
    return image._replace(source=partial(bytes, image.source()), name=str(image))


def _end_with_parent() -> None:
    """Let a worker end when its parent does, even if that is killed, and leave interrupts to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def draw_styles(config: StylizeConfig, photo: Photo) -> Row:
    """Write a photograph and its other styles, each whole or not at all; returns its row of the log."""
    from spn4cir.datasets.style_folders import PHOTOS
    from spn4cir.images import open_image

    picture = open_image(photo.image)
    picture.info.clear()  # colour profiles and the like would be written again
    picture.thumbnail((config.max_side, config.max_side), Image.Resampling.LANCZOS)
    drawn = {
        PHOTOS: picture,
        "sketch": draw_sketch(picture),
        "art": draw_art(picture),
        "mosaic": draw_mosaic(picture, config.divisor),
    }
    files: dict[str, str] = {}
    for folder, one in drawn.items():
        inner = f"{folder}/{photo.name}.png"
        path = make_parent(Path(config.output) / inner)
        save_png(path, one)
        files[inner] = hash_files(path)
    return {"name": photo.name, "made_by": _made_by(config, photo), "files": files}


def make_parent(path: Path) -> Path:
    """The path, whose folder is made. Raises ``InputError`` if that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made: {error.strerror}; what is there {STAYS}") from None
    return path


def _append(path: Path, row: Row) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; what is there {STAYS}") from None


def _write_captions(out: Path, photos: Sequence[Photo]) -> None:
    """Write the captions that are not there yet, or are others."""
    from spn4cir.datasets.style_folders import TEXTS

    for photo in photos:
        path, text = out / TEXTS / f"{photo.name}.txt", f"{photo.caption}\n"
        if photo.caption and not (path.is_file() and path.read_bytes() == text.encode()):
            write_text(make_parent(path), text)


def _list_photos(photos: Sequence[Photo], split: str) -> str:
    """The list of a split, one photograph a line."""
    rows = [
        {"image": f"{photo.name}.png"} | ({"caption": f"{photo.name}.txt"} if photo.caption else {})
        for photo in photos
        if photo.split == split
    ]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def _write_sheet(out: Path, photos: Sequence[Photo], rows: int) -> None:
    """Write a page with some of the photographs, evenly spaced: styles beside each other, the caption below."""
    from spn4cir.datasets.style_folders import PHOTOS, STYLES
    from spn4cir.images import open_image

    shown = [photos[n * len(photos) // rows] for n in range(rows)] if rows < len(photos) else photos
    pairs = ""
    for photo in shown:
        pictures = [(folder, open_image(out / folder / f"{photo.name}.png")) for folder in (PHOTOS, *STYLES)]
        tags = "\n".join(image_tag(_enlarged(picture), f"{folder}/{photo.name}") for folder, picture in pictures)
        told = html.escape(photo.caption or photo.name)
        pairs += f'<div class="pair">{tags}<small>{told}</small></div>\n'
    title = f"{len(shown)} of {len(photos)} photographs in other styles"
    told = f"From left to right: photograph, {', '.join(STYLES)}."
    write_text(out / SHEET, html_page(title, f'<p>{told}</p>\n<div class="pairs">\n{pairs}</div>'))


def _enlarged(picture: Image.Image) -> Image.Image:
    """A picture of ``SHOWN`` pixels on the longer side; blocks of a small one stay sharp."""
    scale = SHOWN / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


if __name__ == "__main__":
    run_command(lambda: stylize(parse(StylizeConfig, recipes_folder() / "stylize.yaml", text=__doc__ or "")))
