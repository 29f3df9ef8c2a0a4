"""Train the embedded BLIP and BLIP-2 on the train images of the ``emoji`` dataset and their names.

They see images and names, never a triplet, and no val or test target. BLIP's vision tower begins as that of the
embedded CLIP with a transformer, which saw the same; BLIP-2's is that of the embedded BLIP, and frozen. Writes a folder
of transformers (configuration, tokenizer, half-precision weights) and ``quality.json``::

    python -m benchmarks.embedded.make_fusion --backbone blip4cir --epochs 25
    python -m benchmarks.embedded.make_fusion --backbone sprc --tower blip --epochs 36 --batch-size 64
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.embedded.make_emoji import image_path
from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.datasets.emoji import FOLDER
from spn4cir.datasets.emoji_names import load_names
from spn4cir.images import open_image
from spn4cir.losses import info_nce
from spn4cir.search import scores_of

WIDTH = 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 1500
SHIFT = 2
VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 6, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6, "initializer_range": 0.02,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
    "encoder_hidden_size": WIDTH, "max_position_embeddings": 64, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "pad_token_id": 0,
}  # fmt: skip
FOLDERS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "blip4cir": ("blip", ["[DEC]", "[ENC]"], {
        "model_type": "blip", "architectures": ["BlipForImageTextRetrieval"], "image_text_hidden_size": WIDTH,
        "vision_config": VISION, "text_config": TEXT | {"sep_token_id": 3},
    }),
    "sprc": ("blip2", ["[DEC]"], {
        "model_type": "blip-2", "architectures": ["Blip2ForImageTextRetrieval"], "image_text_hidden_size": WIDTH // 2,
        "num_query_tokens": 8, "vision_config": VISION,
        "qformer_config": TEXT
        # with BERT's 0.02 a Q-Former as narrow as this hardly sees the image at first
        | {"cross_attention_frequency": 2, "use_qformer_text_input": True, "initializer_range": 0.09},
    }),
}  # fmt: skip
"""By backbone: its folder, the special tokens that it appends to BERT's, and its configuration."""


def train_names() -> dict[str, str]:
    """Train image → name."""
    names = load_names()
    return {i: names[i] for i in json.loads((FOLDER / "images.json").read_text(encoding="utf-8"))["train"]}


def _wordpiece(vocabulary: list[tuple[str, int]] | None) -> Tokenizer:
    """BERT's way of splitting lower-cased text."""
    tokenizer = Tokenizer(models.WordPiece(dict(vocabulary) if vocabulary else None, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def write_folder(backbone: str, names: list[str], output: Path) -> None:
    """Configuration and tokenizer, as ``from_pretrained`` reads them."""
    _, added, config = FOLDERS[backbone]
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _wordpiece(None)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    # each letter also within a word; named in advance, or the trainer would number them by chance, and so break ties
    fixed = [*SPECIAL, *letters, *(f"##{c}" for c in letters if c.isalnum())]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=fixed, show_progress=False)
    tokenizer.train_from_iterator(names, trainer)
    tokenizer = _wordpiece(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    tokenizer.add_special_tokens([*SPECIAL, *added])
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", additional_special_tokens=added, model_max_length=TEXT["max_position_embeddings"],
    ).save_pretrained(output)  # fmt: skip
    text = "text_config" if "text_config" in config else "qformer_config"
    config = config | {text: config[text] | {"vocab_size": tokenizer.get_vocab_size()}}
    if "sep_token_id" in config[text]:
        config[text]["bos_token_id"] = tokenizer.token_to_id("[DEC]")
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def drop_words(name: str, rng: random.Random) -> str:
    """The name without a random share of its words, from none to all of them."""
    share = rng.random()
    return " ".join(word for word in name.split() if rng.random() >= share)


def same_rows(names: Sequence[str], pictures: Sequence[bytes]) -> Tensor:
    """(N, N) bool: equal names or equal pixels."""
    rows = torch.zeros(len(names), len(names), dtype=torch.bool)
    for values in (names, pictures):
        number = {value: n for n, value in enumerate(values)}
        code = torch.tensor([number[value] for value in values])
        rows |= code[:, None] == code
    return rows


def library_of(backbone: Backbone) -> PreTrainedModel:
    """The model of transformers that a backbone stands on."""
    return next(module for module in backbone.children() if isinstance(module, PreTrainedModel))


def clip_tower(pixels: Tensor) -> dict[str, Tensor]:
    """Vision transformer of the embedded CLIP that has one, under BLIP's names.

    BLIP has no norm before the first block. Its centring and its scale are linear and go into the embeddings; what each
    patch is divided by varies, and is taken to be its mean over pixels (N, 3, H, W).
    """
    file = load_file(FOLDER.parent / "clip_transformer" / "open_clip_model.safetensors")
    clip = {key.removeprefix("visual."): value.float() for key, value in file.items() if key.startswith("visual.")}
    block = {
        "ln_1.": "layer_norm1.", "attn.in_proj_": "self_attn.qkv.", "attn.out_proj.": "self_attn.projection.",
        "ln_2.": "layer_norm2.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
    }  # fmt: skip
    found = {}
    for key, value in clip.items():
        if key.startswith("transformer.resblocks."):
            _, _, number, part = key.split(".", 3)
            old = next(old for old in block if part.startswith(old))
            found[f"encoder.layers.{number}.{part.replace(old, block[old])}"] = value
    found |= {f"post_layernorm.{part}": clip[f"ln_post.{part}"] for part in ("weight", "bias")}
    kernel, places = clip["conv1.weight"], clip["positional_embedding"]  # (D, 3, P, P), (1 + L, D)
    patches = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2) + places[1:]  # (N, L, D)
    first = clip["class_embedding"] + places[0]  # (D,)

    def normed(x: Tensor, deviation: Tensor) -> Tensor:
        scaled: Tensor = (x - x.mean(-1, keepdim=True)) / deviation * clip["ln_pre.weight"]  # (…, D)
        return scaled

    deviation = patches.std(-1, correction=0).mean()
    found["embeddings.class_embedding"] = torch.zeros(1, 1, len(first))
    whole = torch.cat([normed(first, first.std(correction=0))[None], normed(places[1:], deviation)])
    found["embeddings.position_embedding"] = (whole + clip["ln_pre.bias"])[None]
    found["embeddings.patch_embedding.weight"] = normed(kernel.movedim(0, -1), deviation).movedim(-1, 0).contiguous()
    found["embeddings.patch_embedding.bias"] = torch.zeros(len(kernel))
    return found


