"""Generated triplets in the published JSON shapes: lists of reference, target and captions.

Those of images of a dataset name its ids. Those of other images, as the zero-shot setting learns from, also say where
their pictures lie: relative to the folder of the file, or to one above it (the next one; any, below the current
directory), and never outside.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from spn4cir.dataset import Dataset
from spn4cir.datasets.reading import Entry, inner_path, read_entries
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.provenance import read_provenance
from spn4cir.types import ImageRef, Triplet

OUT_OF_DOMAIN = ("reference_name", "target_name", "captions")  # ids are addresses; reference and target are paths
SHAPES = (OUT_OF_DOMAIN, ("candidate", "target", "captions"), ("reference", "target_hard", "caption"))
AddImage: TypeAlias = Callable[[Entry, str, str], None]  # of an entry, the field with an image's path, the image's id
MAKE = "python data_gen/make_triplets.py"


def with_images(dataset: Dataset, images: Mapping[str, ImageRef], check: str = "") -> Dataset:
    """A dataset whose training may use further images too, by id; ``check`` is the command that checks them, if any."""
    wider = copy.copy(dataset)
    wider.extra_images, wider.extra_check = {**dataset.extra_images, **images}, check or dataset.extra_check
    return wider


def open_generated(
    path: Path, dataset: Dataset, ranked: Iterable[str] = (), may_have_others: bool = True
) -> tuple[Dataset, list[Triplet], list[str]]:
    """Triplets of a generated file, of images of a dataset or of others that the file says the place of.

    Other images may have none of the ids of ``ranked``, which a benchmark ranks. Where a file may have no others, as
    that of a catalogue which has lost pictures since, their triplets are left out. Returns the dataset, with the other
    images if there are any, and what ``read_generated`` returns.

    Raises ``InputError`` if the file was made from another catalogue and names images of this dataset, whose pictures
    are others.
    """
    others, known = _Others(path, frozenset(ranked)), dataset.training_images()
    own, made_from = dataset.provenance(), read_provenance(path.parent)
    if own and made_from and not own.is_same(made_from):
        entries = read_entries(path)
        named = {entry.text(key) for entry in entries for key in OUT_OF_DOMAIN[:2] if key in entry}
        if both := sorted(named.intersection(known)):
            what = f"whose {short(both[0])} is another picture than that of {own}"
            raise InputError(f"{path} was made from {made_from}, {what}")
    lost = set[str]()
    add: AddImage = others.add if may_have_others else lambda entry, key, image_id: lost.add(image_id)
    triplets, notes = read_generated(path, known, dataset.skip_reasons, add, dataset.further_names)
    if lost:
        kept = [triplet for triplet in triplets if not lost.intersection(triplet.image_ids)]
        what = f"of images that are gone since, such as {short(min(lost))}"
        triplets, notes = kept, [*notes, f"{path}: {len(triplets) - len(kept)} triplets {what}, are left out"]
    return with_images(dataset, others.images) if others.images else dataset, triplets, notes


def read_generated(
    path: Path,
    known: Iterable[str],
    skipped: Iterable[str] = (),
    other: AddImage | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[list[Triplet], list[str]]:
    """The triplets of a generated file, whoever made it, and a line for each reason why some are left out.

    Raises ``InputError`` that names the file, the entry and the field.

    Args:
        path: JSON list; each entry has ``candidate``, ``target``, ``captions``, or ``reference``, ``target_hard``,
            ``caption``, or ``reference_name``, ``target_name``, ``captions``: one text, or a list to draw from.
            ``llm_caption``, the text of a rewriter, takes the place of these texts, as it does in published training.
        known, skipped: image ids that may occur, and those whose triplets are left out.
        other: takes an image that is not known; None for an error.
        names: further name → image id.
    """
    if not path.is_file():
        how = f"make them with {MAKE} and give --generated auto, or put the published file there"
        raise InputError(f"generated triplets {path} are missing: {how}")
    out = frozenset(skipped)
    allowed, triplets = out.union(known), []
    no_text, of_skipped, same = "without any text", "of skipped images", "whose reference is their target"
    counts = {no_text: 0, of_skipped: 0, same: 0}
    for entry in read_entries(path):
        triplet = _triplet(entry, allowed, other, names or {})
        if not triplet.texts:
            counts[no_text] += 1
        elif (triplet.reference,) == triplet.targets:
            counts[same] += 1
        elif out.intersection(triplet.image_ids):
            counts[of_skipped] += 1
        else:
            triplets.append(triplet)
    return triplets, [f"{path}: {count} triplets {why} are left out" for why, count in counts.items() if count]


def _triplet(entry: Entry, allowed: frozenset[str], other: AddImage | None, names: Mapping[str, str]) -> Triplet:
    """One entry; without texts if it has none that says anything."""
    shape = next((shape for shape in SHAPES if shape[0] in entry or shape[1] in entry), SHAPES[2])
    ids = []
    for key in shape[:2]:
        image_id = entry.text(key)
        image_id = names.get(image_id, image_id)
        if image_id not in allowed:
            if other is None or shape is not OUT_OF_DOMAIN:
                raise entry.error(key, f"{image_id[:60]!r} is no training image")
            other(entry, key.removesuffix("_name"), image_id)
        ids.append(image_id)
    texts = (_texts(entry, "llm_caption") if "llm_caption" in entry else ()) or _texts(entry, shape[2])
    return Triplet(ids[0], (ids[1],), texts, generated=True)


def _texts(entry: Entry, key: str) -> tuple[str, ...]:
    """A field's text, or those of its list, that say something."""
    is_text = isinstance(entry.get(key, object, "a text"), str)
    return tuple(text for text in ([entry.text(key)] if is_text else entry.texts(key)) if text.strip())


class _Others:
    """Images of a generated file that are no dataset's, and where their pictures lie; none has an id of ``ranked``."""

    def __init__(self, path: Path, ranked: frozenset[str]):
        self._file, self._ranked, self._root = path, ranked, Path()
        self.images: dict[str, ImageRef] = {}

    def add(self, entry: Entry, key: str, image_id: str) -> None:
        """Take an image from the field that holds its path."""
        if image_id in self._ranked:
            raise entry.error(f"{key}_name", f"{short(image_id)} is no training image, but one that is evaluated on")
        try:
            inner = inner_path(self._file, key, entry.text(key))
        except InputError:
            if key not in entry:
                raise
            what = "is no path below a folder: a published file names pictures on its authors' disk"
            advice = f"get your own by data_gen/sample_images.py and make triplets of them by {MAKE}"
            raise entry.error(key, f"{short(entry.text(key))} {what}; {advice}") from None
        if not self.images:
            roots = _roots(self._file.parent)
            found = [root for root in roots if (root / inner).is_file()]
            if not found:
                where = f"{short(inner.as_posix())} lies neither in {self._file.parent} nor in {roots[-1]}"
                raise entry.error(key, f"{where}: put a copy of this file into the folder that its paths start from")
            self._root = found[0]
        place = ImageRef(self._root / inner)
        if self.images.setdefault(image_id, place) != place:
            raise entry.error(key, f"{short(image_id)} was {self.images[image_id]} before: one id, one picture")


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
    """What a file in ``folder`` says of a triplet and the captions of its reference and target."""
    place = picture_places(dataset, folder)

    def entry(triplet: Triplet, captions: tuple[str, str]) -> dict[str, object]:
        return {**dataset.triplet_entry(triplet, place), "caption1": captions[0], "caption2": captions[1]}

    return entry
