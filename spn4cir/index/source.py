"""Where the images of an index come from: which there are, where each lies, and what is known about it."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from spn4cir.dataset import Dataset
from spn4cir.datasets import DATASETS, load_dataset
from spn4cir.datasets.catalogue import Catalogue
from spn4cir.datasets.rows import HUB
from spn4cir.datasets.table_settings import split_place
from spn4cir.distributed import cpu_count
from spn4cir.errors import InputError
from spn4cir.identity import Stamp, image_stamp
from spn4cir.images import read_content
from spn4cir.index.columns import concatenate_tables
from spn4cir.index.snapshot import SourceNote
from spn4cir.types import ImageRef

if TYPE_CHECKING:
    import pyarrow

OWN = Catalogue.name
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")


@dataclass
class Source:
    """Images of a folder, a table, a hub name or a dataset.

    Args:
        note: what the index remembers of it.
        images: image id → where its pixels come from.
        columns: what is known about each, in the same order.
        notes: what was left out, a line each.
    """

    note: SourceNote
    images: dict[str, ImageRef]
    columns: pyarrow.Table
    notes: list[str]

    @cached_property
    def column_hashes(self) -> list[int]:
        """A hash of what is known about each image, by which a change is noticed."""
        import pandas

        hashes = pandas.util.hash_pandas_object(self.columns.to_pandas(integer_object_nulls=True), index=False)
        names = zlib.crc32(repr(self.columns.column_names).encode())
        return [int(value) for value in hashes ^ names]

    def relative_path(self, image_id: str) -> str | None:
        """The path of an image below the root; None for an image that has no file of its own."""
        path = self.images[image_id].path
        return None if path is None else os.path.relpath(path, self.note.root)


def read_source(place: str | Path, dataset: str | None = None) -> Source:
    """The images of a place.

    Args:
        place: a folder of pictures, a table, ``hf:`` and a hub name; or the name of a dataset, such as ``emoji``, if
            there is no such folder or file. For a named ``dataset`` the folder of its files, or empty.
        dataset: name of a dataset; None decides by the place.

    Raises:
        InputError: if there is no such place, or it holds no pictures.
    """
    text = str(place)
    where = split_place(text)[0]  # without settings
    if dataset is None:
        is_name = where in DATASETS and not Path(where).exists()
        dataset, text = (text, "") if is_name else (OWN, text)
    if dataset == OWN and not text.startswith(HUB) and not Path(where).exists():
        raise InputError(f"{where} is missing: give a folder of pictures, a table of them, or {', '.join(DATASETS)}")
    if text and not text.startswith(HUB):
        text = f"{Path(where).absolute()}{text[len(where) :]}"
    opened = load_dataset(dataset, text or None)
    if dataset == OWN:
        ids = opened.training_images()
    else:
        roles = opened.image_roles()
        ids = list(dict.fromkeys(i for role in roles for i in role.image_ids if i not in opened.skip_reasons))
    images = {image_id: opened.image(image_id) for image_id in ids}
    if not images:
        raise InputError(f"{place} holds no pictures")
    folders = {str(image.path.absolute().parent) for image in images.values() if image.path}
    own_root = str(opened.root.absolute()) if opened.root else ""
    if not own_root or any(os.path.commonpath([own_root, folder]) != own_root for folder in folders):
        own_root = os.path.commonpath(folders) if folders else ""
    return Source(SourceNote(text, dataset, own_root), images, _columns(opened, ids), opened.notes())


def stored_image(note: SourceNote, path: Path, box: Sequence[int] | None) -> ImageRef:
    """The image of an index whose file and crop box are stored, decoded as its dataset decodes it."""
    left, upper, right, lower = box or (0, 0, 0, 0)
    is_published = getattr(DATASETS.get(note.dataset), "as_published", False)
    return ImageRef(path, (left, upper, right, lower) if box else None, as_published=is_published)


def content_hashes(images: Sequence[ImageRef]) -> list[str]:
    """SHA-256 of the bytes and the crop box of each image; empty for an image that cannot be read."""
    with ThreadPoolExecutor(cpu_count(), "hash") as pool:
        return list(tqdm(pool.map(_content_hash, images), "hash", len(images), False, unit="image"))


def image_stamps(images: Iterable[ImageRef]) -> list[Stamp]:
    """Size and time of the last change of each image's file, by which a change is noticed; zeros for a missing one."""
    return [image_stamp(image) or (0, 0) for image in images]


def _content_hash(image: ImageRef) -> str:
    try:
        data = read_content(image)
    except (OSError, ValueError):
        return ""
    return hashlib.sha256(data + str(image.box or "").encode()).hexdigest()


def _columns(dataset: Dataset, ids: Sequence[str]) -> pyarrow.Table:
    """Category, title and caption where the dataset has them, and further columns; numbers are recognised."""
    import pyarrow as pa
    import pyarrow.compute as pc

    titles, captions = [[of(image_id) for image_id in ids] for of in (dataset.label, dataset.caption)]
    known: dict[str, Any] = {
        "category": [dataset.category(image_id) for image_id in ids],
        "title": [title if title != image_id else "" for title, image_id in zip(titles, ids, strict=True)],
        "caption": [text if text != title else "" for text, title in zip(captions, titles, strict=True)],
        "names": _names(dataset, ids),
    }
    columns = {name: pa.array(values) for name, values in known.items() if any(values)}
    others = dataset.other_columns()
    if others:
        listed = pa.array(dataset.list_training_images())
        table = concatenate_tables(others).take(pc.index_in(pa.array(ids), listed))
        columns |= {name: table[name] for name in table.column_names if name and name not in columns}
    return pa.table(
        {name: _typed(values) for name, values in columns.items()} or {"category": pa.nulls(len(ids), pa.string())}
    )


def _names(dataset: Dataset, ids: Sequence[str]) -> list[str]:
    """Further names of each image, of products that share a picture, separated by commas."""
    names: dict[str, list[str]] = {}
    for name, image_id in dataset.further_names.items():
        names.setdefault(image_id, []).append(name)
    return [", ".join(names.get(image_id, ())) for image_id in ids]


def _typed(column: Any) -> Any:
    """A column of text, numbers or booleans: texts that all are plain numbers become numbers, empty ones null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    if pa.types.is_floating(kind):  # no NaN, which is an empty cell, and no -0.0
        column = column.cast(pa.float64())
        return pc.add(pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column), 0.0)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return column
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        column = pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, column.type), column)
    values = column.drop_null().to_pylist()
    if not values or not all(len(value) < 16 and _NUMBER.fullmatch(value.strip()) for value in values):
        return column.cast(pa.string())
    whole = all(value.strip().lstrip("-").isdigit() for value in values)
    return pc.utf8_trim_whitespace(column).cast(pa.int64() if whole else pa.float64())
