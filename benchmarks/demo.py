"""The whole system on real images: captions → pairs → triplets → stage 1 → stage 2 → evaluation → a picture.

Follows the recipes of the embedded data, one seed. A demo that was interrupted goes on where it was; one that was
complete starts over. What holds over seeds, and against controls, is the matter of ``benchmarks.claims``.

examples:
  python -m benchmarks.demo
  python -m benchmarks.demo --max-annotated 300 --output runs/demo-300
"""

import argparse
import random
import shutil
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.claims import ROOT, measure
from spn4cir.config import TrainConfig, parse
from spn4cir.errors import run_command

if TYPE_CHECKING:
    from torch import Tensor

    from spn4cir.types import Benchmark

EMBEDDED = "embedded weights, no training"
ROWS = {  # name → recipe
    "stage 1": "clip4cir_stage1",
    "stage 1 → stage 2, negatives only": "clip4cir_stage2",
    "stage 1 → stage 2, generated positives": "clip4cir_stage2_generated",
}
COLUMNS = ("R@1", "R@5", "R@10", "macro R@1", "Rs@1")
TOP = 5


def main() -> None:
    """Generate, train, evaluate, print, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--max-annotated", type=int, default=2000, help="annotated triplets to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    picture = args.output / "report.png"
    if picture.is_file():
        shutil.rmtree(args.output)

    from spn4cir.data_gen.make_triplets import make_triplets
    from spn4cir.data_gen.steps import GenerateConfig
    from spn4cir.datasets import load_dataset

    started = time.time()
    generated = args.output / "triplets"
    print(f"1/3 triplets from images alone → {generated}", flush=True)
    preset = ROOT / "recipes" / "triplets" / "emoji.yaml"
    make_triplets(parse(GenerateConfig, preset, ["--output", str(generated)]), load_dataset("emoji"))
    print(f"\n2/3 both stages, with and without them, from {args.max_annotated} annotated triplets", flush=True)
    runs = args.output / f"{args.max_annotated}-seed{args.seed}"
    found = {EMBEDDED: measure(None, splits=["val"])}
    for row, recipe in ROWS.items():
        run = train_row(recipe, runs, str(generated / "triplets.json"), args.max_annotated, args.seed)
        found[row] = measure(run, splits=["val"])
    print("\n3/3 example queries before and after", flush=True)
    first, *_, last = (runs / recipe for recipe in ROWS.values())
    draw(picture, [("stage 1", first), ("stage 2 with generated positives", last)], args.seed)
    print("\n" + text_table(found, args.max_annotated))
    print(f"\n{time.time() - started:.0f} s; example queries in {picture}, runs in {runs}")
    print(f"next: spn4cir-eval --run {last} --split test --ablate")
    print(f"      spn4cir-demo --model {last}    # opens a page that searches the pictures by this model")


def train_row(recipe: str, runs: Path, generated: str, annotated: int, seed: int) -> Path:
    """Train a recipe of the embedded data, from stage 1 if it is of stage 2; a complete run is reused."""
    from spn4cir.run import pending
    from spn4cir.train import train

    config = parse(TrainConfig, ROOT / "recipes" / "emoji" / f"{recipe}.yaml", [])
    config = replace(config, max_annotated=annotated, seed=seed, eval_every=0, output=str(runs / recipe))
    stage = 1 if "stage1" in recipe else 2
    if stage == 2:
        config = replace(config, init=str(runs / "clip4cir_stage1"))
    if config.generated:
        config = replace(config, generated=generated)
    if left := pending(config):
        train(left, stage)
    return runs / recipe


def text_table(found: dict[str, dict[str, Any]], annotated: int) -> str:
    """Metrics of each row on val."""
    width = max(map(len, found))
    lines = [f"emoji/val, {annotated} annotated triplets, one seed"]
    lines.append(" " * width + "".join(f"{name:>10}" for name in COLUMNS))
    for row, measured in found.items():
        metrics = measured["val"]["metrics"]
        lines.append(f"{row:<{width}}" + "".join(f"{metrics[column]:10.2f}" for column in COLUMNS))
    return "\n".join(lines)


def draw(path: Path, models: list[tuple[str, Path]], seed: int) -> None:
    """A picture of queries with their first results by two models, the target framed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from spn4cir.datasets import load_dataset
    from spn4cir.images import open_image

    dataset = load_dataset("emoji")
    benchmark = dataset.benchmark("val")
    ranked = [first_results(folder) for _, folder in models]
    queries = choose(benchmark, ranked, seed)
    widths = [1, 1.6] + [1] * TOP + [0.25] + [1] * TOP  # reference, text, results, gap, results
    size = (13.5, 1.1 * len(queries) + 0.4)
    figure, axes = pyplot.subplots(len(queries), len(widths), figsize=size, gridspec_kw={"width_ratios": widths})
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (number, why) in zip(axes, queries, strict=True):
        query = benchmark.queries[number]
        assert query.reference is not None
        line[0].imshow(open_image(dataset.image(query.reference)))
        line[0].set_title(why, fontsize=8, color="grey", loc="left")
        text = textwrap.fill(f"+ “{query.text}”", 18)
        line[1].text(0, 0.5, text, transform=line[1].transAxes, va="center", fontsize=9)
        for side, rows in enumerate(ranked):
            for place, row in enumerate(rows[number][:TOP].tolist()):
                image_id = benchmark.gallery[row]
                axis = line[2 + side * (TOP + 1) + place]
                axis.imshow(open_image(dataset.image(image_id)))
                if image_id in query.targets:
                    axis.set_axis_on()
                    axis.set(xticks=[], yticks=[])
                    for spine in axis.spines.values():
                        spine.set(color="green", linewidth=3)
    for side, (name, _) in enumerate(models):
        axes[0][2 + side * (TOP + 1)].set_title(f"first {TOP} by {name}", fontsize=10, loc="left")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.01, wspace=0.08, hspace=0.28)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def first_results(run: Path) -> "Tensor":
    """(Q, TOP) gallery rows of the val queries, best first, by a run."""
    from spn4cir import checkpoints
    from spn4cir.datasets import load_dataset
    from spn4cir.evaluate import encode_benchmark
    from spn4cir.images import ImageSource
    from spn4cir.ranking import padded_rows
    from spn4cir.search import top_k

    backbone, dataset = checkpoints.load_model(run), load_dataset("emoji")
    benchmark = dataset.benchmark("val")
    found = encode_benchmark(backbone, benchmark, ImageSource(dataset.image, backbone.transform))
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    references = padded_rows([[query.reference or ""] for query in benchmark.queries], row)
    return top_k(found.queries["composed"], found.target, TOP, references)[1]


def choose(benchmark: "Benchmark", ranked: "list[Tensor]", seed: int) -> list[tuple[int, str]]:
    """Query numbers with the reason for each: drawn at random, three the second model mends, one it breaks."""
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    hits = [
        [row[query.targets[0]] == int(rows[number][0]) for number, query in enumerate(benchmark.queries)]
        for rows in ranked
    ]
    numbers = list(range(len(benchmark.queries)))
    random.Random(seed).shuffle(numbers)
    mended = [(n, "mended") for n in numbers if hits[1][n] and not hits[0][n]][:3]
    broken = [(n, "broken") for n in numbers if hits[0][n] and not hits[1][n]][:1]
    taken = {n for n, _ in mended + broken}
    return [(n, "at random") for n in numbers if n not in taken][:3] + mended + broken


if __name__ == "__main__":
    run_command(main)
