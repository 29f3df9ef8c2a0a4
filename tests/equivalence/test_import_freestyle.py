"""The published FreestyleRet's state dict → the same embeddings, by its network written a second time."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_backbones import EMBEDDED
from torch import Tensor
from torch.nn import functional as F

from spn4cir.backbones.freestyle import Freestyle
from spn4cir.checkpoints import load_model
from spn4cir.errors import InputError
from spn4cir.importers import import_published

MODEL = f"local-dir:{EMBEDDED / 'clip_transformer'}"


def published() -> tuple[Any, dict[str, Tensor]]:
    """A CLIP whose norms were trained, and a state dict with all names of the published code."""
    torch.manual_seed(0)
    clip = open_clip.create_model(MODEL, load_weights=False).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    state = {f"openclip.{name}": value for name, value in clip.state_dict().items()}
    state |= {f"visual.{name}": value for name, value in clip.visual.state_dict().items()}
    state |= {f"transformer.{name}": value for name, value in clip.visual.transformer.state_dict().items()}
    state |= {"style_prompt": torch.randn(4, 128), "gram_prompt": torch.randn(4, 128)}
    channels = {0: (3, 3, 1), 2: (64, 3, 3), 5: (64, 64, 3), 9: (128, 64, 3), 12: (128, 128, 3)}
    for number, (out, into, side) in channels.items():
        state[f"gram_encoder.{number}.weight"] = 0.1 * torch.randn(out, into, side, side)
        state[f"gram_encoder.{number}.bias"] = torch.rand(out)
    for name, shape in {"gram_patch": (256, 128, 16, 16), "gram_pool": (4, 256), "gram_linear.0": (512, 256),
                        "style_patch": (256, 256, 16, 16), "style_linear.0": (512, 256)}.items():  # fmt: skip
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return clip, state


@torch.no_grad()
def embed(clip: Any, state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """What the published network gives for pictures of any style, photographs too; cosines are all that count."""
    visual = clip.visual
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = visual.ln_pre(x)
    x = torch.cat([x[:, :1], state["style_prompt"].expand(len(x), -1, -1), x[:, 1:]], 1)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    x = last(torch.cat([x[:, :1], state["gram_prompt"].expand(len(x), -1, -1), x[:, 1:]], 1))
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


def imported(tmp_path: Path, state: dict[str, Tensor]) -> Freestyle:
    torch.save(state, tmp_path / "published.pth")
    import_published(tmp_path / "published.pth", tmp_path / "model", "freestyle", {"model": MODEL})
    model = load_model(tmp_path / "model")
    assert isinstance(model, Freestyle)
    return model


def test_the_same_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of queries, photographs and texts; every name that is not used is accounted for, with the reason."""
    clip, state = published()
    model = imported(tmp_path, state)
    pixels = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        features, tokens = model.encode_image(pixels), model.tokenize(["a red heart", "two dots"])
        text = F.normalize(clip.encode_text(tokens["text"]), dim=-1)
        plain = F.normalize(clip.visual(pixels), dim=-1)  # negative control: without prompts
        torch.testing.assert_close(model.compose_text(tokens).query, text, atol=1e-5, rtol=0)
    expected = embed(clip, state, pixels)
    torch.testing.assert_close(features.target[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.compose_image(features), expected, atol=1e-5, rtol=0)
    assert float((features.target[:, 0] - plain).abs().max()) > 0.01
    told = capsys.readouterr().out
    for what in ("never trained and never called: style_patch", "never reaches the network: gram_patch",
                 "a layer of VGG behind relu2_1: gram_encoder.12", "the image tower a second time"):  # fmt: skip
        assert what in told


def test_filters_are_those_of_the_file(tmp_path: Path) -> None:
    """VGG's first layers, for plain RGB."""
    _, state = published()
    model, pixels = imported(tmp_path, state), torch.rand(1, 3, 32, 32)
    x = F.conv2d(pixels, state["gram_encoder.0.weight"], state["gram_encoder.0.bias"])
    for number in (2, 5, 9):
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = F.conv2d(x, state[f"gram_encoder.{number}.weight"], state[f"gram_encoder.{number}.bias"]).relu()
        x = F.max_pool2d(x, 2) if number == 5 else x
    gram = torch.einsum("bchw,bdhw->bcd", x, x) / 256
    expected = (gram[:, torch.triu_indices(128, 128)[0], torch.triu_indices(128, 128)[1]] + 1e-6).log()
    torch.testing.assert_close(model.filters(pixels), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("change", "told"), [
    ({"style_prompt": None}, "style_prompt and gram_prompt, FreestyleRet's prompts, are not in it"),
    ({"gram_prompt": torch.zeros(3, 128)}, "different shapes"),
    ({"something": torch.zeros(1)}, "'something' is unknown here"),
    ({"visual.proj": torch.zeros(128, 128)}, r"visual\.proj differs from openclip's own"),
    ({"gram_encoder.9.weight": None}, "neither torchvision's vgg19 nor a normalised VGG"),
])  # fmt: skip
def test_files_of_another_kind(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    _, state = published()
    state = {name: value for name, value in {**state, **change}.items() if value is not None}
    with pytest.raises(InputError, match=told):
        imported(tmp_path, state)
