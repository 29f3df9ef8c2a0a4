"""Approximate search of a large segment by faiss: built once, beside the vectors."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from spn4cir.errors import InputError
from spn4cir.faiss_search import Kind, Neighbours, import_faiss
from spn4cir.search import top_k

MIN_APPROXIMATE = 4096
"""Rows from which a segment gets an index of faiss; smaller ones are searched exactly."""
PROBES, FIRST = 256, 10


def check_kind(kind: str) -> None:
    """Raises ``InputError`` for an unknown kind of index, or if faiss is needed and missing."""
    if kind not in get_args(Kind):
        raise InputError(f"unknown kind of index {kind!r}; known: {', '.join(get_args(Kind))}")
    if kind != "exact":
        import_faiss()


def build_approximate(vectors: Tensor, kind: str, folder: Path) -> None:
    """Build and save an index of vectors (N, K, E), and print its recall against exact search."""
    file = folder / f"{kind}.faiss"
    if file.is_file():
        return
    neighbours = Neighbours(vectors, _known(kind))
    neighbours.save(file)
    share = measure_recall(neighbours, vectors)
    print(f"{kind}: recall@{FIRST} {share:.3f} against exact search, {PROBES} images as queries")


def open_approximate(vectors: Tensor, kind: str, folder: Path, effort: int) -> Neighbours | None:
    """The saved index of a segment; None for one that is searched exactly."""
    if kind == "exact" or len(vectors) < MIN_APPROXIMATE:
        return None
    return Neighbours(vectors, _known(kind), effort, folder / f"{kind}.faiss")


def measure_recall(neighbours: Neighbours, vectors: Tensor) -> float:
    """Share of the exact first ten that are found, over evenly spaced images as queries, themselves left out."""
    rows = torch.linspace(0, len(vectors) - 1, min(PROBES, len(vectors))).long()
    queries = torch.nn.functional.normalize(vectors[rows].float().mean(1), dim=1)
    ranked, exact_rows = (top_k(queries, one, FIRST, rows[:, None])[1] for one in (neighbours, vectors))
    return float((ranked[:, :, None] == exact_rows[:, None]).any(2).float().mean())


def _known(kind: str) -> Kind:
    return next(one for one in get_args(Kind) if one == kind)
