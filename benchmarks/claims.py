"""What each stage and the generated positives bought on the embedded dataset, against controls of equal steps.

Every run ends after a fixed number of steps and its last state is evaluated, on val and on test: nothing is selected.

examples:
  python -m benchmarks.claims                       # three seeds, both settings; about half an hour on two cores
  python -m benchmarks.claims --seeds 0 --max-annotated 2000 --runs runs/claims
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spn4cir.config import TrainConfig, parse
from spn4cir.errors import run_command
from spn4cir.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "claims.json"
STAGE1_STEPS = {300: 60, 2000: 120}
STAGE2_STEPS = 120
SHARE = {300: 0.5, 2000: 0.25}  # of each batch, where generated triplets take part
ROWS = {
    "embedded": "embedded weights, no training",
    "stage1": "stage 1",
    "stage1+p": "stage 1, generated positives",
    "stage2": "stage 1 → stage 2, negatives only",
    "stage2+p": "stage 1 → stage 2, generated positives",
    "both+p": "stage 1 → stage 2, generated positives in both",
    "longer": "stage 1, for as many steps as both stages",
    "longer2": "longer stage 1 → stage 2, negatives only",
    "longer2+p": "longer stage 1 → stage 2, generated positives",
}


def settings(stage: int, annotated: int, seed: int) -> TrainConfig:
    """The recipe of a stage, with a fixed number of steps."""
    recipe = ROOT / "recipes" / "emoji" / f"clip4cir_stage{stage}.yaml"
    steps = STAGE1_STEPS[annotated] if stage == 1 else STAGE2_STEPS
    return replace(
        parse(TrainConfig, recipe, []), max_annotated=annotated, seed=seed, epochs=10_000, max_steps=steps, eval_every=0
    )


def run_setting(
    annotated: int, seed: int, generated: str, folder: Path, rows: Iterable[str] = ROWS
) -> dict[str, dict[str, Any]]:
    """Train the rows of one setting and evaluate each; runs that are complete in ``folder`` are reused."""
    from spn4cir.run import pending
    from spn4cir.train import train

    positives: dict[str, Any] = {"generated": generated, "generated_share": SHARE[annotated]}
    first, second = settings(1, annotated, seed), settings(2, annotated, seed)
    plans: dict[str, tuple[int, TrainConfig]] = {
        "stage1": (1, first),
        "stage1+p": (1, replace(first, **positives)),
        "stage2": (2, replace(second, init=str(folder / "stage1"))),
        "stage2+p": (2, replace(second, init=str(folder / "stage1"), **positives)),
        "both+p": (2, replace(second, init=str(folder / "stage1+p"), **positives)),
        "longer": (1, replace(first, max_steps=STAGE1_STEPS[annotated] + STAGE2_STEPS)),
        "longer2": (2, replace(second, init=str(folder / "longer"))),
        "longer2+p": (2, replace(second, init=str(folder / "longer"), **positives)),
    }
    found = {}
    for name, (stage, config) in plans.items():
        if name not in rows:
            continue
        output = folder / name
        if left := pending(replace(config, output=str(output))):
            train(left, stage)
        found[name] = measure(output)
    return found


def measure(run: Path | None, backbone: str = "clip4cir") -> dict[str, Any]:
    """Metrics of a run (of a backbone's embedded weights for None) on val and test, with the ablation."""
    from spn4cir import checkpoints
    from spn4cir.backbones import build_backbone
    from spn4cir.datasets import load_dataset
    from spn4cir.evaluate import evaluate
    from spn4cir.images import ImageSource

    kept = run and run / "measured.json"
    if kept and kept.is_file():
        measured: dict[str, Any] = json.loads(kept.read_text())
        return measured
    model = checkpoints.load_model(run) if run else build_backbone(backbone)
    dataset = load_dataset("emoji")
    images = ImageSource(dataset.image, model.transform, keep=True)
    found = {}
    for split in ("val", "test"):
        result = evaluate(model, dataset.benchmark(split), images, ablate=split == "val")
        found[split] = {"metrics": result.metrics, "ablation": result.ablation}
    if kept:
        write_text(kept, json.dumps(found))
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 2), "sd": deviation and round(deviation, 2), "seeds": values}


def summarise(
    settings_found: dict[str, dict[int, dict[str, dict[str, Any]]]], embedded: dict[str, Any]
) -> dict[str, Any]:
    """``{setting: {row: {"test R@1": {mean, sd, seeds}, …}}}``."""
    summary: dict[str, Any] = {}
    for setting, by_seed in settings_found.items():
        rows: dict[str, Any] = {}
        for name in ROWS:
            measured = (
                [embedded] if name == "embedded" else [found[name] for found in by_seed.values() if name in found]
            )
            if not measured:
                continue
            columns = {
                f"{split} {metric}": spread([round(m[split]["metrics"][metric], 4) for m in measured])
                for split in ("val", "test")
                for metric in ("R@1", "R@5", "R@10", "macro R@1", "Rs@1")
            }
            for alone in ("image only", "text only"):
                columns[f"val R@1 {alone}"] = spread([round(m["val"]["ablation"][alone]["R@1"], 4) for m in measured])
            rows[name] = columns
        summary[setting] = rows
    return summary


def markdown(summary: dict[str, Any]) -> str:
    """The table of docs/results.md."""
    lines = []
    for setting, rows in summary.items():
        lines += [f"**{setting} annotated triplets**", ""]
        names = ["val R@1", "val R@10", "test R@1", "test R@10", "test macro R@1", "test Rs@1"]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for key, label in ROWS.items():
            if key not in rows:
                continue
            cells = []
            for name in names:
                cell = rows[key][name]
                cells.append(f"{cell['mean']:.1f}" + (f" ± {cell['sd']:.1f}" if cell["sd"] is not None else ""))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, summarise, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-annotated", type=int, nargs="+", default=[2000, 300], choices=sorted(STAGE1_STEPS))
    parser.add_argument("--generated", default="auto", help="file of generated triplets (default: made if missing)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="default: all")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/claims"), help="where runs lie; what is there is reused"
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()

    from spn4cir.data_gen.make_triplets import make_triplets
    from spn4cir.data_gen.steps import GenerateConfig
    from spn4cir.datasets import load_dataset
    from spn4cir.results import git_commit

    started = time.time()
    if args.generated == "auto":
        make_triplets(parse(GenerateConfig, ROOT / "recipes" / "triplets" / "emoji.yaml", []), load_dataset("emoji"))
    found: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for annotated in args.max_annotated:
        for seed in args.seeds:
            folder = args.runs / f"{annotated}-seed{seed}"
            found.setdefault(str(annotated), {})[seed] = run_setting(annotated, seed, args.generated, folder, args.rows)
    summary = summarise(found, measure(None))
    report = {
        "what": "percent, mean and standard deviation over seeds; last state of each run, nothing selected",
        "command": "python -m benchmarks.claims --seeds " + " ".join(map(str, args.seeds)),
        "steps": {"stage 1": STAGE1_STEPS, "stage 2": STAGE2_STEPS},
        "generated share of a batch": SHARE,
        "rows": ROWS,
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
