"""What generating triplets costs, step by step, and what a million images would: computed from what was measured.

Steps without a model are measured here, on many small pictures whose captions are given: seconds, peak of anonymous
memory, and bytes left on the disk. Encoding, matching and captioning come from the results of their own benchmarks.

examples:
  python -m benchmarks.generation --images 20000 --json benchmarks/results/generation.json
  python -m benchmarks.generation --plan        # the table of docs/generation.md, from benchmarks/results
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import anonymous
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.results import git_commit

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STEPS = ("deduplicate", "match_pairs", "caption", "write_text")
WORDS = (
    "a", "red", "green", "blue", "dress", "shirt", "with", "long", "short", "sleeves", "dots", "stripes", "collar",
)  # fmt: skip
SIDE = 24  # of a picture: decoding a real one is measured by benchmarks.deduplication


def make_pictures(folder: Path, count: int) -> None:
    """Distinct small pictures, and captions of ten words for them."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    with (folder.parent / "captions.jsonl").open("w") as captions:
        for n in range(count):
            Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{n:07}.bmp")
            text = " ".join(WORDS[w] for w in draw.integers(0, len(WORDS), 10))
            captions.write(json.dumps({"image_id": f"{n:07}.bmp", "caption": f"{text} {n}"}) + "\n")


def measured(step: str, options: list[str]) -> dict[str, Any]:
    """One step as a command: seconds, and its peak of anonymous memory in MB."""
    command = [sys.executable, str(ROOT / "data_gen" / f"{step}.py"), *options]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
    assert process.returncode == 0, f"{step} failed"
    return {"seconds": round(time.perf_counter() - start, 1), "peak MB": round(peak / 1024)}


def run(count: int) -> dict[str, Any]:
    """The steps over a tenth of the pictures and over all, so that what is fixed can be told from what each costs."""
    rows: dict[str, dict[str, Any]] = {step: {} for step in STEPS}
    for images in (count // 10, count):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            make_pictures(folder / "pictures", images)
            options = ["--dataset", "catalogue", "--data-root", str(folder / "pictures"), "--window", "null"]
            options += ["--output", str(folder / "out"), "--pairs-per-image", "1", "--templates", "[unlike]"]
            options += ["--captions", str(folder / "captions.jsonl")]
            for step in STEPS:
                before = _bytes(folder / "out")
                rows[step][str(images)] = measured(step, options) | {"MB on disk": 0.0}
                rows[step][str(images)]["MB on disk"] = round((_bytes(folder / "out") - before) / 1e6, 2)
    return {
        "benchmark": "generation",
        "what": f"steps without a model, pictures of {SIDE} × {SIDE}, uniform pairs, given captions",
        "images": [count // 10, count],
        "steps": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def plan(images: int) -> str:
    """A table of the steps over so many images, each linear in them but matching, which is quadratic."""
    read = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    steps = read["generation"]["steps"]
    small, large = (int(count) for count in read["generation"]["images"])

    def each(step: str, what: str) -> float:
        """Of one image more."""
        many, few = (float(steps[step][str(n)][what]) for n in (large, small))
        return (many - few) / (large - small)

    def row(step: str, device: str, seconds: float, note: str, disk: float = 0.0, memory: float = 0.0) -> str:
        gigabytes = f"{disk / 1e3:.1f} GB", f"{memory / 1e3:.1f} GB"
        return f"| {step} | {device} | {_duration(seconds)} | {gigabytes[0]} | {gigabytes[1]} | {note} |"

    def light(step: str) -> tuple[float, float, float]:
        memory = steps[step][str(large)]["peak MB"] + each(step, "peak MB") * (images - large)
        return each(step, "seconds") * images, each(step, "MB on disk") * images, memory

    decode = read["deduplication"]["cost"]["4000"]["seconds per 1000"] / 1000
    seconds, disk, memory = light("deduplicate")
    rate = {d: read[d]["rows"][2]["images a second"]["float32"] for d in ("encoding", "encoding_device")}
    matching = read["matching"]["cpu"][2]
    whole = matching["seconds"]["ours"] * (images / matching["images"]) ** 2
    device = min(read["matching_device"]["device"], key=lambda one: abs(one["images"] - images))
    counted = device["seconds for all"]["ours"] * (images / device["images"]) ** 2
    vectors = images * 768 * 4 / 1e6
    llava = max(one["images a second"] for one in read["captioning_device"]["by batch"].values())
    gpu, cpu = read["encoding_device"]["machine"].split()[1], "2 cores"
    lines = [
        "| step | on | time | disk | memory of a process | computed from |",
        "| --- | --- | --- | --- | --- | --- |",
        row("deduplicate", cpu, seconds + decode * images, "files, and decoding by `deduplication`", disk, memory),
        row("encode, Unicom L/14", gpu, images / rate["encoding_device"], "`encoding_device`", vectors),
        row("", cpu, images / rate["encoding"], "`encoding`", vectors),
        row("match, exact window", gpu, counted, "`matching_device`, quadratic", *light("match_pairs")[1:]),
        row("", cpu, whole, "`matching`, quadratic", light("match_pairs")[1], vectors + 256 * images * 4 / 1e6),
        row("caption, LLaVA-1.5-7B", gpu, images / llava, "`captioning_device`, 24 tokens", *light("caption")[1:]),
        row("write", cpu, light("write_text")[0], "one triplet an image", *light("write_text")[1:]),
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def main() -> None:
    """Measure, or print the plan."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--plan", action="store_true", help="print what 20,000 and a million images cost")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    if args.plan:
        for images in (20_000, 1_000_000):
            print(f"**{images:,} images**\n\n{plan(images)}\n")
        return
    report = run(args.images)
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
