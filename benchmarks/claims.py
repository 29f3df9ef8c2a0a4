"""What scaling positives and negatives buys a converged model, on the embedded dataset, with paired intervals.

The protocol was fixed before the test split was read. Stage 1 trains at a constant rate until ``PATIENCE`` evaluations
in a row, one about every ``EVERY`` steps, bring no better score on ``HELD`` annotated triplets that are held out, a
tenth of all. Every other row goes on from that model for ``STEPS`` steps, the rate falling to zero: with annotated
triplets alone or with generated ones in each batch, and against the targets of the batch (stage 1 goes on) or against
a bank of all training images (stage 2). Stage 1 that goes on with annotated triplets alone is the control of equal
steps, and, for as many steps as fit into the time of stage 2, that of equal time. Each row keeps its best state on the
held-out triplets. Settings were chosen there as well (``--tune``). Only then is the test split evaluated, once.

examples:
  python -m benchmarks.claims                       # five seeds, four numbers of triplets; hours on two cores
  python -m benchmarks.claims --seeds 0 --max-annotated 300 --runs runs/claims
  python -m benchmarks.claims --backbone sprc --seeds 0 1 2 --max-annotated 1800
  python -m benchmarks.claims --tune                # scores on held-out triplets by setting; the test split is not read
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spn4cir.config import TrainConfig, parse
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.intervals import paired_bootstrap

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
HELD, EVERY, PATIENCE, STEPS = 200, 25, 10, 150
PROTOCOL = {"held out": HELD, "evaluated every": EVERY, "patience": PATIENCE, "steps": STEPS}
BUDGETS = (1800, 1000, 300, 100)
SHARE = {1800: 0.25, 1000: 0.25, 300: 0.5, 100: 0.5}  # of each batch, where generated triplets take part
ROWS = {
    "embedded": "embedded weights, no training",
    "stage1": "stage 1, converged",
    "steps": "… stage 1 goes on for as many steps (control)",
    "time": "… stage 1 goes on for as much time as stage 2 (control)",
    "positives": "… stage 1 goes on, generated positives",
    "negatives": "… stage 2, negatives only",
    "both": "… stage 2, generated positives",
    "stage1+p": "stage 1 with generated positives, converged",
    "both+p": "… stage 2, generated positives",
}
CONTROLS = {"time": ("negatives", "both"), "steps": ("positives", "negatives", "both"), "stage1": tuple(ROWS)[2:]}
"""What each row is compared with: control → rows."""
COLUMNS = {"steps": "equal steps", "time": "equal time", "stage1": "stage 1"}
METRICS = ("R@1", "R@5", "R@10", "macro R@1", "Rs@1")
SETTINGS: dict[str, dict[str, Any]] = {  # of clip4cir, chosen by --tune; other backbones keep those of their recipes
    "stage1": {"lr": 2e-3, "temperature": 0.1},
    "steps": {"lr": 1e-3, "temperature": 0.1},
    "positives": {"lr": 1e-3, "temperature": 0.1},
    "negatives": {"lr": 3e-4, "temperature": 0.1},
    "both": {"lr": 1e-3, "temperature": 0.1},
}
RATES = (3e-4, 1e-3)
TEMPERATURES = {1: (0.1,), 2: (0.06, 0.1)}  # by stage


class Setting:
    """The runs of one number of annotated triplets and one seed, in a folder where complete ones are reused."""

    def __init__(self, annotated: int, seed: int, generated: str, folder: Path, backbone: str = "clip4cir"):
        self.annotated, self.seed, self.generated, self.backbone = annotated, seed, generated, backbone
        self.folder = folder / f"{annotated}-seed{seed}" / backbone
        self.batch = 128 if annotated > 128 else 64

    def recipe(self, stage: int, name: str, positives: bool, **changes: Any) -> TrainConfig:
        """The recipe of a stage under the protocol."""
        recipe = parse(TrainConfig, ROOT / "recipes" / "emoji" / f"{self.backbone}_stage{stage}.yaml", [])
        config = replace(
            recipe, max_annotated=self.annotated + HELD, holdout=HELD / (self.annotated + HELD), seed=self.seed,
            batch_size=self.batch, select_by=["R@1", "R@5"], epochs=10_000, output=str(self.folder / name), **changes,
        )  # fmt: skip
        if positives:
            share = SHARE[self.annotated]
            whole = self.batch if share == 0.25 else 2 * self.batch  # as many annotated ones, if there are few
            mixed = replace(config, generated=self.generated, generated_share=share, batch_size=whole)
            return replace(mixed, eval_every=often(replace(config, batch_size=round(whole * (1 - share)))))
        return replace(config, eval_every=often(config))

    def first(self, name: str, positives: bool) -> TrainConfig:
        """Stage 1 until its patience ends."""
        return self.recipe(1, name, positives, patience=PATIENCE, schedule="constant", **self.settings("stage1"))

    def settings(self, row: str) -> dict[str, Any]:
        """What differs from the recipe."""
        return SETTINGS[row] if self.backbone == "clip4cir" else {}

    def second(self, stage: int, name: str, positives: bool, init: str, **changes: Any) -> TrainConfig:
        """What goes on from a converged stage 1."""
        common = {"max_steps": STEPS, "warmup_steps": 5, "schedule": "cosine", "init": str(self.folder / init)}
        return self.recipe(stage, name, positives, **common | changes)

    def train(self, name: str) -> Path:
        """Train a row, and what it goes on from, unless they are complete."""
        if name in ("stage1", "stage1+p"):
            return self.run(1, self.first(name, name == "stage1+p"))
        init = "stage1+p" if name.endswith("+p") else "stage1"
        self.train(init)
        kind = name.removesuffix("+p")
        stage, positives = 1 + (kind in ("negatives", "both")), kind in ("positives", "both")
        config = self.second(stage, name, positives, init, **self.settings("steps" if kind == "time" else kind))
        if kind == "time":
            slow, fast = (triplet_time(self.train(row)) for row in ("steps", "negatives"))
            config = replace(config, max_steps=max(10, round(STEPS * fast / slow)))
        return self.run(stage, config)

    def run(self, stage: int, config: TrainConfig) -> Path:
        """Train to the end, from wherever it was."""
        from spn4cir.run import pending
        from spn4cir.train import train

        if left := pending(config):
            train(left, stage)
        return Path(str(config.output))


def often(config: TrainConfig) -> int:
    """Epochs between evaluations, about ``EVERY`` steps."""
    from spn4cir.data import load_data

    return max(1, round(EVERY / (len(load_data(config, lambda _: None).triplets) // config.batch_size)))


def triplet_time(run: Path) -> float:
    """Seconds of training for each triplet of a batch, the median of the lines of the log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return 1 / float(statistics.median(line["items_per_second"] for line in lines))


