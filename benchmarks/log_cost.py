"""The share of a stage-2 step that its log takes: gradient norm, checks of finiteness, and one line every few steps.

Stage 2 of the embedded dataset with its recipe, on the embedded weights; times are sums over all steps of one run.

example:
  python -m benchmarks.log_cost --json benchmarks/results/log_cost.json
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import measure
from spn4cir import train as loop
from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import save_model
from spn4cir.config import TrainConfig, parse, recipes_folder
from spn4cir.objective import Objective
from spn4cir.run import Run

STEPS = 60
LOGGING = {"gradient norm": (loop, "limit_gradient"), "finite": (loop, "check_finite"),
           "numbers": (loop.StepLog, "numbers"), "write": (Run, "log")}  # fmt: skip


def timed(function: Callable[..., Any], name: str, seconds: Counter[str]) -> Callable[..., Any]:
    """The same function; the seconds that it takes are added up under a name."""

    @wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            seconds[name] += time.perf_counter() - start  # type: ignore[assignment]

    return run


def suite() -> dict[str, Any]:
    """Train, and tell where the time went."""
    seconds: Counter[str] = Counter()
    stamps: list[float] = []

    def stamp(objective: Any) -> None:
        stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_model(folder / "init", build_backbone("clip4cir"), {})
        config = parse(TrainConfig, recipes_folder() / "emoji" / "clip4cir_stage2.yaml", [])
        config = replace(config, init=str(folder / "init"), output=str(folder / "run"), max_steps=STEPS, eval_every=0)
        patches = [
            patch.object(owner, name, timed(getattr(owner, name), what, seconds))
            for what, (owner, name) in LOGGING.items()
        ]
        patches.append(patch.object(Objective, "after_step", stamp))
        for one in patches:
            one.start()
        try:
            loop.train(config, 2)
        finally:
            for one in patches:
                one.stop()
    step = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    rows = [{"what": what, "seconds per step": float(f"{seconds[what] / STEPS:.3g}")} for what in LOGGING]
    total = sum(seconds.values()) / STEPS
    return measure.report(
        "log_cost", "share of a step of stage 2 that logging takes, emoji, embedded CLIP, batch 128", rows,
        step_seconds=float(f"{step:.4g}"), log_every=config.log_every, share=float(f"{total / step:.3g}"), bound=0.01,
    )  # fmt: skip


if __name__ == "__main__":
    measure.command("log_cost", __doc__, suite)
