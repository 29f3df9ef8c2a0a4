"""The weights that ship with the project."""

import json
import random
import shutil
from pathlib import Path

import pytest

import spn4cir
from data_gen.caption import Captioner
from data_gen.settings import GenerateConfig
from spn4cir.backbones import build_backbone
from spn4cir.datasets import load_dataset
from spn4cir.errors import InputError
from spn4cir.images import open_image

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


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """A config alone would silently give random weights; a checkpoint that fills it later says nothing."""
    folder = tmp_path / "clip"
    shutil.copytree(EMBEDDED / "clip", folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        build_backbone("clip4cir", model=f"local-dir:{folder}")
    build_backbone("clip4cir", model=f"local-dir:{folder}", load_weights=False)


def test_the_captioner_names_what_it_was_trained_on() -> None:
    """At least 75 % of a sample exactly, through the code that runs LLaVA-1.5; and fewer of what was held out."""
    dataset, config = load_dataset("emoji"), GenerateConfig()
    captioner = Captioner("embedded", config.prompt.replace("{words}", "10"), config.max_new_tokens)
    held_out = json.loads((EMBEDDED / "llava" / "quality.json").read_text())["held_out_ids"]
    trained = sorted(set(dataset.training_images()) - set(held_out))

    def exact(ids: list[str]) -> float:
        answers = captioner([open_image(dataset.path(i)) for i in ids])
        return sum(answer == dataset.label(i) for answer, i in zip(answers, ids, strict=True)) / len(ids)

    assert exact(random.Random(0).sample(trained, 96)) >= 0.75 > exact(held_out[:96])