def measure(run: Path | None, backbone: str = "clip4cir", splits: Iterable[str] = ("val", "test")) -> dict[str, Any]:
    """Metrics of a run (of a backbone's embedded weights for None) by split, with the ablation, and hits by query."""
    from spn4cir import checkpoints
    from spn4cir.backbones import build_backbone
    from spn4cir.datasets import load_dataset
    from spn4cir.evaluate import evaluate
    from spn4cir.images import ImageSource
    from spn4cir.measures import MEASURES

    kept = run and run / "measured.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.is_file() else {}
    if missing := [split for split in splits if split not in found]:
        model = checkpoints.load_model(run) if run else build_backbone(backbone)
        dataset = load_dataset("emoji")
        images = ImageSource(dataset.image, model.transform, keep=True)
        for split in missing:
            result = evaluate(model, dataset.benchmark(split), images, ablate=True)
            ranks = result.rankings["gallery"].ranks
            assert ranks is not None
            hits = {f"R@{k}": MEASURES["recall"].values(ranks, k).tolist() for k in (1, 10)}
            found[split] = {"metrics": result.metrics, "ablation": result.ablation, "hits": hits}
        if kept:
            write_text(kept, json.dumps(found))
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 2), "sd": deviation and round(deviation, 2), "seeds": values}


def summarise(found: Mapping[str, list[dict[str, Any]]], split: str) -> dict[str, Any]:
    """``{row: {metric: {mean, sd, seeds}}}`` of what the seeds find on a split."""
    return {
        row: {name: spread([round(seed[split]["metrics"][name], 4) for seed in seeds]) for name in METRICS}
        for row, seeds in found.items()
    }


