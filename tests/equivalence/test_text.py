"""clip4cir's trimmed text encoding against open_clip's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spn4cir.backbones.clip4cir import CLIP4CIR
from spn4cir.backbones.shared_clip import EMBEDDED

TEXTS = ["red", "make it a big blue flag", "the same person, but taking a bath in yellow"]
LONG = [*TEXTS, "and " * 60]  # cut at the context: nothing is trimmed


def encodings(model: CLIP4CIR, texts: list[str]) -> list[dict[str, Tensor]]:
    """Values and all gradients, trimmed and whole."""
    text, found = model.tokenize(texts)["text"], []
    weight = torch.randn(len(texts), 128, generator=torch.Generator().manual_seed(0))
    for encode in (model._encode_text, model.clip.encode_text):
        model.zero_grad()
        value = encode(text)
        (value * weight).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"value": value.detach(), **gradients})
    return found


def close(found: list[dict[str, Tensor]]) -> bool:
    trimmed, whole = found
    assert trimmed.keys() == whole.keys()
    return all((trimmed[name] - whole[name]).norm() <= 1e-5 * (whole[name].norm() + 1e-2) for name in whole)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS, LONG], ids=["one", "ragged", "full"])
def test_trimmed_text_equals_open_clip(backbone: CLIP4CIR, texts: list[str]) -> None:
    """Values and gradients of every text parameter."""
    found = encodings(backbone, texts)
    assert close(found) and len(found[0]) > 40


def test_where_the_text_is_read_matters(backbone: CLIP4CIR) -> None:
    """Negative control: reading one column earlier gives other values."""
    whole = backbone.clip.encode_text(backbone.tokenize(TEXTS)["text"])
    text = backbone.tokenize(TEXTS)["text"]
    backbone._end, backbone.clip.text_eos_id = int(text[0, 1]), int(text[0, 1])  # the word of the first text
    assert not torch.allclose(backbone._encode_text(text), whole, atol=1e-3)


def test_padding_is_really_cut(backbone: CLIP4CIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer sees only the columns that some row uses."""
    widths: list[int] = []
    backbone.clip.transformer.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    backbone._encode_text(backbone.tokenize(TEXTS)["text"])
    backbone._encode_text(backbone.tokenize(TEXTS[:1])["text"])
    assert widths[1] < widths[0] < 24


def variant(folder: Path, pool: str, pad: str) -> CLIP4CIR:
    """The embedded model's architecture with another way to pool, or a tokenizer that pads with its end token."""
    shutil.copytree(EMBEDDED / "clip", folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["pool_type"] = pool
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["pad_token"] = settings.get(pad, settings["pad_token"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIP4CIR(model=f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("pool", "pad"), [("eos", "pad_token"), ("argmax", "pad_token"), ("last", "pad_token"), ("eos", "eos_token")]
)
def test_other_models_of_open_clip(tmp_path: Path, pool: str, pad: str) -> None:
    """However a model pools its text and pads it, the composed text is what open_clip gives."""
    assert close(encodings(variant(tmp_path / "model", pool, pad), TEXTS))
