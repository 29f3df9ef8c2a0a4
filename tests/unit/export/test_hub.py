"""Uploads, with the hub's client replaced at its boundary: what is sent is what ``spn4cir.load`` reads."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import save_file
from tiny_backbones import tiny_backbone

import spn4cir
from spn4cir.checkpoints import save_model
from spn4cir.config import TrainConfig, write_yaml
from spn4cir.errors import InputError
from spn4cir.export.hub import push_to_hub
from spn4cir.export.onnx import checked_pictures
from spn4cir.model_card import write_card


class FakeHub:
    """As much of the hub as an upload and a download ask for."""

    root: Path
    made: list[dict[str, Any]]

    def create_repo(self, name: str, **options: Any) -> str:
        self.made.append({"name": name, **options})
        return f"hub/{name}"

    def create_commit(self, name: str, operations: list[Any], commit_message: str) -> None:
        for one in operations:
            place = self.root / one.path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            source = one.path_or_fileobj
            place.write_bytes(source if isinstance(source, bytes) else Path(source).read_bytes())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.root, FakeHub.made = tmp_path / "hub", []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(FakeHub.root))
    return FakeHub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a tokenizer, and with files that stay at home."""
    folder = tmp_path / "run"
    save_model(folder, tiny_backbone("blip4cir", tmp_path), {"stage": 1})
    write_yaml(TrainConfig(data_root="/secret/data", init="/secret/x"), folder / "config.yaml", "stage 1")
    for name in ("last.safetensors", "metrics.jsonl", "made_from.json", "run.lock"):
        (folder / name).write_text("{}")
    write_card(folder)
    return folder


def test_what_is_pushed_can_be_loaded(run: Path, hub: type[FakeHub]) -> None:
    """The model, its tokenizer, settings and card; no state of training, and no folder of this machine."""
    assert push_to_hub(run, "someone/a-model", private=True) == "hub/someone/a-model"
    assert hub.made == [{"name": "someone/a-model", "private": True, "exist_ok": True}]
    sent = {path.relative_to(hub.root).as_posix() for path in hub.root.rglob("*") if path.is_file()}
    tokenizer = {f"tokenizer/{path.name}" for path in (run / "tokenizer").iterdir()}
    assert sent == {"README.md", "model.json", "model.safetensors", "config.yaml", *tokenizer} and tokenizer
    text = (hub.root / "config.yaml").read_text()
    assert "secret" not in text and text.startswith("# stage 1\n") and yaml.safe_load(text)["dataset"] == "emoji"
    pictures = checked_pictures()[:2]
    own, loaded = spn4cir.load(run, device="cpu"), spn4cir.load("someone/a-model", device="cpu")
    for model in (own, loaded):
        assert model.backbone.name == "blip4cir"
    assert torch.equal(own.embed_queries(pictures, ["a", "b"]), loaded.embed_queries(pictures, ["a", "b"]))


def test_no_path_is_pushed(run: Path, hub: type[FakeHub]) -> None:
    """Files that the weights came from are not needed any more: of their paths the last names go."""
    settings = TrainConfig(init="secret/run", generated="../alice/secret/t.json")
    write_yaml(settings, run / "config.yaml")
    backbone = spn4cir.load(run, device="cpu").backbone
    backbone.options["tokenizer"] = "/home/alice/secret/bert"
    save_model(run, backbone, {"stage": 1})
    assert b"secret" in (run / "model.safetensors").read_bytes()
    write_card(run)
    push_to_hub(run, "a/b")
    for path in hub.root.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path
    digest = hashlib.sha256((hub.root / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (hub.root / "README.md").read_text()
    assert spn4cir.load("a/b", device="cpu").backbone.options["tokenizer"] == "bert"


def test_a_damaged_model_is_not_pushed(run: Path, hub: type[FakeHub]) -> None:
    """Weights that are cut short, or are those of another model."""
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        push_to_hub(run, "a/b")
    save_file({"x": torch.zeros(1)}, run / "model.safetensors")
    with pytest.raises(InputError, match="does not fit this model"):
        push_to_hub(run, "a/b")
    assert not hub.made


@pytest.mark.parametrize("error", [LocalTokenNotFoundError("no token"), OSError("no network"), ConnectionError("x\ny")])
def test_a_hub_out_of_reach_is_one_line(
    run: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """No token, no network: what to do."""

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "create_repo", fail)
    with pytest.raises(InputError, match=r"--push-to-hub a/b: the hub did not take it .*HF_TOKEN") as told:
        push_to_hub(run, "a/b")
    assert "\n" not in str(told.value)


def test_the_client_itself_is_offline(run: Path) -> None:
    """The real client, which HF_HUB_OFFLINE keeps from the network."""
    with pytest.raises(InputError, match="the hub did not take it"):
        push_to_hub(run, "a/b")


def test_the_client_itself_finds_no_network(run: Path) -> None:
    """A port at which nothing listens: the client's own error of transport, in a process that is not offline."""
    code = f"import pathlib, spn4cir.export.hub as hub; hub.push_to_hub(pathlib.Path({str(run)!r}), 'a/b')"
    given = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and "proxy" not in k.lower()}
    given |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x"}
    told = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert "InputError: --push-to-hub a/b: the hub did not take it" in told.stderr.splitlines()[-1]


def test_what_is_not_pushed(run: Path, hub: type[FakeHub], tmp_path: Path) -> None:
    """No hub id, no model, an architecture in a folder of this machine."""
    for name in ("name", "a/b/c", "", "a b/c", "../x", "a/b.git", f"a/{'b' * 120}", "é/b", "a/b--c"):
        with pytest.raises(InputError, match="OWNER/NAME"):
            push_to_hub(run, name)
    with pytest.raises(InputError, match="holds no model"):
        push_to_hub(tmp_path, "a/b")
    note = json.loads((run / "model.json").read_text())
    note["options"]["model"] = f"local-dir:{tmp_path}"
    (run / "model.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match="others lack"):
        push_to_hub(run, "a/b")
    assert not hub.made
