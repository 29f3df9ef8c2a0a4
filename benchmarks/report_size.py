"""Seconds and bytes of the report of many queries, over photographs that are drawn.

Two models' ranks and first items are drawn, over a gallery of JPEG files; then everything that ``spn4cir-eval --compare
--report`` does after the evaluation is measured: intervals, paired tests, labels, rows by tag and mode, and the page.

examples:
  python -m benchmarks.report_size --queries 2000         # seconds
  python -m benchmarks.report_size --save                 # 20,000 queries, 5,000 photographs
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spn4cir.comparison import compare_results
from spn4cir.errors import run_command
from spn4cir.evaluate import COMPOSED, IMAGE_ONLY, LATE_FUSION, TEXT_ONLY
from spn4cir.files import write_text
from spn4cir.measures import Ranks
from spn4cir.report import write_report
from spn4cir.results import Ranking, Result, compute_ablation, compute_metrics, git_commit
from spn4cir.summary import metric_rows
from spn4cir.types import Benchmark, Query, recall_measures

RESULT = Path(__file__).parent / "results" / "report_size.json"
TAGS = ("colour", "shape", "pattern", "sleeve", "length", "material")
WORDS = ("darker", "longer", "sleeves", "with", "striped", "pattern", "and", "round", "neck", "in", "red")


def draw_photographs(folder: Path, count: int) -> None:
    """JPEG files of 640 × 480 with detail and noise, about 60 kB each."""
    chance = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        noise = chance.integers(-12, 13, (480, 640, 1))
        picture = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.jpg", quality=85)


def make_benchmark(queries: int, gallery: int) -> Benchmark:
    """Queries with texts of 60 to 120 letters and one or two targets."""
    chance = np.random.default_rng(1)
    ids = tuple(f"photographs/of/{n}.jpg" for n in range(gallery))

    def query(number: int) -> Query:
        reference, *targets = chance.choice(gallery, 2 + number % 2, replace=False).tolist()
        text = " ".join(chance.choice(WORDS, 12).tolist()) + f" {number}"
        return Query(ids[reference], text, tuple(ids[n] for n in targets), (TAGS[number % len(TAGS)],))

    measures = recall_measures(1, 5, 10, 50, primary=(10, 50))
    return Benchmark("drawn/val", ids, tuple(query(n) for n in range(queries)), True, measures)


def draw_result(benchmark: Benchmark, seed: int) -> Result:
    """An evaluation of which ranks and first items are drawn."""
    chance, count, most = np.random.default_rng(seed), len(benchmark.queries), len(benchmark.gallery)
    targets = np.array([len(query.targets) for query in benchmark.queries])

    def ranks() -> Ranks:
        drawn = np.minimum(chance.geometric(chance.uniform(0.005, 0.5, (count, 2))), most - 1)
        drawn[targets == 1, 1] = 0
        return np.repeat(drawn[..., None], 2, axis=2).astype(np.int64)

    by_mode = {mode: {"gallery": ranks()} for mode in (IMAGE_ONLY, TEXT_ONLY, COMPOSED, LATE_FUSION)}
    top = [[benchmark.gallery[n] for n in row] for row in chance.integers(0, most, (count, 6)).tolist()]
    metrics, tags = compute_metrics(benchmark, by_mode[COMPOSED])
    return Result(
        benchmark.name, metrics, tags, {mode: one for mode, (one, _) in compute_ablation(benchmark, by_mode).items()},
        count, "drawn", queries=benchmark.queries, benchmark=benchmark, by_mode=by_mode,
        rankings={"gallery": Ranking(by_mode[COMPOSED]["gallery"], top, [[0.0] * 6] * count)},
    )  # fmt: skip


def measure_report(queries: int, gallery: int) -> dict[str, Any]:
    """Seconds of each part and of all, and the size of the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_photographs(folder, gallery)
        benchmark = make_benchmark(queries, gallery)
        drawn = {label: draw_result(benchmark, seed) for seed, label in enumerate(("first", "other"))}
        start, before = time.perf_counter(), time.process_time()
        results = {label: result.with_intervals() for label, result in drawn.items()}
        intervals = time.perf_counter()
        differences = compare_results(results["first"], {"other": results["other"]})
        compared = time.perf_counter()
        rows = {label: metric_rows(result) for label, result in results.items()}
        counted = time.perf_counter()
        page = write_report(folder / "report", results, lambda i: folder / i.rpartition("/")[2], differences, rows=rows)
        end = time.perf_counter()
        return {
            "queries": queries, "gallery": gallery, "models": len(results), "seconds": round(end - start, 2),
            "CPU seconds": round(time.process_time() - before, 2),  # of a busy machine, the seconds of an idle one
            "seconds of": {
                "intervals": round(intervals - start, 2), "paired tests": round(compared - intervals, 2),
                "rows by tag and mode": round(counted - compared, 2), "page": round(end - counted, 2),
            },
            "MB": round(page.stat().st_size / 1e6, 2), "bounds": {"seconds": 10, "MB": 20},
        }  # fmt: skip


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--gallery", type=int, default=5_000)
    parser.add_argument("--save", action="store_true", help=f"keep the result as {RESULT.name}")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    found = {"benchmark": "report_size", **measure_report(args.queries, args.gallery), "machine": machine}
    text = json.dumps({**found, "git": git_commit()}, indent=1)
    print(text)
    if args.save:
        write_text(RESULT, text + "\n")


if __name__ == "__main__":
    run_command(_main)
