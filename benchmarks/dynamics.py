"""Curves of the runs of ``benchmarks.claims``: loss, recall on held-out triplets, temperature, norm of the gradient.

Columns are stage 1 until its patience ends, a line for each seed with a dot at the state that was kept, and then the
rows that go on from it, as means over seeds with the range between them.

examples:
  python -m benchmarks.dynamics                                  # docs/dynamics.png, from runs/claims
  python -m benchmarks.dynamics --max-annotated 1000 100 --picture other.png
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.claims import BUDGETS, ROOT, ROWS, Setting
from spn4cir.errors import InputError, run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = {"loss": "loss", "recall": "R@1 and R@5, mean,\nheld-out triplets (%)",
          "temperature": "temperature", "grad_norm": "norm of the gradient"}  # fmt: skip
COLORS = {
    "stage1": "#0072b2", "stage1+p": "#d55e00",
    "steps": "#0072b2", "time": "#56b4e9", "positives": "#d55e00", "negatives": "#000000", "both": "#009e73",
    "both+p": "#cc79a7",
}  # fmt: skip
Curve = list[tuple[int, float]]


def curves(run: Path) -> dict[str, Curve]:
    """``{name: [(step, value)]}`` of a run's log. Raises ``InputError`` if there is none."""
    path = run / "metrics.jsonl"
    if not (run / "result.json").is_file():
        raise InputError(f"{run} is not trained yet: python -m benchmarks.claims --train-only, with its --runs")
    found: dict[str, Curve] = {name: [] for name in CURVES}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        row = line | ({"recall": (line["R@1"] + line["R@5"]) / 2} if "R@1" in line else {})
        for name, curve in found.items():
            if name in row:
                curve.append((row["step"], row[name]))
    return found


def mean(of_seeds: Sequence[Curve]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all seeds have, and mean, least and greatest value at each."""
    values = defaultdict[int, list[float]](list)
    for curve in of_seeds:
        for step, value in curve:
            values[step].append(value)
    steps = [step for step in sorted(values) if len(values[step]) == len(of_seeds)]
    at = [values[step] for step in steps]
    return steps, [sum(v) / len(v) for v in at], [min(v) for v in at], [max(v) for v in at]


def draw_first(axes: "Axes", name: str, rows: dict[str, list[Path]]) -> None:
    """Stage 1: a line for each seed, and a dot at the state that was kept."""
    for row, runs in rows.items():
        for number, run in enumerate(runs):
            curve = curves(run)[name]
            label = None if number else ROWS[row]
            axes.plot(*zip(*curve, strict=True), color=COLORS[row], linewidth=0.8, alpha=0.8, label=label)
            best = json.loads((run / "result.json").read_text())["best_step"]
            axes.plot(*min(curve, key=lambda point: abs(point[0] - best)), "o", color=COLORS[row], markersize=4)


def draw_next(axes: "Axes", name: str, rows: dict[str, list[Path]]) -> None:
    """What goes on from stage 1: means over seeds, and the range between them."""
    for row, runs in rows.items():
        steps, middle, low, high = mean([curves(run)[name] for run in runs])
        axes.fill_between(steps, low, high, color=COLORS[row], alpha=0.12, linewidth=0)
        before = ", after stage 1 with generated positives" * row.endswith("+p")
        label = ROWS[row].removeprefix("… ") + before
        axes.plot(steps, middle, "-" if len(steps) > 1 else "o", color=COLORS[row], linewidth=1.3, label=label)


def draw(folder: Path, budgets: Sequence[int], seeds: Sequence[int], picture: Path) -> None:
    """Four rows of curves, two columns for each number of annotated triplets. Raises ``InputError`` unless trained."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the picture needs matplotlib: pip install 'spn4cir[demo]', and run this again") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    size = (5.2 * len(budgets) + 1, 9.6)
    figure, axes = pyplot.subplots(4, 2 * len(budgets), figsize=size, layout="constrained", squeeze=False)
    for place, annotated in enumerate(budgets):
        settings = [Setting(annotated, seed, "", folder) for seed in seeds]
        runs = {row: [setting.folder / row for setting in settings] for row in COLORS}
        first = {row: runs[row] for row in ("stage1", "stage1+p")}
        for line, (name, title) in enumerate(CURVES.items()):
            left, right = axes[line][2 * place : 2 * place + 2]
            draw_first(left, name, first)
            draw_next(right, name, {row: runs[row] for row in runs if row not in first})
            if not place:
                left.set_ylabel(title)
            for one in (left, right):
                one.spines[["top", "right"]].set_visible(False)
                if name in ("loss", "grad_norm"):
                    one.set_yscale("log")
                    one.yaxis.set_minor_formatter(NullFormatter())
        axes[0][2 * place].set_title(f"{annotated:,} annotated:\nstage 1, until patience ends", fontsize=10)
        axes[0][2 * place + 1].set_title(f"{annotated:,} annotated:\nwhat goes on from it", fontsize=10)
        for one in axes[-1][2 * place : 2 * place + 2]:
            one.set_xlabel("step")
    parts = [axes[0][column].get_legend_handles_labels() for column in (0, 1)]
    handles, labels = (first + second for first, second in zip(*parts, strict=True))
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=9, ncols=len(budgets))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dynamics",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--max-annotated", type=int, nargs="+", default=[1800, 300], choices=BUDGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="where runs of benchmarks.claims lie")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "dynamics.png")
    args = parser.parse_args()
    draw(args.runs, args.max_annotated, args.seeds, args.picture)
    print(f"drawn in {args.picture}")


if __name__ == "__main__":
    run_command(main)
