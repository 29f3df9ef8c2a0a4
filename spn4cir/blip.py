"""What BLIP and BLIP-2 share: library models by name or folder, BERT's tokenizer, published names of its tower."""

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from spn4cir.errors import InputError

M = TypeVar("M", bound=PreTrainedModel)
C = TypeVar("C", bound=PreTrainedConfig)
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
BERT = "bert-base-uncased"
BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
STEM = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}


def load_settings(kind: type[C], model: str | Path) -> C:
    """The configuration of a folder, or of a name on the hub. Raises ``InputError`` if there is none."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():  # else: defaults
        raise InputError(f"{model} holds no config.json")
    try:
        return cast(C, kind.from_pretrained(model))
    except UNREADABLE as error:
        raise _unreadable(kind.__name__, model, error) from None


def _unreadable(kind: str, model: str | Path, error: Exception) -> InputError:
    said = " ".join(str(error).split())[:200]
    return InputError(
        f"cannot load {kind} {str(model)!r} (where there is no network, give a folder that holds config.json and "
        f"model.safetensors, or --init FOLDER of spn4cir-import): {said}"
    )


def load_library(kind: type[M], model: str | Path, config: Mapping[str, Any] | None, load_weights: bool) -> M:
    """A model of transformers in float32 and eval mode.

    Args:
        kind: its class.
        model: folder, or name on the hub; not read where ``config`` is given and no weights are wanted.
        config: its configuration as a dictionary; None takes that of ``model``.
        load_weights: False gives random weights.

    Raises:
        InputError: if there is no such model, or if it lacks weights or has others.
    """
    settings = None if config else load_settings(kind.config_class, model)
    try:
        settings = settings or kind.config_class.from_dict(dict(config or {}))
        if not load_weights:
            return cast(M, kind(settings).eval())
        loaded, report = kind.from_pretrained(model, config=settings, dtype=torch.float32, output_loading_info=True)
    except UNREADABLE as error:
        raise _unreadable(kind.__name__, model, error) from None
    for word in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, report[word])):
            raise InputError(f"{model}: {len(found)} {word.replace('_', ' ')} for {kind.__name__}, such as {found[0]}")
    return cast(M, loaded.eval())


def load_tokenizer(source: str | Path, size: int, added: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with ``size`` entries; special tokens in ``added`` are appended where they are missing.

    A folder may hold ``vocab.txt`` alone.

    Raises:
        InputError: if there is no such tokenizer, or it has another number of entries than the model.
    """
    folder = Path(source)
    bare = (folder / "vocab.txt").is_file() and not any(folder.glob("tokenizer*.json"))  # nothing says whose
    try:
        tokenizer = (BertTokenizer if bare else AutoTokenizer).from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:120]
        raise InputError(
            f"cannot load tokenizer {str(source)!r} (where there is no network, give as option tokenizer a folder that "
            f"holds vocab.txt of {BERT}, from huggingface.co/{BERT}): {said}"
        ) from None
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": [word for word in added if word not in known]})
    if len(tokenizer) != size:
        raise InputError(f"tokenizer {str(source)!r} has {len(tokenizer)} entries, and the model has {size}")
    return tokenizer


def vision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a published vision tower, names without their prefix, under the names of transformers.

    BLIP's towers have one bias for query, key and value; EVA's have ``q_bias`` and ``v_bias``, the key's being zero.
    ``norm``, where there is one, becomes ``post_layernorm``. Names that are unknown stay as they are.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block and block[2] in ("attn.q_bias", "attn.v_bias"):
            if block[2] == "attn.q_bias":
                key = state.get(f"blocks.{block[1]}.attn.v_bias")
                if key is None:
                    raise InputError(f"beside {name} there is no v_bias")
                found[f"encoder.layers.{block[1]}.self_attn.qkv.bias"] = torch.cat([value, torch.zeros_like(key), key])
        elif block:
            part, _, last = block[2].rpartition(".")
            found[f"encoder.layers.{block[1]}.{BLOCK.get(part, part)}.{last}"] = value
        elif name in STEM:
            found[STEM[name]] = value
        else:
            found[re.sub(r"^norm\.", "post_layernorm.", name)] = value
    return found


def vision_settings(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, int]:
    """What a configuration states of such a tower, read from shapes; heads are 64 wide unless their number is given.

    Args:
        state: as ``vision_names`` returns it.
        heads: number of heads, where they are not 64 wide.

    Raises:
        InputError: naming the tensor that would be needed.
    """
    try:
        width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
        places = state["embeddings.position_embedding"].shape[1]
        inner = state["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise InputError(f"the architecture cannot be recognised without {error.args[0]}") from None
    except (AttributeError, IndexError, ValueError):
        raise InputError("the architecture cannot be recognised by the shapes of its vision tower") from None
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads or max(1, width // 64),
        "patch_size": patch,
        "image_size": patch * isqrt(places - 1),  # one more for the class
    }


def resize_positions(state: Mapping[str, Tensor], size: int) -> tuple[dict[str, Tensor], str]:
    """Position embeddings of a vision tower for images of ``size`` pixels, and what to say of it, if they changed.

    Interpolated bicubically on the grid of patches; the class token's stays as it is.

    Args:
        state: as ``vision_names`` returns it.
        size: of the images, a multiple of the patch size.

    Raises:
        InputError: naming the tensor that would be needed, or if patches do not fill the image.
    """
    settings = vision_settings(state)
    patch, old, name = settings["patch_size"], settings["image_size"], "embeddings.position_embedding"
    if size == old:
        return dict(state), ""
    if size % patch:
        raise InputError(f"images of {size} pixels are not filled by patches of {patch}")
    old, new = old // patch, size // patch
    first, grid = state[name][:, :1], state[name][:, 1:]  # (1, 1, D), (1, old², D)
    if grid.shape[1] != old * old:
        raise InputError(f"{grid.shape[1]} positions are no square grid")
    planes = grid.float().transpose(1, 2).reshape(1, -1, old, old)  # (1, D, old, old)
    planes = F.interpolate(planes, (new, new), mode="bicubic", align_corners=False)
    grid = planes.flatten(2).transpose(1, 2).to(first.dtype)  # (1, new², D)
    return {**state, name: torch.cat([first, grid], 1)}, f", positions resized from {old}×{old} to {new}×{new}"
