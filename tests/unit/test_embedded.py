"""The weights that ship with the project."""

import json
from pathlib import Path

import pytest

import spn4cir

EMBEDDED = Path(spn4cir.__file__).parent / "embedded"
WEIGHTS = sorted(EMBEDDED.rglob("*.safetensors"))


def test_there_are_weights() -> None:
    """The embedded dual encoder is there, so the tests below look at something."""
    assert EMBEDDED / "clip" / "open_clip_model.safetensors" in WEIGHTS


def test_nothing_pickled_ships() -> None:
    """Weights are safetensors."""
    assert not [p for kind in ("*.pt", "*.pth", "*.bin", "*.ckpt", "*.pkl", "*.npy") for p in EMBEDDED.rglob(kind)]


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.parent.name)
def test_weights_are_small(path: Path) -> None:
    """At most 8 MB a file."""
    assert path.stat().st_size <= 8_000_000


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.parent.name)
def test_quality_says_how_weights_were_made(path: Path) -> None:
    """Beside weights stands quality.json with the command that made them, which names a module that is there."""
    quality = json.loads((path.parent / "quality.json").read_text(encoding="utf-8"))
    python, flag, module, *_ = quality["command"].split()
    assert (python, flag) == ("python", "-m")
    assert (EMBEDDED.parents[1] / Path(*module.split("."))).with_suffix(".py").is_file()
