"""Imported weights against CLIP written out in plain torch, from its definition and with OpenAI's names."""

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from openai_clip import EMBED, HEADS, SIZE, VISION, WIDTH, OpenAI, VisionTransformer, attend, randomise, write_config
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbone import Backbone
from spn4cir.checkpoints import load_model
from spn4cir.cli import import_command

LAYERS = [2, 1, 1, 1]
TEXTS = ["is red", "has longer sleeves and a flower on the left", "blue"]


class Bottleneck(nn.Module):
    def __init__(self, inside: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.stride = stride
        self.downsample = None
        if stride > 1 or inside != 4 * planes:
            layers = [nn.AvgPool2d(stride), nn.Conv2d(inside, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)]
            self.downsample = nn.Sequential(OrderedDict(zip(("-1", "0", "1"), layers, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        y = self.bn3(self.conv3(F.avg_pool2d(y, self.stride)))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class AttentionPool(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty((SIZE // 32) ** 2 + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, places, width)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        return self.c_proj(attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads))[:, 0]


class ModifiedResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, half = WIDTH // 4, WIDTH // 8
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inside = width
        for number, blocks in enumerate(LAYERS):
            planes, layer = width * 2**number, []
            for block in range(blocks):
                layer.append(Bottleneck(inside, planes, 2 if number and not block else 1))
                inside = 4 * planes
            setattr(self, f"layer{number + 1}", nn.Sequential(*layer))
        self.attnpool = AttentionPool(32 * width, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        x = F.avg_pool2d(x, 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class CLIP4CIR(OpenAI):
    """CLIP, and CLIP4CIR's two vectors from it."""

    def query_and_target(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        image = self.visual(pixels)
        query = image + self.text(tokens)
        return query / query.norm(dim=-1, keepdim=True), image / image.norm(dim=-1, keepdim=True)


def random_model(kind: str) -> CLIP4CIR:
    model = CLIP4CIR(ModifiedResNet() if kind == "resnet" else VisionTransformer()).eval()
    randomise(model)
    return model


def config_folder(folder: Path, kind: str, quick_gelu: bool = True) -> str:
    """The architecture in open_clip's words."""
    resnet = {"layers": LAYERS, "width": WIDTH // 4, "head_width": 8 * WIDTH // HEADS, "patch_size": None}
    return write_config(folder, resnet if kind == "resnet" else VISION, quick_gelu)


def contained(state: dict[str, Tensor], container: str) -> dict[str, object]:
    if container == "CLIP":
        return {"epoch": 3, "CLIP": state}
    return {"epoch": 3, "state_dict": {f"clip.{name}": value for name, value in state.items()}}


def imported(tmp_path: Path, content: object, model: str) -> Backbone:
    """Through the command and back from disk."""
    torch.save(content, tmp_path / "published.pt")
    output = tmp_path / "imported"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--backbone", "clip4cir", str(tmp_path / "published.pt"), "--output", str(output)]
        patch.setattr(sys, "argv", ["spn4cir-import", *arguments, "--model", model])
        import_command()
    return load_model(output)


@torch.no_grad()
def apart(backbone: Backbone, model: CLIP4CIR) -> tuple[float, float]:
    """Greatest difference between the two, of queries and of targets."""
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    tokens = backbone.tokenize(TEXTS)
    query, target = model.query_and_target(pixels, tokens["text"])
    found_query, found_target = backbone.encode_query(pixels, tokens), backbone.encode_target(pixels)[:, 0]
    return float((found_query - query).abs().max()), float((found_target - target).abs().max())


@pytest.mark.parametrize("container", ["CLIP", "state_dict"])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_imported_weights_give_the_published_vectors(tmp_path: Path, kind: str, container: str) -> None:
    """normalise(f_img + f_txt) and normalise(f_img), from either container."""
    model = random_model(kind)
    backbone = imported(tmp_path, contained(model.state_dict(), container), config_folder(tmp_path / "model", kind))
    assert max(apart(backbone, model)) <= 1e-5
    state = model.state_dict()
    assert backbone.state_dict().keys() == {f"clip.{name}" for name in state}
    assert all(torch.equal(value, state[name.removeprefix("clip.")]) for name, value in backbone.state_dict().items())


def test_half_precision_is_widened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights in half precision become float32 of the same values, and that is said."""
    model = random_model("vit").half()
    backbone = imported(tmp_path, {"CLIP": model.state_dict()}, config_folder(tmp_path / "model", "vit"))
    assert f"{len(model.state_dict())}  float16 → float32" in capsys.readouterr().out
    assert {value.dtype for value in backbone.state_dict().values()} == {torch.float32}
    assert max(apart(backbone, model.float())) <= 1e-5


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_another_activation_differs(tmp_path: Path, kind: str) -> None:
    """Negative control: the same weights under GELU fit in every name and shape, and give other vectors."""
    model = random_model(kind)
    folder = config_folder(tmp_path / "model", kind, quick_gelu=False)
    assert apart(imported(tmp_path, {"CLIP": model.state_dict()}, folder), model)[0] > 1e-3


@pytest.mark.parametrize("name", [
    "visual.bn2.running_mean", "visual.layer1.0.downsample.1.running_var", "visual.attnpool.q_proj.bias",
    "visual.layer2.0.bn3.weight", "transformer.resblocks.1.attn.in_proj_weight", "ln_final.bias",
])  # fmt: skip
def test_one_changed_tensor_differs(tmp_path: Path, name: str) -> None:
    """Negative control: whichever tensor another one stands in for, the vectors show it."""
    model = random_model("resnet")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[name] = state[name].flip(0)
    backbone = imported(tmp_path, {"CLIP": state}, config_folder(tmp_path / "model", "resnet"))
    assert max(apart(backbone, model)) > 1e-3
