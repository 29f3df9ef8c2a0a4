"""One query among a million vectors: our index beside raw faiss and beside npy and faiss, exact and by a graph.

Vectors are made up: 1,000 directions with noise around them; queries are noisy copies. Each way runs in a process of
its own, over the same file of vectors. The graph is built once by each, with the same parameters.

examples:
  python -m benchmarks.index --json benchmarks/results/index.json    # half an hour, 10 GB of disk, 8 GB of memory
  python -m benchmarks.index --count 50000
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.made_index import make_index
from benchmarks.measure import report, watched
from spn4cir.errors import run_command
from spn4cir.files import write_text

WIDTH, QUERIES, FIRST, CENTRES = 512, 100, 10, 1000
EFFORTS = (64, 256, 1024)
Found = list[list[int]]


def make_files(folder: Path, count: int) -> None:
    """``vectors.npy`` (count, WIDTH) and ``queries.npy`` (QUERIES, WIDTH)."""
    draw = torch.Generator().manual_seed(count)
    centres = F.normalize(torch.randn(CENTRES, WIDTH, generator=draw), dim=1)
    file = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.dtype("float32"), (count, WIDTH))
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        near = centres[torch.randint(0, CENTRES, (size,), generator=draw)]
        file[start : start + size] = F.normalize(near + 0.06 * torch.randn(size, WIDTH, generator=draw), dim=1)
    file.flush()
    rows = np.linspace(0, count - 1, QUERIES).astype(int)
    noisy = torch.from_numpy(file[rows]) + 0.03 * torch.randn(QUERIES, WIDTH, generator=draw)
    np.save(folder / "queries.npy", F.normalize(noisy, dim=1).numpy())


def timed(search: Callable[[Any], list[Any]], queries: Any) -> dict[str, Any]:
    """First results, and the median and 95th percentile of the time of one query in milliseconds."""
    search(queries[0])
    taken, found = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search(query))
        taken.append(1000 * (time.perf_counter() - start))
    return {
        "p50 ms": round(statistics.median(taken), 2),
        "p95 ms": round(statistics.quantiles(taken, n=20)[-1], 2),
        "found": found,
    }


def ours(begin: Callable[[], None], folder: Path, kind: str) -> dict[str, Any]:
    """``Index.search_vector``, hits with their paths and columns included."""
    from spn4cir.index.local import Index
    from spn4cir.selection import Selection

    queries, path = torch.from_numpy(np.load(folder / "queries.npy")), folder / f"index-{kind}"
    begin()
    start = time.perf_counter()
    if not path.is_dir():
        vectors = torch.from_numpy(np.load(folder / "vectors.npy", mmap_mode="r+"))[:, None]
        make_index(path, vectors, {"category": [f"c{n % 20}" for n in range(len(vectors))]}, kind=kind)
    built = time.perf_counter()
    index = Index(path)
    opened = time.perf_counter()
    index.search_vector(queries[0], Selection(FIRST))
    first = time.perf_counter()
    result = timed(lambda query: [int(hit.id[1:]) for hit in index.search_vector(query, Selection(FIRST))], queries)
    parts = {"build": built - start, "open": opened - built, "first search": first - opened}
    rows = timed(lambda query: index.nearest(query, FIRST).ids, queries)
    more = {"candidates alone, p50 ms": rows["p50 ms"], "efforts": efforts(path, queries) if kind == "hnsw" else []}
    return {**{f"{name} s": round(value, 2) for name, value in parts.items()}, **result, **more}


def efforts(path: Path, queries: Any) -> list[dict[str, Any]]:
    """Time and recall by how much of the graph is looked at."""
    from spn4cir.index.approximate import measure_recall
    from spn4cir.index.local import Index
    from spn4cir.selection import Selection

    found = []
    for effort in EFFORTS:
        index = Index(path, effort=effort)
        about = timed(partial(index.search_vector, selection=Selection(FIRST)), queries)
        del about["found"]
        vectors, graph = index.snapshot.vectors[0].whole(), index._state[1][0]
        assert graph is not None
        found.append({"effort": effort, **about, "recall@10 of stored": round(measure_recall(graph, vectors), 4)})
    return found


def raw_faiss(begin: Callable[[], None], folder: Path, kind: str) -> dict[str, Any]:
    """An index of faiss, and row numbers out of it."""
    import faiss

    vectors, queries = np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    begin()
    start = time.perf_counter()
    index: Any = (
        faiss.IndexFlatIP(WIDTH) if kind == "exact" else faiss.IndexHNSWFlat(WIDTH, 32, faiss.METRIC_INNER_PRODUCT)
    )
    if kind == "hnsw":
        index.hnsw.efSearch = 64
    for first in range(0, len(vectors), 16_384):
        index.add(np.ascontiguousarray(vectors[first : first + 16_384]))
    faiss.write_index(index, str(folder / f"raw-{kind}.faiss"))
    built = time.perf_counter()
    result = timed(lambda query: index.search(query[None], FIRST)[1][0].tolist(), queries)
    return {"build s": round(built - start, 2), **result}


def npy_and_faiss(begin: Callable[[], None], folder: Path, kind: str) -> dict[str, Any]:
    """The layout of clip-retrieval: a mapped index, and metadata in Parquet that hits are looked up in."""
    import faiss
    import pyarrow as pa
    from pyarrow import parquet

    queries, count = np.load(folder / "queries.npy"), len(np.load(folder / "vectors.npy", mmap_mode="r"))
    begin()
    start = time.perf_counter()
    metadata = folder / "metadata_0.parquet"
    paths = [f"i{n}.png" for n in range(count)]
    parquet.write_table(pa.table({"image_path": paths, "category": [f"c{n % 20}" for n in range(count)]}), metadata)
    del paths
    built = time.perf_counter()
    index = faiss.read_index(str(folder / f"raw-{kind}.faiss"), faiss.IO_FLAG_MMAP)
    table = parquet.read_table(metadata, memory_map=True)
    opened = time.perf_counter()

    def search(query: Any) -> list[int]:
        rows = index.search(query[None], FIRST)[1][0]
        table.take(rows).to_pylist()
        found: list[int] = rows.tolist()
        return found

    parts = {"build (metadata)": built - start, "open": opened - built}
    return {**{f"{name} s": round(value, 2) for name, value in parts.items()}, **timed(search, queries)}


def recall(found: Found, truth: Found) -> float:
    """Share of the exact first that were found."""
    return round(sum(len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)) / (len(truth) * FIRST), 4)


def run(count: int) -> dict[str, Any]:
    """All ways, one after the other."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, count)
        truth: Found = []
        for kind in ("exact", "hnsw"):
            for way in (raw_faiss, ours, npy_and_faiss):
                about = watched(way, folder, kind)
                truth = truth or about["found"]
                about[f"recall@{FIRST}"] = recall(about.pop("found"), truth)
                results[f"{kind}, {way.__name__}"] = about
                print(f"{kind}, {way.__name__}: {about}", flush=True)
    ratios = {
        kind: round(results[f"{kind}, ours"]["p50 ms"] / results[f"{kind}, raw_faiss"]["p50 ms"], 3)
        for kind in ("exact", "hnsw")
    }
    what = f"one query among {count:,} vectors of {WIDTH}, first {FIRST}, {QUERIES} queries"
    return report("index", what, [], ways=results, **{"p50, ours / raw faiss": ratios})


def main() -> None:
    """Measure, print a line for each way and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000_000, help="vectors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    found = run(args.count)
    print(json.dumps(found, ensure_ascii=False))
    if args.json:
        write_text(args.json, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_command(main)
