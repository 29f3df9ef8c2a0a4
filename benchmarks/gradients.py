"""Stage 1 with cached gradients against the plain step on the same batch: equal gradients, and what is held meanwhile.

The real objective on the embedded CLIP with a vision transformer, whose every part trains, with random pixels: all
images of a batch are unique. Memory is what a step takes beyond the model, its gradients and the batch: activations.
Cached gradients go through the images in eight chunks, and through the texts in chunks of the same size; checkpointed
blocks keep what is between.

examples:
  python -m benchmarks.gradients                         # half a minute on two cores
  python -m benchmarks.gradients --json benchmarks/results/gradients.json
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import bound, command, in_turns, peaks, report, row, share
from benchmarks.step import TEXTS
from spn4cir.backbones.clip4cir import CLIP4CIR
from spn4cir.backbones.shared_clip import EMBEDDED
from spn4cir.batches import TripletBatch
from spn4cir.compute import checkpoint_blocks
from spn4cir.errors import run_command
from spn4cir.objective import Objective

BATCH, CHUNKS, ROUNDS, TEMPERATURE, NEAR = 128, 8, 3, 0.06, 1e-5
WAYS = {"cached gradients": (True, False), "checkpointed blocks": (False, True)}
"""By name, whether there are chunks, and whether blocks are checkpointed."""
PLAIN = (False, False)


class Step:
    """Loss and gradients of one batch.

    Args:
        way: whether images and texts go through in chunks, and whether blocks are checkpointed.
        batch: triplets, of two images each.
    """

    def __init__(self, way: tuple[bool, bool], batch: int):
        torch.manual_seed(0)
        chunked, checkpointed = way
        self.backbone = CLIP4CIR(f"local-dir:{EMBEDDED / 'clip_transformer'}")
        self.backbone.chunk = 2 * batch // CHUNKS if chunked else None
        assert not checkpointed or checkpoint_blocks(self.backbone)
        self.backbone.train()
        side = self.backbone.clip.visual.image_size
        side = side[0] if isinstance(side, tuple) else side
        rows = torch.arange(batch)
        target = batch + rows[:, None]
        tokens = self.backbone.tokenize([f"{TEXTS[n % len(TEXTS)]} {n}" for n in range(batch)])
        pixels = torch.randn(2 * batch, 3, side, side)
        self.batch = TripletBatch(tokens, rows, target, target, pixels=pixels)
        self.objective = Objective(self.backbone, TEMPERATURE, learn_temperature=True)

    def __call__(self) -> None:
        """Gradients stay where they are, so that they are no part of what a second call takes."""
        self.objective.zero_grad(set_to_none=False)
        self.loss: Tensor = self.objective(self.batch)
        self.loss.backward()
        self.loss = self.loss.detach()

    def distance(self, other: "Step") -> float:
        """Of the gradients of two steps, all together and the farthest one, by norm; the latter if it counts at all."""
        pairs = {name: value.grad for name, value in self.objective.named_parameters() if value.grad is not None}
        own = {name: value.grad for name, value in other.objective.named_parameters() if value.grad is not None}
        assert pairs.keys() == own.keys() and len(own) > 2
        floor = 1e-3 * max(float(value.norm()) for value in own.values())  # zero but for rounding
        return max(float((pairs[name] - own[name]).norm()) / max(float(own[name].norm()), floor) for name in own)


def prepare(batch: int) -> dict[str, Step]:
    """All ways, with a model each."""
    return {name: Step(way, batch) for name, way in ({"plain": PLAIN} | WAYS).items()}


def suite(batch: int = BATCH, rounds: int = ROUNDS) -> dict[str, Any]:
    """All measurements; asserts that losses and gradients are equal but for rounding."""
    steps = prepare(batch)
    seconds = in_turns(steps, rounds)
    plain, rows = steps.pop("plain"), []
    memory = peaks(prepare, batch)
    for name, step in steps.items():
        apart = step.distance(plain)
        assert apart < NEAR, f"gradients of {name} differ by {apart}"
        assert abs(float(step.loss - plain.loss)) < NEAR * float(plain.loss), f"the loss of {name} differs"
        bounds = [bound("gradients' distance", float(f"{apart:.2g}"), most=NEAR)]
        if name == "cached gradients":
            bounds.append(bound("memory", share(memory[name], memory["plain"]), most=0.25))
        what = f"stage 1, B = {batch}, {name}" + (f", {CHUNKS} chunks" if WAYS[name][0] else "")
        rows.append(
            row(
                what,
                "plain, same batch",
                (seconds[name], seconds["plain"]),
                (memory[name], memory["plain"]),
                tuple(bounds),
            )
        )
    return report("gradients", f"loss and all gradients; medians of {rounds} rounds in turns", rows)


if __name__ == "__main__":
    run_command(lambda: command("gradients", __doc__, suite))