def fresh(name: str, folder: Path, pixels: Tensor, tower: str | None) -> Backbone:
    """A backbone with random weights but for its vision tower, which is that of a folder, or begins as CLIP's."""
    backbone = build_backbone(name, model=str(folder), load_weights=False, train_vision=tower is None)
    for key, value in backbone.named_parameters():
        if key.endswith("query_tokens"):  # zeros in the library: equal tokens would stay equal for ever
            torch.nn.init.normal_(value, std=0.02)
    prefix = "vision_model."
    vision = clip_tower(pixels)
    if tower:
        file = load_file(FOLDER.parent / tower / "model.safetensors")
        vision = {key.removeprefix(prefix): value.float() for key, value in file.items() if key.startswith(prefix)}
    library_of(backbone).vision_model.load_state_dict(vision)
    library_of(backbone).vision_model.requires_grad_(tower is None)
    return backbone


class Looked(nn.Module):
    """In the place of a vision tower: takes what the tower gave."""

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        """(B, L, D) as they are."""
        return SimpleNamespace(last_hidden_state=tokens)


class Views:
    """What ``encode_image`` takes for some images, shifted at random by up to two pixels.

    Args:
        backbone: its vision tower is asked once for each shift if it does not train, and then taken out.
        pixels: (N, 3, H, W).
        frozen: whether it does not train.
    """

    def __init__(self, backbone: Backbone, pixels: Tensor, frozen: bool):
        steps = range(-SHIFT, SHIFT + 1)
        self.shifts, self.pixels = [(down, across) for down in steps for across in steps], pixels
        self.tower = library_of(backbone).vision_model
        self.seen: list[Tensor] | None = None
        if frozen:
            with torch.no_grad():
                self.seen = [self._look(shift) for shift in self.shifts]  # (N, L, D) each
            library_of(backbone).vision_model = Looked()

    def _look(self, shift: tuple[int, int]) -> Tensor:
        parts = torch.roll(self.pixels, shift, (2, 3)).split(256)
        return torch.cat([self.tower(part).last_hidden_state for part in parts])

    def __call__(self, rows: Tensor, rng: random.Random) -> Tensor:
        """Rows (B,) → (B, 3, H, W), or (B, L, D) of a tower that does not train."""
        number = rng.randrange(len(self.shifts))
        if self.seen is not None:
            return self.seen[number][rows]
        return torch.roll(self.pixels[rows], self.shifts[number], (2, 3))


def write_weights(backbone: Backbone, folder: Path) -> None:
    """In half precision, with zeros for the head that a backbone leaves out and the library's class expects."""
    library = library_of(backbone)
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    weights = {key: value.detach().half().contiguous() for key, value in library.state_dict().items()}
    for key, value in kind(library.config).state_dict().items():
        if key not in weights:
            assert key.startswith("itm_head."), key
            weights[key] = torch.zeros_like(value, dtype=torch.half)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # as other files are


