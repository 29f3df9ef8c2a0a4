"""Zero-shot on the embedded dataset: generated triplets alone, against no training and few annotated triplets.

Generated triplets come from the training images, or from pictures of another maker (--pictures). Nothing annotated
takes part: no triplet, no pair that matching would leave out, no query that selects. Every run ends after a fixed
number of steps, and its last state is evaluated on val and on test.

examples:
  python -m benchmarks.zeroshot                     # five seeds, without pictures of another maker
  npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
  python -m benchmarks.zeroshot --pictures package/img/google/64
  python -m benchmarks.zeroshot --seeds 0 1 --max-steps 5 --runs runs/try --output try.json
"""

import argparse
import json
import os
import platform
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.claims import ROOT, spread
from benchmarks.intervals import paired_bootstrap
from spn4cir.backbone import Backbone
from spn4cir.config import TrainConfig, parse
from spn4cir.datasets.emoji import Emoji
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text
from spn4cir.results import Result
from spn4cir.types import Triplet

RESULT = Path(__file__).parent / "results" / "zeroshot.json"
STEPS = {"annotated": (60, 120), "generated": (120, 120)}
"""Optimiser steps of stage 1 and of stage 2; stage 1 overfits few annotated triplets."""
PAIRS = {  # a row, and the rows that it is compared with
    "generated 1": ("none", "annotated 100", "annotated 300"),
    "generated 2": ("none", "annotated 100", "annotated 300", "generated 1"),
    "pictures 1": ("none", "annotated 100", "annotated 300", "generated 1"),
    "pictures 2": ("none", "annotated 100", "annotated 300", "generated 2"),
    "annotated 100": ("none",),
    "annotated 300": ("none",),
}
ROWS = {
    "none": "embedded weights, no training",
    "generated 1": "generated triplets, stage 1",
    "generated 2": "generated triplets, stage 1 → stage 2",
    "pictures 1": "generated triplets of another maker's pictures, stage 1",
    "pictures 2": "generated triplets of another maker's pictures, stage 1 → stage 2",
    "annotated 100": "100 annotated triplets, stage 1 → stage 2",
    "annotated 300": "300 annotated triplets, stage 1 → stage 2",
}
METRICS = ("R@1", "R@5", "R@10", "macro R@1", "Rs@1")


class Unannotated(Emoji):
    """The embedded images without their annotated triplets, which matching would leave out."""

    has_triplets = False

    def read_triplets(self) -> list[Triplet]:
        """No triplet."""
        return []


def code_points(name: str) -> str:
    """The code points of the emoji that a file is named by, without what makers write in different ways.

    Left away are leading zeros, the prefix ``emoji_u`` and the variation selector FE0F, which says to show a picture.
    Raises ``InputError`` for any other name.

    Example:
        >>> code_points("0023-FE0F-20e3.png"), code_points("emoji_u1f468_200d_2695.png")
        ('23-20e3', '1f468-200d-2695')
    """
    stem = Path(name).stem.lower().removeprefix("emoji_u")
    if not re.fullmatch(r"[0-9a-f]{2,6}([-_][0-9a-f]{2,6})*", stem):
        raise InputError(f"--pictures: {name} is not named by its code points, so targets cannot be left out")
    return "-".join(part.lstrip("0") for part in re.split("[-_]", stem) if part != "fe0f")


def split_pictures(names: list[str], dataset: Emoji) -> tuple[list[str], list[str]]:
    """Split pictures into those to train on, and those whose emoji is a target of val or test."""
    training = set(dataset.training_images())
    targets = {code_points(i) for i in dataset.benchmark("val").gallery if i not in training}
    kept: list[str] = []
    left_out: list[str] = []
    for name in names:
        (left_out if code_points(name) in targets else kept).append(name)
    return kept, left_out


def generate(folder: Path) -> Path:
    """Make triplets of the training images, as the preset of the embedded dataset says; returns their file."""
    from spn4cir.data_gen.make_triplets import make_triplets
    from spn4cir.data_gen.steps import GenerateConfig

    preset = ROOT / "recipes" / "triplets" / "emoji.yaml"
    make_triplets(parse(GenerateConfig, preset, ["--output", str(folder)]), Unannotated())
    return folder / "triplets.json"


