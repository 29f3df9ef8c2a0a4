"""The data of a training: triplets, the benchmark that selects, images by their pixels."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from spn4cir import checkpoints
from spn4cir.config import TrainConfig
from spn4cir.dataset import Dataset
from spn4cir.datasets import load_dataset, open_extra_images
from spn4cir.datasets.generated import MAKE, open_generated
from spn4cir.datasets.skip import skip_notes
from spn4cir.errors import InputError
from spn4cir.identity import PUBLISHED_CLASSES, group_near_duplicates, inspect_images, read_optimized
from spn4cir.provenance import describe_others, folder_of, read_provenance
from spn4cir.results import metric_names, primary_names
from spn4cir.triplets import Numbers, TripletTable, join_triplets, named_images
from spn4cir.types import Benchmark, Query, Triplet, recall_measures

Say = Callable[[str], None]
NAMED = 20  # broken images that a message names
HOLDOUT_GALLERY = 10_000
"""Held-out triplets are ranked over so many images, or over all images of the triplets if there are fewer."""


@dataclass
class TrainingData:
    """What a run trains on and is selected on.

    Args:
        triplets: annotated ones, then generated ones.
        selection: the benchmark that selects the best state.
        reported: the benchmark whose metrics the run reports; the same unless a hold-out split selects.
        extra: images that no triplet names.
    """

    dataset: Dataset
    triplets: Sequence[Triplet]
    selection: Benchmark
    reported: Benchmark
    extra: Sequence[str] = ()

    def candidate_images(self, config: TrainConfig) -> list[str]:
        """Images of the bank, in a fixed order: those that triplets name, the rest of training, and extra ones.

        Where targets alone are ranked, they and the extra ones come first, and the references after them.
        """
        if config.bank.images == "targets":
            return list(dict.fromkeys([*self.ranked_images(config), *named_images(self.triplets)]))
        rest = self.dataset.training_images() if config.bank.images == "all" else []
        return list(dict.fromkeys([*named_images(self.triplets), *rest, *self.extra]))

    def ranked_images(self, config: TrainConfig) -> list[str]:
        """Those of ``candidate_images`` that queries are ranked against."""
        if config.bank.images != "targets":
            return self.candidate_images(config)
        return list(dict.fromkeys([*(i for t in self.triplets for i in (*t.targets, *t.negatives)), *self.extra]))

    def sample_references(self, count: int, seed: int) -> tuple[list[Triplet], list[str]]:
        """Triplets with different references, ``count`` at most, and a third as many target images."""
        many = min(len(self.triplets), 8 * count)  # as several triplets may share a reference
        order = random.Random(f"references/{seed}").sample(range(len(self.triplets)), many)
        found: dict[str, Triplet] = {}
        targets: dict[str, None] = {}
        for number in order:
            triplet = self.triplets[number]
            if triplet.reference is not None:
                found.setdefault(triplet.reference, triplet)
            if len(targets) < count // 3:
                targets[(triplet.targets or triplet.image_ids)[0]] = None  # a class's example has no target
            if len(found) == count:
                break
        return list(found.values()), list(targets)

    def split_rows(self) -> tuple[Sequence[int] | Numbers, Sequence[int] | Numbers]:
        """Row numbers of annotated and of generated triplets; arrays for a table of triplets."""
        if isinstance(self.triplets, TripletTable):
            return self.triplets.split_rows()
        generated = [triplet.generated for triplet in self.triplets]
        return [n for n, made in enumerate(generated) if not made], [n for n, made in enumerate(generated) if made]


def load_data(config: TrainConfig, say: Say) -> TrainingData:
    """Load what a configuration names; takes out of its ``select_by`` what the selecting benchmark lacks.

    Raises ``InputError`` if files are missing or damaged, or there is no triplet to train on.
    """
    dataset = load_dataset(config.dataset, config.data_root)
    has_benchmark = bool(dataset.protocols) or config.holdout is None  # a catalogue may come without any query
    benchmark = dataset.benchmark("val", config.protocol) if has_benchmark else None
    dataset, triplets, selection = load_triplets(config, dataset, benchmark, say)
    extra: list[str] = []
    if config.bank.extra:
        dataset, extra = open_extra_images(dataset, config.bank.extra)
    return TrainingData(dataset, triplets, selection, benchmark or selection, extra)


def load_triplets(
    config: TrainConfig, dataset: Dataset, benchmark: Benchmark | None, say: Say
) -> tuple[Dataset, Sequence[Triplet], Benchmark]:
    """The dataset, with images that only generated triplets name; the triplets; and the benchmark that selects.

    Triplets are the annotated ones, up to the limit, then the generated ones. Annotated triplets are held out where
    there are any. Raises ``InputError`` if there are no triplets, or the benchmark lacks a metric to select by.
    """
    for note in (*dataset.notes(), *skip_notes(dataset)):
        say(note)
    for name in config.select_by or ():
        if benchmark and name not in metric_names(benchmark):
            known = ", ".join(metric_names(benchmark))
            raise InputError(f"select_by: {benchmark.name} has no metric {name!r}; known: {known}")
    triplets: Sequence[Triplet] = dataset.triplets()[: config.max_annotated]
    generated: Sequence[Triplet] = []
    if config.generated:
        is_auto = config.generated == "auto"
        path = find_generated(dataset, config.backbone) if is_auto else dataset.file(config.generated)
        ranked = benchmark.gallery if benchmark else ()
        dataset, generated, notes = open_generated(path, dataset, ranked, may_have_others=not is_auto)
        for note in notes:
            say(note)
    if not triplets and not generated:
        more = "raise max_annotated, or " * dataset.has_triplets
        raise InputError(f"no triplets to train on: {more}give generated ones")
    if config.holdout is None:
        assert benchmark is not None
        return dataset, join_triplets(triplets, generated), benchmark
    if triplets:
        triplets, selection = split_holdout(config, triplets)
    else:
        generated, selection = split_holdout(config, generated)
    lacking = [name for name in config.select_by or () if name not in metric_names(selection)]
    if lacking:
        config.select_by = [name for name in config.select_by or () if name not in lacking] or None
        names = ", ".join(config.select_by or primary_names(selection))
        say(f"{selection.name} has no {', '.join(lacking)}: selected by {names}")
    return dataset, join_triplets(triplets, generated), selection


def find_generated(dataset: Dataset, backbone: str) -> Path:
    """The file that spn4cir-triplets writes by default for a dataset's images.

    Raises ``InputError`` if there are only triplets of another catalogue, or of one that they do not name.
    """
    base, own = Path("data") / dataset.name, dataset.provenance()
    names = (f"generated_{backbone}", "generated")
    folders = [folder_of(base, own) / name for name in names]
    found = next((folder for folder in folders if folder.is_dir()), folders[-1]) / "triplets.json"
    made_from = read_provenance(found.parent)
    if own is None or (found.is_file() and made_from and own.is_same(made_from)):
        return found
    others = describe_others(base, own) if made_from is None or own.is_same(made_from) else str(made_from)
    told = f"{base} holds none of {own}" + (f", only of {others}" if others else "")
    if old := next((path for name in names if (path := base / name / "triplets.json").is_file()), None):
        told += f", and {old} does not say of which images it is: if of these, give --generated {old}"
    make = f"make them with {MAKE} --dataset {dataset.name}{dataset.place_option()}"
    raise InputError(f"generated triplets are missing: {told}; {make}")


def split_holdout(config: TrainConfig, triplets: Sequence[Triplet]) -> tuple[Sequence[Triplet], Benchmark]:
    """Split off a fraction of the triplets as a benchmark; returns the rest and the benchmark.

    A triplet's own words decide on which side it falls, so the split is the same for all seeds, for both stages, and
    whatever other triplets there are. Of generated triplets many share a target, so the target decides, and no image is
    both trained on and evaluated. They are ranked over the images of all triplets that are split, or of the first ones
    that name ``HOLDOUT_GALLERY`` images. A table of triplets is split by other numbers than a list is.
    """
    if not triplets[0].targets:
        raise InputError("selection: holdout needs triplets with targets, and these have labels alone: leave it out")
    made = triplets[0].generated
    drawn = triplets.draws(made) if isinstance(triplets, TripletTable) else _draws(triplets, made)
    is_held = np.isfinite(drawn) & ((drawn < config.holdout) | (drawn == drawn.min()))
    held, rest = np.flatnonzero(is_held), np.flatnonzero(~is_held)
    if not 0 < len(held) < len(triplets):
        what = f"holdout holds out {len(held)} of {len(triplets)} {'generated' if made else 'annotated'} triplets"
        why = f"nothing is left to select on, or to train on; holdout is {config.holdout}"
        raise InputError(f"selection: {what}: {why}")
    own = [triplets[int(n)] for n in held]
    named, others = named_images(own), islice(named_images(triplets), HOLDOUT_GALLERY)
    gallery = tuple(dict.fromkeys([*named, *others]))
    queries = tuple(Query(t.reference, t.texts[0] if t.texts else None, t.targets) for t in own)
    name = f"{config.dataset}/holdout-{'generated-' * made}{config.holdout:g}"
    measures = recall_measures(1, 5, 10, 50, primary=(10, 50))
    benchmark = Benchmark(name, gallery, queries, exclude_reference=True, measures=measures, is_holdout=True)
    return triplets.take(rest) if isinstance(triplets, TripletTable) else [triplets[int(n)] for n in rest], benchmark


def _draws(triplets: Sequence[Triplet], by_target: bool) -> Numbers:
    """What ``TripletTable.draws`` gives, of a list."""
    words = (t.targets[0] if by_target else f"{t.reference}/{'/'.join(t.targets)}/{t.texts}" for t in triplets)
    same = np.array([(t.reference,) == t.targets for t in triplets])  # which would not be ranked
    return np.where(same, np.inf, [random.Random(f"holdout/{word}").random() for word in words])


def hash_pixels(
    dataset: Dataset, image_ids: Iterable[str], say: Say, show: bool = True, own_mode: bool = False
) -> dict[str, str]:
    """Image id → hash of its pixels, equal for equal ones; or for those that ``optimized_images.json`` says are equal.

    Each image is decoded, unless it was before and has not changed since: a broken one is found before training.
    ``own_mode`` is that of ``inspect_images``.
    Raises ``InputError`` that names up to ``NAMED`` missing or broken ones, and the command that lists all.
    """
    images = {image_id: dataset.image(image_id) for image_id in image_ids}
    found = inspect_images(images, _pixel_cache(dataset), show=show, own_mode=own_mode)
    broken = [image_id for image_id, image in found.items() if image.problem]
    if broken:
        told = []
        for image_id in broken[:NAMED]:
            detail = f"does not decode: {found[image_id].detail}"
            told.append(f"{images[image_id]} {'is missing' if found[image_id].problem == 'missing' else detail}")
        more = f"; and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
        raise InputError(f"image {'; image '.join(told)}{more}; see {dataset.check_command(broken[0])}")
    published = dataset.root and dataset.root / PUBLISHED_CLASSES
    if not published or not published.is_file():
        return {image_id: image.pixels for image_id, image in found.items()}
    canonical: Mapping[str, str] = read_optimized(published)
    say(f"{dataset.name}: {published} says which images are equal")
    first_of = {image_id: canonical.get(image_id, image_id) for image_id in found}
    return {i: found[first].pixels if first in found else f"as {first}" for i, first in first_of.items()}


def merge_near_duplicates(
    dataset: Dataset, hashes: Mapping[str, str], say: Say, own_mode: bool = False
) -> dict[str, str]:
    """Image id → the hash of the first image that shows the same picture; the hashes are what ``hash_pixels`` gives.

    ``own_mode`` is that of ``inspect_images``, which finds all of them in its cache.
    """
    images = {image_id: dataset.image(image_id) for image_id in hashes}
    found = inspect_images(images, _pixel_cache(dataset), show=False, own_mode=own_mode)
    first_of = group_near_duplicates(found)
    merged = {hashes[i]: hashes[first] for i, first in first_of.items()}  # published classes hold together
    classes = {i: merged.get(pixels, pixels) for i, pixels in hashes.items()}
    count = len(set(hashes.values())) - len(set(classes.values()))
    say(f"{dataset.name}: {count} pictures are near-duplicates of another, and one image with it")
    return classes


def _pixel_cache(dataset: Dataset) -> Path:
    return checkpoints.runs_root() / "pixels" / f"{dataset.name}.jsonl"
