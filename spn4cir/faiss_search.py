"""The first k of a gallery by an index of faiss, exact or approximate, behind the signature of ``search.top_k``."""

import importlib
import math
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.errors import InputError
from spn4cir.files import replaced
from spn4cir.search import BLOCK, blocks, top_k

Kind: TypeAlias = Literal["exact", "ivf", "hnsw"]
CHUNK = 1024  # queries searched at once; faiss multiplies matrices only where queries × E are more than 128,000
SPARE = 16  # vectors fetched beyond those needed, so that few searches end within equal scores
SLACK = 2.0**-20  # times √E and both lengths: more than two ways to add up a product in float32 differ by
LINKS = 32  # of a vector in the graph of hnsw
SEED = 42
GPU_LIMIT = 2048  # vectors that faiss finds at most on a GPU


class Neighbours:
    """A gallery that is searched by an index of faiss.

    Vectors are compared by inner product, in float32. An index holds all G · K vectors; the best k · K of them always
    belong to at least k images. What it finds is scored once more from the gallery, so scores are those of all K
    vectors, and equal ones are in the order of rows.

    ``exact`` finds what ``search.top_k`` finds, up to images whose scores differ by less than float32 tells apart.
    ``ivf`` looks into the few of about 4 √(G · K) clusters that are nearest, ``hnsw`` walks a graph: both may miss
    images, and may find fewer than k. Several threads link the graph of ``hnsw`` in an order of their own, so that two
    builds may differ; with OMP_NUM_THREADS=1 they do not. Where faiss finds a GPU, ``exact`` and ``ivf`` are searched
    there (not tried on one).

    Args:
        gallery: (G, K, E), kept; in half precision it stays so, but not in the index.
        index: which.
        effort: clusters that ``ivf`` looks into, or vectors that ``hnsw`` keeps in sight; more is slower, misses less.
        saved: file of ``save`` to read the index from, ``ivf`` or ``hnsw`` alone; None builds it.

    Raises ``InputError`` if faiss or the saved file is missing, ``ValueError`` if a vector is not finite.
    """

    def __init__(self, gallery: Tensor, index: Kind = "exact", effort: int = 64, saved: Path | None = None):
        if index not in get_args(Kind) or effort < 1:
            raise ValueError(f"index must be one of {', '.join(get_args(Kind))} and effort positive: {index}, {effort}")
        self.gallery, self.kind, self._effort = gallery, index, effort
        faiss = import_faiss()
        self._on_gpu = index != "hnsw" and faiss.get_num_gpus() > 0
        self._longest = 0.0  # length of a vector
        self._index = None
        if saved is not None:
            self._index = self._read(faiss, saved, effort)
        elif gallery.numel():
            self._index = self._build(faiss, effort)

    def __len__(self) -> int:
        return len(self.gallery)

    def _build(self, faiss: Any, effort: int) -> Any:
        """The index of all vectors."""
        for _, block in blocks(self.gallery, torch.empty(0)):
            self._longest = max(self._longest, float(block.norm(dim=2).max()))
            if not bool(block.isfinite().all()):
                raise ValueError("the gallery is not finite: an embedding holds NaN or infinity")
        images, vectors, width = self.gallery.shape
        lists = max(1, min(images * vectors, int(4 * math.sqrt(images * vectors))))
        index = faiss.IndexFlatIP(width)
        if self.kind == "ivf":
            index = faiss.IndexIVFFlat(index, width, lists, faiss.METRIC_INNER_PRODUCT)
        elif self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = effort
        if self._on_gpu:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        if self.kind == "ivf":
            index.cp.seed, index.cp.min_points_per_centroid = SEED, 1  # few points are no reason to complain
            index.nprobe = min(effort, lists)
            drawn = torch.randperm(images, generator=torch.Generator().manual_seed(SEED))
            some = drawn[: index.cp.max_points_per_centroid * lists // vectors + 1].sort().values
            index.train(_array(self.gallery[some.to(self.gallery.device)].flatten(0, 1)))
        for _, block in blocks(self.gallery, torch.empty(0)):
            index.add(_array(block.flatten(0, 1)))
        return index

    def candidates(self, query: Tensor, count: int) -> tuple[np.ndarray[Any, Any], float] | None:
        """Rows of about ``count`` images nearest to one query (E,), unordered, and the lowest product found.

        None where the index finds fewer.
        """
        assert self._index is not None
        wanted = min(count * self.gallery.shape[1], self._index.ntotal)
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = max(self._effort, wanted)
        products, found = self._index.search(_array(query[None]), wanted)
        if (found < 0).any():
            return None
        is_all = wanted == self._index.ntotal
        return np.unique(found[0] // self.gallery.shape[1]), -math.inf if is_all else float(products[0, -1])

    def save(self, path: Path) -> None:
        """Write the index, vectors included."""
        faiss = import_faiss()
        with replaced(path) as beside:
            faiss.write_index(faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index, str(beside))

    def _read(self, faiss: Any, path: Path, effort: int) -> Any:
        try:
            index = faiss.read_index(str(path))
        except RuntimeError:
            raise InputError(f"{path} is missing or damaged: build the index anew") from None
        count, _, width = self.gallery.shape
        if (index.ntotal, index.d) != (count * self.gallery.shape[1], width):
            raise InputError(f"{path} is an index of other vectors: build the index anew")
        if self.kind == "hnsw":
            index.hnsw.efSearch = effort
        else:
            index.nprobe = min(effort, index.nlist)
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index) if self._on_gpu else index

    @torch.no_grad()
    def top_k(
        self, query: Tensor, k: int, excluded: Tensor | None = None, members: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best gallery rows of each query, best first, as ``search.top_k`` takes and gives them.

        Where fewer than k are found the last rows are -1, with a score of minus infinity. ``members`` are scored
        without the index. Raises ``ValueError`` if a query is not finite.
        """
        k = min(k, len(self.gallery))
        if not bool(torch.isfinite(query).all()):
            raise ValueError("scores are not finite: a query holds NaN or infinity")
        scores = query.new_full((len(query), k), -torch.inf, dtype=torch.float32)
        rows = torch.full_like(scores, -1, dtype=torch.long)
        for start in range(0, len(query) if k else 0, CHUNK):
            part = slice(start, start + CHUNK)
            own, without = query[part].float(), None if excluded is None else excluded[part].to(query.device)
            if members is None:
                scores[part], rows[part] = self._search(own, k, without)
            else:
                scores[part], rows[part] = self._best(own, members[part].to(query.device), k, without)
        return scores, rows

    def _search(self, query: Tensor, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first k by the index; where an exact one may not have seen all of them, by all scores."""
        assert self._index is not None
        vectors, left_out = self.gallery.shape[1], 0 if excluded is None else excluded.shape[1]
        count = min((k + left_out) * vectors + SPARE, self._index.ntotal)
        if self._on_gpu:
            count = min(count, GPU_LIMIT)
        products, found = (torch.from_numpy(one).to(query.device) for one in self._index.search(_array(query), count))
        rows = found.div(vectors, rounding_mode="floor")  # -1, a place that is not filled, stays -1
        scores, rows = self._best(query, rows, k, excluded)
        if self.kind == "exact" and count < self._index.ntotal:
            slack = SLACK * math.sqrt(query.shape[1]) * self._longest * query.norm(dim=1)
            unsure = ~(scores[:, -1] > products[:, -1] + slack)  # what was not seen scores no more than that
            if bool(unsure.any()):
                part = None if excluded is None else excluded[unsure]
                scores[unsure], places = top_k(query[unsure], self.gallery, k, part)
                rows[unsure] = places.masked_fill(scores[unsure].isneginf(), -1)
        return scores, rows

    def _best(self, query: Tensor, rows: Tensor, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k best of the images that a padded table (b, X) names, scored here; (b, k) each, padded with -1."""
        rows = rows.sort(1).values
        rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1  # found by several of its vectors
        for column in () if excluded is None else excluded.T:
            rows[rows == column[:, None]] = -1
        rows = rows.masked_fill(rows < 0, len(self.gallery)).sort(1).values  # padding comes last
        rows = rows[:, : max(1, int((rows < len(self.gallery)).sum(1).max()))]
        scores = torch.full_like(rows, -torch.inf, dtype=torch.float32)
        at_once = max(1, BLOCK // (rows.shape[1] * self.gallery.shape[1]))
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            held = self.gallery[part.clamp(max=len(self.gallery) - 1).to(self.gallery.device)]  # (q, X, K, E)
            # not a matrix product, where the last bit of a score depends on the place of the image
            products = (held.to(query.device, torch.float32) * query[start : start + at_once, None, None]).sum(3)
            scores[start : start + at_once] = products.amax(2).masked_fill(part == len(self.gallery), -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order).masked_fill(scores.isneginf(), -1)
        missing = max(0, k - rows.shape[1])
        return F.pad(scores[:, :k], (0, missing), value=-torch.inf), F.pad(rows[:, :k], (0, missing), value=-1)


def import_faiss() -> Any:
    """The module faiss. Raises ``InputError`` if it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        advice = "pip install 'spn4cir[faiss-cpu]', or faiss-gpu on a CUDA machine"
        raise InputError(f"faiss is missing: {advice}") from error


def _array(vectors: Tensor) -> np.ndarray[Any, Any]:
    """What faiss takes."""
    return vectors.detach().to("cpu", torch.float32).contiguous().numpy()
