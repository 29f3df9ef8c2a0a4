"""Millions of triplets in a memory-mapped table, beside a list of triplets at a tenth of them.

A Parquet file of triplets is made, whose references and targets are among 100,000 images and whose texts are short; one
query in a hundred has two targets. Each way runs in a process of its own: open (a table also for the first time, when
``datasets`` converts it), what training computes of all triplets (images, known targets, an epoch's order), and 1,000
batches of 256 with their texts, as far as the numbers that a batch holds; pixels and tokens are left out. Memory is
anonymous memory beyond that of the imports: what stays, and the peak.

examples:
  python -m benchmarks.triplet_table --rows 200000       # seconds
  python -m benchmarks.triplet_table --save              # ten million rows: minutes, and 3 GB of disk
"""

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import parquet
from torch import Tensor

from benchmarks.measure import anonymous, in_child
from spn4cir.batches import KnownTargets, TripletCollate, TripletRows, TripletSampler
from spn4cir.data import TrainingData
from spn4cir.datasets import load_dataset
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.images import ImageSource, Transform
from spn4cir.results import git_commit
from spn4cir.triplets import named_images
from spn4cir.types import Triplet

T = TypeVar("T")
IMAGES, BATCH, BATCHES, GROUP = 100_000, 256, 1000, 1 << 20
RESULT = Path(__file__).parent / "results" / "triplet_table.json"
WORDS = ("red", "blue", "longer", "darker", "striped", "without sleeves", "with a dog", "from the side")


class NoPixels(ImageSource):
    """Instead of pixels nothing: (B, 0)."""

    def __init__(self) -> None:
        super().__init__(Path, Transform(1))

    def stack(self, image_ids: Sequence[str]) -> Tensor:
        """(B, 0)."""
        return torch.empty(len(image_ids), 0)


def make(folder: Path, rows: int) -> None:
    """Write ``triplets.parquet``, and ``catalogue.csv``, which names images that are not there."""
    lines = [f"{n % 100}/{n}.jpg,image-{n:06d}" for n in range(IMAGES)]
    write_text(folder / "catalogue.csv", "\n".join(["image,image_id", *lines]) + "\n")
    chance, ids = np.random.default_rng(0), pa.array([f"image-{n:06d}" for n in range(IMAGES)])
    words = pa.array([f"make it {one} and {other}" for one in WORDS for other in WORDS])
    schema = pa.schema({"reference": pa.string(), "target": pa.string(), "modification": pa.string()})
    with parquet.ParquetWriter(folder / "triplets.parquet", schema) as writer:
        for start in range(0, rows, GROUP):
            count = min(GROUP, rows - start)
            reference, target = chance.integers(0, IMAGES, (2, count))
            numbers = np.arange(start, start + count)
            text, number = chance.integers(0, len(words), count), numbers.copy()
            twin = np.flatnonzero(numbers % 100 == 99)  # asks what the row before asks
            twin = twin[twin > 0]
            for values in (reference, text, number):
                values[twin] = values[twin - 1]
            texts = pc.binary_join_element_wise(words.take(text), pa.array(number).cast(pa.string()), ", number ")
            writer.write_table(pa.table([ids.take(reference), ids.take(target), texts], schema=schema))


class Meter:
    """Seconds, and anonymous memory in MB beyond the start, of one task after the other."""

    def __init__(self) -> None:
        self.before, self.peak, self.found = anonymous(os.getpid()), 0, dict[str, dict[str, float]]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, anonymous(os.getpid()))

    def run(self, name: str, task: Callable[[], T]) -> T:
        """What the task returns."""
        self.peak, start = 0, time.perf_counter()
        result = task()
        seconds = time.perf_counter() - start
        pa.default_memory_pool().release_unused()
        kept = anonymous(os.getpid())
        peak = max(self.peak, kept)
        self.found[name] = {
            "seconds": round(seconds, 2),
            "MB": round((kept - self.before) / 1024),
            "peak MB": round((peak - self.before) / 1024),
        }
        return result

    def close(self) -> dict[str, dict[str, float]]:
        """All tasks."""
        self._done.set()
        self._thread.join()
        return self.found


def as_list(folder: Path) -> list[Triplet]:
    """The same triplets as objects."""
    table = parquet.ParquetFile(folder / "triplets.parquet")
    rows = (row for batch in table.iter_batches() for row in zip(*(c.to_pylist() for c in batch.columns), strict=True))
    return [Triplet(reference, (target,), (text,)) for reference, target, text in rows]


def measure(folder: Path, is_table: bool) -> dict[str, Any]:
    """One way, from opening to the batches; and what must be equal of both."""
    import datasets  # noqa: F401  # imports are no part of it
    import pandas  # noqa: F401

    meter = Meter()
    dataset = load_dataset("pairs", str(folder))
    meter.run("catalogue of images", dataset.training_images)
    triplets = meter.run("open", dataset.triplets if is_table else lambda: as_list(folder))
    images = meter.run("images that are named", lambda: list(named_images(triplets)))
    identity = {image_id: n for n, image_id in enumerate(sorted(images))}
    known = meter.run("known targets", lambda: KnownTargets(triplets, identity))
    annotated, generated = split(triplets)
    sampler = meter.run("sampler", lambda: TripletSampler(annotated, generated, BATCH, None, 0))
    rows, collate = TripletRows(triplets, 0), TripletCollate(lambda texts: {}, identity, NoPixels(), known=known)
    drawn = iter(sampler)
    meter.run("epoch", lambda: next(drawn))

    def draw() -> int:
        return sum(len(collate([rows[key] for key in next(drawn)])) for _ in range(min(BATCHES, len(sampler) - 1)))

    count = meter.run("batches", draw)
    return {**meter.close(), "images": len(images), "queries of several targets": len(known._targets), "drawn": count}


def split(triplets: Sequence[Triplet]) -> Any:
    """Row numbers of annotated and of generated triplets, as training has them."""
    nothing: Any = None
    return TrainingData(nothing, triplets, nothing, nothing).split_rows()


def run(rows: int) -> dict[str, Any]:
    """Make both files, and measure each way in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        ways: dict[str, Any] = {}
        for name, count in (("list", rows // 10), ("small table", rows // 10), ("table", rows)):
            folder = Path(place) / str(count)
            if not folder.exists():
                folder.mkdir()
                in_child(make, folder, count)
            if name != "list":
                ways[f"{name}, first time"] = {"rows": count, **in_child(measure, folder, True)}
            ways[name] = {"rows": count, **in_child(measure, folder, name != "list")}
    equal = ("images", "queries of several targets", "drawn")
    assert all(ways["list"][key] == ways["small table"][key] for key in equal), "table and list differ"
    return {
        "benchmark": "triplet_table",
        "batch": BATCH,
        "ways": ways,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
    }


def main() -> None:
    """Measure, print one line of JSON, and keep it if told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the table; the list has a tenth of them")
    parser.add_argument("--save", action="store_true", help=f"also keep the result in benchmarks/results/{RESULT.name}")
    args = parser.parse_args()
    found = run(args.rows)
    print(json.dumps(found))
    if args.save:
        write_text(RESULT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
