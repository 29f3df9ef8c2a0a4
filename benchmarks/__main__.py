"""The suite of speed: every fast path beside a straightforward way, in one table.

Each benchmark runs in a process of its own, and asserts first that both ways agree. Then come seconds and peaks of
extra memory, a line of JSON for each benchmark, and the table; a bound that is missed is marked there. Exit code 1 if
one is missed or a benchmark fails. With a CUDA device there are its rows too.

examples:
  python -m benchmarks                          # under five minutes on two cores; writes nothing
  python -m benchmarks --only loss step
  python -m benchmarks --save                   # also keeps the results in benchmarks/results
  python -m benchmarks --list                   # what there is, and what takes longer
"""

import argparse
import ast
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, in_child, run_one
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text

HERE = Path(__file__).parent
SUITE = (
    "loss", "step", "gradients", "processes", "bank", "search", "evaluation", "deduplication", "matching", "device",
)  # fmt: skip
QUICK = ("evaluation", "deduplication", "matching")
"""These are smaller here than by their own commands, whose results have the plain names."""
SLOW = {
    "catalogues": "seconds, after a download",
    "captioning": "a minute, or a CUDA device",
    "encoding": "minutes, or a CUDA device",
    "demo": "about five minutes",
    "generation": "minutes",
    "references": "minutes, and 20 GB of disk",
    "report_size": "a minute",
    "cutoffs": "a minute",
    "engine": "minutes",
    "index": "half an hour, 10 GB of disk and 8 GB of memory",
    "index_kills": "minutes",
    "kills": "minutes",
    "claims": "four hours",
    "embeddings": "minutes for each part",
    "pairs": "minutes",
    "dynamics": "seconds, after claims",
    "zeroshot": "an hour, after claims",
    "negatives": "two hours, after claims",
    "styles": "an hour, after data_gen/stylize.py",
    "table_fuzz": "minutes",
    "triplet_table": "minutes, and 3 GB of disk",
    "serving": "minutes",
    "unchanged": "minutes",
    "log_cost": "a minute",
}
"""Apart from the suite, by their own commands; and how long they take on two cores."""


def summary(name: str) -> str:
    """The first line of a benchmark's docstring; its module is not imported."""
    tree = ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def listing() -> str:
    """All benchmarks, for people."""
    lines = ["python -m benchmarks runs:"]
    lines += [f"  {name:14} {summary(name)}" for name in SUITE]
    lines += ["", "apart from it, each by python -m benchmarks.NAME (--help tells more):"]
    lines += [f"  {name:14} {summary(name)} ({takes})" for name, takes in SLOW.items()]
    return "\n".join(lines)


def run_all(names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Reports by name, and what went wrong by name; a line of progress for each."""
    reports, failures = dict[str, dict[str, Any]](), dict[str, str]()
    for n, name in enumerate(names, 1):
        print(f"[{n}/{len(names)}] {name}: {summary(name)}", file=sys.stderr, end=" ", flush=True)
        start = time.perf_counter()
        try:
            reports[name] = in_child(run_one, name)
        except Exception as error:  # whatever it is, the other benchmarks are wanted, and it is told
            failures[name] = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"{time.perf_counter() - start:.0f} s{' FAILED' * (name in failures)}", file=sys.stderr, flush=True)
    return reports, failures


def missed(reports: Mapping[str, dict[str, Any]]) -> list[str]:
    """The benchmarks, what was measured, and the bounds that do not hold."""
    return [
        f"{name}: {one['what']}: {held['of']} {held['value']}, which should be {held['bound']}"
        for name, found in reports.items()
        for one in found["rows"]
        for held in one["bounds"]
        if not held["holds"]
    ]


def table(reports: Mapping[str, dict[str, Any]]) -> str:
    """All rows of all benchmarks."""
    heads = ("benchmark", "what", "against", "seconds", "baseline", "ratio", "MB", "baseline", "bounds")
    lines = [heads, *(_cells(name, one) for name, found in reports.items() for one in found["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads) - 1)]
    numbers = range(3, 8)
    return "\n".join(
        "  ".join(
            [*(line[n].rjust(w) if n in numbers else line[n].ljust(w) for n, w in enumerate(widths)), line[-1]]
        ).rstrip()
        for line in lines
    )


def _cells(name: str, one: Row) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"

    seconds, memory = (tuple(map(number, one[part].values())) for part in ("seconds", "peak extra MB"))
    bounds = (
        f"{held['of']} {number(held['value'])} {held['bound']} {'holds' if held['holds'] else 'MISSED'}"
        for held in one["bounds"]
    )
    return name, one["what"], one["against"], *seconds, number(one["ratio"]), *memory, "; ".join(bounds)


def keep(reports: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Write each report into a file of its name."""
    for name, found in reports.items():
        file = folder / f"{name}{'_quick' * (name in QUICK)}.json"
        write_text(file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def choose(only: Sequence[str]) -> list[str]:
    """Names to run: those that are asked for, or all; without a CUDA device its rows are left out.

    Raises:
        InputError: for a name that is none.
    """
    for name in only:
        if name in SLOW:
            raise InputError(f"--only {name}: it takes {SLOW[name]}, and runs by python -m benchmarks.{name}")
        if name not in SUITE:
            raise InputError(f"--only {name}: there is no such benchmark; known: {', '.join(SUITE)}")
    if only:
        return list(only)
    import torch

    return [name for name in SUITE if name != "device" or torch.cuda.is_available()]


def main(given: Sequence[str] | None = None) -> None:
    """Run, print lines of JSON and the table; exit code 1 if anything is not as it should be."""
    about, _, examples = (__doc__ or "").partition("\n\nexamples:")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=about, epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these benchmarks instead of all")
    parser.add_argument("--save", action="store_true", help="also write each result to benchmarks/results/NAME.json")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    args = parser.parse_args(given)
    if args.list:
        print(listing())
        return
    names = choose(args.only)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow each other down
    start = time.perf_counter()
    reports, failures = run_all(names)
    for found in reports.values():
        print(json.dumps(found, ensure_ascii=False))
    if args.save:
        keep(reports, HERE / "results")
    wrong = [*(f"{name} failed: {told}" for name, told in failures.items()), *missed(reports)]
    print(f"\n{table(reports)}\n\n{len(reports)} benchmarks in {time.perf_counter() - start:.0f} s", *wrong, sep="\n")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
