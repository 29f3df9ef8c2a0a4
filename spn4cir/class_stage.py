"""Stage ``classes``: images against learned centres of their classes (UniFEx)."""

import dataclasses
from collections import Counter
from functools import partial

from spn4cir import bank as banks
from spn4cir.backbone import Backbone
from spn4cir.backbones.embedding import Embedding, TowerFeatures
from spn4cir.batches import BalancedSampler, TripletCollate, TripletLoader, TripletSampler
from spn4cir.class_objective import ClassObjective, build_margin, find_margin
from spn4cir.config import TrainConfig
from spn4cir.data import TrainingData
from spn4cir.errors import InputError
from spn4cir.margins import ArcFace
from spn4cir.objective import ClassCentres
from spn4cir.preparation import (
    Training,
    evaluate_cached,
    frozen_features,
    make_sampler,
    open_images,
    parameter_groups,
    prepare_compute,
)
from spn4cir.run import Run


def check_classes(config: TrainConfig) -> None:
    """Raises ``InputError`` for settings of other stages."""
    own, usual = dataclasses.asdict(config), dataclasses.asdict(TrainConfig())
    for name in ("negatives", "generated", "learn_temperature", "holdout", "terms"):
        if own[name] != usual[name]:
            raise InputError(f"{name} is for other stages: in stage classes, images are scored against classes")
    for name, value in own["bank"].items():
        if name != "dtype" and value != usual["bank"][name]:
            raise InputError(f"bank.{name} is for other stages: stage classes has no bank of candidates")
    if find_margin(config.classes.margin).observe is not ArcFace.observe and config.compute.accumulate > 1:
        what = f"classes.margin {config.classes.margin} follows the images of a whole batch"
        raise InputError(f"{what}: set compute.accumulate to 1")
    if config.mixed_precision == "fp16":
        raise InputError("mixed_precision fp16 is not for stage classes, which takes bf16: set mixed_precision bf16")


def prepare_classes(config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone) -> Training:
    """Centres, and the neck, train; and blocks of the tower where ``blocks`` says so. A frozen tower encodes once."""
    if lacking := next((t for t in data.triplets if t.label is None or t.reference is None), None):
        what = (
            f"{lacking.reference or 'an example'} has no label" if lacking.label is None else "an example has no image"
        )
        raise InputError(f"stage classes needs images with labels, as dataset labelled has: {what}")
    if not isinstance(backbone, Embedding) or (backbone.neck is None and not backbone.options["blocks"]):
        raise InputError(f"stage classes trains backbone embedding with a neck or blocks; {backbone.name} has neither")
    counts = Counter(str(triplet.label) for triplet in data.triplets)
    names = sorted(counts)
    if len(names) < 2:
        raise InputError(
            f"stage classes needs two classes in training at least, and there is {names[0] if names else 0}"
        )
    margin = build_margin(
        config.classes.margin, config.classes.options, float(config.temperature or 0), [counts[name] for name in names]
    )
    images, pixels, _ = open_images(config, run, data, backbone)
    identity = banks.assign_rows(pixels)
    bank: banks.Bank | None = None
    gallery: banks.Bank | None = None
    tower = TowerFeatures(backbone)
    if not backbone.options["blocks"]:
        tower.freeze_image_side()
        with run.accelerator.main_process_first():
            trained = {i: pixels[i] for i in data.candidate_images(config)}
            bank = frozen_features(config, tower, images, trained)
            identity = bank.rows
            gallery = frozen_features(config, tower, images, {i: pixels[i] for i in data.selection.image_ids})
    classes = {name: number for number, name in enumerate(names)}
    collate = TripletCollate(backbone.tokenize, identity, images, bank, classes=classes)
    loader = TripletLoader(data.triplets, collate, choose_sampler(config, run, data), config.workers)
    prepare_compute(backbone, config.compute)
    width = backbone.options["width"] if backbone.neck else backbone.features
    process = (run.accelerator.process_index, run.accelerator.num_processes)
    centres = ClassCentres(len(names), config.classes.centres, width, process)
    objective = ClassObjective(backbone, margin, centres)
    parameter_groups(objective, config)  # raises before hours
    select = partial(evaluate_cached, backbone, data, images, gallery, config.eval_batch_size)
    if bank is None:
        return Training(objective, loader, select)
    still = banks.FrozenCheck(tower, images(data.candidate_images(config)[0]))
    is_rounded = config.bank.dtype != "float32"
    return Training(objective, loader, select, partial(still.check, tower), bank.fingerprint, is_rounded)


def choose_sampler(config: TrainConfig, run: Run, data: TrainingData) -> TripletSampler:
    """Each image once in an epoch, or as many of each source in each batch."""
    if config.classes.balance is None:
        return make_sampler(config, run, data)
    sources = [str(triplet.label).partition("/")[0] for triplet in data.triplets]  # a class is SOURCE/LABEL
    process = (run.accelerator.process_index, run.accelerator.num_processes)
    return BalancedSampler(sources, config.batch_size, config.seed, process, config.compute.accumulate)
