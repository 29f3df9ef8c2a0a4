"""Two processes equal one: same loss, same gradients, same weights after training."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_backbones import tiny_backbone
from torch import Tensor

from spn4cir.backbones import build_backbone
from spn4cir.backbones.shared_clip import EMBEDDED
from spn4cir.checkpoints import load_model, read_tensors, save_model
from spn4cir.datasets import DATASETS

SCRIPT = Path(__file__).parent / "toy_script.py"
# not the residual network: the gradient of its key bias is rounding alone, and AdamW makes steps of any gradient
TRANSFORMER = f"local-dir:{EMBEDDED / 'clip_transformer'}"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


NAMES = ("clip4cir", "tgcir", "sprc")  # one without and two with further terms of stage 1


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path]:
    """The script, and a folder with ``one`` and ``two``: what so many processes made of each backbone."""
    root, script = tmp_path_factory.mktemp("processes"), load_script()
    toy = script.Toy.draw(root / "toy")
    for name in NAMES:
        whole = build_backbone(name, model=TRANSFORMER) if name == "clip4cir" else tiny_backbone(name, root)
        save_model(root / "init" / name, whole, {})
        (root / "one" / name).mkdir(parents=True)
    (root / "two").mkdir()
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "1", "SPN4CIR_RUNS": str(root / "runs"), "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, *TORCHRUN, str(SCRIPT), "processes", *(str(root / n) for n in ("toy", "init", "two"))]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "toy", script.Toy)
        patch.setenv("SPN4CIR_RUNS", str(root / "runs"))
        for name in NAMES:
            script.evaluations(toy, root / "init" / name, root / "one" / name)
            script.runs(toy, root / "init" / name, root / "one" / name)
    return script, root


@pytest.fixture(params=NAMES)
def both(all_of_them: tuple[ModuleType, Path], request: pytest.FixtureRequest) -> tuple[ModuleType, Path, str]:
    """The same, and the name of one backbone."""
    return (*all_of_them, request.param)


def step(
    both: tuple[ModuleType, Path, str], what: int | str, rows: list[int], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What one process makes of these rows, in a stage, or in one with options."""
    script, root, name = both
    toy, init = script.Toy(str(root / "toy")), root / "init" / name
    found: dict[str, Tensor] = script.first_step(toy, init, what, root / "b", rows, dtype)
    return found


