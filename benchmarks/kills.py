"""Data generation, killed again and again: what a resumed run leaves must be what an uninterrupted one leaves.

Runs ``data_gen/make_triplets.py`` once to its end. Then the same command is started in an empty folder, gets SIGKILL after
a random time, and is started again, until it was killed so many times; the last start may finish. A run that finishes
earlier is compared, and the next starts in an empty folder. At the end two processes share the work of one more run.

examples:
  python -m benchmarks.kills --kills 20 --json benchmarks/results/kills.json
  python -m benchmarks.kills --kills 3 --options '--dataset catalogue --data-root my/pictures --captions my/captions.jsonl'
"""

import argparse
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from spn4cir.errors import InputError, run_command
from spn4cir.evaluate import git_commit
from spn4cir.files import write_text

ROOT = Path(__file__).parent.parent
SAME = ("images.jsonl", "pairs.jsonl", "captions.jsonl", "triplets.jsonl", "triplets.json")
STEPS = {"images.jsonl": "deduplicate", "pairs.jsonl": "match", "captions.jsonl": "caption", "triplets.json": "write"}


def start(output: Path, options: list[str], processes: int = 1) -> "subprocess.Popen[bytes]":
    """The command, in a process group of its own, so that a kill takes all of it."""
    script = [str(ROOT / "data_gen" / "make_triplets.py"), "--output", str(output), *options]
    many = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"ACCELERATE_USE_CPU": "1"} if many else {})
    return subprocess.Popen(
        [sys.executable, *many, *script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )


def finished(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether it ended by itself within that time; else all of it is killed."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    if code:
        raise InputError(f"make_triplets ended with exit code {code}: run it by hand with the same options")
    return True


def step_of(output: Path) -> str:
    """The step that a killed run was in: that of the first file which is not finished."""
    left = (step for name, step in STEPS.items() if not (output / name).with_suffix(".done.json").is_file())
    return next(left, "report")


def compare(output: Path, truth: Path) -> None:
    """Raise unless all files that the promise is about are equal, byte for byte."""
    for name in SAME:
        assert (output / name).read_bytes() == (truth / name).read_bytes(), f"{name} differs after a kill"
    left = [path.name for path in output.iterdir() if ".partial." in path.name or path.suffix == ".tmp"]
    assert not left, f"left behind: {left}"


def run(kills: int, options: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """All runs."""
    truth, draw, begun = folder / "truth", random.Random(seed), time.perf_counter()
    finished(start(truth, options), 1e6)
    whole = time.perf_counter() - begun
    moments: list[dict[str, Any]] = []
    rounds = 0
    while len(moments) < kills:
        output, rounds = folder / f"round{rounds}", rounds + 1
        while not finished(start(output, options), seconds := draw.uniform(0, whole) if len(moments) < kills else 1e6):
            moments.append({"step": step_of(output), "after": round(seconds, 1)})
            print(f"kill {len(moments)}: after {seconds:.1f} s, in {moments[-1]['step']}", flush=True)
        compare(output, truth)
        print(f"round {rounds}: equal", flush=True)
    finished(start(folder / "two", options, 2), 1e6)
    compare(folder / "two", truth)
    return {
        "benchmark": "kills",
        "what": f"make_triplets.py {shlex.join(options)}",
        "uninterrupted seconds": round(whole, 1),
        "kills": moments,
        "rounds": rounds,
        "equal": [*SAME],
        "two processes": "equal",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
    }


def main() -> None:
    """Run, kill, compare, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--options", default="", help="of make_triplets.py, in one string")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(args.kills, shlex.split(args.options), args.seed, Path(folder))
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
