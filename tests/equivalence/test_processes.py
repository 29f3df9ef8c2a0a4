"""Two processes equal one: same loss, same gradients, same weights after training."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import read_tensors, save_model
from spn4cir.datasets import DATASETS

SCRIPT = Path(__file__).parent / "toy_script.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Path]:
    """The script, and a folder with ``one`` and ``two``: what so many processes made of it."""
    root, script = tmp_path_factory.mktemp("processes"), load_script()
    toy = script.Toy.draw(root / "toy")
    save_model(root / "init", build_backbone("clip4cir"), {})
    (root / "one").mkdir()
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
        script.runs(toy, root / "init", root / "one")
    return script, root


def step(script: ModuleType, root: Path, stage: int, rows: list[int]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = script.first_step(script.Toy(str(root / "toy")), root / "init", stage, root / "b", rows)
    return found


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of one name."""
    assert one.keys() == two.keys()
    norms = {name: float(one[name].norm()) for name in one}
    floor = 1e-3 * max(norms.values())  # a gradient that is zero but for rounding has no relative distance
    return max(float((one[name] - two[name]).norm()) / max(norms[name], floor) for name in one)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_two_processes_equal_those_of_one(both: tuple[ModuleType, Path], stage: int) -> None:
    """Loss and every gradient, targets that occur on both processes and equal pixels among them."""
    script, root = both
    two, about = read_tensors(root / "two" / f"step{stage}.safetensors")
    assert about["world"] == 2
    one = step(script, root, stage, script.BATCH)
    assert distance(one, two) < 1e-5
    assert abs(float(one["loss"] - two["loss"])) < 1e-5 * float(one["loss"])


@pytest.mark.parametrize("stage", [1, 2])
def test_half_the_batch_gives_other_gradients(both: tuple[ModuleType, Path], stage: int) -> None:
    """Negative control: what one process alone would compute is far off."""
    script, root = both
    two = read_tensors(root / "two" / f"step{stage}.safetensors")[0]
    assert distance(step(script, root, stage, script.BATCH[:4]), two) > 1e-2


def test_candidates_come_from_all_processes(both: tuple[ModuleType, Path]) -> None:
    """Negative control: in stage 1 the mean of two halves, each with its own negatives, is another loss; the bank of
    stage 2 makes no difference."""
    script, root = both
    for stage, alike in ((1, False), (2, True)):
        two = read_tensors(root / "two" / f"step{stage}.safetensors")[0]["loss"]
        halves = [step(script, root, stage, rows)["loss"] for rows in (script.BATCH[:4], script.BATCH[4:])]
        assert torch.allclose(sum(halves) / 2, two, rtol=1e-5) == alike


@pytest.mark.parametrize("stage", [1, 2])
def test_runs_of_two_processes_equal_those_of_one(both: tuple[ModuleType, Path], stage: int) -> None:
    """Weights after four steps of the loop; the starting weights, as a negative control, are far."""
    _, root = both
    one, two, start = (
        read_tensors(root / name / "model.safetensors")[0]
        for name in (f"one/stage{stage}", f"two/stage{stage}", "init")
    )
    assert distance(one, two) < 1e-5
    assert distance(one, start) > 1e-4