def differences(
    found: Mapping[str, list[dict[str, Any]]], split: str, controls: Mapping[str, Sequence[str]] = CONTROLS
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """``{control: {row: {metric: [difference, low, high]}}}`` in points, paired by seed and query, 95 %."""

    def hits(row: str, metric: str) -> Any:
        return 100 * np.array([seed[split]["hits"][metric] for seed in found[row]])

    return {
        control: {
            row: {
                metric: [round(x, 2) for x in paired_bootstrap(hits(row, metric), hits(control, metric))]
                for metric in ("R@1", "R@10")
            }
            for row in rows
            if row in found and row != control
        }
        for control, rows in controls.items()
        if control in found
    }


def endings(setting: Setting, rows: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each run ended."""
    said = ("steps", "best_step", "stopped_by", "seconds", "git")
    results = {row: json.loads((setting.folder / row / "result.json").read_text()) for row in rows if row != "embedded"}
    return {row: {name: result[name] for name in said} for row, result in results.items()}


def markdown(part: Mapping[str, Any], rows: Mapping[str, str], controls: Mapping[str, str]) -> str:
    """Metrics of each row, and differences from controls (key → title) where there are some."""
    titles = ["", "test R@1", "test R@10", *(f"R@1 − {title}" for title in controls.values())]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row, metrics in part["test"].items():
        cells = [
            f"{metrics[name]['mean']:.1f}" + (f" ± {sd:.1f}" if (sd := metrics[name]["sd"]) is not None else "")
            for name in ("R@1", "R@10")
        ]
        for control in controls:
            values = part["differences"].get(control, {}).get(row)
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*values["R@1"]) if values else "")
        lines.append(f"| {rows[row]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tune(setting: Setting, rows: Iterable[str]) -> dict[str, Any]:
    """Scores on held-out triplets by row and setting; the test split is not read."""
    found: dict[str, Any] = {}
    for row in rows:
        if row not in SETTINGS or row == "stage1":
            continue
        stage, positives = 1 + (row in ("negatives", "both")), row in ("positives", "both")
        for lr in RATES:
            for temperature in TEMPERATURES[stage]:
                setting.train("stage1")
                name = f"tune/{row}-{lr:g}-{temperature:g}"
                config = setting.second(stage, name, positives, "stage1", lr=lr, temperature=temperature)
                run = setting.run(stage, config)
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                best = max((line["R@1"] + line["R@5"]) / 2 for line in lines if "R@1" in line)
                found.setdefault(row, {})[f"lr {lr:g}, temperature {temperature:g}"] = round(best, 2)
    return found


def main() -> None:
    """Train, evaluate, summarise, write."""
    from spn4cir.backbones import BACKBONES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backbone", default="clip4cir", choices=list(BACKBONES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--max-annotated", type=int, nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--generated", default="auto", help="file of generated triplets (default: made if missing)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="default: all")
    parser.add_argument("--tune", action="store_true", help="try settings on held-out triplets instead")
    parser.add_argument("--train-only", action="store_true", help="train, and leave the test split unread")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/claims"), help="where runs lie; what is there is reused"
    )
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/claims_BACKBONE.json)")
    args = parser.parse_args()
    output = args.output or RESULTS / f"claims_{args.backbone}.json"

    from spn4cir.data_gen.make_triplets import make_triplets
    from spn4cir.data_gen.steps import GenerateConfig
    from spn4cir.datasets import load_dataset
    from spn4cir.results import git_commit

    if args.generated == "auto":
        make_triplets(parse(GenerateConfig, ROOT / "recipes" / "triplets" / "emoji.yaml", []), load_dataset("emoji"))
    settings = {
        annotated: [Setting(annotated, seed, args.generated, args.runs, args.backbone) for seed in args.seeds]
        for annotated in args.max_annotated
    }
    if args.tune:
        for annotated, seeds in settings.items():
            for setting in seeds:
                print(annotated, setting.seed, json.dumps(tune(setting, args.rows), indent=1))
        return
    trained = [row for row in args.rows if row != "embedded"]
    for seeds in settings.values():
        for setting in seeds:
            for row in trained:
                setting.train(row)
    if args.train_only:
        return
    results = {}
    for annotated, seeds in settings.items():
        found = {row: [measure(setting.folder / row, splits=["test"]) for setting in seeds] for row in trained}
        if "embedded" in args.rows:
            untrained = measure(None, args.backbone, ["test"])
            found = {"embedded": [untrained] * len(seeds), **found}
        results[str(annotated)] = {
            "test": summarise(found, "test"),
            "differences": differences(found, "test"),
            "runs": {setting.seed: endings(setting, trained) for setting in seeds},
        }
    report = {
        "what": "emoji/test in percent, mean and standard deviation over seeds; differences in points with 95 % "
        "intervals, paired by seed and query; best state of each run on held-out training triplets",
        "command": "python -m benchmarks.claims " + " ".join(sys.argv[1:]),
        "protocol": PROTOCOL,
        "settings": SETTINGS if args.backbone == "clip4cir" else "of the recipes",
        "generated share of a batch": SHARE,
        "rows": ROWS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
        "written": time.strftime("%Y-%m-%d"),
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(report, indent=1) + "\n")
    for annotated, part in results.items():
        print(f"**{annotated} annotated triplets**\n\n{markdown(part, ROWS, COLUMNS)}\n")
    print(f"written to {output}")


if __name__ == "__main__":
    run_command(main)
