"""Stage ``crossmodal``: images and their texts into one space of codes, by terms over both (MASLN)."""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from spn4cir import bank as banks
from spn4cir.backbone import Backbone
from spn4cir.backbones.masln import FEATURES, MASLN, FrozenImages, TextTower
from spn4cir.batches import TripletCollate, TripletLoader
from spn4cir.config import TrainConfig
from spn4cir.data import TrainingData
from spn4cir.errors import InputError
from spn4cir.pair_objective import PairObjective
from spn4cir.preparation import (
    Training,
    evaluate_cached,
    frozen_features,
    make_sampler,
    open_images,
    parameter_groups,
)
from spn4cir.run import Run
from spn4cir.terms import TERMS, TermSizes, WeightedTerms, check_terms
from spn4cir.types import Tokens

TEXTS_AT_ONCE = 256
IGNORED = ("negatives", "classes", "compute", "generated", "learn_temperature", "temperature", "holdout", "dropout")


def check_pairs(config: TrainConfig) -> None:
    """Raises ``InputError`` for settings of other stages, and if no term has a weight."""
    own, usual = dataclasses.asdict(config), dataclasses.asdict(TrainConfig())
    usual["compute"]["accumulate"] = own["compute"]["accumulate"]
    for name in IGNORED:
        if own[name] != usual[name]:
            raise InputError(f"{name} is for other stages: in stage crossmodal, terms are the loss")
    for name, value in own["bank"].items():
        if name != "dtype" and value != usual["bank"][name]:
            raise InputError(f"bank.{name} is for other stages: stage crossmodal has no candidates")
    check_terms(config.terms)
    if not any(config.terms.values()):
        raise InputError(f"terms: stage crossmodal needs one with a weight above 0; known: {', '.join(TERMS)}")


def prepare_pairs(config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone) -> Training:
    """The encoders, and what the terms bring, train; frozen features of images and texts are computed once."""
    if not isinstance(backbone, MASLN):
        raise InputError(
            f"stage crossmodal trains codes of images and texts: give --backbone masln, not {backbone.name}"
        )
    if lacking := next((t for t in data.triplets if t.reference is None or not t.texts or t.label is None), None):
        what = "image" if lacking.reference is None else "label" if lacking.texts else "text"
        where = lacking.reference or "an example"
        raise InputError(f"stage crossmodal needs an image, a text and a label each: {where} has no {what}")
    images, pixels, _ = open_images(config, run, data, backbone)
    tower = FrozenImages(backbone)
    tower.freeze_image_side()
    with run.accelerator.main_process_first():
        bank = frozen_features(config, tower, images, {i: pixels[i] for i in data.candidate_images(config)})
        gallery = frozen_features(config, tower, images, {i: pixels[i] for i in data.selection.image_ids})
    classes = {name: number for number, name in enumerate(sorted({str(triplet.label) for triplet in data.triplets}))}
    texts = CachedTexts(backbone, [text for triplet in data.triplets for text in triplet.texts])
    collate = TripletCollate(texts, bank.rows, images, bank, classes=classes)
    loader = TripletLoader(data.triplets, collate, make_sampler(config, run, data), config.workers)
    sizes = TermSizes(backbone.options["width"], (backbone.image_width, backbone.text_width), classes=len(classes))
    if config.terms.get("reconstruction"):
        sizes.class_vectors = embed_classes(list(classes), data, backbone, bank)
    steps = min(len(loader) * config.epochs, config.max_steps or sys.maxsize)
    objective = PairObjective(backbone, WeightedTerms(config.terms, sizes).to(run.accelerator.device), steps)
    parameter_groups(objective, config)  # raises before hours
    still = banks.FrozenCheck(tower, images(data.candidate_images(config)[0]))
    select = partial(evaluate_cached, backbone, data, images, gallery, config.eval_batch_size)
    is_rounded = config.bank.dtype != "float32"
    return Training(objective, loader, select, partial(still.check, tower), bank.fingerprint, is_rounded)


class CachedTexts:
    """Tokenizes texts of the training as their frozen features, each computed once.

    Args:
        texts: all that occur; equal ones are computed once.
    """

    def __init__(self, backbone: MASLN, texts: Sequence[str]):
        self._row = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        self._features = read_texts(backbone, list(self._row))  # (T, D_t)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """B texts → features (B, D_t)."""
        return {FEATURES: self._features[[self._row[text] for text in texts]]}


@torch.no_grad()
def read_texts(backbone: MASLN, texts: Sequence[str]) -> Tensor:
    """N texts → frozen features (N, D_t), on the CPU."""
    device, parts = next(backbone.parameters()).device, []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        tokens = backbone.tokenize(texts[start : start + TEXTS_AT_ONCE])
        parts.append(backbone.read_text({name: value.to(device) for name, value in tokens.items()}).cpu())
    return torch.cat(parts)


def embed_classes(classes: Sequence[str], data: TrainingData, backbone: MASLN, bank: banks.Bank) -> Tensor:
    """The embedding (C, D_c) of each class that is seen in training.

    It is the vector that the dataset has; else the text features of the class's name; else, where texts are given
    features, the mean of its training images' features. Raises ``InputError`` if the dataset's vectors lack a class.
    """
    if vectors := data.dataset.class_vectors():
        if lost := [name for name in classes if name not in vectors]:
            raise InputError(f"class_vectors.npy has no row for class {lost[0]!r}: classes.txt must name it")
        return torch.tensor([list(vectors[name]) for name in classes])
    if isinstance(backbone.text_tower, TextTower):
        return read_texts(backbone, classes)
    members = defaultdict[str, list[str]](list)
    for triplet in data.triplets:
        members[str(triplet.label)].append(str(triplet.reference))
    return torch.stack([bank.references(members[name])[:, 0].float().mean(0) for name in classes])
