"""Ranks and the first k: by blocks against dense scores and their argsort, a product and topk, and indexes of faiss.

Vectors are made up: about unit norm, with 64 directions that matter more than the rest, in whole multiples of 2⁻¹¹, so
that float32 and float16 hold them and their dot products come out exactly in any order: results are asserted to be
equal, not nearly so. Queries are noisy copies of their targets.

examples:
  python -m benchmarks.search
  python -m benchmarks.search --mapped 1000000   # one query among a million images: 2 GB of disk, 5 GB of memory
  python -m benchmarks.search --device   # on a GPU, up to ten million images
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Row, bound, in_turns, row, share, watched
from spn4cir.errors import InputError, run_command
from spn4cir.faiss_search import Kind, Neighbours
from spn4cir.files import write_text
from spn4cir.search import rank_targets, top_k

COUNT, WIDTH, QUERIES, FIRST = 100_000, 256, 256, 10
INDEXED = 10_000  # images in the indexes of faiss
FEW, SEARCHED, LONG = 64, 200_000, 512  # few queries, their images, and the width
MAPPED = 300_000  # images to search for one query
SIZES = (20_000, 100_000, 1_000_000, 10_000_000)  # on a GPU
AT_ONCE = 2**27  # scores that the straightforward way sorts at once on a GPU
Vectors = dict[str, Tensor]
Found = dict[str, Tensor]


def make_vectors(count: int, device: str = "cpu", stored: torch.dtype = torch.float32, width: int = WIDTH) -> Vectors:
    """``gallery`` (count, 1, width), ``query`` (QUERIES, width) and ``targets`` (QUERIES, 1)."""
    draw = torch.Generator(device).manual_seed(count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    def exact(vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1).mul_(2**11).round_().div_(2**11)

    gallery, basis = torch.empty(count, 1, width, dtype=stored, device=device), normal(64, width) / 8
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        gallery[start : start + size, 0] = exact(0.5 * normal(size, width) + normal(size, 64) @ basis).to(stored)
    targets = torch.randint(0, count, (QUERIES, 1), generator=draw, device=device)
    query = exact(gallery[targets[:, 0], 0].float() + normal(QUERIES, width) / width**0.5 * 1.5)
    return {"gallery": gallery, "query": query, "targets": targets}


def ranks(vectors: Vectors) -> Found:
    """By counting, block by block."""
    return {"ranks": rank_targets(vectors["query"], vectors["gallery"], vectors["targets"])[0][:, 0]}


def first(vectors: Vectors) -> Found:
    """By selection, block by block."""
    scores, rows = top_k(vectors["query"], vectors["gallery"], FIRST)
    return {"scores": scores, "rows": rows}


def straightforward(vectors: Vectors) -> Found:
    """Both from all scores at once and their argsort."""
    scores = vectors["query"] @ vectors["gallery"][:, 0].float().T  # (Q, G)
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = (order == vectors["targets"]).int().argmax(1) + 1
    rows = order[:, :FIRST]
    return {"places": places, "scores": scores.gather(1, rows), "rows": rows}


WAYS: dict[str, tuple[Callable[[Vectors], Found], int]] = {
    "ranks": (ranks, 3),
    "first k": (first, 3),
    "dense and argsort": (straightforward, 1),  # slow
}


def check(ranked: Found, selected: Found, plain: Found) -> None:
    """Assert that both ways agree."""
    lowest, highest = ranked["ranks"].T
    assert bool(((lowest <= plain["places"]) & (plain["places"] <= highest)).all()), "ranks differ from the argsort"
    assert torch.equal(selected["rows"], plain["rows"]), "the first k differ from the argsort"
    assert torch.equal(selected["scores"], plain["scores"]), "scores differ"


def measured(way: str, path: Path) -> dict[str, Any]:
    """In a process of its own: results, median seconds, and the peak of extra anonymous memory in MB."""
    result = watched(_serve, way, path)
    return {**result, "found": {name: torch.tensor(value) for name, value in result["found"].items()}}


def _serve(begin: Callable[[], None], way: str, path: Path) -> dict[str, Any]:
    vectors = {name: value.clone() for name, value in load_file(path).items()}  # in memory, and not in a mapped file
    vectors["query"][:64] @ vectors["gallery"][:64, 0].T  # libraries take their memory
    task, rounds = WAYS[way]
    begin()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = task(vectors)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "found": {name: value.tolist() for name, value in found.items()}}


def on_cpu(path: Path, count: int) -> dict[str, Any]:
    """Ours and the straightforward way over so many images; asserts that they agree."""
    parts = {way: measured(way, path) for way in WAYS}
    check(*(part["found"] for part in parts.values()))
    seconds = {way: part["seconds"] for way, part in parts.items()}
    peak = {way: part["peak MB"] for way, part in parts.items()}
    ours = max(peak["ranks"] or 0, peak["first k"] or 0)
    return {
        "images": count,
        "seconds": {way: round(value, 2) for way, value in seconds.items()},
        "peak extra MB": peak,
        "ratio": round(seconds["dense and argsort"] / (seconds["ranks"] + seconds["first k"]), 1),
        "memory": round(ours / peak["dense and argsort"], 3) if ours else None,
    }


def indexes(vectors: Vectors) -> list[dict[str, Any]]:
    """Indexes of faiss over some images; asserts that the exact one finds what torch finds."""
    query, gallery = vectors["query"], vectors["gallery"][:INDEXED].clone()
    start = time.perf_counter()
    truth = top_k(query, gallery, FIRST)
    rows: list[dict[str, Any]] = [{"index": "none", "seconds": round(time.perf_counter() - start, 3)}]
    kinds: tuple[Kind, ...] = ("exact", "ivf", "hnsw")
    for kind in kinds:
        start = time.perf_counter()
        index = Neighbours(gallery, kind)
        built = time.perf_counter()
        found = top_k(query, index, FIRST)
        end = time.perf_counter()
        hits = (found[1][:, :, None] == truth[1][:, None]).any(1).float().mean()
        equal = torch.equal(found[1], truth[1]) and torch.equal(found[0], truth[0])
        assert equal or kind != "exact", "the exact index finds other images"
        rows.append(
            {
                "index": kind,
                "build seconds": round(built - start, 2),
                "seconds": round(end - built, 3),
                f"recall@{FIRST}": round(float(hits), 4),
            }
        )
    return rows


def few_queries(queries: int, count: int) -> dict[str, Any]:
    """The first k among images of a memory-mapped file, in turns with others' ways; asserts that they agree."""
    import faiss  # the measurements on a GPU do not need it

    vectors = make_vectors(count, width=LONG)
    query = vectors["query"][:queries]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gallery.npy"
        np.save(path, vectors.pop("gallery").numpy())
        gallery = torch.from_numpy(np.load(path, mmap_mode="c"))  # (G, 1, E)
        index = faiss.IndexFlatIP(LONG)
        index.add(gallery[:, 0].numpy())
        ways: dict[str, Callable[[], Any]] = {
            "first k": lambda: top_k(query, gallery, FIRST),
            "product and topk": lambda: (query @ gallery[:, 0].T).topk(FIRST),
            "faiss flat": lambda: index.search(query.numpy(), FIRST),
        }
        (scores, rows), *others = (way() for way in ways.values())
        assert torch.equal((gallery[rows, 0] * query[:, None]).sum(2), scores), "rows have other scores"
        assert all(np.array_equal(scores, values) for values, _ in others), "scores differ"
        seconds = in_turns(ways, 9)
    return {
        "queries": queries,
        "images": count,
        "seconds": {way: round(value, 4) for way, value in seconds.items()},
        **{f"to {way}": share(seconds["first k"], seconds[way]) for way in list(ways)[1:]},
    }


