"""One of two processes: tgcir_script.py FOLDER RANK writes stage 1's terms and gradients of its half of a batch."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import write_tensors
from spn4cir.in_batch import InBatch

IDENTITY = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5])  # equal targets within a half and across


def losses_and_gradients(rows: slice) -> dict[str, Tensor]:
    """Each term, and the total's gradients, of these rows of a batch of eight; in float64."""
    torch.manual_seed(3)
    backbone = build_backbone("tgcir").double()
    reference, target = torch.randn(2, 8, 3, 64, 64, dtype=torch.float64)
    target = target[torch.tensor([IDENTITY.tolist().index(i) for i in IDENTITY.tolist()])]
    texts = ["is red", "is blue", "a cat", "a green dog", "more", "less of it", "", "a house"][rows]
    features, targets = backbone.encode_image(reference[rows]), backbone.encode_image(target[rows])
    composed = backbone.compose(features.reference, backbone.tokenize(texts))
    contrast = InBatch(IDENTITY[rows], 0.1)
    terms = {"rank": contrast(composed.query, targets.target), **backbone.extra_losses(composed, targets, contrast)}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    found = {f"gradient of {n}": p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    return {**{name: term.detach() for name, term in terms.items()}, **found}


def meet(folder: Path, rank: int) -> None:
    """As that one of two processes, write what half of the batch gives."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    try:
        write_tensors(folder / f"{rank}.safetensors", losses_and_gradients(slice(4 * rank, 4 * rank + 4)), {})
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    meet(Path(sys.argv[1]), int(sys.argv[2]))
