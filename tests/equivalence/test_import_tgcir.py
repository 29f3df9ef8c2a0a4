"""Weights in TG-CIR's published layout, through the importer, against the model written out with that layout."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_clip import SIZE, VISION, write_config
from tgcir_written_out import WrittenOut, in_our_names
from torch import Tensor

from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import load_model
from spn4cir.cli import import_command
from spn4cir.errors import InputError
from spn4cir.importers import import_published
from spn4cir.importers.tgcir_weights import convert_tgcir_weights

TEXTS = ["is red", "has longer sleeves and a flower on the left", "", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny CLIP in open_clip's words."""
    return write_config(tmp_path_factory.mktemp("tiny") / "model", VISION)


def apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def imported(tmp_path: Path, content: object, model: str) -> Backbone:
    """Through the command and back from disk."""
    torch.save(content, tmp_path / "published.pt")
    output = tmp_path / "imported"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--backbone", "tgcir", str(tmp_path / "published.pt"), "--output", str(output)]
        patch.setattr(sys, "argv", ["spn4cir-import", *arguments, "--model", model])
        import_command()
    return load_model(output)


@torch.no_grad()
def distances(backbone: Backbone, model: WrittenOut) -> tuple[float, float]:
    """Greatest difference between the two, of queries and of targets."""
    pixels, tokens = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)), backbone.tokenize(TEXTS)
    reference = model.image(pixels)
    query, _ = model.query(reference, model.text(tokens["text"]))
    found_query, found_target = backbone.encode_query(pixels, tokens), backbone.encode_target(pixels)[:, 0]
    return apart(found_query, query), apart(found_target, model.target(reference))


def contained(model: WrittenOut) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": {name: value.clone() for name, value in model.state_dict().items()}}


@pytest.mark.parametrize("twins", [False, True], ids=["stage 1", "stage 2"])
def test_imported_weights_give_the_published_vectors(
    tmp_path: Path, folder: str, twins: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """From either container, with numbers of OpenAI's archive beside the weights; each name is accounted for."""
    model = WrittenOut(twins)
    content = contained(model)
    content["state_dict"]["backbone.clip.context_length"] = torch.tensor(16)
    backbone = imported(tmp_path, content, folder)
    assert backbone.options["separated"] is twins and max(distances(backbone, model)) <= 1e-5
    wanted = in_our_names(model.state_dict())
    assert backbone.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in backbone.state_dict().items())
    told = " ".join(capsys.readouterr().out.split())
    assert f"matched {len(wanted)} missing 0 unexpected 0 of another shape 0 ignored" in told
    assert "a number beside the weights of OpenAI's archives: backbone.clip." in told


def test_the_scale_is_told_as_a_temperature(folder: str) -> None:
    """A learned scale is left out, with its number and what it means."""
    content = contained(WrittenOut())
    for scale in (torch.tensor([12.5]), torch.tensor(12.5)):
        content["state_dict"]["loss_T"] = scale
        published = convert_tgcir_weights(content, {"model": folder})
        assert published.temperature == pytest.approx(0.08)
        reason = published.ignored["loss_T"]
        assert "scale 12.5" in reason and "temperature 0.08" in reason


@pytest.mark.parametrize("name", [
    "backbone.masks.weight", "backbone.tokenlearn.tokenizers.3.conv.0.weight", "backbone.fc.bias",
    "backbone.tokenlearn.tokenizers.7.conv.0.bias", "backbone.text_fc.weight", "s_remain_map.2.weight",
    "backbone.tokenlearn_text.tokenizers.0.conv.0.weight", "backbone.masks_text.weight", "backbone.clip.ln_final.bias",
])  # fmt: skip
def test_one_changed_tensor_differs(folder: str, name: str) -> None:
    """Negative control: whichever tensor is another one, the vectors show it."""
    model = WrittenOut(twins=True)
    content = contained(model)
    content["state_dict"][name] += torch.linspace(0.5, 1.5, content["state_dict"][name].numel()).view(
        content["state_dict"][name].shape
    )
    published = convert_tgcir_weights(content, {"model": folder})
    backbone = build_backbone("tgcir", **published.options, load_weights=False)
    backbone.load_state_dict(published.state)
    assert max(distances(backbone, model)) > 1e-4


