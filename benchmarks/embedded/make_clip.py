"""Train the embedded dual encoder: a tiny CLIP on the train images of the ``emoji`` dataset and their names.

Nothing of it knows about composition: it sees images and names, never a triplet, and no val or test target. Writes an
open_clip folder (config, tokenizer, half-precision weights) and ``quality.json``::

    python -m benchmarks.embedded.make_clip
    python -m benchmarks.embedded.make_clip --tower transformer --epochs 60
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.embedded.make_emoji import image_path
from spn4cir.datasets.emoji import FOLDER
from spn4cir.datasets.emoji_names import load_names
from spn4cir.images import open_image

FOLDERS = {"resnet": "clip", "transformer": "clip_transformer"}
SHIFT, ZOOM = 4, 0.15
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "transformer": {"image_size": 64, "patch_size": 16, "width": 128, "layers": 6, "head_width": 32},
}


def write_folder(folder: Path, names: list[str], vision: dict[str, Any]) -> None:
    """Config and tokenizer, as open_clip's ``local-dir:`` schema reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(names, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    text = {
        "context_length": 24,
        "vocab_size": tokenizer.get_vocab_size(),
        "hf_tokenizer_name": "embedded",  # any name: a local folder is its own tokenizer
        "width": 128,
        "heads": 4,
        "layers": 4,
        "pool_type": "eos",
        "eos_id": 2,
        "pad_id": 0,
    }
    config = {
        "model_cfg": {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tower", default="resnet", choices=sorted(TOWERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: the folder in spn4cir/embedded")
    args = parser.parse_args()
    args.output = args.output or FOLDER.parent / FOLDERS[args.tower]
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    all_names = load_names()
    ids = json.loads((FOLDER / "images.json").read_text())["train"]
    names = [all_names[i] for i in ids]
    vision = TOWERS[args.tower]
    write_folder(args.output, names, vision)
    model = open_clip.create_model(f"local-dir:{args.output}", load_weights=False).to(memory_format=torch.channels_last)
    tokenize = open_clip.get_tokenizer(f"local-dir:{args.output}")
    size = vision["image_size"]
    mean, std = torch.tensor(model.visual.image_mean), torch.tensor(model.visual.image_std)
    pixels = torch.stack([to_tensor(image_path(i), size) for i in ids])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    tokens = tokenize(names)

    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    steps = len(ids) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps * args.epochs, pct_start=0.05)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(ids)} images")
    started = time.time()
    for epoch in tqdm(range(args.epochs), desc="epochs", mininterval=20):
        order = torch.randperm(len(ids))
        total = 0.0
        for step in range(steps):
            rows = order[step * args.batch_size : (step + 1) * args.batch_size]
            image = model.encode_image(moved(pixels[rows], rng), normalize=True)
            text = model.encode_text(tokens[rows], normalize=True)
            logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, B)
            labels = torch.arange(len(rows))
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}, {time.time() - started:.0f} s", flush=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, args.output / "open_clip_model.safetensors")

    model.load_state_dict({name: value.float() for name, value in weights.items()})
    model.eval()
    with torch.no_grad():
        image = torch.cat([model.encode_image(p, normalize=True) for p in pixels.split(256)])
        text = torch.cat([model.encode_text(t, normalize=True) for t in tokens.split(256)])
    found = ((image @ text.T).argmax(1) == torch.arange(len(ids))).float().mean().item()
    report = {
        "what": "train images whose own name is nearest among all train names, in percent; "
        "composed retrieval without training is in docs/results.md",
        "command": f"python -m benchmarks.embedded.make_clip --tower {args.tower} --epochs {args.epochs} "
        f"--seed {args.seed}",
        "minutes": round((time.time() - started) / 60, 1),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_to_name": {"images": len(ids), "percent": round(100 * found, 2)},
    }
    (args.output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def moved(pixels: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """(B, 3, H, W) shifted by up to ``SHIFT`` pixels and zoomed by up to a factor of 1 ± ``ZOOM``, all alike."""
    zoom = 1 + rng.uniform(-ZOOM, ZOOM)
    across, down = (2 * rng.uniform(-SHIFT, SHIFT) / pixels.shape[-1] for _ in range(2))
    change = torch.tensor([[[zoom, 0.0, across], [0.0, zoom, down]]])
    grid = F.affine_grid(change.expand(len(pixels), -1, -1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def to_tensor(path: Path, size: int) -> torch.Tensor:
    """(3, size, size) in [0, 1]."""
    picture = open_image(path).resize((size, size), 3)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255


if __name__ == "__main__":
    main()