def step_loss(
    backbone: Backbone, views: Sequence[Tensor], names: Sequence[str], same: Tensor, scale: Tensor, rng: random.Random
) -> Tensor:
    """Mean of "swap" (another's picture and the own name) and "keep" (the own picture and a part of the name)."""
    seen, wanted = (backbone.encode_image(view) for view in views)
    other = seen.reference.roll(rng.randrange(1, len(names)), 0)  # (B, L, D)
    swap = backbone.compose(other, backbone.tokenize(names)).query  # (B, E)
    keep = backbone.compose(seen.reference, backbone.tokenize([drop_words(name, rng) for name in names])).query
    ignore = same.nonzero().T
    own = torch.arange(len(names))
    temperature = 1 / scale.exp().clamp(max=100)
    both = [info_nce(query, wanted.target, own, temperature, ignore) for query in (swap, keep)]
    return torch.stack(both).mean()


def train(backbone: Backbone, pixels: Tensor, names: Sequence[str], args: argparse.Namespace, folder: Path) -> int:
    """Train; returns the number of whole epochs. Ctrl-C ends it early; weights are written after each epoch."""
    rng = random.Random(args.seed)
    scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())
    trained = [p for p in (*backbone.parameters(), scale) if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    tower = library_of(backbone).vision_model
    views = Views(backbone, pixels, frozen=bool(args.tower))
    same = same_rows(names, [p.numpy().tobytes() for p in pixels])  # (N, N)
    steps = len(names) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps * args.epochs, pct_start=0.1)
    started = time.time()
    for epoch in range(args.epochs):
        order, total = torch.randperm(len(names)), 0.0
        try:
            for rows in order.split(args.batch_size)[:steps]:
                both = [views(rows, rng) for _ in range(2)]
                loss = step_loss(backbone, both, [names[n] for n in rows], same[rows][:, rows], scale, rng)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                total += loss.item()
        except KeyboardInterrupt:
            return epoch
        looked, library_of(backbone).vision_model = library_of(backbone).vision_model, tower
        write_weights(backbone, folder)
        library_of(backbone).vision_model = looked
        print(
            f"epoch {epoch + 1}: loss {total / steps:.4f}, temperature {1 / scale.exp().item():.4f}, "
            f"{time.time() - started:.0f} s",
            flush=True,
        )
    return int(args.epochs)


@torch.no_grad()
def measure(backbone: Backbone, pixels: Tensor, names: Sequence[str], seed: int) -> dict[str, float]:
    """Share of queries of each kind that rank their target, or its equal, first among all images, in percent."""
    rng = random.Random(seed)
    features = [backbone.encode_image(part) for part in pixels.split(256)]
    reference, target = (torch.cat(list(part)) for part in zip(*features, strict=True))
    same = same_rows(names, [p.numpy().tobytes() for p in pixels])
    found = {}
    for kind, looked_at, texts in (
        ("swap", reference.roll(rng.randrange(1, len(names)), 0), list(names)),
        ("keep", reference, [drop_words(name, rng) for name in names]),
    ):
        hits = 0
        for rows in torch.arange(len(names)).split(256):
            query = backbone.compose(looked_at[rows], backbone.tokenize([texts[n] for n in rows])).query
            first = scores_of(query, target).argmax(1)  # (B,)
            hits += int(same[rows, first].sum())
        found[kind] = round(100 * hits / len(names), 2)
    return found


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--backbone", choices=sorted(FOLDERS), required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower", help="embedded folder whose vision tower is taken and kept as it is")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    named = train_names()
    names, folder = list(named.values()), args.output or FOLDER.parent / FOLDERS[args.backbone][0]
    write_folder(args.backbone, names, folder)
    read = build_backbone(args.backbone, model=str(folder), load_weights=False).transform
    pixels = torch.stack([read(open_image(image_path(i))) for i in named])  # (N, 3, H, W)
    backbone = fresh(args.backbone, folder, pixels, args.tower)  # in eval mode: no dropout, so fewer epochs
    started = time.time()
    epochs = train(backbone, pixels, names, args, folder)
    minutes = round((time.time() - started) / 60, 1)
    shipped = build_backbone(args.backbone, model=str(folder))
    report = {
        "what": f"train images that a query ranks first among all {len(names)}, in percent: swap is another image and "
        "the whole name, keep is the image itself and a random part of its name",
        "command": f"python -m benchmarks.embedded.make_fusion --backbone {args.backbone} --epochs {args.epochs} "
        f"--batch-size {args.batch_size} --lr {args.lr:g} --seed {args.seed}"
        + (f" --tower {args.tower}" if args.tower else ""),
        "epochs": epochs,
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in library_of(shipped).parameters()),
        "found_first": measure(shipped, pixels, names, args.seed),
    }
    (folder / "quality.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
