"""Data generation, killed again and again: what a resumed run leaves must be what an uninterrupted one leaves.

Runs ``data_gen/make_triplets.py`` once to its end. Then the same command is started in an empty folder and gets SIGKILL
at a random moment of its first step; started again, at a random moment of the next step; and so on until it may finish,
and is compared. All that is repeated until there were so many kills. At the end two processes share one more run.

examples:
  python -m benchmarks.kills --kills 20 --json benchmarks/results/kills.json
  python -m benchmarks.kills --kills 3 --options '--dataset catalogue --data-root my/pictures --matcher embedded'
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
from spn4cir.files import write_text
from spn4cir.results import git_commit

ROOT = Path(__file__).parent.parent
SAME = ("images.jsonl", "pairs.jsonl", "captions.jsonl", "triplets.jsonl", "triplets.json")
FILES = {"images.jsonl": "deduplicate", "pairs.jsonl": "match", "captions.jsonl": "caption", "triplets.json": "write"}
STEPS = (*FILES.values(), "report")


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


def ended(process: "subprocess.Popen[bytes]") -> None:
    """Wait for its end. Raises ``InputError`` if it failed."""
    if code := process.wait():
        raise InputError(f"make_triplets ended with exit code {code}: run it by hand with the same options")


def step_of(output: Path) -> str:
    """The step that a run is in: that of the first file which is not finished; before the first, ``start``."""
    if not any(output.glob("images.*")):
        return "start"
    left = (step for name, step in FILES.items() if not (output / name).with_suffix(".done.json").is_file())
    return next(left, "report")


def watch(process: "subprocess.Popen[bytes]", output: Path) -> dict[str, float]:
    """How long each step of a whole run took, in seconds."""
    seconds, before = dict.fromkeys(STEPS, 0.0), time.perf_counter()
    while process.poll() is None:
        time.sleep(0.01)
        step, now = step_of(output), time.perf_counter()
        seconds[step] = seconds.get(step, 0.0) + now - before
        before = now
    ended(process)
    return seconds


def kill_in(step: str, delay: float, process: "subprocess.Popen[bytes]", output: Path) -> str:
    """Kill a run that long after it entered a step, unless it ends before; the step that it was in."""
    while process.poll() is None and step_of(output) != step:
        time.sleep(0.005)
    time.sleep(delay)
    if process.poll() is not None:
        return ""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return step_of(output)


def compare(output: Path, truth: Path) -> None:
    """Raise unless all files that the promise is about are equal, byte for byte, and nothing else is left."""
    for name in SAME:
        assert (output / name).read_bytes() == (truth / name).read_bytes(), f"{name} differs after a kill"
    left = [path.name for path in output.iterdir() if ".partial." in path.name or path.suffix == ".tmp"]
    assert not left, f"left behind: {left}"


def run(kills: int, options: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """All runs."""
    truth, draw = folder / "truth", random.Random(seed)
    seconds = watch(start(truth, options), truth)
    moments: list[dict[str, Any]] = []
    rounds = 0
    while len(moments) < kills:
        output, rounds = folder / f"round{rounds}", rounds + 1
        for step in STEPS[: kills - len(moments)]:
            delay = draw.uniform(0, seconds[step])
            found = kill_in(step, delay, start(output, options), output)
            if found:
                moments.append({"aimed at": step, "after": round(delay, 3), "in": found})
                print(f"kill {len(moments)}: {delay:.2f} s into {step}, in {found}", flush=True)
        ended(start(output, options))
        compare(output, truth)
        print(f"round {rounds}: equal", flush=True)
    ended(start(folder / "two", options, 2))
    compare(folder / "two", truth)
    return {
        "benchmark": "kills",
        "what": f"make_triplets.py {shlex.join(options)}".strip(),
        "uninterrupted seconds": {step: round(taken, 2) for step, taken in seconds.items()},
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
