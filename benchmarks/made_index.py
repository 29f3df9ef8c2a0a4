"""An index of made-up vectors in a folder, without pictures and without a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor
from torch.nn import functional as F

from spn4cir.index.approximate import MIN_APPROXIMATE, build_approximate
from spn4cir.index.changes import draw_number
from spn4cir.index.snapshot import BLOCK, Head, SegmentNote, SourceNote, segment_store, write_head, write_removed


def draw_vectors(count: int, k: int = 1, width: int = 16, seed: int = 0) -> Tensor:
    """Unit vectors (count, k, width), some of them equal, some nearly so."""
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(count, k, width, generator=generator), dim=2)
    vectors[count // 2 : count // 2 + count // 10] = vectors[: count // 10]
    near = vectors[: count // 10] + 0.02 * torch.randn(count // 10, k, width, generator=generator)
    vectors[-(count // 10) :] = F.normalize(near, dim=2)
    return vectors


def draw_columns(count: int) -> dict[str, list[Any]]:
    """A text, a number and a truth for each row, empty cells included."""
    return {
        "category": [None if n % 11 == 0 else ("dress", "shirt", "toptee")[n % 3] for n in range(count)],
        "price": [None if n % 7 == 0 else float(n % 50) for n in range(count)],
        "sold": [None if n % 13 == 0 else n % 2 == 0 for n in range(count)],
        "product": [None if n % 17 == 0 else f"p{n // 4}" for n in range(count)],
    }


def make_index(
    path: Path,
    vectors: Tensor,
    columns: Mapping[str, Sequence[Any]],
    sizes: Sequence[int] | None = None,
    gone: Sequence[int] = (),
    kind: str = "exact",
) -> Path:
    """Write an index of several segments; rows of ``gone`` are removed. Ids are ``i000`` and so on."""
    path.mkdir(parents=True, exist_ok=True)
    count = len(vectors)
    notes, start = [], 0
    for number, size in enumerate(sizes or [count]):
        part = slice(start, start + size)
        key = f"{number:024x}"
        store = segment_store(path, key, size, str(vectors.dtype).removeprefix("torch."))
        for first in range(0, size, BLOCK):
            store.write(first, {"target": vectors[part][first : first + BLOCK]})
        store.finish()
        ids = [f"i{n:03d}" for n in range(start, start + size)]
        files = {
            "id": ids,
            "source": [0] * size,
            "path": [f"{image_id}.png" for image_id in ids],
            "box": pa.nulls(size, pa.list_(pa.int64())),
            "size": [1] * size,
            "mtime_ns": [1] * size,
            "content": [f"content of {image_id}" for image_id in ids],
            "columns": pa.array([0] * size, pa.uint64()),
            "draw": pa.array([draw_number(image_id) for image_id in ids], pa.uint64()),
            "problem": [""] * size,
        }
        parquet.write_table(pa.table(files), store.folder / "files.parquet")
        parquet.write_table(pa.table({n: v[part] for n, v in columns.items()}), store.folder / "columns.parquet")
        if kind != "exact" and size >= MIN_APPROXIMATE:
            build_approximate(vectors[part], kind, store.folder)
        dead = np.array([row - start for row in gone if start <= row < start + size], dtype=np.int64)
        notes.append(SegmentNote(key, size, write_removed(store.folder, dead)))
        start += size
    source = SourceNote("", "catalogue", str(path))
    shape = (vectors.shape[1], vectors.shape[2])
    write_head(
        path,
        Head("embedded", "made-up", str(vectors.dtype).removeprefix("torch."), shape, kind, (source,), tuple(notes)),
    )
    return path
