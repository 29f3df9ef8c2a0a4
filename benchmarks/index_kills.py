"""An index, killed while it is built and changed: what is left must be the old index or the new one.

Builds an index of made-up pictures, adds a second folder, and updates it after pictures were changed, added and
removed; each to its end first. Then each of the three gets SIGKILL at random moments: the index must open as it was
before or as it is after, and the same command, run again, must end with the same bytes.

examples:
  python -m benchmarks.index_kills --kills 20 --json benchmarks/results/index_kills.json
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.measure import report
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text
from spn4cir.index.local import Index
from spn4cir.model import Model, load

CHANGES = ("build", "add", "update")
COUNT = 1500


def draw(path: Path, seed: object) -> None:
    """A picture of coloured blocks, the same one each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = Image.frombytes("RGB", (6, 6), random.Random(str(seed)).randbytes(6 * 6 * 3))
    blocks.resize((96, 80), Image.Resampling.NEAREST).save(path)


def draw_folders(folder: Path) -> None:
    """``pictures`` and ``more``."""
    for n in range(COUNT):
        draw(folder / "pictures" / f"{n % 7}" / f"{n}.png", n)
    for n in range(COUNT // 2):
        draw(folder / "more" / f"more{n}.png", f"more {n}")


def edit_pictures(folder: Path) -> None:
    """What an update finds: pictures that are new, changed, gone and broken."""
    for n in range(0, COUNT, 3):
        draw(folder / "pictures" / f"{n % 7}" / f"{n}.png", f"changed {n}")
    for n in range(1, COUNT, 30):
        (folder / "pictures" / f"{n % 7}" / f"{n}.png").unlink()
    for n in range(COUNT // 4):
        draw(folder / "pictures" / "new" / f"{n}.png", f"new {n}")
    (folder / "pictures" / "0" / "0.png").write_bytes(b"no picture")


def digests(path: Path) -> dict[str, str]:
    """Every file of an index but its lock, by its content."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix != ".lock"]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def change(model: Model, kind: str, folder: Path, path: Path) -> None:
    """One change to its end."""
    if kind == "build":
        Index.build(model, folder / "pictures", path)
    elif kind == "add":
        Index(path, model).add(folder / "more")
    else:
        Index(path, model).update()


def in_child(run: Callable[[], None]) -> int:
    """Start in a child process, whose output goes nowhere; its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            run()
            code = 0
        finally:
            os._exit(code)
    return child


def finish(child: int) -> None:
    """Wait for a child. Raises ``InputError`` if it failed."""
    if code := os.waitpid(child, 0)[1]:
        raise InputError(f"a change of the index ended with {code}")


def run(kills: int, seed: int) -> dict[str, Any]:
    """All changes, to their ends and killed."""
    draws, seconds = random.Random(seed), dict[str, float]()
    moments: list[dict[str, Any]] = []
    model = load()
    with tempfile.TemporaryDirectory() as name:
        folder, truth = Path(name), Path(name) / "truth"
        draw_folders(folder)
        for number, kind in enumerate(CHANGES):
            if kind == "update":
                edit_pictures(folder)
            before = folder / f"before-{kind}"
            if truth.is_dir():
                shutil.copytree(truth, before)
            start = time.perf_counter()
            finish(in_child(partial(change, model, kind, folder, truth)))
            seconds[kind] = round(time.perf_counter() - start, 2)
            ids = {"old": Index(before).ids if before.is_dir() else None, "new": Index(truth).ids}
            wanted = kills * (number + 1) // len(CHANGES)
            while len(moments) < wanted:  # a change that ends before its kill is not counted
                path, delay = folder / f"{kind}-killed", draws.uniform(0, seconds[kind])
                if before.is_dir():
                    shutil.copytree(before, path)
                child = in_child(partial(change, model, kind, folder, path))
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                killed = os.waitpid(child, 0)[1] == signal.SIGKILL
                left = Index(path).ids if (path / "index.json").is_file() else None
                state = "new" if left == ids["new"] else "old"
                assert left == ids[state], f"{kind} after {delay:.2f} s: neither the old index nor the new one"
                if state == "old":
                    finish(in_child(partial(change, model, kind, folder, path)))
                assert digests(path) == digests(truth), f"{kind} after {delay:.2f} s: other bytes"
                if killed:
                    moments.append({"change": kind, "after s": round(delay, 2), "left": state})
                    print(moments[-1], flush=True)
                shutil.rmtree(path)
    return report("index_kills", f"{COUNT} pictures, {COUNT // 2} more", [], seconds=seconds, kills=moments)


def main() -> None:
    """Kill and compare; prints a line for each kill and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.index_kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20, help="over the three changes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    found = run(args.kills, args.seed)
    print(json.dumps(found))
    if args.json:
        write_text(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
