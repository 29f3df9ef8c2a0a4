"""Labelled images in a folder and in tables, and what tests ask of the dataset ``labelled``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from conftest import draw_picture

from spn4cir.datasets.labelled import Labelled

CLASSES, EACH = 8, 4
PATHS = [(f"images/{label}/{n}.png", f"c{label}") for label in range(CLASSES) for n in range(EACH)]


def draw_classes(folder: Path) -> Path:
    """Draw eight classes of four pictures into a folder."""
    for path, _ in PATHS:
        draw_picture(folder / path, path)
    return folder


def rows_of(**columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of M4D's form, with further columns."""
    rows = [{"img_path": path, "label": label} for path, label in PATHS]
    return [{**row, **{name: values[n] for name, values in columns.items()}} for n, row in enumerate(rows)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write a CSV or Parquet file; returns its path."""
    frame = pandas.DataFrame(rows, dtype=object)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return str(path)


def classes_of(dataset: Labelled) -> dict[str, str]:
    """Image id → class, of all images that have one."""
    return {i: dataset.category(i) for role in dataset.image_roles() for i in role.image_ids if dataset.category(i)}


def classes_by_split(dataset: Labelled) -> dict[str, set[str]]:
    """Split → its classes."""
    names = [role.image_ids for role in dataset.image_roles()[:3]]
    return {s: {dataset.category(i) for i in ids} for s, ids in zip(("train", "val", "test"), names, strict=True)}
