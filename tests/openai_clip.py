"""CLIP written out in plain torch, from its definition and with OpenAI's names; tiny, for tests to compare with."""

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZE, PATCH, WIDTH, CONTEXT, EMBED, HEADS = 64, 16, 32, 16, 24, 4


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

    def positions(self, pixels: Tensor) -> Tensor:
        """(B, 1 + patches, width), before the last norm."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.transformer(self.ln_pre(x))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.ln_post(self.positions(pixels)[:, 0]) @ self.proj


class OpenAI(nn.Module):
    """CLIP with any visual tower."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.transformer = Transformer(WIDTH, 2, HEADS)
        self.token_embedding = nn.Embedding(49408, WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.empty(WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))

    def text_positions(self, tokens: Tensor) -> Tensor:
        """(B, context, width), after the last norm."""
        future = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        return self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, future))

    def text(self, tokens: Tensor) -> Tensor:
        x = self.text_positions(tokens)
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection  # the end token has the highest id


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Every weight and statistic random, so that none may be swapped or left out unnoticed."""
    dice = torch.Generator().manual_seed(5)
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or name.endswith("logit_scale"):
            continue
        if "running_var" in name:
            value.uniform_(0.5, 1.5, generator=dice)
        elif value.ndim == 1:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.3, generator=dice)
        else:
            spread = 1.0 if "embedding" in name else value[0].numel() ** -0.5
            value.normal_(0, spread, generator=dice)


def write_config(folder: Path, vision: dict[str, Any], quick_gelu: bool = True) -> str:
    """The architecture in open_clip's words; the tokenizer is CLIP's own. Returns its name."""
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": 2}
    config = {"embed_dim": EMBED, "quick_gelu": quick_gelu, "vision_cfg": {"image_size": SIZE, **vision}}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**config, "text_cfg": text}}))
    return f"local-dir:{folder}"


VISION = {"layers": 2, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
"""``VisionTransformer`` in open_clip's words."""
