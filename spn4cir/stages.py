"""What prepares each kind of training: model, candidates and batches. A further objective is a further preparation.

``STAGES`` names them: a new one is a function here, or elsewhere, one line in the dictionary and one test.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spn4cir import bank as banks
from spn4cir import checkpoints
from spn4cir.backbone import Backbone
from spn4cir.backbones import BACKBONES, INSIDE, build_backbone, check_backbone
from spn4cir.batches import KnownTargets, TripletCollate, TripletLoader, TripletSampler
from spn4cir.compute import checkpoint_blocks, compile_blocks
from spn4cir.config import ComputeConfig, TrainConfig, training_command
from spn4cir.data import Say, TrainingData, hash_pixels, merge_near_duplicates
from spn4cir.errors import InputError
from spn4cir.evaluate import evaluate
from spn4cir.images import ImageSource, takes_own_mode
from spn4cir.objective import BankCandidates, Objective, StoredTargets, initial_temperature
from spn4cir.results import Result
from spn4cir.run import Run, options_of

SOURCES = {"model", "pretrained", "config", "tokenizer"}
"""Options of a backbone that say where weights and vocabulary come from."""


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


def check_stage1(config: TrainConfig) -> None:
    """Raises ``InputError`` for settings of stage 2, and for batches without a negative."""
    for name in ("limit", "extra"):
        if getattr(config.bank, name) is not None:
            raise InputError(f"bank.{name} is for stage 2: the candidates of stage 1 are the targets of the batch")
    if config.batch_size // config.compute.accumulate < 2:
        raise InputError(
            f"batch_size {config.batch_size} in {config.compute.accumulate} parts leaves one triplet, without any "
            "negative: raise batch_size, or lower compute.accumulate"
        )


def prepare_stage1(config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone) -> Training:
    """Both sides train; candidates are the targets of the batch."""
    images, pixels, classes = _open_images(config, run, data, backbone)
    fit_statistics(backbone, data, images, config.seed)
    ids = data.candidate_images(config)
    bank: banks.Bank | None = None
    gallery: banks.Bank | None = None
    more: dict[str, Any] = {}
    if config.bank.in_stage1:
        if any(value.requires_grad for value in _parameters(backbone.image_side())):
            what = f"the image side of {backbone.name} trains in stage 1, with these options"
            raise InputError(f"bank.in_stage1: {what}: set bank.in_stage1 to false")
        backbone.freeze_image_side()
        bank, gallery = _open_banks(config, run, data, backbone, images, pixels, classes)
        still = banks.FrozenCheck(backbone, images(ids[0]))
        more = {"check": partial(still.check, backbone), "bank": bank.fingerprint}
    identity = bank.rows if bank else banks.assign_rows(classes)
    known = KnownTargets(data.triplets, identity)
    collate = TripletCollate(backbone.tokenize, identity, images, bank, known)
    loader = TripletLoader(data.triplets, collate, _sampler(config, run, data), config.workers)
    prepare_compute(backbone, config.compute)
    objective = Objective(
        backbone, config.temperature, config.learn_temperature, StoredTargets(bank) if bank else None,
        config.negatives.types, config.negatives.max_similarity, config.negatives.margin,
    )  # fmt: skip
    if objective.needs_whole_triplets and (known.is_partial or known.positives > 1 or known.negatives):
        raise InputError(
            f"stage 1 of {backbone.name} with negatives.types {list(objective.types)} needs a reference, "
            "a text and one target in each triplet: some triplets have fewer, or more"
        )
    if bank and (objective.needs_whole_triplets or objective.margin is not None):
        raise InputError(
            f"bank.in_stage1: stage 1 of {backbone.name} with these negatives needs more of targets than is stored: "
            "set bank.in_stage1 to false"
        )
    select = partial(evaluate, backbone, data.selection, images, gallery, batch_size=config.eval_batch_size)
    return Training(objective, loader, select, is_rounded=_is_rounded(config, gallery), **more)


def _parameters(parts: Iterable[nn.Module | nn.Parameter]) -> Iterator[nn.Parameter]:
    """Parameters of modules, and those that stand by themselves."""
    for part in parts:
        yield from [part] if isinstance(part, nn.Parameter) else part.parameters()


def _open_banks(
    config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone, images: ImageSource,
    pixels: dict[str, str], classes: dict[str, str],
) -> tuple[banks.Bank, banks.Bank | None]:  # fmt: skip
    """The bank of the candidates, and one of what evaluation ranks, so that it need not encode images again."""
    with run.accelerator.main_process_first():
        bank = frozen_features(config, backbone, images, classes)
        if bank.reference is None or data.selection.texts:
            return bank, None
        shown = {image_id: pixels[image_id] for image_id in data.selection.image_ids}
        is_held = shown.items() <= classes.items()  # as with held-out triplets; no two of them became one
        return bank, bank if is_held else frozen_features(config, backbone, images, shown)


def _is_rounded(config: TrainConfig, gallery: banks.Bank | None) -> bool:
    return gallery is not None and config.bank.dtype != "float32"


def check_stage2(config: TrainConfig) -> None:
    """Raises ``InputError`` for settings of stage 1."""
    if config.bank.in_stage1:
        raise InputError("bank.in_stage1 is for stage 1: stage 2 always has a bank")
    if config.negatives.types != ["target"]:
        raise InputError(f"negatives.types {config.negatives.types} is for stage 1: a bank holds targets alone")
    if config.negatives.margin is not None:
        raise InputError("negatives.margin is for stage 1: a bank's candidates all count")


def prepare_stage2(config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone) -> Training:
    """The query side trains; the image side is frozen, and candidates are all rows of a bank."""
    images, pixels, classes = _open_images(config, run, data, backbone)
    fit_statistics(backbone, data, images, config.seed)
    ids = data.candidate_images(config)
    backbone.freeze_image_side()
    prepare_compute(backbone, config.compute)
    parameter_groups(Objective(backbone, config.temperature, config.learn_temperature), config)  # raises before hours
    bank, gallery = _open_banks(config, run, data, backbone, images, pixels, classes)
    frozen = banks.FrozenCheck(backbone, images(ids[0]))
    collate = TripletCollate(backbone.tokenize, bank.rows, images, bank, KnownTargets(data.triplets, bank.rows))
    loader = TripletLoader(data.triplets, collate, _sampler(config, run, data), config.workers)
    ranked = bank.first_rows(1 + max(bank.rows[i] for i in data.ranked_images(config)))
    local = ranked.shard(run.accelerator.process_index, run.accelerator.num_processes).to(run.accelerator.device)
    if not local.resident:
        run.say("the bank does not fit on the device: it is read ahead from disk, at each step")
    objective = Objective(
        backbone, config.temperature, config.learn_temperature, BankCandidates(local, config.bank.limit, config.seed),
        max_similarity=config.negatives.max_similarity,
    )  # fmt: skip
    select = partial(evaluate, backbone, data.selection, images, gallery, batch_size=config.eval_batch_size)
    check = partial(frozen.check, backbone)
    return Training(objective, loader, select, check, bank.fingerprint, _is_rounded(config, gallery))


STAGES: dict[Any, Callable[[TrainConfig, Run, TrainingData, Backbone], Training]] = {
    1: prepare_stage1,
    2: prepare_stage2,
}
CHECKS: dict[Any, Callable[[TrainConfig], None]] = {1: check_stage1, 2: check_stage2}
"""Raises ``InputError`` for settings that a stage would ignore, before anything is read; not all stages have one."""


def _open_images(
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


def _sampler(config: TrainConfig, run: Run, data: TrainingData) -> TripletSampler:
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


def resolve_temperature(config: TrainConfig, backbone: Backbone, say: Say = print) -> None:
    """Put a number in the place of ``temperature: null``, and say where it is from."""
    if config.temperature is None:
        config.temperature = initial_temperature(backbone)
        source = "published start: the weights hold none" if backbone.temperature is None else "of the starting weights"
        say(f"temperature {config.temperature:.6g}, {source}")


def load_backbone(config: TrainConfig, stage: Any, say: Say = print) -> Backbone:
    """The model to start from: ``init``, else for stage 2 the newest stage 1, else a new one from its options.

    Options that differ from those of ``init`` hold, and what only they bring is initialised anew; but options that say
    where weights come from do not, and that is printed.
    """
    if inside := config.backbone_options.keys() & set(INSIDE):
        raise InputError(f"backbone {config.backbone}: {inside.pop()} is not for a recipe to set")
    if stage != 2 and not config.init:
        return build_backbone(config.backbone, **config.backbone_options)
    if not config.init:
        run = checkpoints.newest_run(config.dataset, config.backbone, stage=1)
        if run is None:
            where = checkpoints.runs_root() / config.dataset / config.backbone
            raise InputError(
                f"stage 2 starts from a completed stage 1 run, and {where} holds none: "
                f"run {training_command(1)}{options_of(config)} first, or give --init FOLDER"
            )
        config.init = str(run)
    name, options = checkpoints.read_model(Path(config.init))
    check_backbone(name)
    if name != config.backbone:
        raise InputError(f"{config.init} holds a {name}, and the backbone is {config.backbone}: give --backbone {name}")
    changes = {key: value for key, value in config.backbone_options.items() if options.get(key) != value}
    for key in sorted(SOURCES & changes.keys()):
        say(f"{config.init} is the start: its own {key} holds, and {changes.pop(key)!r} of backbone_options does not")
    for fixed in sorted(BACKBONES[name].fixed_options):
        group, _, setting = fixed.partition(".")
        then, now = options.get(group), changes.get(group)
        if isinstance(then, dict) and isinstance(now, dict) and setting in now and now[setting] != then[setting]:
            raise InputError(
                f"{config.init} was made with {fixed} {then[setting]!r}: it cannot become {now[setting]!r}"
            )
    return checkpoints.load_model(Path(config.init), changes)
