"""Stage ``classes`` in processes of its own: classes_script.py OUTPUT trains each margin for six steps into OUTPUT."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from spn4cir.config import TrainConfig
from spn4cir.config_groups import AdamWConfig, ClassesConfig
from spn4cir.train import train

MARGINS = {"arcface": 3, "adacos": 1, "curricularface": 2, "adaface": 1}
"""Margins with a state of their own among them, and the number of centres."""


def settings(output: Path, margin: str, steps: int = 6) -> TrainConfig:
    """A short training on the embedded data."""
    return TrainConfig(
        dataset="labelled", backbone="embedding", backbone_options={"width": 16, "dropout": 0.0}, batch_size=64,
        max_steps=steps, lr=0.01, temperature=1 / 30, weight_decay=0.0, log_every=1, eval_every=0, save_every=3,
        adamw=AdamWConfig(eps=1e-2),
        classes=ClassesConfig(margin, {}, MARGINS[margin]), seed=0, output=str(output / margin),
    )  # fmt: skip


def run_all(output: Path) -> None:
    """Train each margin."""
    for margin in MARGINS:
        train(settings(output, margin), "classes")


if __name__ == "__main__":
    Accelerator.end_training = lambda self: None  # it ends the process group, which the next run here still needs
    run_all(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
