"""What negatives buy on the embedded dataset: what of a triplet others replace, and how many candidates there are.

Stage 1 is trained with each type of negative alone and with all of them; stage 2, from the run whose targets are
replaced, with ever more candidates. Every run has the same number of steps and its last state is evaluated, on val and
on test: nothing is selected. A comparison that was stopped goes on where it was.

examples:
  python -m benchmarks.negatives                  # three seeds; about half an hour on two cores
  python -m benchmarks.negatives --seeds 0 --steps 10 10 --runs runs/quick --json quick.json --picture quick.png
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spn4cir.config import BankConfig, NegativesConfig, TrainConfig, parse
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
START = "target"
"""The type whose runs stage 2 starts from."""
TYPES: dict[str, NegativesConfig] = {
    "target": NegativesConfig(["target"]),
    "query": NegativesConfig(["query"]),
    "text": NegativesConfig(["text"]),
    "reference": NegativesConfig(["reference"]),
    "all four": NegativesConfig(["target", "query", "text", "reference"]),
}
BANKS: dict[str, BankConfig] = {
    **{f"limit {limit}": BankConfig(limit=limit) for limit in (31, 127, 511, 1023)},
    "named": BankConfig(images="named"),
    "all": BankConfig(images="all"),
}
INK, PALE, WARM = "#0072b2", "#a6cbe3", "#d55e00"  # also told apart by those who see no red or no green
SPLITS = ("val", "test")
METRICS = ("R@1", "R@10")


def plans(seed: int, steps: Sequence[int], folder: Path) -> dict[str, tuple[int, TrainConfig]]:
    """Stage and settings of each run of a seed, in the order in which they are trained."""

    recipes = [parse(TrainConfig, ROOT / "recipes" / "emoji" / f"clip4cir_stage{stage}.yaml", []) for stage in (1, 2)]

    def settings(stage: int, name: str) -> TrainConfig:
        output, bound = str(folder / name.replace(" ", "-")), steps[stage - 1]
        return replace(recipes[stage - 1], seed=seed, epochs=10_000, max_steps=bound, eval_every=0, output=output)

    first = {name: (1, replace(settings(1, name), negatives=kind)) for name, kind in TYPES.items()}
    start = first[START][1].output
    return first | {name: (2, replace(settings(2, name), bank=bank, init=start)) for name, bank in BANKS.items()}


def measure(run: Path) -> dict[str, Any]:
    """What a complete run finds, by split, as its result says."""
    from spn4cir import checkpoints
    from spn4cir.datasets import load_dataset
    from spn4cir.evaluate import evaluate
    from spn4cir.images import ImageSource

    kept = run / "test.json"
    if not kept.is_file():
        model, dataset = checkpoints.load_model(run), load_dataset(TrainConfig.dataset)
        found = evaluate(model, dataset.benchmark("test"), ImageSource(dataset.image, model.transform, keep=True))
        write_text(kept, json.dumps(found.as_json()))
    return {"val": json.loads((run / "result.json").read_text()), "test": json.loads(kept.read_text())}


def train_all(seeds: Sequence[int], steps: Sequence[int], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Train and measure; ``{name of a run: [what each seed finds]}``."""
    from spn4cir.run import pending
    from spn4cir.train import train

    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for name, (stage, config) in plans(seed, steps, folder / f"seed{seed}").items():
            if left := pending(config):
                train(left, stage)
            assert config.output is not None
            found.setdefault(name, []).append(measure(Path(config.output)))
    return found


