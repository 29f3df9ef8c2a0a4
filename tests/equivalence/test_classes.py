"""Stage ``classes``: two processes, with half of the classes each, equal one; resuming; nothing is encoded twice."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.backbones.embedding import Embedding
from spn4cir.checkpoints import load_model, read_tensors
from spn4cir.train import train

SCRIPT = Path(__file__).parent / "classes_script.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classes_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def launch(root: Path, *arguments: str) -> None:
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "1", "SPN4CIR_RUNS": str(root / "runs"), "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, *TORCHRUN, str(SCRIPT), *arguments]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``one`` and ``two``: what so many processes trained."""
    root = tmp_path_factory.mktemp("classes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPN4CIR_RUNS", str(root / "runs"))
        script.run_all(root / "one")
    launch(root, str(root / "two"))
    return root


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("margin", script.MARGINS)
def test_two_processes_equal_one(runs: Path, margin: str) -> None:
    """Losses, the margin's state, all centres, the neck, and the optimiser's states, after six steps."""
    one, two = (runs / kind / margin for kind in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(one)[-1] < losses(one)[0]
    (first, _), (second, _) = (read_tensors(run / "last.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    assert any(name.endswith("candidates.centres") for name in first)
    for name, value in first.items():
        assert second[name].shape == value.shape, name
        if value.is_floating_point() and "tower" not in name:
            distance = float((second[name] - value).norm() / value.norm().clamp(min=1e-6))
            assert distance < 1e-3, f"{name}: {distance}"


def test_a_run_of_two_processes_goes_on_in_one(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the classes are put together in the saved state, and taken apart again."""
    monkeypatch.setenv("SPN4CIR_RUNS", str(runs / "runs"))
    whole = train(script.settings(tmp_path / "whole", "curricularface", 8), "classes")
    config = script.settings(tmp_path / "two", "curricularface", 8)
    source = runs / "two" / "curricularface"
    target = Path(str(config.output))
    target.mkdir(parents=True)
    for name in ("config.yaml", "last.safetensors", "model.json", "model.safetensors", "metrics.jsonl"):
        text = (source / name).read_bytes()
        if name == "config.yaml":
            text = text.replace(b"max_steps: 6", b"max_steps: 8").replace(str(source).encode(), str(target).encode())
        (target / name).write_bytes(text)
    train(replace(config, resume=str(target)), "classes")
    assert losses(target) == pytest.approx(losses(whole), rel=1e-4)
    assert len(losses(target)) == 8


def test_no_image_is_read_after_the_features(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another margin and another width train from the same store: the tower sees one picture, the check's."""
    monkeypatch.setenv("SPN4CIR_RUNS", str(runs / "runs"))
    seen: list[int] = []
    encode = Embedding._encode

    def counted(self: Embedding, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Embedding, "_encode", counted)
    config = replace(script.settings(tmp_path, "adaface"), backbone_options={"width": 8, "dropout": 0.1}, dropout=True)
    before = sorted((runs / "runs" / "banks").iterdir())
    train(config, "classes")
    assert max(seen) == 1 and len(seen) < 12
    assert sorted((runs / "runs" / "banks").iterdir()) == before


def test_the_first_loss_by_hand(runs: Path) -> None:
    """The trained model's embeddings are the neck's, of unit norm, from the tower's own features."""
    model = load_model(runs / "one" / "arcface")
    assert isinstance(model, Embedding) and model.neck is not None
    pixels = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        features = model.tower(pixels)
        expected = F.normalize(features @ model.neck.weight.T + model.neck.bias, dim=-1)
        found = model.encode_image(pixels)
    torch.testing.assert_close(found.target[:, 0], expected)
    torch.testing.assert_close(found.reference[:, 0], features)
    torch.testing.assert_close(model.compose_image(found), expected)