def on_device(count: int, device: str = "cuda") -> dict[str, Any]:
    """Over a gallery in half precision on a GPU; the straightforward way over as many queries as fit, scaled up."""
    vectors = make_vectors(count, device, torch.float16)
    fit = min(QUERIES, max(1, AT_ONCE // count))
    some = {**vectors, "query": vectors["query"][:fit], "targets": vectors["targets"][:fit]}
    results, seconds, peak = dict[str, Found](), dict[str, float](), dict[str, float]()
    for way, (task, _) in WAYS.items():
        given = some if task is straightforward else vectors
        for _ in range(2):  # the first time warms up
            results[way] = {}
            before, start = _settled_memory(), time.perf_counter()
            results[way] = task(given)
            peak[way] = round((_settled_memory(peak=True) - before) / 2**20, 1)
            seconds[way] = (time.perf_counter() - start) * QUERIES / len(given["query"])
    ranked, selected, plain = results.values()
    check({"ranks": ranked["ranks"][:fit]}, {name: value[:fit] for name, value in selected.items()}, plain)
    return {
        "images": count,
        "seconds": {way: round(value, 4) for way, value in seconds.items()},
        "peak extra MB": peak,
        "queries that argsort is given at once": fit,
        "ratio": round(seconds["dense and argsort"] / (seconds["ranks"] + seconds["first k"]), 1),
    }


def _settled_memory(peak: bool = False) -> int:
    """Bytes held on the GPU once it has nothing to do, or the most that were since the last call."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return held


def run(device: bool = False, mapped: int = MAPPED) -> dict[str, Any]:
    """All measurements, with so many images for one query; those on a GPU instead where ``device`` says so."""
    from spn4cir.results import git_commit  # loads much, which the processes that are measured need not

    parts: dict[str, Any]
    if device and not torch.cuda.is_available():
        raise InputError("--device: torch finds no GPU; leave it out to measure on the CPU")
    if device:
        parts = {"device": [on_device(count) for count in SIZES]}
    else:
        with tempfile.TemporaryDirectory() as folder:
            path, vectors = Path(folder) / "vectors.safetensors", make_vectors(COUNT)
            save_file(vectors, path)
            parts = {"cpu": [on_cpu(path, COUNT)], "indexed": INDEXED, "faiss": indexes(vectors)}
        parts["few queries"] = [few_queries(FEW, SEARCHED), few_queries(1, mapped)]
    return {
        "benchmark": "search",
        "what": f"rank of the target and first {FIRST} of {QUERIES} queries, width {WIDTH}",
        **parts,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if device else f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "git": git_commit(),
    }


def suite() -> dict[str, Any]:
    """The same on the CPU, with the rows of the table."""
    found = run()
    rows: list[Row] = []
    for one in found["cpu"]:
        what, plain = f"rank and first {FIRST} of {QUERIES} queries, {one['images']:,} images", "dense and argsort"
        seconds, memory = one["seconds"], one["peak extra MB"]
        ours = max(memory["ranks"] or 0, memory["first k"] or 0) or None
        rows.append(row(what, plain, (seconds["ranks"] + seconds["first k"], seconds[plain]), (ours, memory[plain])))
    for one, plain, most in zip(found["few queries"], ("product and topk", "faiss flat"), (1.2, 1.1), strict=True):
        counts = f"queries: {one['queries']}, mapped images: {one['images']:,}"
        what, seconds = f"first {FIRST}, width {LONG}, {counts}", one["seconds"]
        held = bound("time", one[f"to {plain}"], most=most)
        rows.append(row(what, plain, (seconds["first k"], seconds[plain]), bounds=(held,)))
    return {**found, "rows": rows}


def main() -> None:
    """Measure, print a line for each way and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", action="store_true", help="on a GPU")
    parser.add_argument("--mapped", type=int, default=MAPPED, metavar="N", help="images to search for one query")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    report = run(args.device, args.mapped)
    for line in (line for part in ("device", "cpu", "faiss", "few queries") for line in report.get(part, ())):
        print(", ".join(f"{key}: {value}" for key, value in line.items()))
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