def step_of_two(
    both: tuple[ModuleType, Path, str], what: int | str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What two processes made of the script's rows."""
    found, about = read_tensors(both[1] / "two" / both[2] / f"step{what}-{dtype}.safetensors")
    assert about["world"] == 2
    return found


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of one name."""
    assert one.keys() == two.keys()
    norms = {name: float(one[name].norm()) for name in one}
    floor = 1e-3 * max(norms.values())  # a gradient that is zero but for rounding has no relative distance
    return max(float((one[name] - two[name]).norm()) / max(norms[name], floor) for name in one)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_two_processes_equal_those_of_one(
    both: tuple[ModuleType, Path, str], stage: int, dtype: torch.dtype, bound: float
) -> None:
    """Loss and every gradient, targets that occur on both processes and equal pixels among them.

    In stage 2 each holds half of the bank.
    """
    one, two = step(both, stage, both[0].BATCH, dtype), step_of_two(both, stage, dtype)
    assert one["loss"].dtype == dtype
    assert distance(one, two) < bound
    assert abs(float(one["loss"] - two["loss"])) < bound * float(one["loss"])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("what", ["types", "similar", "similar 2", "drawn", "one drawn", "drawn, similar"])
def test_negatives_of_two_processes_equal_those_of_one(
    all_of_them: tuple[ModuleType, Path], what: str, dtype: torch.dtype, bound: float
) -> None:
    """Types of negatives, those too similar, and candidates that are drawn: loss and every gradient."""
    both = (*all_of_them, "clip4cir")
    one, two = step(both, what, both[0].BATCH, dtype), step_of_two(both, what, dtype)
    assert distance(one, two) < bound
    assert abs(float(one["loss"] - two["loss"])) < bound * float(one["loss"])
    plain = step(both, both[0].OPTIONS[what][0], both[0].BATCH, dtype)  # negative control
    assert abs(float(one["loss"] - plain["loss"])) > 1e-3


MIXED_STEPS = [
    "mixed", "mixed chunks", "mixed similar", "mixed 2", "mixed drawn", "apart", "apart chunks", "apart 2",
]  # fmt: skip


@pytest.mark.parametrize("what", MIXED_STEPS)
def test_mixed_batches_of_two_processes_equal_those_of_one(both: tuple[ModuleType, Path, str], what: str) -> None:
    """Several targets, hard negatives, queries without a part; also where one process has no text, and fewer targets.

    Loss, every gradient, and the share of candidates that are masked.
    """
    script = both[0]
    assert set(MIXED_STEPS) == set(script.MIXED_STEPS)
    one, two = step(both, what, script.rows_of(what), torch.float64), step_of_two(both, what, torch.float64)
    assert distance(one, two) < 1e-10 and abs(float(one["loss"] - two["loss"])) < 1e-10 * float(one["loss"])
    assert one["masked"] == two["masked"] > 0
    single = step_of_two(both, what)
    assert distance(step(both, what, script.rows_of(what)), single) < 1e-4
    halves = [step(both, what, script.rows_of(what)[n:][:4]) for n in (0, 4)]  # negative control
    assert all(distance(half, single) > 1e-2 for half in halves)
    assert abs(float(sum(half["loss"] for half in halves) / 2 - single["loss"])) > 1e-3 or "2" in what


@pytest.mark.parametrize("size", [7, 256])
@pytest.mark.parametrize("benchmark", [0, 1])
def test_two_processes_return_the_result_of_one(both: tuple[ModuleType, Path, str], benchmark: int, size: int) -> None:
    """Metrics, ranks and first items of each query, on both processes; with a block of all, the second encodes none."""
    _, root, name = both

    def found(folder: str, process: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        stem = root / folder / name / f"result-{benchmark}-{size}-{process}"
        rows = [json.loads(line) for line in stem.with_suffix(".jsonl").read_text().splitlines()]
        return json.loads(stem.with_suffix(".json").read_text()), rows

    (one, rows), *others = found("one", 0), found("two", 0), found("two", 1)
    for two, rows_of_two in others:
        assert two == one and len(rows) == one["count"] == len(rows_of_two)
        for row, other in zip(rows, rows_of_two, strict=True):
            assert row.keys() == other.keys() and any(key.startswith("top") for key in row)
            for key, value in row.items():
                assert other[key] == (pytest.approx(value, abs=1e-5) if key.startswith("scores") else value), key
    assert others[0][1] == others[1][1]


def test_chunks_of_two_processes_equal_the_whole_of_one(both: tuple[ModuleType, Path, str]) -> None:
    """Gradient caching, with checkpoints inside, under DistributedDataParallel: as one process that keeps all."""
    one, two = step(both, 1, both[0].BATCH, torch.float64), step_of_two(both, "chunks", torch.float64)
    assert distance(one, two) < 1e-10


@pytest.mark.parametrize("stage", [1, 2])
def test_half_the_batch_gives_other_gradients(both: tuple[ModuleType, Path, str], stage: int) -> None:
    """Negative control: what one process alone would compute is far off."""
    assert distance(step(both, stage, both[0].BATCH[:4]), step_of_two(both, stage)) > 1e-2


def test_candidates_come_from_all_processes(both: tuple[ModuleType, Path, str]) -> None:
    """Negative control: in stage 1 the mean of two halves, each with its own negatives, is another loss; the bank of
    stage 2 makes no difference."""
    for stage, alike in ((1, False), (2, True)):
        halves = [step(both, stage, rows)["loss"] for rows in (both[0].BATCH[:4], both[0].BATCH[4:])]
        assert torch.allclose(sum(halves) / 2, step_of_two(both, stage)["loss"], rtol=1e-5) == alike


@pytest.mark.parametrize("stage", [1, 2])
def test_runs_of_two_processes_equal_those_of_one(both: tuple[ModuleType, Path, str], stage: int) -> None:
    """Weights after four steps of the loop; the starting weights, as a negative control, are far."""
    _, root, name = both
    one, two = (read_tensors(root / n / name / f"stage{stage}" / "model.safetensors")[0] for n in ("one", "two"))
    start = load_model(root / "init" / name)
    if stage == 2:
        start.freeze_image_side()  # with the copies that training began with
    assert distance(one, two) < 1e-5
    assert distance(one, start.state_dict()) > 0.1
