"""Which photographs are drawn in other styles: their splits, captions and names, each picture once."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.types import ImageRef

NAME_LENGTH = 100  # of a longer id, and of one that is no file name, a part and a hash make the name


class Photo(NamedTuple):
    """A photograph to draw: ``name`` is its path in each style without suffix, ``pixels`` the hash of its pixels."""

    name: str
    image: ImageRef
    pixels: str
    split: str
    caption: str


def plan_photos(dataset: Dataset, cache: Path) -> list[Photo]:
    """Return the different pictures of a dataset, sorted by id; those that do not decode are left out, with a line.

    A dataset with val and test queries keeps its splits: their targets are val and test, and a picture that is also in
    train is train. Of other datasets the training images are taken, and split by their pixels, so that a picture stays
    where it was when others are added.

    Args:
        cache: file of pixel hashes, so that unchanged files are decoded once.

    Raises ``InputError`` if fewer than three different pictures are left, one for each split.
    """
    from spn4cir.identity import canonical_ids, inspect_images

    splits = _benchmark_splits(dataset)
    ids = [i for part in splits.values() for i in part] if splits else sorted(dataset.training_images())
    images = {image_id: dataset.image(image_id) for image_id in ids}
    found = inspect_images(images, cache)
    hashes = {image_id: one.pixels for image_id, one in found.items() if not one.problem}
    if broken := [f"{images[i]}, which is {one.problem}" for i, one in found.items() if one.problem]:
        print(f"stylize: {len(broken)} pictures are left out, such as {broken[0]}")
    unique = sorted(image_id for image_id, first in canonical_ids(hashes).items() if image_id == first)
    if len(unique) < 3:
        left_out = f", {len(broken)} being broken, such as {broken[0]}" if broken else ""
        raise InputError(f"{dataset.name}: 3 splits take 3 different pictures, and there are {len(unique)}{left_out}")
    splits = splits or split_pictures({image_id: hashes[image_id] for image_id in unique})
    split_of = {image_id: split for split in reversed(splits) for image_id in splits[split]}
    names = name_pictures(unique, dataset.name)
    return [Photo(names[i], images[i], hashes[i], split_of[i], _caption(dataset, i)) for i in unique]


def split_pictures(hashes: Mapping[str, str]) -> dict[str, list[str]]:
    """Image ids by split: about a fifth are test and a twentieth of the rest val, as the hash of their pixels draws."""
    from spn4cir.datasets.style_folders import TEST_EVERY, VAL_EVERY

    draws = {i: int(sha256(f"split/{pixels}".encode()).hexdigest()[:13], 16) / 16**13 for i, pixels in hashes.items()}
    ordered = sorted(draws, key=lambda i: draws[i])
    test = [i for i in ordered if draws[i] < 1 / TEST_EVERY] or ordered[:1]
    rest = ordered[len(test) :]
    val = [i for i in rest if draws[i] < 1 / TEST_EVERY + (1 - 1 / TEST_EVERY) / VAL_EVERY] or rest[:1]
    return {"train": sorted(rest[len(val) :]), "val": sorted(val), "test": sorted(test)}


def _benchmark_splits(dataset: Dataset) -> dict[str, list[str]]:
    """Image ids by split, train first, of a dataset with val and test queries whose targets are known; else nothing."""
    if not {"val", "test"} <= dataset.protocols.keys():
        return {}
    benchmarks = {split: dataset.benchmark(split) for split in ("val", "test")}
    if not all(benchmark.has_known_targets for benchmark in benchmarks.values()):
        return {}
    targets = {
        split: [i for query in benchmark.queries for i in query.targets if i not in benchmark.texts]
        for split, benchmark in benchmarks.items()
    }
    return {"train": sorted(dataset.training_images()), **{split: sorted({*ids}) for split, ids in targets.items()}}


def _caption(dataset: Dataset, image_id: str) -> str:
    """The caption on one line; or what the dataset calls the image, if that is not a part of the id."""
    label = dataset.label(image_id)
    return " ".join((dataset.caption(image_id) or (label if label not in image_id else "")).split())


def name_pictures(image_ids: Sequence[str], folder: str) -> dict[str, str]:
    """Image id → a path of plain names without suffix, at least in ``folder``; different ones for different ids.

    The path is that of the id where it can be. An id that is no path of plain names, such as an address, and ids that
    differ only in suffix or case, get names that end with a hash of the id. Raises ``InputError`` if two are equal.
    """
    from spn4cir.datasets.reading import PLAIN
    from spn4cir.pixels import picture_suffixes

    paths: dict[str, str] = {}
    for image_id in image_ids:
        suffix = PurePosixPath(image_id).suffix
        path = image_id.removesuffix(suffix) if suffix.lower() in picture_suffixes() else image_id
        is_plain = len(path) <= NAME_LENGTH and all(PLAIN.fullmatch(part) for part in path.split("/"))
        paths[image_id] = (path if "/" in path else f"{folder}/{path}") if is_plain else ""
    counts = Counter(path.lower() for path in paths.values())
    for image_id, path in paths.items():
        if not path or counts[path.lower()] > 1:
            words = re.sub(r"[^A-Za-z0-9]+", "-", image_id).strip("-")[-40:]
            paths[image_id] = f"{folder}/{words}-{sha256(image_id.encode()).hexdigest()[:16]}"
    if len({path.lower() for path in paths.values()}) < len(paths):
        raise InputError(f"{folder}: two pictures would have the same name: rename one of them")
    return paths
