"""What all exports of an index share: its images with their paths, and a count of what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spn4cir.datasets.reading import inner_path
from spn4cir.index.snapshot import Snapshot


@dataclass(frozen=True)
class Exported:
    """What an export wrote, deleted and left as it was, in images or in shards."""

    unit: str
    written: int
    deleted: int
    unchanged: int

    def __str__(self) -> str:
        return f"{self.unit}: {self.written:,} written, {self.deleted:,} deleted, {self.unchanged:,} unchanged"


def live_rows(snapshot: Snapshot) -> np.ndarray[Any, Any]:
    """Rows of all images that are in the index, in order."""
    return np.flatnonzero(snapshot.alive)


def image_paths(snapshot: Snapshot, rows: Sequence[int]) -> list[str | None]:
    """The absolute path of each row's picture; None for one that has no file of its own."""
    files = snapshot.files.select(["source", "path"]).take(rows).to_pydict()
    roots = [Path(source.root) for source in snapshot.head.sources]
    return [
        None if path is None else str(roots[source] / inner_path(roots[source], "path", path))
        for source, path in zip(files["source"], files["path"], strict=True)
    ]
