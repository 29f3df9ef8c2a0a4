"""What all stages are prepared with: images by their pixels, batches, groups of parameters, cached features."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from spn4cir import bank as banks
from spn4cir import checkpoints
from spn4cir.backbone import Backbone
from spn4cir.backbones.embedding import Embedding
from spn4cir.backbones.masln import MASLN
from spn4cir.batches import TripletLoader, TripletSampler
from spn4cir.compute import checkpoint_blocks, compile_blocks
from spn4cir.config import TrainConfig
from spn4cir.config_groups import ComputeConfig
from spn4cir.data import TrainingData, hash_pixels, merge_near_duplicates
from spn4cir.errors import InputError
from spn4cir.evaluate import evaluate
from spn4cir.images import ImageSource, takes_own_mode
from spn4cir.objective import Objective
from spn4cir.results import Result
from spn4cir.run import Run

EMBEDDED_AT_ONCE = 4096


@dataclass
class Training:
    """A training that is ready to run.

    Args:
        objective, loader: the module whose ``forward(batch)`` is the loss, and its batches.
        evaluate: evaluates the model on the selecting benchmark; all processes call it.
        check: raises ``InputError`` if something that must not move has moved; called after each epoch.
        bank: fingerprint of the bank in use, or None without a bank.
        is_rounded: whether ``evaluate`` reads features of lower precision than the model's.
    """

    objective: Objective
    loader: TripletLoader
    evaluate: Callable[[], Result]
    check: Callable[[], None] = lambda: None
    bank: str | None = None
    is_rounded: bool = False


def open_images(
    config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone
) -> tuple[ImageSource, dict[str, str], dict[str, str]]:
    """Pixels by image id; hashes of the pixels of all images, benchmarks included; and of each candidate's class.

    A class has equal pixels or, if ``negatives.near_duplicates`` says so, shows the same picture.
    """
    images = ImageSource(data.dataset.image, backbone.transform, config.keep_pixels)
    candidates, own_mode = data.candidate_images(config), takes_own_mode(backbone.transform)
    ids = [*candidates, *data.selection.image_ids, *data.reported.image_ids]
    with run.accelerator.main_process_first():  # the others find in the cache what the first has decoded
        pixels = hash_pixels(data.dataset, ids, run.say, show=run.main, own_mode=own_mode)
        classes = {image_id: pixels[image_id] for image_id in candidates}
        if config.negatives.near_duplicates:
            classes = merge_near_duplicates(data.dataset, classes, run.say, own_mode)
    return images, pixels, classes


def make_sampler(config: TrainConfig, run: Run, data: TrainingData) -> TripletSampler:
    """This process's share of each batch."""
    process = (run.accelerator.process_index, run.accelerator.num_processes)
    annotated, generated = data.split_rows()
    return TripletSampler(
        annotated, generated, config.batch_size, config.generated_share, config.seed, process,
        config.compute.accumulate,
    )  # fmt: skip


@torch.no_grad()
def fit_statistics(backbone: Backbone, data: TrainingData, images: ImageSource, seed: int) -> None:
    """Give a backbone the training images that its statistics are to be fitted to, if it wants any.

    Raises ``InputError`` if no triplet has a reference.
    """
    if not (count := backbone.statistics_sample):
        return
    triplets, targets = data.sample_references(count, seed)
    if not triplets:
        raise InputError(f"{backbone.name} fits statistics to reference images, and no training triplet has one")
    references = images.stack([str(triplet.reference) for triplet in triplets])
    backbone.fit_statistics(references, [triplet.label for triplet in triplets], images.stack(targets))


def parameter_groups(objective: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters by decay, which only matrices have, and by the factor of their learning rate.

    Raises ``InputError`` if a text in ``lr_scale`` is in no trainable parameter's name.
    """
    trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    for text in config.lr_scale:
        if not any(text in name for name in trainable):
            raise InputError(f"lr_scale: no parameter that trains has {text!r} in its name, as {next(iter(trainable))}")
    scale = {n: next((f for text, f in config.lr_scale.items() if text in n), 1.0) for n in trainable}
    return [
        {
            "params": [p for n, p in trainable.items() if (p.ndim > 1) == matrices and scale[n] == factor],
            "weight_decay": config.weight_decay if matrices else 0.0,
            "scale": factor,
        }
        for factor in dict.fromkeys(scale.values())
        for matrices in (True, False)
    ]


def prepare_compute(backbone: Backbone, compute: ComputeConfig) -> None:
    """Let the backbone compute as the settings say. Raises ``InputError`` if it has no blocks for that."""
    backbone.chunk = compute.chunk
    for name, prepare in (("checkpoint", checkpoint_blocks), ("compile", compile_blocks)):
        if getattr(compute, name) and not prepare(backbone):
            raise InputError(f"compute.{name}: {backbone.name} has no blocks that follow each other")


def frozen_features(config: TrainConfig, backbone: Backbone, images: ImageSource, hashes: dict[str, str]) -> banks.Bank:
    """The bank of these images with the parts and the type that the settings name."""
    parts = banks.stored_parts(config.bank.dtype, config.bank.references == "stored")
    root = checkpoints.runs_root() / "banks"
    return banks.load_or_build(backbone, images, hashes, root, config.eval_batch_size, parts)


@torch.no_grad()
def evaluate_cached(
    backbone: Embedding | MASLN, data: TrainingData, images: ImageSource, features: banks.Bank | None, batch_size: int
) -> Result:
    """Evaluate on the selecting benchmark; cached reference features of its images are embedded anew, if given."""
    if features is None:
        return evaluate(backbone, data.selection, images, batch_size=batch_size)
    assert features.reference is not None
    was_training, device = backbone.training, next(backbone.parameters()).device
    backbone.eval()
    rows = range(len(features.reference))
    parts = [rows[n : n + EMBEDDED_AT_ONCE] for n in range(0, len(rows), EMBEDDED_AT_ONCE)]
    vectors = [backbone.embed(features.reference[part].to(device)).cpu() for part in parts]
    backbone.train(was_training)
    embedded = replace(features, target=torch.cat(vectors)[:, None])
    return evaluate(backbone, data.selection, images, embedded, batch_size=batch_size)
