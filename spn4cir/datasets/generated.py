"""Generated triplets in the published JSON shapes: lists of reference, target and captions."""

from collections.abc import Iterable
from pathlib import Path

from spn4cir.datasets.files import Entry, read_entries
from spn4cir.errors import InputError
from spn4cir.types import Triplet

SHAPES = (
    ("reference_name", "target_name", "captions"),  # out of domain, where ids are addresses
    ("candidate", "target", "captions"),  # FashionIQ
    ("reference", "target_hard", "caption"),  # CIRR
)


def read_generated(path: Path, known: Iterable[str], skipped: Iterable[str] = ()) -> tuple[list[Triplet], list[str]]:
    """Triplets of a generated file, whoever made it.

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
    if not path.is_file():
        raise InputError(
            f"generated triplets {path} are missing: make them with python data_gen/make_triplets.py and "
            "give --generated auto, or put the published file there"
        )
    out, allowed = frozenset(skipped), frozenset(known)
    triplets, empty, left_out, same = [], 0, 0, 0
    for entry in read_entries(path):
        triplet = _triplet(entry, allowed | out)
        if not triplet.modifications:
            empty += 1
        elif triplet.reference == triplet.target:
            same += 1
        elif {triplet.reference, triplet.target} & out:
            left_out += 1
        else:
            triplets.append(triplet)
    notes = [f"{path}: {empty} triplets without any text are left out"] if empty else []
    notes += [f"{path}: {left_out} triplets of skipped images are left out"] if left_out else []
    notes += [f"{path}: {same} triplets whose reference is their target are left out"] if same else []
    return triplets, notes


def _triplet(entry: Entry, allowed: frozenset[str]) -> Triplet:
    """One entry; without modifications if it has no text that says anything."""
    shape = next((shape for shape in SHAPES if shape[0] in entry or shape[1] in entry), SHAPES[2])
    ids = []
    for key in shape[:2]:
        image_id = entry.text(key)
        if image_id not in allowed:
            raise entry.error(key, f"{image_id[:60]!r} is no training image")
        ids.append(image_id)
    one = isinstance(entry.get(shape[2], object, "a text"), str)
    texts = [entry.text(shape[2])] if one else entry.texts(shape[2])
    return Triplet(ids[0], ids[1], tuple(text for text in texts if text.strip()), generated=True)


def published_shape(dataset: str, triplet: Triplet, captions: tuple[str, str]) -> dict[str, object]:
    """One entry as it is published for a dataset, ``captions`` being those of reference and target."""
    texts, described = list(triplet.modifications), {"caption1": captions[0], "caption2": captions[1]}
    if dataset == "cirr":
        return {
            "pairid": 0,
            "reference": triplet.reference,
            "target_hard": triplet.target,
            "caption": texts,
            "img_set": {"members": [""]},
            **described,
        }
    return {"target": triplet.target, "candidate": triplet.reference, "captions": texts, **described}
