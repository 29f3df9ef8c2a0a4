"""All backbones through both stages on the embedded dataset, beside what image and text find alone.

Each run follows its recipe to the last step and its last state is evaluated, on val and on test: nothing is selected.

examples:
  python -m benchmarks.backbones                          # four backbones, three seeds; about an hour on two cores
  python -m benchmarks.backbones --backbones sprc --seeds 0
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.claims import measure, spread
from spn4cir.config import TrainConfig, parse
from spn4cir.errors import run_command
from spn4cir.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "backbones.json"
WAYS = ("composed", "image only", "text only")
COLUMNS = ("val R@1", "val R@10", "test R@1", "test R@10", "val R@1 image only", "val R@1 text only")


def run_stages(backbone: str, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Both stages of a backbone by their recipes, and what their last states find; complete runs are reused."""
    from spn4cir.run import pending
    from spn4cir.train import train

    found: dict[str, dict[str, Any]] = {}
    for stage in (1, 2):
        recipe = ROOT / "recipes" / TrainConfig.dataset / f"{backbone}_stage{stage}.yaml"
        output = folder / f"stage{stage}"
        config = replace(parse(TrainConfig, recipe, []), seed=seed, eval_every=0, output=str(output))
        config.init = str(folder / "stage1") if stage == 2 else None
        if left := pending(config):
            train(left, stage)
        seconds = json.loads((output / "result.json").read_text())["seconds"]
        found[f"stage {stage}"] = {**measure(output), "seconds": seconds}
    return found


def columns(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over seeds of what the table shows."""
    found = {}
    for name in COLUMNS:
        split, metric, alone = (*name.split(" ", 2), "")[:3]
        values = [(m[split]["ablation"][alone] if alone else m[split]["metrics"])[metric] for m in measured]
        found[name] = spread([round(value, 4) for value in values])
    return found


def summarise(runs: dict[str, list[dict[str, dict[str, Any]]]], untrained: dict[str, Any]) -> dict[str, Any]:
    """``{backbone: {row: {column: {mean, sd, seeds}}}}``."""
    return {
        backbone: {
            "embedded weights": columns([untrained[backbone]]),
            **{row: columns([seed[row] for seed in seeds]) for row in ("stage 1", "stage 2")},
            "seconds": {row: [seed[row]["seconds"] for seed in seeds] for row in ("stage 1", "stage 2")},
        }
        for backbone, seeds in runs.items()
    }


def markdown(summary: dict[str, Any]) -> str:
    """The table of docs/results.md."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for backbone, rows in summary.items():
        for row in ("embedded weights", "stage 1", "stage 2"):
            cells = [
                f"{cell['mean']:.1f}" + (f" ± {cell['sd']:.1f}" if cell["sd"] is not None else "")
                for cell in (rows[row][name] for name in COLUMNS)
            ]
            lines.append(f"| {backbone}, {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, summarise, write."""
    from spn4cir.backbones import BACKBONES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backbones",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/backbones"), help="what is there is reused")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()

    from spn4cir.results import git_commit

    started = time.time()
    runs = {
        backbone: [run_stages(backbone, seed, args.runs / f"{backbone}-seed{seed}") for seed in args.seeds]
        for backbone in args.backbones
    }
    report = {
        "what": "percent, mean and standard deviation over seeds; last state of each run, nothing selected",
        "command": "python -m benchmarks.backbones",
        "backbones": args.backbones,
        "seeds": args.seeds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
        "seconds": round(time.time() - started, 1),
        "summary": summarise(runs, {backbone: measure(None, backbone) for backbone in args.backbones}),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(report, indent=1) + "\n")
    print(markdown(report["summary"]))
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_command(main)