def generate_from_pictures(pictures: Path, folder: Path) -> tuple[Path, dict[str, int]]:
    """Make triplets of another maker's pictures, without those of targets; returns their file, and counts."""
    from spn4cir.data_gen.make_triplets import make_triplets
    from spn4cir.data_gen.sample_images import SampleConfig, sample_images
    from spn4cir.data_gen.steps import GenerateConfig
    from spn4cir.datasets import load_dataset
    from spn4cir.datasets.pictures import walk

    if not pictures.is_dir():
        raise InputError(f"--pictures {pictures} is no folder")
    kept, left_out = split_pictures(walk(pictures).ids, Emoji())
    if not kept:
        raise InputError(f"--pictures {pictures} holds no picture to train on")
    listed, sample = folder / "pictures.txt", folder / "sample"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(listed, "".join(f"{name}\n" for name in kept))
    sample_images(SampleConfig(folder=str(pictures), list=str(listed), images=len(kept), output=str(sample)))
    options = ["--dataset", "catalogue", "--data-root", str(sample), "--output", str(folder / "triplets")]
    config = parse(GenerateConfig, ROOT / "recipes" / "triplets" / "emoji.yaml", options)
    make_triplets(config, load_dataset("catalogue", str(sample)))
    return folder / "triplets" / "triplets.json", {"pictures": len(kept), "left out as targets": len(left_out)}


def settings(stage: int, seed: int, max_steps: int | None, annotated: int = 0, generated: Path | None = None) -> Any:
    """The recipe of a stage, with a fixed number of steps and nothing selected.

    Of 100 annotated triplets each batch holds all, so seeds differ in their order alone.
    """
    kind = "generated" if generated else "annotated"
    recipe = ROOT / "recipes" / "emoji" / f"clip4cir_{'zeroshot_' if generated else ''}stage{stage}.yaml"
    config = parse(TrainConfig, recipe, [])
    return replace(
        config, seed=seed, max_annotated=annotated, generated=str(generated) if generated else None,
        holdout=None, eval_every=0, epochs=10_000, max_steps=min(STEPS[kind][stage - 1], max_steps or 10_000),
        batch_size=min(config.batch_size, annotated or config.batch_size),
    )  # fmt: skip


def train_pair(folder: Path, **options: Any) -> tuple[Path, Path]:
    """Train stage 1 and then stage 2 into a folder; runs that are complete there are reused."""
    from spn4cir.run import pending
    from spn4cir.train import train

    runs = folder / "stage1", folder / "stage2"
    for stage, output in enumerate(runs, 1):
        config = replace(settings(stage, **options), output=str(output), init=str(runs[0]) if stage == 2 else None)
        if left := pending(config):
            train(left, stage)
    return runs


def measure(run: Path | None) -> dict[str, list[float]]:
    """Value of each query by split and metric, such as ``test R@1``, in percent; their mean is the metric.

    The embedded weights for None. A query's value of ``macro R@1`` is its recall times Q / (T · queries of its tag),
    with Q queries and T tags.
    """
    from spn4cir import checkpoints
    from spn4cir.backbones import build_backbone
    from spn4cir.datasets import load_dataset
    from spn4cir.evaluate import evaluate
    from spn4cir.images import ImageSource

    kept = run and run / "hits.json"
    if kept and kept.is_file():
        saved: dict[str, list[float]] = json.loads(kept.read_text())
        return saved
    model: Backbone = checkpoints.load_model(run) if run else build_backbone("clip4cir")
    dataset = load_dataset("emoji")
    images = ImageSource(dataset.image, model.transform, keep=True)
    found: dict[str, list[float]] = {}
    for split in ("val", "test"):
        values = query_values(evaluate(model, dataset.benchmark(split), images))
        found |= {f"{split} {name}": one.tolist() for name, one in values.items()}
    if kept:
        write_text(kept, json.dumps(found))
    return found


def query_values(result: Result) -> dict[str, NDArray[np.float64]]:
    """Value (Q,) of each query by metric, in percent, whose mean is the metric of the result."""
    from spn4cir.measures import recall

    ranks = {over: ranking.ranks for over, ranking in result.rankings.items()}
    values = {}
    for name in METRICS:
        ranked = ranks["subset" if name.startswith("Rs") else "gallery"]
        assert ranked is not None
        values[name] = 100 * recall(ranked, int(name.partition("@")[2]))
        if name.startswith("macro"):
            shares = [result.count / (len(result.tags) * result.tags[q.tags[0]]["queries"]) for q in result.queries]
            values[name] *= np.array(shares)
        assert np.isclose(values[name].mean(), result.metrics[name])
    return values


