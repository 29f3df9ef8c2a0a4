"""Every backbone in a size that tests can afford, with weights that are random but the same each time."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import spn4cir
from spn4cir.backbone import Backbone
from spn4cir.backbones import BACKBONES, build_backbone

EMBEDDED = Path(spn4cir.__file__).parent / "embedded"
SIDE = 64  # pixels
COMPOSED = tuple(name for name in BACKBONES if name not in ("embedding", "masln"))
"""Those that stages 1 and 2 train; the others have a stage of their own."""
TINY = (*COMPOSED, "clip4cir combiner")
"""All that ``tiny_backbone`` builds; the first word is the backbone's name."""
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"patch_size": 16, "image_size": SIDE}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_options(name: str, folder: Path) -> dict[str, Any]:
    """What ``build_backbone`` takes beside the name; ``folder`` is where a CLIP may be described."""
    if name == "clip4cir combiner":
        return {**tiny_options("clip4cir", folder), "fusion": "combiner"}
    if name in ("clip4cir", "tgcir"):
        return {"model": f"local-dir:{_clip(folder / 'clip')}"}
    if name == "blip4cir":
        words = json.loads((EMBEDDED / "blip" / "config.json").read_text())["text_config"]["vocab_size"]
        config = {"image_text_hidden_size": 24, "vision_config": TOWER, "text_config": {**BERT, "vocab_size": words}}
        return {"model": None, "config": config, "tokenizer": str(EMBEDDED / "blip"), "train_vision": True}
    if name == "sprc":
        config = json.loads((EMBEDDED / "blip2" / "config.json").read_text())
        config |= {"image_text_hidden_size": 24, "num_query_tokens": 4}
        config["vision_config"] |= TOWER
        config["qformer_config"] |= {**BERT, "encoder_hidden_size": TOWER["hidden_size"]}
        return {"model": None, "config": config, "tokenizer": str(EMBEDDED / "blip2")}
    if name == "freestyle":
        return {"model": f"local-dir:{_clip(folder / 'clip')}", "trains": "all", "style": {"width": 8}}
    raise KeyError(f"{name} is new: give it a tiny configuration")


def _clip(folder: Path) -> Path:
    """The embedded CLIP's architecture and tokenizer, with less of everything."""
    if not folder.is_dir():
        shutil.copytree(EMBEDDED / "clip", folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["embed_dim"] = 24
        config["model_cfg"]["vision_cfg"] |= {"layers": 1, "width": 32, "head_width": 16, "image_size": SIDE}
        config["model_cfg"]["text_cfg"] |= {"layers": 1, "width": 32, "heads": 2}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def tiny_backbone(name: str, folder: Path, **options: Any) -> Backbone:
    """A backbone of that name; in stage 1 each part of it trains."""
    torch.manual_seed(5)
    backbone = build_backbone(name.split()[0], **{**tiny_options(name, folder), "load_weights": False, **options})
    with torch.no_grad():
        for value in backbone.parameters():  # what libraries begin with is too small to tell anything
            value.add_(0.1 * torch.randn(value.shape))
    if backbone.statistics_sample:  # or a run of a few steps would begin by fitting them
        backbone.fit_statistics(torch.randn(12, 3, SIDE, SIDE), [None] * 12, torch.randn(4, 3, SIDE, SIDE))
    return backbone
