"""Stage ``classes`` from the command line, and where its model serves: evaluation, an index, the matcher."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from spn4cir.checkpoints import load_model
from spn4cir.data_gen.matchers import load_matcher
from spn4cir.errors import InputError
from spn4cir.eval_cli import evaluate_command
from spn4cir.index.local import Index
from spn4cir.model import load
from spn4cir.train_cli import train_command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, by the recipe that the stage takes without arguments."""
    root = tmp_path_factory.mktemp("embeddings")
    options = ["--epochs", "2", "--backbone_options.width", "32", "--output", str(root / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPN4CIR_RUNS", str(root / "runs"))
        patch.setattr(sys, "argv", ["spn4cir-train", "--stage", "classes", *options])
        train_command()
    return root / "run"


def test_evaluation(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of concepts never trained on, with and without --ablate."""
    for more in ([], ["--ablate"]):
        monkeypatch.setattr(sys, "argv", ["spn4cir-eval", "--run", str(run), "--split", "test", *more])
        evaluate_command()
        assert "mMP@5" in capsys.readouterr().out


def test_the_newest_run_is_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --run it is that of the stage, and not the embedded weights of another backbone."""
    monkeypatch.setenv("SPN4CIR_RUNS", str(tmp_path))
    newest = tmp_path / "labelled" / "embedding" / "classes-20260101-120000"
    shutil.copytree(run, newest)
    monkeypatch.setattr(sys, "argv", ["spn4cir-eval", "--dataset", "labelled", "--split", "test"])
    evaluate_command()
    assert f"model {newest}" in capsys.readouterr().out


def test_an_index_of_few_numbers(run: Path, tmp_path: Path) -> None:
    """Pictures are found by themselves; a text is refused in one line."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (70, 50), colour).save(folder / f"{n}.png")
    index = Index.build(load(run), folder, tmp_path / "index")
    drawn = tmp_path / "drawn.png"
    Image.new("RGB", (90, 90), (10, 10, 240)).save(drawn)
    assert index.search(str(drawn), k=1)[0].id == "2.png"
    with pytest.raises(InputError, match="reads images alone"):
        index.search(str(drawn), "in red")


def test_the_matcher(run: Path) -> None:
    """A run ranks pairs of images by its own vectors."""
    matcher, model = load_matcher(f"run:{run}"), load_model(run)
    pixels = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        expected = model.encode_target(pixels)[:, 0]
    found = matcher.encode(pixels)
    assert found.shape == (3, 32)
    torch.testing.assert_close(found, expected)
