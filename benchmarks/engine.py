"""An index exported to Qdrant's own core in a folder, and searched there, beside exact search of the index on disk.

The vectors are made up: clusters of 100 unit vectors, one a picture. Both have to return the same hits. An export that
follows another one without a change, and one that follows the removal of one image in a hundred, are timed too.

examples:
  python -m benchmarks.engine                              # 20,000 and 100,000 images
  python -m benchmarks.engine --images 5000 --json engine.json
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.made_index import make_index
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.index.local import Index
from spn4cir.index.searchable import Hit, SearchableIndex
from spn4cir.index.snapshot import Snapshot, write_head
from spn4cir.index.vector_engines import export_index
from spn4cir.selection import Selection

WIDTH, CLUSTER, QUERIES = 512, 100, 100
WHERE = ["price<=10"]  # a tenth of the images


def make_vectors(count: int) -> Tensor:
    """Unit vectors (count, 1, WIDTH) in clusters."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(-(-count // CLUSTER), WIDTH, generator=generator).repeat_interleave(CLUSTER, 0)[:count]
    return F.normalize(centres + torch.randn(count, WIDTH, generator=generator), dim=1)[:, None]


def timed(task: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the task returns."""
    start = time.perf_counter()
    result = task()
    return round(time.perf_counter() - start, 5), result


def search(index: SearchableIndex, queries: Tensor, where: list[str]) -> tuple[list[float], list[list[Hit]]]:
    """Milliseconds and hits of one query at a time; the first one, which loads, does not count."""
    index.search_vector(queries[0], Selection(), where)
    taken = [timed(partial(index.search_vector, query, Selection(), where)) for query in queries]
    return [1000 * seconds for seconds, _ in taken], [hits for _, hits in taken]


def measure(count: int) -> dict[str, Any]:
    """Export, open and search as many images; asserts that both indexes return the same hits."""
    with tempfile.TemporaryDirectory() as name:
        folder, vectors = Path(name), make_vectors(count)
        columns: dict[str, list[Any]] = {"price": [n * 7919 % 100 for n in range(count)]}
        local, place = Index(make_index(folder / "index", vectors, columns)), f"qdrant:{folder / 'engine'}"
        generator = torch.Generator().manual_seed(1)
        chosen = vectors[torch.randint(count, (QUERIES,), generator=generator), 0]
        queries = F.normalize(chosen + torch.randn(QUERIES, WIDTH, generator=generator) / WIDTH**0.5, dim=1)
        row: dict[str, Any] = {"images": count}
        row["export seconds"], done = timed(lambda: export_index(local.path, "qdrant", place))
        row["export again seconds"], again = timed(lambda: export_index(local.path, "qdrant", place))
        assert (done.written, again.written, again.deleted) == (count, 0, 0)
        row["open seconds"], engine = timed(lambda: Index.open(place))
        for what, where in (("all", []), (WHERE[0], WHERE)):
            found = {kind: search(index, queries, where) for kind, index in (("engine", engine), ("local", local))}
            pairs = zip(found["engine"][1], found["local"][1], strict=True)
            assert all([hit.id for hit in one] == [hit.id for hit in other] for one, other in pairs), "hits differ"
            row |= {
                f"{kind}, {what}, ms": {f"p{p}": round(float(np.percentile(taken, p)), 2) for p in (50, 95)}
                for kind, (taken, _) in found.items()
            }
        engine.close()
        write_head(local.path, Snapshot(local.path).remove(np.arange(0, count, 100)))
        row["export of 1 % removed seconds"], done = timed(lambda: export_index(local.path, "qdrant", place))
        assert (done.written, done.deleted) == (0, -(-count // 100)), "more is written than has changed"
    return row


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 100_000], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    from spn4cir.results import git_commit

    report = {
        "benchmark": "engine",
        "what": f"first 10 of one query, width {WIDTH}, Qdrant's core in a folder beside the index on disk, both exact",
        "rows": [measure(count) for count in args.images],
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "git": git_commit(),
    }
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
