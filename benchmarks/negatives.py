"""What negatives buy on the embedded dataset: what of a triplet others replace, and how many candidates there are.

Under the protocol of ``benchmarks.claims``, whose runs are reused: stage 1 is trained with each type of negative alone
and with all of them until its patience ends; stage 2, from the model whose targets were replaced, with ever more
candidates. A comparison that was stopped goes on where it was.

examples:
  python -m benchmarks.negatives                  # five seeds; hours on two cores
  python -m benchmarks.negatives --seeds 0 --runs runs/quick --json quick.json --picture quick.png
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.claims import BUDGETS, PROTOCOL, Setting, differences, measure, summarise
from spn4cir.config import TrainConfig
from spn4cir.config_groups import BankConfig, NegativesConfig
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
METRICS = ("R@1", "R@10")


def plans(setting: Setting) -> dict[str, tuple[int, TrainConfig]]:
    """Stage and settings of each run of a seed, in the order in which they are trained."""
    found = {
        name: (1, replace(setting.first("stage1" if name == START else f"types/{name}", False), negatives=kind))
        for name, kind in TYPES.items()
    }
    for name, bank in BANKS.items():
        row = "negatives" if name == "all" else f"candidates/{name}"
        config = setting.second(2, row, False, "stage1", **setting.settings("negatives"))
        found[name] = (2, replace(config, bank=bank))
    return found


def train_all(seeds: Sequence[int], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Train and measure; ``{name of a run: [what each seed finds]}``."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        setting = Setting(BUDGETS[0], seed, "", folder)
        runs = {name: setting.run(stage, config) for name, (stage, config) in plans(setting).items()}
        for name, run in runs.items():
            found.setdefault(name, []).append(measure(run, splits=["test"]))
    return found


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
    from spn4cir.results import git_commit

    sizes, metrics = bank_sizes(), summarise(found, "test")
    compared = {START: [name for name in found if name != START], "all": [name for name in BANKS if name != "all"]}
    return {
        "what": "emoji/test in percent, mean and standard deviation over seeds; differences in points with 95 % "
        "intervals, paired by seed and query; best state of each run on held-out training triplets",
        "command": "python -m benchmarks.negatives --seeds " + " ".join(map(str, args.seeds)),
        "protocol": PROTOCOL,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
        "stage 1, by type of negative": {name: metrics[name] for name in TYPES},
        "stage 2, by candidates": {name: {"candidates": sizes[name], **metrics[name]} for name in BANKS},
        "differences": differences(found, "test", compared),
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

    protocol, steps = "emoji/test", results["protocol"]["steps"]
    types, banks = results["stage 1, by type of negative"], results["stage 2, by candidates"]
    figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 6.4), layout="constrained", sharex="col")
    for (left, right), metric in zip(axes, METRICS, strict=True):
        left.set_ylabel(f"{metric}, {protocol} (%)")
        draw_types(left, {name: row[metric] for name, row in types.items()})
        points = {name: (row["candidates"], row[metric]) for name, row in banks.items()}
        draw_candidates(right, points, types[START][metric]["mean"])
    axes[0][0].set_title("Stage 1: what the negatives replace\n(until patience ends, batch of 128)", fontsize=11)
    axes[1][0].set_xlabel("replaced part of the triplet")
    axes[0][1].set_title(f"Stage 2: how many candidates a query has\n(from “target”, {steps} steps)", fontsize=11)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="where runs lie, to be gone on with")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "negatives.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "negatives.png")
    args = parser.parse_args()
    results = report(train_all(args.seeds, args.runs), args)
    for path in (args.json, args.picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.json, json.dumps(results, indent=1) + "\n")
    print(f"written to {args.json}")
    draw(results, args.picture)
    print(f"drawn in {args.picture}")


if __name__ == "__main__":
    run_command(main)
