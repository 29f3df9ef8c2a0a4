"""A step of stage 2 against its text tower alone: what 25,136 candidates cost beside the model.

The real objective, a bank of random unit vectors, and CLIP4CIR of open_clip's RN50x4 with random weights; references
come from the bank, so the visual tower does not run. The text tower alone is its forward pass, its backward pass from a
fixed gradient and the same optimiser's step, on the same tokens. First loss and gradients are held against a dense
cross-entropy on the same weights.

examples:
  python -m benchmarks.step                              # under a minute on two cores
  python -m benchmarks.step --json benchmarks/results/step.json
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import bound, command, distance, in_turns, report, row, share
from spn4cir.backbones.clip4cir import CLIP4CIR
from spn4cir.bank import Bank
from spn4cir.batches import TripletBatch
from spn4cir.errors import run_command
from spn4cir.objective import BankCandidates, Objective
from spn4cir.types import ImageFeatures

MODEL, CANDIDATES, BATCH, ROUNDS = "RN50x4-quickgelu", 25_136, 32, 5
TEMPERATURE, NEAR = 0.02, 1e-4
TEXTS = (
    "is blue with shorter sleeves and has a lighter floral print",
    "has a longer hem and is more formal and less revealing",
    "is a darker green with a round neck and no buttons",
    "has thin straps and is white with black stripes and pockets",
)
"""In FashionIQ's style: two captions of one pair, joined."""


def bank_of(count: int, k: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bank:
    """Random unit vectors (count, k, width), without images."""
    draw = torch.Generator(device).manual_seed(0)
    target = torch.empty(count, k, width, dtype=dtype, device=device)
    for part in torch.split(target, max(1, 2**16 // k)):
        part.copy_(F.normalize(torch.randn(part.shape, generator=draw, device=device), dim=-1))
    return Bank(None, target, {}, "", torch.device(device))


class Steps:
    """Steps of stage 2, and of the text tower alone, of one model on one batch.

    Args:
        model: of open_clip.
        count: candidates.
        batch: queries.
    """

    def __init__(self, model: str, count: int, batch: int):
        torch.manual_seed(0)
        self.backbone = CLIP4CIR(model)
        self.backbone.freeze_image_side()
        self.backbone.train()
        tokens = self.backbone.tokenize([TEXTS[n % len(TEXTS)] for n in range(batch)])
        width = self.text(tokens["text"][:1]).shape[1]
        self.bank = bank_of(count, 1, width)
        rows = torch.arange(batch) * (count // batch)
        references = torch.randn(batch, 1, width)
        features = ImageFeatures(references, references[:, :0])
        self.batch = TripletBatch(tokens, torch.arange(batch), rows[:, None], rows[:, None], features=features)
        self.objective = Objective(self.backbone, TEMPERATURE, candidates=BankCandidates(self.bank))
        self.fixed = torch.randn(batch, width)
        self.trained = [value for value in self.backbone.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)

    def text(self, text: Tensor) -> Tensor:
        """What the backbone computes of texts, and nothing else: (B, E)."""
        return self.backbone._encode_text(text)

    def stage2(self) -> None:
        """A step as in training."""
        self._step(self.objective(self.batch))

    def tower(self) -> None:
        """A step of the text tower alone."""
        self._step((self.text(self.batch.tokens["text"]) * self.fixed).sum())

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def dense(self) -> Tensor:
        """The loss of the batch by all scores at once."""
        assert self.batch.features is not None
        query = F.normalize(self.batch.features.reference[:, 0] + self.text(self.batch.tokens["text"]), dim=-1)
        return F.cross_entropy(query @ self.bank.target[:, 0].T / TEMPERATURE, self.batch.target[:, 0])

    def check(self) -> float:
        """The largest relative distance, by norm, of loss and gradients from the dense ones; asserts it is small."""
        found = []
        for loss in (self.objective(self.batch), self.dense()):
            gradients = torch.autograd.grad(loss, self.trained)
            found.append([loss.detach(), torch.cat([part.flatten() for part in gradients])])
        apart = max(distance(one, other) for one, other in zip(*found, strict=True))
        assert apart < NEAR, f"loss or gradients differ from the dense ones by {apart}"
        return apart


def suite(model: str = MODEL, count: int = CANDIDATES, batch: int = BATCH, rounds: int = ROUNDS) -> dict[str, Any]:
    """All measurements; asserts that loss and gradients are those of dense scores."""
    steps = Steps(model, count, batch)
    apart = steps.check()
    seconds = in_turns({way: getattr(steps, way) for way in ("stage2", "tower")}, rounds)
    width, words = steps.bank.target.shape[2], int((steps.batch.tokens["text"] > 0).sum(1).max())
    pair = seconds["stage2"], seconds["tower"]
    rows = [
        row(
            f"stage-2 step, {count:,} candidates × {width}, text tower of {model}, B = {batch}",
            "the text tower's forward, backward and optimiser step",
            pair,
            bounds=(bound("time", share(*pair), most=1.15),),
        )
    ]
    what = f"AdamW step, {words} tokens; medians of {rounds} rounds in turns"
    return report("step", what, rows, **{"distance from dense": float(f"{apart:.2g}")})


if __name__ == "__main__":
    run_command(lambda: command("step", __doc__, suite))