def summarise(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``{split: {metric: {mean, sd, seeds}}}`` of what the seeds find; the deviation of one seed is null."""
    from spn4cir.results import combine

    summary: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        results = [each[split] for each in found]
        summary[split] = {
            name: {
                "mean": round(mean, 2),
                "sd": round(deviation, 2) if len(found) > 1 else None,
                "seeds": [round(result["metrics"][name], 4) for result in results],
            }
            for name, (mean, deviation) in combine(results).items()
        }
    return summary


def bank_sizes() -> dict[str, int]:
    """How many candidates a query has in each bank, its positive included: images of equal pixels are one."""
    from spn4cir.data import hash_pixels, load_data

    whole = dict[str, int]()
    for name in ("named", "all"):
        config = TrainConfig(bank=BANKS[name])
        data = load_data(config, print)
        whole[name] = len(set(hash_pixels(data.dataset, data.candidate_images(config), print).values()))
    return {name: min(whole[bank.images], (bank.limit or whole["all"]) + 1) for name, bank in BANKS.items()}


def report(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    """All that is kept as JSON."""
    runs = [each for row in found.values() for each in row]
    sizes = bank_sizes()
    seeds, steps = (" ".join(map(str, values)) for values in (args.seeds, args.steps))
    return {
        "what": "percent, mean and standard deviation over seeds; last state of each run, nothing selected",
        "command": f"python -m benchmarks.negatives --seeds {seeds} --steps {steps}",
        "protocols": {split: runs[0][split]["protocol"] for split in SPLITS},
        "steps": {"stage 1": args.steps[0], "stage 2": args.steps[1]},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": sorted({str(each["val"]["git"]) for each in runs}),
        "seconds of training": round(sum(each["val"]["seconds"] for each in runs), 1),
        "stage 1, by type of negative": {name: summarise(found[name]) for name in TYPES},
        "stage 2, by candidates": {name: {"candidates": sizes[name], **summarise(found[name])} for name in BANKS},
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Recall by type of negative, and against the number of candidates, on test.

    Raises:
        InputError: if matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("the picture needs matplotlib: pip install 'spn4cir[demo]', and run this again") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    protocol, steps = results["protocols"]["test"], results["steps"]
    types, banks = results["stage 1, by type of negative"], results["stage 2, by candidates"]
    figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 6.4), layout="constrained", sharex="col")
    for (left, right), metric in zip(axes, METRICS, strict=True):
        left.set_ylabel(f"{metric}, {protocol} (%)")
        draw_types(left, {name: row["test"][metric] for name, row in types.items()})
        points = {name: (row["candidates"], row["test"][metric]) for name, row in banks.items()}
        draw_candidates(right, points, types[START]["test"][metric]["mean"])
    axes[0][0].set_title(f"Stage 1: what the negatives replace\n({steps['stage 1']} steps, batch of 128)", fontsize=11)
    axes[1][0].set_xlabel("replaced part of the triplet")
    axes[0][1].set_title(
        f"Stage 2: how many candidates a query has\n(from “target”, {steps['stage 2']} steps)", fontsize=11
    )
    axes[1][1].set_xlabel("candidates of a query, its target included (log scale)")
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_types(axes: "Axes", rows: dict[str, dict[str, Any]]) -> None:
    """A bar for each type, its value on it, with one standard deviation and a dot for each seed."""
    for place, row in enumerate(rows.values()):
        axes.bar(place, row["mean"], width=0.7, color=PALE)
        axes.errorbar(place, row["mean"], row["sd"] or 0, color=INK, capsize=5, linewidth=1.2)
        axes.plot([place + 0.22] * len(row["seeds"]), row["seeds"], ".", color=INK, markersize=5)
        axes.annotate(f"{row['mean']:.1f}", (place, 0), (0, 4), textcoords="offset points", ha="center", color="black")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def draw_candidates(axes: "Axes", points: dict[str, tuple[int, dict[str, Any]]], start: float) -> None:
    """Drawn candidates as a line with its deviation and a dot for each seed, the two banks apart, stage 1 dashed."""
    line = [point for name, point in points.items() if name != "named"]
    counts, means = [count for count, _ in line], [row["mean"] for _, row in line]
    below, above = ([row["mean"] + sign * (row["sd"] or 0) for _, row in line] for sign in (-1, 1))
    axes.fill_between(counts, below, above, color=PALE, alpha=0.5, linewidth=0)
    axes.plot(counts, means, "o-", color=INK, label="drawn from all training images (mean, sd, seeds)")
    for count, row in [*line, points["named"]]:
        axes.plot([count] * len(row["seeds"]), row["seeds"], ".", color="black", markersize=3)
    count, row = points["named"]
    axes.errorbar(
        count,
        row["mean"],
        row["sd"] or 0,
        fmt="D",
        color=WARM,
        capsize=4,
        label=f"the {count:,} images that triplets name",
    )
    axes.axhline(start, color="#555555", linestyle="--", linewidth=1, label="before stage 2")
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Train, evaluate, summarise, write, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.negatives",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[80, 60], metavar=("STAGE1", "STAGE2"), help="of each run"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/negatives"), help="where runs lie, to be gone on with")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "negatives.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "negatives.png")
    args = parser.parse_args()
    if min(args.steps) < 1:
        raise InputError(f"--steps are at least 1 for each stage, got {args.steps[0]} and {args.steps[1]}")
    results = report(train_all(args.seeds, args.steps, args.runs), args)
    for path in (args.json, args.picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.json, json.dumps(results, indent=1) + "\n")
    print(f"written to {args.json}")
    draw(results, args.picture)
    print(f"drawn in {args.picture}")


if __name__ == "__main__":
    run_command(main)
