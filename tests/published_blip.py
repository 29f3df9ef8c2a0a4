"""BLIP4CIR from its definition, in float64 and under the published names; and its published files, tiny and random.

Each text is taken alone and without padding, each head and each patch by itself.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

WIDTH, WIDE, INNER, EMBED, LAYERS, POSITIONS, HEAD = 128, 192, 96, 24, 2, 20, 64
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "red", "blue", "has", "longer", "sleeves", "and", "a"]
TEXTS = ["is red", "has longer sleeves and is a red sleeves blue", "", "blue"]
IDS = [[14, 5, 6, 3], [14, 8, 9, 10, 11, 5, 12, 6, 10, 7, 3], [14, 3], [14, 7, 3]]  # [DEC] is 13, [ENC] 14
CONTAINERS = ("BLIP_Retrieval", "state_dict")
State = dict[str, Tensor]


# --- the definition ---------------------------------------------------------------------------------------------------


def normed(state: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def streaming_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(T, D), (S, D), (S, D) → (T, D), one head of 64 after another."""
    heads = []
    for start in range(0, q.shape[1], HEAD):
        own = slice(start, start + HEAD)
        weights = (q[:, own] @ k[:, own].T / math.sqrt(HEAD)).exp()  # (T, S)
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, own])
    return torch.cat(heads, 1)


