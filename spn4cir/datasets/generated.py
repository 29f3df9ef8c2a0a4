"""Generated triplets in the published JSON shapes: lists of reference, target and captions.

Those of images of a dataset name its ids. Those of other images, as the zero-shot setting learns from, also say where
their pictures lie: relative to the folder of the file, or to one above it (the next one; any, below the current
directory), and never outside.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from spn4cir.dataset import Dataset
from spn4cir.datasets.reading import Entry, inner_path, read_entries
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import ImageRef, Triplet

OUT_OF_DOMAIN = ("reference_name", "target_name", "captions")  # ids are addresses; reference and target are paths
SHAPES = (OUT_OF_DOMAIN, ("candidate", "target", "captions"), ("reference", "target_hard", "caption"))
MAKE = "python data_gen/make_triplets.py"


def with_images(dataset: Dataset, images: Mapping[str, ImageRef], check: str = "") -> Dataset:
    """A dataset whose training may use further images too.

    Args:
        dataset: its benchmarks and annotated triplets stay as they are.
        images: image id → image.
        check: command that checks these images, if any does.
    """
    wider = copy.copy(dataset)
    wider.extra_images, wider.extra_check = {**dataset.extra_images, **images}, check or dataset.extra_check
    return wider


def open_generated(
    path: Path, dataset: Dataset, ranked: Iterable[str] = ()
) -> tuple[Dataset, list[Triplet], list[str]]:
    """Triplets of a generated file, of images of a dataset or of others that the file says the place of.

    Args:
        path: the file.
        dataset: whose training images are known.
        ranked: image ids that no other image may have, since a benchmark ranks them.

    Returns:
        The dataset, with the other images if there are any; the triplets; and a line for each reason why some were left
        out.

    Raises:
        InputError: naming the file, the entry and the field.
    """
    others = _Others(path, frozenset(ranked))
    triplets, notes = _read(path, frozenset(dataset.training_images()), frozenset(dataset.skip_reasons), others.add)
    images = {image_id: ImageRef(path) for image_id, path in others.images.items()}
    return with_images(dataset, images) if images else dataset, triplets, notes


def read_generated(path: Path, known: Iterable[str], skipped: Iterable[str] = ()) -> tuple[list[Triplet], list[str]]:
    """Triplets of a generated file, whoever made it, all of whose images are known.

    Args:
        path: JSON list; each entry has ``candidate``, ``target``, ``captions``, or ``reference``, ``target_hard``,
            ``caption``, or ``reference_name``, ``target_name``, ``captions``: one text, or a list to draw from.
        known: image ids that may occur.
        skipped: image ids whose triplets are left out.

    Returns:
        The triplets, and a line for each reason why some were left out.

    Raises:
        InputError: naming the file, the entry and the field.
    """
    return _read(path, frozenset(known), frozenset(skipped), None)


def _read(
    path: Path, known: frozenset[str], out: frozenset[str], other: Callable[[Entry, str, str], None] | None
) -> tuple[list[Triplet], list[str]]:
    if not path.is_file():
        raise InputError(
            f"generated triplets {path} are missing: make them with {MAKE} and "
            "give --generated auto, or put the published file there"
        )
    triplets, empty, left_out, same = [], 0, 0, 0
    for entry in read_entries(path):
        triplet = _triplet(entry, known | out if out else known, other)
        if not triplet.texts:
            empty += 1
        elif (triplet.reference,) == triplet.targets:
            same += 1
        elif out.intersection(triplet.image_ids):
            left_out += 1
        else:
            triplets.append(triplet)
    notes = [f"{path}: {empty} triplets without any text are left out"] if empty else []
    notes += [f"{path}: {left_out} triplets of skipped images are left out"] if left_out else []
    notes += [f"{path}: {same} triplets whose reference is their target are left out"] if same else []
    return triplets, notes


def _triplet(entry: Entry, allowed: frozenset[str], other: Callable[[Entry, str, str], None] | None) -> Triplet:
    """One entry; without texts if it has none that says anything."""
    shape = next((shape for shape in SHAPES if shape[0] in entry or shape[1] in entry), SHAPES[2])
    ids = []
    for key in shape[:2]:
        image_id = entry.text(key)
        if image_id not in allowed:
            if other is None or shape is not OUT_OF_DOMAIN:
                raise entry.error(key, f"{image_id[:60]!r} is no training image")
            other(entry, key.removesuffix("_name"), image_id)
        ids.append(image_id)
    one = isinstance(entry.get(shape[2], object, "a text"), str)
    texts = [entry.text(shape[2])] if one else entry.texts(shape[2])
    return Triplet(ids[0], (ids[1],), tuple(text for text in texts if text.strip()), generated=True)


class _Others:
    """Images of a generated file that are no dataset's, and where their pictures lie.

    Args:
        path: the generated file.
        ranked: ids that are not for them.
    """

    def __init__(self, path: Path, ranked: frozenset[str]):
        self._file, self._ranked, self._root = path, ranked, Path()
        self.images: dict[str, Path] = {}

    def add(self, entry: Entry, key: str, image_id: str) -> None:
        """Take an image from the field that holds its path."""
        if image_id in self._ranked:
            raise entry.error(f"{key}_name", f"{short(image_id)} is no training image, but one that is evaluated on")
        try:
            inner = inner_path(self._file, key, entry.text(key))
        except InputError:
            if key not in entry:
                raise
            raise entry.error(
                key,
                f"{short(entry.text(key))} is no path below a folder: a published file names pictures on its authors' "
                f"disk; get your own by data_gen/sample_images.py and make triplets of them by {MAKE}",
            ) from None
        if not self.images:
            self._root = self._choose_root(entry, key, inner.as_posix())
        place = self._root / inner
        if self.images.setdefault(image_id, place) != place:
            raise entry.error(key, f"{short(image_id)} was {self.images[image_id]} before: one id, one picture")

    def _choose_root(self, entry: Entry, key: str, inner: str) -> Path:
        roots = _roots(self._file.parent)
        for root in roots:
            if (root / inner).is_file():
                return root
        raise entry.error(
            key,
            f"{short(inner)} lies neither in {self._file.parent} nor in {roots[-1]}: put a copy of this file into the "
            "folder that its paths start from",
        )


def _roots(folder: Path) -> list[Path]:
    """Folders that paths in a file of ``folder`` may start from, the nearest first."""
    own, here = folder.absolute(), Path.cwd()
    above = [place for place in own.parents if place == own.parent or here in (place, *place.parents)]
    return [own, *above]


def picture_places(dataset: Dataset, folder: Path) -> Callable[[str], str]:
    """Image id → its picture's path, as a generated file in ``folder`` may say it.

    It starts from the nearest folder that ``open_generated`` looks from; where none holds the dataset, from the
    dataset's own root, into which the file must then be copied to be used with another dataset.
    """
    own = (dataset.root or Path()).absolute()
    start = next((root for root in _roots(folder) if root in (own, *own.parents)), own)

    def place(image_id: str) -> str:
        path = dataset.image(image_id).path
        inside = path is not None and start in path.absolute().parents
        return path.absolute().relative_to(start).as_posix() if path and inside else image_id

    return place


def entry_writer(dataset: Dataset, folder: Path) -> Callable[[Triplet, tuple[str, str]], dict[str, object]]:
    """What ``published_shape`` says of a triplet and its captions, in a file of ``folder``."""
    place = picture_places(dataset, folder) if dataset.name == "catalogue" else None

    def entry(triplet: Triplet, captions: tuple[str, str]) -> dict[str, object]:
        places = (place(str(triplet.reference)), place(triplet.targets[0])) if place else None
        return published_shape(dataset.name, triplet, captions, places)

    return entry


def published_shape(
    dataset: str, triplet: Triplet, captions: tuple[str, str], places: tuple[str, str] | None = None
) -> dict[str, object]:
    """One entry as it is published for a dataset; for a catalogue, the shape of out-of-domain images.

    Args:
        dataset: its name.
        triplet: what is to be written.
        captions: those of reference and target.
        places: paths of their pictures, as ``picture_places`` gives them; by default the ids.
    """
    texts, described = list(triplet.texts), {"caption1": captions[0], "caption2": captions[1]}
    if dataset == "catalogue":
        reference, target = places or (triplet.reference, triplet.targets[0])
        return {
            "reference": reference,
            "target": target,
            "reference_name": triplet.reference,
            "target_name": triplet.targets[0],
            "captions": texts,
            **described,
        }
    if dataset == "cirr":
        return {
            "pairid": 0,
            "reference": triplet.reference,
            "target_hard": triplet.targets[0],
            "caption": texts,
            "img_set": {"members": [""]},
            **described,
        }
    return {"target": triplet.targets[0], "candidate": triplet.reference, "captions": texts, **described}
