"""Generated triplets in the published JSON shapes: lists of reference, target and captions."""

import json
from collections.abc import Iterable
from pathlib import Path

from spn4cir.errors import InputError
from spn4cir.types import Triplet

KEYS = (("candidate", "target", "captions"), ("reference", "target_hard", "caption"))


def read_generated(path: Path, known: Iterable[str] | None = None) -> list[Triplet]:
    """Triplets of a generated file, FashionIQ's or CIRR's shape.

    Args:
        path: JSON list; each entry has ``candidate``, ``target``, ``captions`` or ``reference``, ``target_hard``,
            ``caption`` (a list of texts).
        known: image ids that may occur, or None for any.

    Raises:
        InputError: naming the file, the entry and the field.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"generated triplets {path} are missing: make them with python data_gen/make_triplets.py"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise InputError(f"{path} must hold a JSON list of triplets")
    allowed = None if known is None else set(known)
    return [_triplet(path, number, entry, allowed) for number, entry in enumerate(entries)]


def _triplet(path: Path, number: int, entry: object, allowed: set[str] | None) -> Triplet:
    where = f"{path}, entry {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object")
    reference_key, target_key, text_key = KEYS[0] if "candidate" in entry else KEYS[1]
    for key in (reference_key, target_key, text_key):
        if key not in entry:
            raise InputError(f"{where}: {key!r} is missing")
    ids = entry[reference_key], entry[target_key]
    for key, image_id in zip((reference_key, target_key), ids, strict=True):
        if not isinstance(image_id, str) or (allowed is not None and image_id not in allowed):
            raise InputError(f"{where}: {key!r} names {image_id!r}, which is no training image")
    texts = entry[text_key]
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError(f"{where}: {text_key!r} must be one or more texts that are not empty")
    return Triplet(*ids, tuple(texts), generated=True)


def published_shape(triplet: Triplet, captions: tuple[str, str]) -> dict[str, object]:
    """One entry in FashionIQ's published shape, ``captions`` being those of reference and target."""
    return {
        "target": triplet.target,
        "candidate": triplet.reference,
        "captions": list(triplet.modifications),
        "caption1": captions[0],
        "caption2": captions[1],
    }
