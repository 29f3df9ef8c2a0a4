"""A toy objective: queries against learned centres of classes."""

from spn4cir.backbone import Backbone
from spn4cir.bank import assign_rows
from spn4cir.batches import KnownTargets, TripletCollate, TripletLoader, TripletSampler
from spn4cir.config import TrainConfig
from spn4cir.data import TrainingData, hash_pixels
from spn4cir.evaluate import evaluate
from spn4cir.images import ImageSource
from spn4cir.objective import ClassCentres, Objective
from spn4cir.preparation import Training
from spn4cir.run import Run


def prepare_centres(config: TrainConfig, run: Run, data: TrainingData, backbone: Backbone) -> Training:
    """Labelled triplets; two sub-centres for each class."""
    triplets = [triplet for triplet in data.triplets if triplet.label]
    classes = {label: n for n, label in enumerate(sorted({triplet.label or "" for triplet in triplets}))}
    images = ImageSource(data.dataset.image, backbone.transform)
    identity = assign_rows(hash_pixels(data.dataset, data.candidate_images(config), run.say, show=False))
    known = KnownTargets(triplets, identity)
    collate = TripletCollate(backbone.tokenize, identity, images, known=known, classes=classes)
    sampler = TripletSampler(range(len(triplets)), [], config.batch_size, None, config.seed)
    objective = Objective(backbone, config.temperature, candidates=ClassCentres(len(classes), 2, 16))
    return Training(
        objective, TripletLoader(triplets, collate, sampler), lambda: evaluate(backbone, data.selection, images)
    )
