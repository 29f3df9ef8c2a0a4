"""Imported weights against CLIP written out here in plain torch, from its definition and with OpenAI's names."""

import json
import math
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbone import Backbone
from spn4cir.checkpoints import load_model
from spn4cir.cli import import_command

SIZE, PATCH, WIDTH, CONTEXT, EMBED, HEADS = 64, 16, 32, 16, 24, 4
LAYERS = [2, 1, 1, 1]
TEXTS = ["is red", "has longer sleeves and a flower on the left", "blue"]


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(B, T, D), (B, S, D) twice → (B, T, D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x @ self.in_proj_weight.T + self.in_proj_bias).chunk(3, -1)
        return self.out_proj(attend(q, k, v, self.heads, mask))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Transformer(WIDTH, 2, HEADS)
        self.proj = nn.Parameter(torch.empty(WIDTH, EMBED))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


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


class OpenAI(nn.Module):
    """CLIP, and CLIP4CIR's two vectors from it."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.transformer = Transformer(WIDTH, 2, HEADS)
        self.token_embedding = nn.Embedding(49408, WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.empty(WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))

    def text(self, tokens: Tensor) -> Tensor:
        future = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, future))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection  # the end token has the highest id

    def query_and_target(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        image = self.visual(pixels)
        query = image + self.text(tokens)
        return query / query.norm(dim=-1, keepdim=True), image / image.norm(dim=-1, keepdim=True)


def random_model(kind: str) -> OpenAI:
    """Every weight and statistic random, so that none may be swapped or left out unnoticed."""
    model = OpenAI(ModifiedResNet() if kind == "resnet" else VisionTransformer()).eval()
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point() or name == "logit_scale":
                continue
            if "running_var" in name:
                value.uniform_(0.5, 1.5, generator=dice)
            elif value.ndim == 1:
                value.normal_(1.0 if name.endswith("weight") else 0.0, 0.3, generator=dice)
            else:
                spread = 1.0 if "embedding" in name else value[0].numel() ** -0.5
                value.normal_(0, spread, generator=dice)
    return model


def config_folder(folder: Path, kind: str, quick_gelu: bool = True) -> str:
    """The architecture in open_clip's words; the tokenizer is CLIP's own."""
    head = 8 * WIDTH // HEADS if kind == "resnet" else WIDTH // HEADS
    vision = {"image_size": SIZE, "head_width": head}
    vision |= {"layers": LAYERS, "width": WIDTH // 4} if kind == "resnet" else {"layers": 2, "width": WIDTH}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": 2}
    vision["patch_size"] = None if kind == "resnet" else PATCH
    config = {"embed_dim": EMBED, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return f"local-dir:{folder}"


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
def apart(backbone: Backbone, model: OpenAI) -> tuple[float, float]:
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
