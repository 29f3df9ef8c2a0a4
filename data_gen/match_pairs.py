"""Step 3: pair each image with others from a window of similarity ranks, neither too similar nor too dissimilar.

examples:
  python data_gen/match_pairs.py --dataset emoji --window '[1, 20]' --pairs-per-image 4
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

from data_gen.deduplicate import canonical_images
from data_gen.files import digest, is_done, mark_done, read_jsonl, weights_digest, write_jsonl
from data_gen.settings import GenerateConfig, command
from spn4cir.config import TrainConfig
from spn4cir.errors import InputError
from spn4cir.types import Dataset

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED = Path(__file__).parent.parent / "spn4cir" / "embedded" / "clip"
ROWS = 512  # images compared with all others at once


def match_pairs(config: GenerateConfig, dataset: Dataset) -> None:
    """Write pairs.jsonl: reference, target, and the target's rank and similarity as seen from the reference."""
    out, ids = config.file("pairs.jsonl"), canonical_images(config)
    lo, hi = config.window
    check_window(config, len(ids))
    settings = {"matcher": config.matcher, "window": [lo, hi], "per_image": config.pairs_per_image, "seed": config.seed}
    canonical = {row["image_id"]: row["canonical"] for row in read_jsonl(config.file("images.jsonl"))}
    annotated = {
        (canonical.get(t.reference, t.reference), canonical.get(t.target, t.target)) for t in dataset.triplets()
    }
    named = {"embedded": str(EMBEDDED)}.get(config.matcher, config.matcher.removeprefix("local-dir:"))
    about = {"annotated": sorted(annotated), "weights": weights_digest(Path(named))}
    made_by = digest({"step": "match", **about, **settings}, config.file("images.jsonl"))
    if is_done(out, made_by):
        print(f"match: {out} is done")
        return
    vectors = encode(config, dataset, ids)  # (N, E)
    rows = []
    for start in range(0, len(ids), ROWS):
        scores = vectors[start : start + ROWS] @ vectors.T  # (b, N)
        for n in range(len(scores)):
            scores[n, start + n] = float("-inf")  # never itself
        values, found = scores.sort(dim=1, descending=True, stable=True)
        for n, image_id in enumerate(ids[start : start + ROWS]):
            ranks = [r for r in range(lo, hi) if (image_id, ids[found[n, r - 1]]) not in annotated]
            draw = random.Random(f"{config.seed}/{image_id}")
            for rank in sorted(draw.sample(ranks, min(config.pairs_per_image, len(ranks)))):
                similarity = round(values[n, rank - 1].item(), 4)
                rows.append(
                    {"reference": image_id, "target": ids[found[n, rank - 1]], "rank": rank, "similarity": similarity}
                )
    write_jsonl(out, rows)
    mark_done(out, made_by, **settings, pairs=len(rows))
    print(f"match: {len(rows)} pairs of ranks [{lo}, {hi}) → {out}")


def check_window(config: GenerateConfig, images: int) -> None:
    """Raises ``InputError`` if the window reaches beyond the other images."""
    lo, hi = config.window
    if hi > images:
        raise InputError(f"window [{lo}, {hi}) reaches beyond the {images - 1} other images of {config.dataset}")


def encode(config: GenerateConfig, dataset: Dataset, ids: list[str]) -> "Tensor":
    """(N, E) unit vectors of images by the matcher."""
    import torch
    from tqdm import tqdm

    from spn4cir.backbones import build_backbone
    from spn4cir.images import ImageSource

    name, _, tag = config.matcher.partition(":")
    if config.matcher.startswith(("local-dir:", "hf-hub:")):
        name, tag = config.matcher, ""
    elif not tag and name != "embedded":
        raise InputError(f"matcher {name!r} needs a tag of pretrained weights behind a colon, such as {name}:openai")
    matcher = build_backbone(TrainConfig.backbone, model=name, pretrained=tag or None).eval()
    matcher.to("cuda" if torch.cuda.is_available() else "cpu")
    images, found = ImageSource(dataset.path, matcher.transform), []
    with torch.inference_mode():
        for start in tqdm(range(0, len(ids), 256), "match", unit="batch"):
            pixels = images.stack(ids[start : start + 256]).to(next(matcher.parameters()).device)
            found.append(matcher.encode_target(pixels)[:, 0].cpu())
    return torch.cat(found)


if __name__ == "__main__":
    command(match_pairs, __doc__)
