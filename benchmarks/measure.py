"""What benchmarks share: processes of their own, peaks of memory, rounds in turns, and the rows that they report."""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from spn4cir.files import write_text

T = TypeVar("T")
Task = Callable[[], Any]
Row = dict[str, Any]
CONTEXT = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
"""With these glibc gives freed memory back at once: no peak hides in what an earlier one left."""


def anonymous(process: int | None) -> int:
    """RssAnon of a process in kB, pages of its own without files that are mapped; 0 where the system does not say."""
    return _told("RssAnon", process)


def _told(word: str, process: int | None) -> int:
    try:
        told = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in told.splitlines() if line.startswith(word)), 0)


def in_child(task: Callable[..., T], *given: Any) -> T:
    """What a task returns, or raises, in a new process: nothing is cached there, and nothing stays."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(task, *given).result()


def peaks(prepare: Callable[..., Mapping[str, Task]], *given: Any) -> dict[str, float | None]:
    """The most that each task takes beyond what it is given, in MB, to some pages; None where the system does not say.

    Args:
        prepare: makes the tasks by name, in a process of its own. Each runs once before, so that libraries have theirs.
        given: what it is called with.
    """
    with _environment(RETURNED):
        return in_child(_peaks, prepare, *given)


def _peaks(prepare: Callable[..., Mapping[str, Task]], *given: Any) -> dict[str, float | None]:
    return {name: _peak(task) for name, task in prepare(*given).items()}


def _peak(task: Task) -> float | None:
    task()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    except OSError:
        return None
    before = _told("VmRSS", os.getpid())
    task()
    highest = _told("VmHWM", os.getpid())
    return round((highest - before) / 1024, 1) if before and highest else None


@contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def watched(task: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What a task returns in a new process, with the peak of its anonymous memory, which is looked at meanwhile.

    For tasks that map files, whose pages ``peaks`` would count; shorter peaks than a few milliseconds may be missed.

    Args:
        task: called with ``begin``, which it calls when it has what it is given, and with ``given``.
        given: the rest.

    Returns:
        The same with ``peak MB``, beyond what there was at ``begin``; None where the system does not say.
    """
    here, there = CONTEXT.Pipe()
    child = CONTEXT.Process(target=_serve, args=(there, task, *given))
    child.start()
    there.close()
    before = highest = here.recv()
    while not here.poll(0.005):
        highest = max(highest, anonymous(child.pid))
    result: dict[str, Any] = here.recv()
    child.join()
    return {**result, "peak MB": round((highest - before) / 1024, 1) if before else None}


def _serve(pipe: Any, task: Callable[..., dict[str, Any]], *given: Any) -> None:
    pipe.send(task(lambda: pipe.send(anonymous(os.getpid())), *given))


def in_turns(ways: Mapping[str, Task], rounds: int, wait: Task = lambda: None) -> dict[str, float]:
    """Median seconds of each way, one after the other in each round, after one round that does not count.

    Args:
        ways: what to run.
        rounds: that count.
        wait: returns when a device has done all that it was given.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, way in ways.items():
            wait()
            start = time.perf_counter()
            way()
            wait()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(of[1:]) for name, of in taken.items()}


def bound(of: str, value: float | None, most: float | None = None, least: float | None = None) -> Row:
    """Something that is held against a bound, above or below; what was not measured holds none."""
    sign, limit = ("≤", most) if least is None else ("≥", least)
    assert limit is not None
    holds = value is not None and (value <= limit if least is None else value >= limit)
    return {"of": of, "value": value, "bound": f"{sign} {limit:g}", "holds": holds}


def row(
    what: str,
    against: str,
    seconds: tuple[float | None, float | None] = (None, None),
    memory: tuple[float | None, float | None] = (None, None),
    bounds: tuple[Row, ...] = (),
) -> Row:
    """One line of the table: what was measured against what, (ours, baseline) each, memory in MB."""
    return {
        "what": what,
        "against": against,
        "seconds": _pair(seconds),
        "ratio": share(*seconds),
        "peak extra MB": _pair(memory),
        "memory ratio": share(*memory),
        "bounds": list(bounds),
    }


def _pair(values: tuple[float | None, float | None]) -> Row:
    return {
        name: None if value is None else float(f"{value:.4g}")
        for name, value in zip(("ours", "baseline"), values, strict=True)
    }


def share(ours: float | None, baseline: float | None) -> float | None:
    """Ours as a part of the baseline, or None where either was not measured."""
    return float(f"{ours / baseline:.3g}") if ours is not None and baseline else None


def distance(one: Any, other: Any) -> float:
    """Of two tensors: the norm of their difference as a part of the second's."""
    other = other.double()
    return float((one.double() - other).norm() / other.norm())


def report(benchmark: str, what: str, rows: list[Row], **more: Any) -> dict[str, Any]:
    """What a benchmark prints: its rows, and what they were measured on."""
    import torch

    from spn4cir.results import git_commit  # loads much, which processes that are measured need not

    return {
        "benchmark": benchmark,
        "what": what,
        "rows": rows,
        **more,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "git": git_commit(),
    }


def run_one(name: str) -> dict[str, Any]:
    """What a benchmark of the suite reports. Here, as a new process cannot import the command itself."""
    found: dict[str, Any] = importlib.import_module(f"benchmarks.{name}").suite()
    return found


def command(name: str, about: str | None, suite: Callable[[], dict[str, Any]]) -> None:
    """The command of a benchmark without options: prints one line of JSON."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    found = suite()
    print(json.dumps(found, ensure_ascii=False))
    if args.json:
        write_text(args.json, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
