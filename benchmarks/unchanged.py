"""Losses and triplets at a fixed seed: what a change that should not alter results must leave equal, to the last digit.

examples:
  python -m benchmarks.unchanged --checkout ../before --save before.json
  python -m benchmarks.unchanged --compare before.json
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BACKBONES = ("clip4cir", "tgcir", "blip4cir", "sprc")
STEPS = 6
ROOT = Path(__file__).parents[1]


def run(checkout: Path, folder: Path, *arguments: str) -> None:
    """Run a script of a checkout, with all that it writes below a folder."""
    path = {"PYTHONPATH": str(checkout), "SPN4CIR_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(checkout / arguments[0]), *arguments[1:]],
        cwd=folder, env={**os.environ, **path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")


def losses(folder: Path) -> list[str]:
    """The loss of each step of a run, every digit of it, and its metrics at the end."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [repr(row["loss"]) for row in rows if "loss" in row]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return [*found, *(f"{name} {value!r}" for name, value in sorted(result["metrics"].items()))]


def measure(checkout: Path) -> dict[str, Any]:
    """Both stages of each backbone for a few steps, and the embedded triplets."""
    settings = (checkout / "spn4cir" / "config.py").read_text(encoding="utf-8")
    each = ["--log-every", "1"] if "log_every" in settings else ["--save-every", "1"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for backbone in BACKBONES:
            named = ["--dataset", "emoji", "--backbone", backbone, "--max-steps", str(STEPS), "--seed", "7", *each]
            for stage in (1, 2):
                out = folder / f"{backbone}{stage}"
                init = ["--init", str(folder / f"{backbone}1")] if stage == 2 else []
                run(checkout, folder, f"recipes/stage{stage}.py", *named, "--output", str(out), *init)
                found[f"{backbone} stage {stage}"] = losses(out)
        run(checkout, folder, "data_gen/make_triplets.py", "--dataset", "emoji")
        triplets = next(folder.rglob("triplets.json"))
        found["triplets"] = hashlib.sha256(triplets.read_bytes()).hexdigest()
    return found


def main() -> None:
    """Measure a checkout, and save what came out or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="folder of the source (default: this one)")
    parser.add_argument("--save", type=Path, help="write the result as JSON")
    parser.add_argument("--compare", type=Path, help="JSON of another checkout; exit code 1 if anything differs")
    args = parser.parse_args()
    found = measure(args.checkout.resolve())
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    before = json.loads(args.compare.read_text(encoding="utf-8")) if args.compare else found
    for name, values in found.items():
        shown = values if isinstance(values, str) else values[0]
        print(f"{name:<18}{'equal' if before[name] == values else 'DIFFERS'}  {shown}")
    if before != found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
