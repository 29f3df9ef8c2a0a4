"""Evaluation at full size: FashionIQ's and CIRR's val metrics from feature vectors, against the straightforward way.

Vectors are random, queries lean towards their targets. Both ways compute the metrics of fashioniq/original and cirr/val
and must agree. The straightforward way is what research code does: all scores, all of them sorted, an array of names
in that order, references and subsets found by comparing names.

examples:
  python -m benchmarks.evaluation                        # about a minute on two cores
  python -m benchmarks.evaluation --data-root FOLDER --json benchmarks/results/evaluation.json
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import anonymous, row
from spn4cir.datasets import load_dataset
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text
from spn4cir.measures import measure_name
from spn4cir.ranking import rank_queries
from spn4cir.results import compute_metrics, git_commit, primary_names
from spn4cir.types import Benchmark, Query, recall_measures

WIDTH = 640  # E of CLIP4CIR; K = 1
LEAN = 3.5  # how much of a query is its target, so that recalls lie between nothing and everything
DATASETS = ("fashioniq", "cirr")
FASHIONIQ = {  # published sizes: listed images, queries, distinct references, distinct references and targets
    "dress": (3817, 2017, 1331, 2628), "shirt": (6346, 2038, 1541, 3089), "toptee": (5373, 1961, 1454, 2902),
}  # fmt: skip
SHARED = 121  # images that two of the categories list
CIRR = (2297, 4181, 503)  # images, queries, groups of six
Metrics = dict[str, float]


def load(name: str, root: str | None) -> tuple[Benchmark, str]:
    """A benchmark from annotations, or one of the published sizes where there are none; and a word for which it is."""
    try:
        return load_dataset(name, root).benchmark("val"), "annotations"
    except InputError:
        if root:
            raise
        return {"fashioniq": made_fashioniq, "cirr": made_cirr}[name](), "synthetic, of the published sizes"


def made_fashioniq() -> Benchmark:
    """As many images, queries, references and targets in each category as were published."""
    galleries: list[tuple[str, ...]] = []
    queries, start = list[Query](), 0
    for category, (listed, asked, references, named) in FASHIONIQ.items():
        ids = tuple(f"B{n:09}" for n in range(start, start + listed))
        first = named - references  # references follow each other from here on, the first of them targets as well
        queries += [Query(ids[first + n % references], "", (ids[n],), (category,), ids) for n in range(asked)]
        galleries.append(ids)
        start += listed - (SHARED if category == "shirt" else 0)
    return Benchmark(
        name="fashioniq/original",
        gallery=tuple(dict.fromkeys(i for ids in galleries for i in ids)),
        queries=tuple(queries),
        exclude_reference=False,
        measures=recall_measures(10, 50, primary=(10, 50), over="candidates"),
        macro=tuple(FASHIONIQ),
    )


def made_cirr() -> Benchmark:
    """As many images, queries and groups as were published."""
    listed, asked, groups = CIRR
    ids = [f"dev-{n // 4}-{n // 2 % 2}-img{n % 2}" for n in range(listed)]
    queries = []
    for n in range(asked):
        start = n % groups * (listed - 6) // (groups - 1)
        members = tuple(ids[start : start + 6])
        turn = n // groups
        queries.append(Query(members[turn % 6], "", (members[(turn + 1 + turn // 6) % 6],), (), members, str(n)))
    return Benchmark(
        name="cirr/val",
        gallery=tuple(ids),
        queries=tuple(queries),
        exclude_reference=True,
        measures=(
            *recall_measures(1, 5, 10, 50, primary=(5,)),
            *recall_measures(1, 2, 3, primary=(1,), over="subset"),
        ),
    )


def galleries(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """What is ranked, by tag; where the metrics are no means over tags, the whole gallery."""
    own = {tag: query.candidates for query in reversed(benchmark.queries) for tag in query.tags}
    return {tag: own[tag] for tag in benchmark.macro} or {"": benchmark.gallery}


def features(benchmark: Benchmark) -> tuple[Tensor, Tensor]:
    """Random unit vectors: queries (Q, E), each leaning towards its target, and targets (G, 1, E)."""
    chance = torch.Generator().manual_seed(0)
    target = F.normalize(torch.randn(len(benchmark.gallery), WIDTH, generator=chance), dim=-1)  # (G, E)
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    wanted = target[[row[query.targets[0]] for query in benchmark.queries]]  # (Q, E)
    query = torch.randn(len(wanted), WIDTH, generator=chance) + LEAN * wanted
    return F.normalize(query, dim=-1), target[:, None]


def ours(benchmark: Benchmark, query: Tensor, target: Tensor) -> Metrics:
    """Ranks by counting, in chunks of queries."""
    return compute_metrics(benchmark, rank_queries(benchmark, query, target))[0]


def straightforward(benchmark: Benchmark, query: Tensor, target: Tensor) -> Metrics:
    """All scores, sorted, as names; everything else is a comparison of names."""
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    found: list[Metrics] = []
    for tag, ids in galleries(benchmark).items():
        asked = [n for n, one in enumerate(benchmark.queries) if not tag or tag in one.tags]
        scores = query[asked] @ target[[row[i] for i in ids], 0].T  # (q, g)
        ranked = np.array(ids)[scores.argsort(dim=1, descending=True).numpy()]  # (q, g) names
        if benchmark.exclude_reference:
            references = np.array([benchmark.queries[n].reference for n in asked])
            ranked = ranked[ranked != references[:, None]].reshape(len(asked), -1)  # (q, g - 1)
        hit = ranked == np.array([benchmark.queries[n].targets[0] for n in asked])[:, None]
        hits = {"gallery": hit, "candidates": hit}
        if any(measure.over == "subset" for measure in benchmark.measures):
            members = np.array([benchmark.queries[n].candidates for n in asked])  # (q, 6)
            inside = (ranked[:, :, None] == members[:, None]).any(2)  # (q, g - 1) from (q, g - 1, 6)
            hits["subset"] = hit[inside].reshape(len(asked), -1)  # (q, 5)
        metrics = {measure_name(m): float(100 * hits[m.over][:, : m.k].any(1).mean()) for m in benchmark.measures}
        found.append({**metrics, "Rmean": float(np.mean([metrics[name] for name in primary_names(benchmark)]))})
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


WAYS: dict[str, Callable[[Benchmark, Tensor, Tensor], Metrics]] = {"ours": ours, "straightforward": straightforward}


class Worker:
    """A process of its own that computes metrics in one way, as often as it is told to.

    Args:
        way: one of ``WAYS``.
        benchmarks: by dataset.
    """

    def __init__(self, way: str, benchmarks: dict[str, Benchmark]):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as make does: threads that spin slow each other down
        context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, way, benchmarks), daemon=True)
        self.process.start()
        there.close()
        self.pipe.recv()  # vectors are made

    def run(self, name: str) -> tuple[Metrics, float]:
        """Metrics of a dataset, and the seconds that they took."""
        self.pipe.send(name)
        metrics, seconds = self.pipe.recv()
        return metrics, seconds

    def peak(self, name: str) -> int:
        """The peak of extra anonymous memory in kB; nothing is timed, since to watch takes time too."""
        before = highest = anonymous(self.process.pid)
        self.pipe.send(name)
        while not self.pipe.poll(0.002):
            highest = max(highest, anonymous(self.process.pid))
        self.pipe.recv()
        return highest - before

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def _serve(pipe: Any, way: str, benchmarks: dict[str, Benchmark]) -> None:
    vectors = {name: features(benchmark) for name, benchmark in benchmarks.items()}
    pipe.send("ready")
    while (name := pipe.recv()) is not None:
        start = time.perf_counter()
        metrics = WAYS[way](benchmarks[name], *vectors[name])
        pipe.send((metrics, time.perf_counter() - start))


def measure(benchmarks: dict[str, Benchmark], rounds: int) -> dict[str, dict[str, Any]]:
    """``{way: {"seconds": {dataset: median}, "peak": kB, "metrics": {dataset: …}}}``, first memory, then time in turns.

    Raises:
        AssertionError: if the two disagree.
    """
    workers = {way: Worker(way, benchmarks) for way in WAYS}
    peak = {way: max(worker.peak(name) for name in benchmarks) for way, worker in workers.items()}
    seconds: dict[str, dict[str, list[float]]] = {way: {name: [] for name in benchmarks} for way in WAYS}
    metrics = {way: dict[str, Metrics]() for way in WAYS}
    for name in [*benchmarks] * rounds:
        for way, worker in workers.items():
            metrics[way][name], taken = worker.run(name)
            seconds[way][name].append(taken)
        one, other = (metrics[way][name] for way in WAYS)
        assert one.keys() == other.keys(), (one, other)
        assert all(abs(one[key] - other[key]) < 1e-9 for key in one), (one, other)
    for worker in workers.values():
        worker.close()
    medians = {way: {name: statistics.median(taken) for name, taken in of.items()} for way, of in seconds.items()}
    return {way: {"seconds": medians[way], "peak": peak[way], "metrics": metrics[way]} for way in WAYS}


def report(root: str | None, rounds: int) -> dict[str, Any]:
    """Everything that was measured, rounded, with what it was measured on."""
    loaded = {name: load(name, root) for name in DATASETS}
    benchmarks = {name: benchmark for name, (benchmark, _) in loaded.items()}
    found = measure(benchmarks, rounds)
    total = {way: sum(one["seconds"].values()) for way, one in found.items()}
    known = any(one["peak"] for one in found.values())
    return {
        "benchmark": "evaluation",
        "what": f"metrics of val from random vectors of width {WIDTH}, medians of {rounds} rounds in turns",
        "command": f"python -m benchmarks.evaluation --rounds {rounds}" + (" --data-root FOLDER" if root else ""),
        "data": {
            name: {
                "from": source,
                "protocol": benchmark.name,
                "queries": len(benchmark.queries),
                "images": [len(ids) for ids in galleries(benchmark).values()],
            }
            for name, (benchmark, source) in loaded.items()
        },
        "seconds": {
            way: {"total": round(total[way], 3), **{name: round(value, 3) for name, value in one["seconds"].items()}}
            for way, one in found.items()
        },
        "ratio": round(total["straightforward"] / total["ours"], 1),
        "peak extra MiB": {way: round(one["peak"] / 1024, 1) if known else None for way, one in found.items()},
        "equal metrics": {
            name: {key: round(value, 4) for key, value in metrics.items()}
            for name, metrics in found["ours"]["metrics"].items()
        },
        "threads": f"{torch.get_num_threads()}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
    }


def suite(rounds: int = 1) -> dict[str, Any]:
    """One round, with a row of the table."""
    found, plain = report(None, rounds), "straightforward"
    seconds = found["seconds"]["ours"]["total"], found["seconds"][plain]["total"]
    memory = found["peak extra MiB"]["ours"], found["peak extra MiB"][plain]
    return {
        **found,
        "rows": [row("val of FashionIQ and CIRR from vectors", "all scores sorted, names", seconds, memory)],
    }


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for name, about in found["data"].items():
        sizes = " + ".join(f"{images:,}" for images in about["images"])
        lines.append(f"{name}: {about['protocol']}, {about['queries']:,} queries over {sizes} images, {about['from']}")
    lines.append(
        f"{'seconds':18}" + "".join(f"{name:>12}" for name in ("total", *DATASETS)) + f"{'peak extra MiB':>17}"
    )
    for way, seconds in found["seconds"].items():
        peak = found["peak extra MiB"][way]
        cells = "".join(f"{value:12.3f}" for value in seconds.values())
        lines.append(f"{way:18}{cells}{'unknown' if peak is None else peak:>17}")
    return "\n".join([*lines, f"metrics are equal; ours is {found['ratio']} times as fast"])


def main() -> None:
    """Load, measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=(__doc__ or "").partition("\n\nexamples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-root", help="where annotations lie (default: SPN4CIR_DATA, then data; else made up)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is run (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {args.rounds}")
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: the folder {args.json.parent} is missing")
    found = report(args.data_root, args.rounds)
    print(table(found))
    print(json.dumps(found))
    if args.json:
        write_text(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
