"""What prepares each kind of training: model, candidates and batches. A further objective is a further preparation.

``STAGES`` names them: a new one is a function here, or elsewhere, one line in the dictionary and one test.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spn4cir import bank as banks
from spn4cir import checkpoints
from spn4cir.backbone import Backbone
from spn4cir.backbones import BACKBONES, INSIDE, build_backbone, check_backbone
from spn4cir.batches import KnownTargets, TripletCollate, TripletLoader
from spn4cir.class_stage import check_classes, prepare_classes
from spn4cir.config import TrainConfig, training_command
from spn4cir.data import Say, TrainingData
from spn4cir.dataset import Dataset
from spn4cir.datasets import load_dataset
from spn4cir.errors import InputError
from spn4cir.evaluate import evaluate
from spn4cir.images import ImageSource
from spn4cir.in_batch import TripletMargin
from spn4cir.objective import BankCandidates, Objective, StoredTargets, initial_temperature
from spn4cir.pair_stage import check_pairs, prepare_pairs
from spn4cir.preparation import (
    Training,
    fit_statistics,
    frozen_features,
    make_sampler,
    open_images,
    parameter_groups,
    prepare_compute,
)
from spn4cir.provenance import folder_of
from spn4cir.run import Run, options_of
from spn4cir.terms import TermSizes, WeightedTerms, check_terms

KEEPABLE = 1 << 30
"""Bytes of decoded images that memory may be expected to hold beside a training."""
SOURCES = {"model", "pretrained", "config", "tokenizer"}
"""Options of a backbone that say where weights and vocabulary come from."""
STAGE1_TERMS = ("correlation", "adversary", "classification")
"""Terms that need no more than queries, their targets, and the targets' classes."""


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
    check_terms(config.terms, STAGE1_TERMS, "1")
    if any(config.terms.values()) and (config.bank.in_stage1 or config.negatives.margin is not None):
        raise InputError("terms in stage 1 need targets that are encoded and InfoNCE: unset bank.in_stage1 and margin")


def prepare_stage1(config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone) -> Training:
    """Both sides train; candidates are the targets of the batch."""
    images, pixels, classes = open_images(config, run, data, backbone)
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
    loader = TripletLoader(data.triplets, collate, make_sampler(config, run, data), config.workers)
    if not (bank or config.keep_pixels or config.workers) and config.epochs > 1:
        suggest_keeping(len(ids), images(ids[0]).nbytes, config.epochs, run.say)
    prepare_compute(backbone, config.compute)
    objective = Objective(
        backbone, config.temperature, config.learn_temperature, StoredTargets(bank) if bank else None,
        config.negatives.types, config.negatives.max_similarity,
        None if config.negatives.margin is None else TripletMargin(config.negatives.margin, config.seed),
    )  # fmt: skip
    if objective.needs_whole_triplets and (known.is_partial or known.positives > 1 or known.negatives):
        raise InputError(
            f"stage 1 of {backbone.name} with negatives.types {list(objective.types)} needs a reference, "
            "a text and one target in each triplet: some triplets have fewer, or more"
        )
    if bank and objective.needs_whole_triplets:
        raise InputError(
            f"bank.in_stage1: stage 1 of {backbone.name} with these negatives needs more of targets than is stored: "
            "set bank.in_stage1 to false"
        )
    if any(config.terms.values()):
        _add_terms(objective, config, data, images, identity, loader)
    select = partial(evaluate, backbone, data.selection, images, gallery, batch_size=config.eval_batch_size)
    return Training(objective, loader, select, is_rounded=_is_rounded(config, gallery), **more)


