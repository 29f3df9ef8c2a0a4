"""``spn4cir-export``: from the command line."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from tiny_backbones import tiny_backbone

from spn4cir.checkpoints import save_model
from spn4cir.export_cli import export_command
from spn4cir.model_card import GENERATED


def export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["spn4cir-export", *map(str, arguments)])
    export_command()


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command prints."""
    with pytest.raises(SystemExit) as stopped:
        export(monkeypatch, *arguments)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    return told


def check_card(folder: Path, library: str, use: str, *files: str) -> None:
    """A card names its library and its use, and gives the fingerprints of the files beside it."""
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.library_name == library and use in text.split("## Data")[0]
    for file in files:
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        assert f"| SHA-256 of {file} | {digest} |" in text


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A completed run, the newest one."""
    folder = runs / "emoji" / "clip4cir" / "stage1-20260101-000000"
    save_model(folder, tiny_backbone("clip4cir", tmp_path), {"stage": 1})
    (folder / "result.json").write_text(json.dumps({"protocol": "emoji/val", "metrics": {"R@1": 1.0}, "count": 2}))
    return folder


def test_the_newest_run_is_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both exports in one call, each with the card; the run gets its card."""
    export(monkeypatch, "--onnx", tmp_path / "onnx", "--sentence-transformers", tmp_path / "st")
    told = capsys.readouterr().out
    assert f"model {run}" in told and told.count("largest difference from the model") == 2
    assert "others need that folder" in told  # the tiny CLIP is described in a folder
    check_card(run, "spn4cir", "spn4cir.load", "model.safetensors")
    check_card(tmp_path / "onnx", "onnx", "from search_onnx import OnnxModel", "image.onnx", "query.onnx")
    check_card(tmp_path / "st", "sentence-transformers", "SentenceTransformer(", "model.safetensors")
    card = (tmp_path / "onnx" / "README.md").read_text()
    assert "spn4cir.load" not in card and GENERATED not in card
    loaded = SentenceTransformer(str(tmp_path / "st"), device="cpu", trust_remote_code=True)
    assert loaded.encode("a red heart").shape == (24,)


def test_a_card_alone(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an option the card is written; a person's own is left and named."""
    export(monkeypatch)
    assert f"model card {run / 'README.md'}" in capsys.readouterr().out
    (run / "README.md").write_text("mine")
    export(monkeypatch, "--run", run)
    assert "is your own and stays" in capsys.readouterr().out and (run / "README.md").read_text() == "mine"


def test_a_damaged_run_has_no_card(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown backbone, weights cut short, a result that is none."""
    (run / "result.json").write_text("[1]")
    assert str(run / "result.json") in fails(monkeypatch, capsys)
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[:-10])
    assert "model.safetensors is not a complete" in fails(monkeypatch, capsys)
    (run / "model.json").write_text(json.dumps({"backbone": "other", "options": {}}))
    assert "other" in fails(monkeypatch, capsys)
    assert not (run / "README.md").exists()


def test_wrong_calls_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No run, a missing one, a folder without a model, a taken output, --private alone, the hub offline."""
    assert "no run to write a model card of" in fails(monkeypatch, capsys)
    assert "--run nowhere is missing" in fails(monkeypatch, capsys, "--run", "nowhere")
    assert "holds no model" in fails(monkeypatch, capsys, "--run", tmp_path)
    assert "--private is for" in fails(monkeypatch, capsys, "--private")
    assert "--run is empty" in fails(monkeypatch, capsys, "--run", "")
    for name in ("", "../x", "a/b.git"):
        assert "takes OWNER/NAME" in fails(monkeypatch, capsys, "--run", "embedded", "--push-to-hub", name)
    same = ("--onnx", tmp_path / "same", "--sentence-transformers", tmp_path / "x" / ".." / "same")
    assert "a folder of its own" in fails(monkeypatch, capsys, "--run", "embedded", *same)
    assert not (tmp_path / "same").exists()
    (tmp_path / "file").write_text("x")
    taken = fails(monkeypatch, capsys, "--run", "embedded", "--sentence-transformers", tmp_path / "file")
    assert "new or empty folder" in taken
    assert "HF_TOKEN" in fails(monkeypatch, capsys, "--run", "embedded", "--push-to-hub", "a/b")
