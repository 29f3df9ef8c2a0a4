"""Windows of ranks: partial selection against the dense matrix and a full argsort.

Vectors are made up: unit norm, width 768, with 64 directions that matter more than the rest, so that similarities
spread as those of image encoders do (standard deviation about 0.1); a last row has none, the hardest case, where the
most images are near any rank. First all pairs are compared with those of a full stable sort of float64 products.

examples:
  python -m benchmarks.matching
  python -m benchmarks.matching --device --sizes 20000 100000 1000000   # counting on a GPU
"""

import argparse
import copy
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import report, row, watched
from spn4cir.data_gen.steps import ROWS
from spn4cir.data_gen.windows import Window
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.results import git_commit

WIDTH, SEED, ROUNDS = 768, 42, 3
Pairs = list[tuple[int, int]]


def make_vectors(path: Path, count: int, directions: int) -> None:
    """(count, WIDTH) of unit norm."""
    draw = np.random.default_rng(count)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (count, WIDTH))
    basis = draw.standard_normal((directions, WIDTH), np.float32)
    for start in range(0, count, 50_000):
        rows = draw.standard_normal((min(50_000, count - start), WIDTH), np.float32)
        if directions:
            rows = rows * 0.5 + draw.standard_normal((len(rows), directions), np.float32) @ basis / directions**0.5
        out[start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    out.flush()


def window_of(count: int) -> tuple[int, int]:
    """From 40 to 80 % of the list, as the paper's window on FashionIQ."""
    return int(0.4 * count), int(0.8 * count)


def ranks_of(count: int) -> list[int]:
    """The rank that each image draws."""
    lo, hi = window_of(count)
    return [lo + random.Random(f"{SEED}/{n}").sample(range(hi - lo), 1)[0] for n in range(count)]


def ours(path: Path) -> dict[str, Any]:
    """Blocks of products, selection in each; and the time of the products alone."""
    vectors = np.load(path)
    lo, hi = window_of(len(vectors))
    window, pairs = Window(vectors, lo, hi, 1, SEED), Pairs()
    start = time.perf_counter()
    for first in range(0, len(vectors), ROWS):
        block = range(first, min(first + ROWS, len(vectors)))
        found = window.draw(block, [str(n) for n in block], [()] * len(block))
        pairs += [(one.position, one.rank) for partners in found for one in partners]
    seconds, every = time.perf_counter() - start, torch.from_numpy(vectors)
    start = time.perf_counter()
    for first in range(0, len(vectors), ROWS):
        every[first : first + ROWS] @ every.T
    return {"seconds": seconds, "selection": seconds - (time.perf_counter() - start), "pairs": pairs}


def straightforward(path: Path) -> dict[str, Any]:
    """The dense matrix in float32 and its argsort."""
    every = torch.from_numpy(np.load(path))
    ranks = torch.tensor(ranks_of(len(every)))
    start = time.perf_counter()
    scores = (every @ every.T).fill_diagonal_(-torch.inf)
    middle = time.perf_counter()
    order = scores.argsort(dim=1, descending=True)
    end = time.perf_counter()
    found = order.gather(1, ranks[:, None] - 1)[:, 0]
    pairs = list(zip(found.tolist(), ranks.tolist(), strict=True))
    return {"seconds": time.perf_counter() - start, "selection": end - middle, "pairs": pairs}


def by_the_definition(path: Path) -> dict[str, Any]:
    """A full stable sort of float64 products, some rows at a time, so that it fits in memory."""
    every, pairs = torch.from_numpy(np.load(path)).double(), Pairs()
    ranks = ranks_of(len(every))
    for first in range(0, len(every), ROWS):
        scores = every[first : first + ROWS] @ every.T
        own = range(first, first + len(scores))
        scores[range(len(own)), own] = -torch.inf
        order = scores.sort(dim=1, descending=True, stable=True).indices
        pairs += [(int(order[row, ranks[n] - 1]), ranks[n]) for row, n in enumerate(own)]
    return {"pairs": pairs}


def measured(task: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """In a process of its own; adds its peak of extra anonymous memory in MB, beyond what imports and vectors take."""
    return watched(_serve, task, path)


def _serve(begin: Callable[[], None], task: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    vectors = np.load(path)
    torch.from_numpy(vectors[:64]) @ torch.from_numpy(vectors[:64]).T  # libraries take their memory
    begin()
    del vectors
    return task(path)


def compare(path: Path, count: int, directions: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """All ways over so many vectors; asserts that ours finds the pairs of the definition."""
    make_vectors(path, count, directions)
    truth = measured(by_the_definition, path)["pairs"]
    results = [(measured(ours, path), measured(straightforward, path)) for _ in range(rounds)]  # in turns
    for fast, plain in results:
        assert fast["pairs"] == truth, "pairs differ from a full sort"
        off = sum(one != other for one, other in zip(plain["pairs"], truth, strict=True))
        assert off < 0.1 * count, "the straightforward way finds other pairs"
    fast, plain = ({**one[0], **_medians(one)} for one in zip(*results, strict=True))
    parts = {"ours": fast, "dense and argsort": plain}
    return {
        "images": count,
        "directions": directions or "none",
        "seconds": {name: round(part["seconds"], 2) for name, part in parts.items()},
        "of it selection": {name: round(part["selection"], 2) for name, part in parts.items()},
        "peak extra MB": {name: part["peak MB"] for name, part in parts.items()},
        "ratio": {key: round(plain[key] / fast[key], 2) for key in ("seconds", "selection")},
        "memory": round(fast["peak MB"] / plain["peak MB"], 3) if fast["peak MB"] else None,
        "pairs that float32 alone gets wrong": off,
    }


def _medians(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(one[key] for one in results) for key in ("seconds", "selection")}


def on_cpu(window: Window) -> Window:
    """The same window, computed on the CPU."""
    other = copy.copy(window)
    other.device, other._all = "cpu", torch.from_numpy(np.asarray(window.vectors))
    return other


def on_device(path: Path, count: int, blocks: int) -> dict[str, Any]:
    """Counting on a GPU: some blocks of references against all images; and sorting there, the straightforward way."""
    make_vectors(path, count, 64)
    vectors = np.load(path, mmap_mode="c")
    lo, hi = window_of(count)
    window = Window(vectors, lo, hi, 1, SEED)
    assert window.device != "cpu", "no GPU"
    firsts = list(range(0, count, ROWS))[:blocks]

    def ours(first: int) -> list[Any]:
        block = range(first, min(first + ROWS, count))
        return window.draw(block, [str(n) for n in block], [()] * len(block))

    def plain(first: int) -> Any:
        block = range(first, min(first + ROWS, count))
        scores = window._all[first : first + ROWS] @ window._all.T
        scores[range(len(block)), block] = -torch.inf
        return scores.sort(dim=1, descending=True, stable=True).indices

    ranks, seconds = ranks_of(count)[:ROWS], dict[str, float]()
    for way in (ours, plain):
        way(0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for first in firsts:
            way(first)
        torch.cuda.synchronize()
        seconds[way.__name__] = (time.perf_counter() - start) / len(firsts)
    order, found = plain(0), ours(0)
    off = sum(int(order[n, ranks[n] - 1]) != one[0].position for n, one in enumerate(found))
    some = range(16)
    settled = on_cpu(window).draw(some, [str(n) for n in some], [()] * len(some))
    assert [one[0][:2] for one in settled] == [one[0][:2] for one in found[:16]], "a GPU finds other pairs than a CPU"
    total = -(-count // ROWS)
    return {
        "images": count,
        "blocks measured": len(firsts),
        "blocks": total,
        "seconds a block": {name: round(value, 4) for name, value in seconds.items()},
        "seconds for all": {name: round(value * total, 1) for name, value in seconds.items()},
        "ratio": round(seconds["plain"] / seconds["ours"], 2),
        "peak GPU GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "pairs of the first block that float32 alone gets wrong": off,
    }


def run(sizes: list[int], device: bool, blocks: int) -> dict[str, Any]:
    """All measurements."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        if device:
            rows = [on_device(path, count, blocks) for count in sizes]
        else:
            rows = [compare(path, count, 64) for count in sizes] + [compare(path, sizes[-1], 0)]
    machine = torch.cuda.get_device_name() if device else f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "benchmark": "matching",
        "what": f"one partner of each image from ranks of 40 to 80 % of the list, width {WIDTH}"
        + ("" if device else f", medians of {ROUNDS} rounds in turns"),
        "device" if device else "cpu": rows,
        "threads": torch.get_num_threads(),
        "machine": machine,
        "torch": torch.__version__,
        "git": git_commit(),
    }


def suite(count: int = 5000) -> dict[str, Any]:
    """One size on the CPU, once, with a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        one = compare(Path(folder) / "vectors.npy", count, 64, rounds=1)
    plain = "dense and argsort"
    pairs = [(part["ours"], part[plain]) for part in (one["seconds"], one["peak extra MB"])]
    return report(
        "matching", "windows of ranks, one round", [row(f"windows of {count:,} images", plain, *pairs)], cpu=one
    )


def main() -> None:
    """Measure, print a line for each size and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 10000, 20000], help="numbers of images")
    parser.add_argument("--device", action="store_true", help="on a GPU")
    parser.add_argument("--blocks", type=int, default=10**9, help="measure so many blocks on a GPU, and scale up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    found = run(args.sizes, args.device, args.blocks)
    for line in found.get("cpu") or found["device"]:
        print(", ".join(f"{key}: {value}" for key, value in line.items()))
    print(json.dumps(found))
    if args.json:
        write_text(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