def summarise(found: dict[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    """Mean and standard deviation of each row's metrics, and differences between rows with their intervals."""
    rows = {
        row: {name: spread([round(float(np.mean(one[name])), 4) for one in by_seed]) for name in by_seed[0]}
        for row, by_seed in found.items()
    }
    differences: dict[str, Any] = {}
    for row, others in PAIRS.items():
        for other in others:
            if row in found and other in found:
                differences[f"{row} - {other}"] = {
                    name: compare(found[row], found[other], name) for name in found[row][0]
                }
    return {"rows": rows, "differences": differences}


def compare(one: list[dict[str, list[float]]], other: list[dict[str, list[float]]], name: str) -> dict[str, float]:
    """Difference of a metric, with its interval; a row without seeds is the same for all seeds of the other one."""
    a, b = (np.array([hits[name] for hits in row]) for row in (one, other))  # (S, Q)
    difference, low, high = paired_bootstrap(a, np.broadcast_to(b, a.shape) if len(b) == 1 else b)
    return {"difference": round(difference, 2), "low": round(low, 2), "high": round(high, 2)}


def markdown(summary: dict[str, Any]) -> str:
    """Two tables: the rows, and their differences."""
    names = ["val R@1", "test R@1", "test R@5", "test R@10", "test macro R@1", "test Rs@1"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, columns in summary["rows"].items():
        cells = [columns[name] for name in names]
        shown = [f"{c['mean']:.1f}" + (f" ± {c['sd']:.1f}" if c["sd"] is not None else "") for c in cells]
        lines.append(f"| {ROWS[key]} | " + " | ".join(shown) + " |")
    lines += ["", "| difference, 95 % interval | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, columns in summary["differences"].items():
        shown = [f"{c['difference']:+.1f} [{c['low']:+.1f}, {c['high']:+.1f}]" for c in (columns[n] for n in names)]
        lines.append(f"| {key} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Generate, train, evaluate, summarise, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zeroshot",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    pictures = (
        "pictures of another maker, named by code points: img/google/64 of the npm package emoji-datasource-google"
    )
    parser.add_argument("--pictures", type=Path, help=pictures)
    parser.add_argument("--max-steps", type=int, help="at most so many steps of each stage, for a trial")
    parser.add_argument("--runs", type=Path, default=Path("runs/zeroshot"), help="where runs lie; complete ones stay")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()

    from spn4cir.results import git_commit

    started, counts = time.time(), dict[str, int]()
    sources: dict[str, dict[str, Any]] = {"generated": {"generated": generate(args.runs / "generated")}}
    if args.pictures:
        file, counts = generate_from_pictures(args.pictures, args.runs / "pictures")
        sources["pictures"] = {"generated": file}
    sources |= {f"annotated {count}": {"annotated": count} for count in (100, 300)}
    found: dict[str, list[dict[str, list[float]]]] = {"none": [measure(None)]}
    for source, options in sources.items():
        for seed in args.seeds:
            folder = args.runs / source.replace(" ", "-") / f"seed{seed}"
            runs = train_pair(folder, seed=seed, max_steps=args.max_steps, **options)
            names = (f"{source} 1", f"{source} 2") if "generated" in options else (None, source)
            for name, run in zip(names, runs, strict=True):
                if name:
                    found.setdefault(name, []).append(measure(run))
    summary = summarise(found)
    report = {
        "what": "percent, mean and standard deviation over seeds; last state of each run, nothing selected; "
        "differences in points, with 95 % intervals by a paired bootstrap over seeds and queries",
        "command": shlex.join(["python", "-m", "benchmarks.zeroshot", *sys.argv[1:]]),
        "steps of stage 1 and stage 2, at most": STEPS,
        "triplets": {
            name: len(json.loads(o["generated"].read_text())) for name, o in sources.items() if "generated" in o
        },
        "pictures of another maker": counts,
        "rows": {name: ROWS[name] for name in found},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
        "seconds": round(time.time() - started, 1),
        "summary": summary,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(report, indent=1) + "\n")
    print(markdown(summary))
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_command(main)