def _add_terms(
    objective: Objective, config: TrainConfig, data: TrainingData, images: ImageSource,
    identity: Mapping[str, int], loader: TripletLoader,
) -> None:  # fmt: skip
    """Add ``terms`` between composed queries and their targets, whose class is their category in the dataset."""
    backbone = objective.backbone
    device = next(backbone.parameters()).device
    with torch.no_grad():
        width = backbone.eval().encode_target(images.stack([next(iter(identity))]).to(device)).shape[2]
    categories = {image_id: data.dataset.category(image_id) for image_id in identity}
    classes = {name: number for number, name in enumerate(sorted({*categories.values()} - {""}))}
    if config.terms.get("classification") and not classes:
        raise InputError(f"terms.classification needs a category of each image, and {data.dataset.name} has none")
    class_of = torch.full((max(identity.values()) + 1,), -1)
    for image_id, number in identity.items():
        class_of[number] = classes.get(categories[image_id], -1)
    steps = min(len(loader) * config.epochs, config.max_steps or sys.maxsize)
    terms = WeightedTerms(config.terms, TermSizes(width, classes=len(classes))).to(device)
    objective.add_terms(terms, steps, class_of.to(device))


def suggest_keeping(images: int, size: int, epochs: int, say: Say) -> None:
    """Say that images of ``size`` bytes each, decoded in each epoch, would fit into memory, if they do."""
    if images * size <= KEEPABLE:
        memory = f"{images * size / 1e6:,.0f} MB"
        say(f"{images:,} images are decoded in each of {epochs} epochs: --keep-pixels true keeps them in {memory}")


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
    check_terms(config.terms, (), "2")
    if config.bank.in_stage1:
        raise InputError("bank.in_stage1 is for stage 1: stage 2 always has a bank")
    if config.negatives.types != ["target"]:
        raise InputError(f"negatives.types {config.negatives.types} is for stage 1: a bank holds targets alone")
    if config.negatives.margin is not None:
        raise InputError("negatives.margin is for stage 1: a bank's candidates all count")


def prepare_stage2(config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone) -> Training:
    """The query side trains; the image side is frozen, and candidates are all rows of a bank."""
    images, pixels, classes = open_images(config, run, data, backbone)
    fit_statistics(backbone, data, images, config.seed)
    ids = data.candidate_images(config)
    backbone.freeze_image_side()
    prepare_compute(backbone, config.compute)
    parameter_groups(Objective(backbone, config.temperature, config.learn_temperature), config)  # raises before hours
    bank, gallery = _open_banks(config, run, data, backbone, images, pixels, classes)
    frozen = banks.FrozenCheck(backbone, images(ids[0]))
    collate = TripletCollate(backbone.tokenize, bank.rows, images, bank, KnownTargets(data.triplets, bank.rows))
    loader = TripletLoader(data.triplets, collate, make_sampler(config, run, data), config.workers)
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
    "classes": prepare_classes,
    "crossmodal": prepare_pairs,
}
CHECKS: dict[Any, Callable[[TrainConfig], None]] = {
    1: check_stage1, 2: check_stage2, "classes": check_classes, "crossmodal": check_pairs,
}  # fmt: skip
"""Raises ``InputError`` for settings that a stage would ignore, before anything is read; not all stages have one."""


def resolve_temperature(config: TrainConfig, backbone: Backbone, say: Say = print) -> None:
    """Put a number in the place of ``temperature: null``, and say where it is from."""
    if config.temperature is None:
        config.temperature = initial_temperature(backbone)
        source = "published start: the weights hold none" if backbone.temperature is None else "of the starting weights"
        say(f"temperature {config.temperature:.6g}, {source}")


def load_backbone(config: TrainConfig, stage: Any, say: Say = print, dataset: Dataset | None = None) -> Backbone:
    """The model to start from: ``init``, else for stage 2 the newest stage 1 on these images, else a new one.

    Options that differ from those of ``init`` hold, and what only they bring is initialised anew; but options that say
    where weights come from do not, and that is printed.
    """
    if inside := config.backbone_options.keys() & set(INSIDE):
        raise InputError(f"backbone {config.backbone}: {inside.pop()} is not for a recipe to set")
    if stage != 2 and not config.init:
        return build_backbone(config.backbone, **config.backbone_options)
    if not config.init:
        dataset = dataset or load_dataset(config.dataset, config.data_root)
        run = checkpoints.find_newest_run(dataset, config.backbone, stage=1)
        if run is None:
            where = folder_of(checkpoints.runs_root() / config.dataset, dataset.provenance()) / config.backbone
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