def see(state: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """(3, H, W) → tokens (L, D): a vision transformer that normalises before each part."""
    at = "visual_encoder."
    kernel = state[f"{at}patch_embed.proj.weight"]  # (D, 3, P, P)
    side = kernel.shape[-1]
    tokens = [state[f"{at}cls_token"][0, 0]]
    for top in range(0, image.shape[1], side):
        for left in range(0, image.shape[2], side):
            patch = image[:, top : top + side, left : left + side]
            tokens.append((kernel * patch).sum((1, 2, 3)) + state[f"{at}patch_embed.proj.bias"])
    x = torch.stack(tokens) + state[f"{at}pos_embed"][0]
    for n in range(LAYERS):
        block = f"{at}blocks.{n}."
        q, k, v = linear(state, f"{block}attn.qkv", normed(state, f"{block}norm1", x, 1e-6)).split(x.shape[1], 1)
        x = x + linear(state, f"{block}attn.proj", streaming_softmax(q, k, v))
        inner = gelu(linear(state, f"{block}mlp.fc1", normed(state, f"{block}norm2", x, 1e-6)))
        x = x + linear(state, f"{block}mlp.fc2", inner)
    return normed(state, f"{at}norm", x, 1e-6)


def read(state: Mapping[str, Tensor], ids: list[int], image: Tensor) -> Tensor:
    """A text's ids and (L, D) → hidden states (T, W): BERT's blocks, which normalise after each part."""
    at = "text_encoder.embeddings."
    x = torch.stack([
        state[f"{at}word_embeddings.weight"][word] + state[f"{at}position_embeddings.weight"][place]
        for place, word in enumerate(ids)
    ])  # fmt: skip
    x = normed(state, f"{at}LayerNorm", x, 1e-12)
    for n in range(LAYERS):
        layer = f"text_encoder.encoder.layer.{n}."
        for part in ("attention", "crossattention"):
            looked_at = image if part == "crossattention" else x
            q = linear(state, f"{layer}{part}.self.query", x)
            k, v = (linear(state, f"{layer}{part}.self.{name}", looked_at) for name in ("key", "value"))
            out = linear(state, f"{layer}{part}.output.dense", streaming_softmax(q, k, v))
            x = normed(state, f"{layer}{part}.output.LayerNorm", out + x, 1e-12)
        inner = gelu(linear(state, f"{layer}intermediate.dense", x))
        x = normed(state, f"{layer}output.LayerNorm", linear(state, f"{layer}output.dense", inner) + x, 1e-12)
    return x


def l2_normalize(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def query_and_target(
    state: Mapping[str, Tensor], pixels: Tensor, ids: list[list[int]] = IDS
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference tokens (B, L, D), queries (B, E) and targets (B, E)."""
    seen = [see(state, image) for image in pixels]
    hidden = [read(state, text, image)[0] for text, image in zip(ids, seen, strict=True)]
    queries = torch.stack([l2_normalize(linear(state, "text_proj", h)) for h in hidden])
    return torch.stack(seen), queries, torch.stack([l2_normalize(linear(state, "vision_proj", x[0])) for x in seen])


# --- published files --------------------------------------------------------------------------------------------------


def published(size: int = 64, patch: int = 16, width: int = WIDTH, momentum: bool = False) -> State:
    """Random weights under BLIP's names, none of which may be swapped or left out unnoticed."""
    dice = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, width),
        "visual_encoder.pos_embed": (1, (size // patch) ** 2 + 1, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, patch, patch),
        "visual_encoder.patch_embed.proj.bias": (width,),
        "text_encoder.embeddings.word_embeddings.weight": (len(WORDS) + 2, WIDE),
        "text_encoder.embeddings.position_embeddings.weight": (POSITIONS, WIDE),
    }

    def add(name: str, inside: int, out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inside), (out,)

    def add_norm(name: str, own: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (own,), (own,)

    for n in range(LAYERS):
        block, layer = f"visual_encoder.blocks.{n}.", f"text_encoder.encoder.layer.{n}."
        add_norm(f"{block}norm1", width)
        add_norm(f"{block}norm2", width)
        add(f"{block}attn.qkv", width, 3 * width)
        add(f"{block}attn.proj", width, width)
        add(f"{block}mlp.fc1", width, INNER)
        add(f"{block}mlp.fc2", INNER, width)
        for part, keys in (("attention", WIDE), ("crossattention", width)):
            add(f"{layer}{part}.self.query", WIDE, WIDE)
            add(f"{layer}{part}.self.key", keys, WIDE)
            add(f"{layer}{part}.self.value", keys, WIDE)
            add(f"{layer}{part}.output.dense", WIDE, WIDE)
            add_norm(f"{layer}{part}.output.LayerNorm", WIDE)
        add(f"{layer}intermediate.dense", WIDE, INNER)
        add(f"{layer}output.dense", INNER, WIDE)
        add_norm(f"{layer}output.LayerNorm", WIDE)
    add_norm("visual_encoder.norm", width)
    add_norm("text_encoder.embeddings.LayerNorm", WIDE)
    add("vision_proj", width, EMBED)
    add("text_proj", WIDE, EMBED)
    state = {}
    for name, shape in shapes.items():
        middle = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        spread = 0.3 if len(shape) == 1 else 1.0 if "embed" in name and "proj" not in name else 0.0
        state[name] = torch.randn(shape, generator=dice) * (spread or math.prod(shape[1:]) ** -0.5) + middle
    if momentum:
        state |= {re.sub(r"^([a-z_]+)\.", r"\1_m.", name): value + 1 for name, value in state.items()}
    return state


def contained(state: State, container: str) -> dict[str, object]:
    """As the three kinds of file hold it, with what stands beside."""
    buffer = {"text_encoder.embeddings.position_ids": torch.arange(POSITIONS)[None]}
    if container == "BLIP_Retrieval":
        whole = state | buffer | {"temp": torch.tensor(0.0321)}
        return {"epoch": 3, "BLIP_Retrieval": whole, "optimizer_state_dict": {"state": {}, "param_groups": []}}
    if container == "state_dict":
        whole = {f"blip.{name}": value for name, value in (state | buffer | {"temp": torch.tensor(0.07)}).items()}
        return {"epoch": 3, "state_dict": whole | {"tau": torch.tensor(0.0298)}}
    heads = {"itm_head.weight": torch.ones(2, WIDE), "text_decoder.cls.predictions.bias": torch.ones(15)}
    queues = {"image_queue": torch.ones(EMBED, 4), "text_queue": torch.ones(EMBED, 4), "queue_ptr": torch.zeros(1)}
    whole = state | buffer | heads | queues | {"temp": torch.tensor(0.05)}
    return {"model": whole, "optimizer": {}, "config": {"image_size": 192}, "epoch": 19}
