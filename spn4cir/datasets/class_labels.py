"""Images with a class each: read from folders, tables and hub names, limited by class, and split by class."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from spn4cir.config import read_settings
from spn4cir.datasets.contents import Contents, read_contents
from spn4cir.datasets.locating import wrong
from spn4cir.datasets.pictures import safe_name
from spn4cir.datasets.reading import PLAIN
from spn4cir.datasets.roles import BOX_ROLES, ROLES
from spn4cir.datasets.rows import HUB
from spn4cir.datasets.table_settings import TableSettings
from spn4cir.datasets.tables import find_table, load_table
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import ImageRef

SETTINGS = "labelled.yaml"
DISTRACTOR = "distractor"
SPLIT_NAMES = {name: name for name in ("train", "val", "test", DISTRACTOR)} | {"validation": "val"}
COLUMNS = {"label": ("label", "class", "category"), "source": ("source",), "split": ("split",)}
TEST_SHARE, VAL_SHARE = 1 / 5, 1 / 20  # of the classes
FEWEST = 3  # classes that can be split


class LabelledImage(NamedTuple):
    """An image and its class; the label of a distractor is empty, and so is the split where the source names none."""

    image_id: str
    label: str
    source: str
    split: str = ""

    @property
    def class_name(self) -> str:
        """The class, by its source too; empty without a label."""
        return f"{self.source}/{self.label}" if self.label else ""


@dataclass(frozen=True)
class LabelSettings:
    """What ``labelled.yaml`` says.

    Args:
        sources: name → folder or table, from the folder of the file on, or ``hf:`` and a hub name.
        min_images: classes with fewer images are left out.
        max_images: classes with more images keep this many, drawn by a hash of the id; None keeps all.
    """

    sources: Mapping[str, str] = field(default_factory=dict)
    min_images: int = 1
    max_images: int | None = None


@dataclass(frozen=True)
class LabelledSource:
    """The images of one source, how to open them, and what to show a person for them."""

    images: Sequence[LabelledImage]
    find: Callable[[str], ImageRef]
    titles: Mapping[str, str]
    captions: Mapping[str, tuple[str, ...]]
    notes: Sequence[str] = ()


def read_label_settings(path: Path) -> LabelSettings:
    """Read ``labelled.yaml``. Raises ``InputError`` that names the file and the key."""
    given = LabelSettings(**read_settings(path, LabelSettings))
    for key, value in (("min_images", given.min_images), ("max_images", given.max_images)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"{path}, {key}: expected a whole number of at least 1, got {short(value)}")
    if given.max_images is not None and given.max_images < given.min_images:
        raise InputError(f"{path}, max_images: {given.max_images} is less than min_images, {given.min_images}")
    if not isinstance(given.sources, dict):
        raise InputError(f"{path}, sources: expected names and places, got {short(given.sources)}")
    for name, place in given.sources.items():
        if not isinstance(name, str) or not PLAIN.fullmatch(name):
            raise InputError(f"{path}, sources: {short(name)} is no name: letters, digits, '.', '_' and '-' only")
        if not isinstance(place, str) or not place:
            raise InputError(f"{path}, sources, {name}: expected a folder or a table, got {short(place)}")
    return given


def read_labelled(place: str, name: str = "") -> LabelledSource:
    """Read the images and classes of a folder, a table or a hub name. Raises ``InputError`` that names file and row.

    Args:
        place: a folder with a subfolder for each class, or ``hf:`` and a hub name, or anything else that a catalogue is
            read from, with a column ``label``. A folder that holds a table called ``labelled`` is read by it.
        name: put before the sources that a column names, or the only source; empty for that column, or the place.
    """
    path = Path(place)
    if not place.startswith(HUB) and not path.exists():
        raise InputError(f"{place} is missing: give a folder, a table, {HUB}OWNER/NAME, or a {SETTINGS}")
    table = find_table(path, "labelled") if path.is_dir() else None
    contents = read_contents(table or place)
    ids = list(contents.places)
    if not ids:
        raise InputError(f"{place} holds no image{''.join(f': {note}' for note in contents.notes[:1])}")
    columns, where = _read_columns(contents, ids)
    default = name or _name_place(path)
    images = [
        _labelled_image(image_id, {role: values[row] for role, values in columns.items()}, (name, default), row, where)
        for row, image_id in enumerate(ids)
    ]
    return LabelledSource(images, contents.image, contents.titles, contents.captions, contents.notes)


def _name_place(path: Path) -> str:
    """The name of a folder, of a table without its suffix, or of a hub name without its owner."""
    if str(path).startswith(HUB):
        return path.name.removeprefix(HUB)
    return path.resolve().name if path.is_dir() else path.stem


def _labelled_image(
    image_id: str, cells: Mapping[str, str], names: tuple[str, str], row: int, where: Callable[[int], str]
) -> LabelledImage:
    """One row; ``names`` are what stands before the source, and the source where the row names none."""
    label, source = " ".join(cells["label"].split()), " ".join(cells.get("source", "").split())
    prefix, default = names
    for role, value in (("label", label), ("source", source)):
        if value and not safe_name(value):
            raise wrong(where(row), role, f"{value!a:.60} is longer than 2000 characters, or holds control characters")
    split = cells.get("split", "").strip().lower()
    if "split" in cells and split not in SPLIT_NAMES:
        raise wrong(where(row), "split", f"{short(cells['split'])} is none of {', '.join(SPLIT_NAMES)}")
    split = SPLIT_NAMES[split] if split else ""
    if "/" in source:  # so that the first slash of a class ends its source
        raise wrong(where(row), "source", f"{short(source)} holds a slash")
    source = ":".join(part for part in (prefix, source) if part) or default
    return LabelledImage(image_id, "" if split == DISTRACTOR else label, source, split)


def _read_columns(contents: Contents, ids: Sequence[str]) -> tuple[dict[str, list[str]], Callable[[int], str]]:
    """Role → one text for each image, and a function that names an image's row in messages.

    Raises ``InputError`` for rows of one picture that say different things.
    """
    first = contents.first_rows
    if rows := contents.rows:
        named = {role: rows.find(names, role == "label") for role, names in COLUMNS.items()}
        columns = {role: rows.texts(column) for role, column in named.items() if column}
        splits = [rows.row_id(row).partition("/")[0] for row in range(len(rows))]
        if "split" not in columns and len(set(splits)) > 1:
            columns["split"] = splits
        return _of_images(contents, columns, rows.name), lambda n: rows.name(first[n])
    if contents.tables:
        columns, name = _read_tables(contents.tables, contents.settings)
        return _of_images(contents, columns, name), lambda n: name(first[n])

    def where(row: int) -> str:
        return str(contents.root / ids[row])

    folders = [image_id.split("/")[:-1] for image_id in ids]
    if all(parts and parts[0].lower() in SPLIT_NAMES for parts in folders):
        return {"label": [(*parts, "")[1] for parts in folders], "split": [parts[0] for parts in folders]}, where
    return {"label": [(*parts, "")[0] for parts in folders]}, where


def _of_images(
    contents: Contents, columns: Mapping[str, list[str]], name: Callable[[int], str]
) -> dict[str, list[str]]:
    """What the rows of each image say, which must be the same."""
    for role, cells in columns.items():
        for first, *others in contents.rows_of.values():
            if (other := next((row for row in others if cells[row] != cells[first]), None)) is not None:
                what = f"{short(cells[other])}, where {name(first)} has {short(cells[first])} for the same picture"
                raise wrong(name(other), role, what)
    return {role: [cells[row] for row in contents.first_rows] for role, cells in columns.items()}


def _read_tables(tables: Sequence[Path], how: TableSettings) -> tuple[dict[str, list[str]], Callable[[int], str]]:
    """The columns of tables below each other; all have those that one has.

    A row with fewer fields than the head line is an error: an image with an empty label would be a distractor.
    """
    places, parts = list[str](), list[dict[str, list[str]]]()
    names = {**COLUMNS, "label": how.names_of("category", COLUMNS["label"])}
    for path in tables:
        table = load_table(path, {**ROLES, **BOX_ROLES}, replace(how, complete=True))
        found = {role: table.find(role, of_role, role == "label") for role, of_role in names.items()}
        parts.append({role: table.text(column) for role, column in found.items() if column is not None})
        places += [f"{path}, row {row}" for row in range(1, len(table) + 1)]
    for path, part in zip(tables, parts, strict=True):
        if lacking := {role for other in parts for role in other} - part.keys():
            raise InputError(f"{path}: the column {min(lacking)!r} is missing, which a table beside it has")
    return {role: [cell for part in parts for cell in part[role]] for role in parts[0]}, places.__getitem__


def limit_classes(images: Sequence[LabelledImage], settings: LabelSettings) -> tuple[list[LabelledImage], list[str]]:
    """Leave out small classes and cap large ones, each class within a split; distractors stay. Returns notes too."""
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for image in images:
        if image.label:
            members[image.class_name, image.split].append(image.image_id)
    low, high = settings.min_images, settings.max_images
    small = {key for key, ids in members.items() if len(ids) < low}
    kept, capped = set[str](), 0
    for key, ids in members.items():
        if key not in small:
            is_capped = high is not None and len(ids) > high
            capped += is_capped
            kept.update(sorted(ids, key=lambda i: _draw(f"image/{i}"))[:high] if is_capped else ids)
    notes = []
    if small:
        lost = sum(len(members[key]) for key in small)
        notes.append(f"{len(small)} classes with fewer than {low} images are left out: {lost} images")
    if capped:
        notes.append(f"{capped} classes with more than {high} images keep {high}, drawn by a hash of the id")
    return [image for image in images if not image.label or image.image_id in kept], notes


def split_images(images: Sequence[LabelledImage], place: str) -> tuple[list[LabelledImage], list[str]]:
    """Give each labelled image a split by its class where its source names none. Returns notes too.

    Where splits are named and none is val, a twentieth of the classes of train is val. Raises ``InputError`` where
    there are too few classes to split.
    """
    held = {image.label: image.split for image in images if image.label and image.split}
    held |= {image.label: "train" for image in images if image.label and image.split == "train"}
    images = [i._replace(split=i.split or held.get(i.label, "")) for i in images]  # equal labels of other sources
    free = {image.label for image in images if image.label and not image.split}
    if 0 < len(free) < FEWEST:
        raise InputError(f"{place}: {len(free)} classes cannot be split, {FEWEST} can; or add a column split")
    split_of, notes = split_classes(free), list[str]()
    if free:
        counts = ", ".join(f"{list(split_of.values()).count(split)} {split}" for split in ("train", "val", "test"))
        notes.append(f"labels are split by a hash of their names, so that no class is in two splits: {counts}")
    named = [image._replace(split=image.split or split_of.get(image.label, "")) for image in images]
    if any(image.label and image.split == "val" for image in named):
        return named, notes
    classes = sorted({image.label for image in named if image.label and image.split == "train"}, key=_draw_class)
    moved = frozenset(classes[: max(1, round(VAL_SHARE * len(classes)))] if len(classes) > 1 else ())
    if moved:
        notes.append(f"no image is in the split val: {len(moved)} labels of train are val, drawn by a hash")
    is_moved = (image.split == "train" and image.label in moved for image in named)
    return [i._replace(split="val") if moves else i for i, moves in zip(named, is_moved, strict=True)], notes


def split_classes(labels: Iterable[str]) -> dict[str, str]:
    """Label → split: a fifth is test and a twentieth val, by a hash of each label, and at least one of both.

    A label keeps its split when others are added or left out, but for the one that is test, or val, for lack of others.
    """
    drawn = {label: _draw_class(label) for label in labels}
    test = max(1, sum(value < TEST_SHARE for value in drawn.values()))
    val = max(1, sum(value < TEST_SHARE + VAL_SHARE for value in drawn.values()) - test)
    ordered = sorted(drawn, key=lambda label: (drawn[label], label))
    return {label: "test" if n < test else "val" if n < test + val else "train" for n, label in enumerate(ordered)}


def _draw_class(label: str) -> float:
    return _draw(f"class/{label}")


def _draw(word: str) -> float:
    """A number in [0, 1) that depends on a text alone."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") / 2**64