def broken(content: dict[str, Any], how: str) -> None:
    state = content["state_dict"]
    conv = "backbone.tokenlearn_text.tokenizers.2.conv.0.weight"
    if how == "another alias":
        state["backbone.image_backbone.ln_post.bias"] += 1
    elif how == "alias of nothing":
        state["backbone.image_backbone.more"] = torch.zeros(1)
    elif how == "unknown name":
        state["backbone.extra.weight"] = torch.zeros(1)
    elif how == "our name":
        state["gate.0.weight"] = state.pop("s_remain_map.0.weight")
    elif how == "ninth convolution":
        state["backbone.tokenlearn.tokenizers.8.conv.0.bias"] = torch.zeros(1)
    elif how == "no masks":
        del state["backbone.masks_text.weight"]
    elif how == "no learner":
        for name in [name for name in state if "tokenlearn_text" in name]:
            del state[name]
    elif how == "no convolution":
        del state[conv]
    elif how == "wide convolution":
        state[conv] = torch.zeros(1, 24, 3)
    elif how == "narrow convolution":
        state[conv] = torch.zeros(1, 12, 1)
    elif how == "number":
        state[conv] = 3.0
    elif how == "scalar":
        state[conv] = torch.tensor(3.0)
    elif how == "another entry":
        content["CLIP"] = content.pop("state_dict")
    elif how == "scale of zero":
        state["loss_T"] = torch.zeros(1)


@pytest.mark.parametrize(("how", "word"), [
    ("another alias", "image_backbone.ln_post.bias should be the same tensor as backbone.clip.visual.ln_post.bias"),
    ("alias of nothing", "backbone.image_backbone.more should be"),
    ("unknown name", "'backbone.extra.weight' is no name of TG-CIR's"),
    ("our name", "'gate.0.weight' is no name of TG-CIR's"),
    ("ninth convolution", "tokenizers.8.conv.0.bias' is no name"),
    ("no masks", "1 missing, such as text_masks"),
    ("no learner", "backbone.tokenlearn_text.tokenizers.0.conv.0.weight is missing"),
    ("no convolution", "backbone.tokenlearn_text.tokenizers.2.conv.0.weight is missing"),
    ("wide convolution", "has shape (1, 24, 3)"),
    ("narrow convolution", "has shape (1, 12, 1)"),
    ("number", "is float, not a tensor"),
    ("scalar", "has shape ()"),
    ("another entry", "state_dict is not an entry of it"),
    ("scale of zero", "loss_T"),
])  # fmt: skip
def test_what_is_not_as_published_is_refused(tmp_path: Path, folder: str, how: str, word: str) -> None:
    """In one line that names it, with nothing written."""
    content = contained(WrittenOut(twins=True))
    broken(content, how)
    torch.save(content, tmp_path / "published.pt")
    with pytest.raises(InputError) as raised:
        import_published(tmp_path / "published.pt", tmp_path / "output", "tgcir", {"model": folder})
    assert word in str(raised.value) and "published.pt" in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "output").exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    """TG-CIR's original release: one line says why, and what to do."""
    torch.save(WrittenOut(), tmp_path / "best_model.pt")
    with pytest.raises(InputError) as raised:
        import_published(tmp_path / "best_model.pt", tmp_path / "output", "tgcir", {})
    told = str(raised.value)
    assert "more than tensors" in told and "WrittenOut" in told and "run its code" in told and "\n" not in told
    assert "save its state_dict() with torch.save, as {'state_dict': …}" in told and not (tmp_path / "output").exists()
