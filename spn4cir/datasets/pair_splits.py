"""Pairs of an image and a text with a class, and how they are split: by class, and within seen classes by pair."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from spn4cir.errors import InputError
from spn4cir.types import ImageRef

FEWEST = 4  # classes that can be split: two seen ones, and one unseen for val and one for test
VAL_SHARE, TEST_SHARE = 1 / 10, 2 / 10  # of the pairs of a seen class
SPLITS = ("train", "val", "test")


class Pair(NamedTuple):
    """An image, its text and their class; the split is empty where the files name none.

    ``further`` are other texts of the image, of which training draws too.
    """

    image_id: str
    text: str
    label: str
    split: str = ""
    further: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairSource:
    """What a place holds: pairs, how to open an image, and a vector for each class if the files have them."""

    pairs: Sequence[Pair]
    find: Callable[[str], ImageRef]
    class_vectors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def split_pairs(pairs: Sequence[Pair], place: str) -> tuple[list[Pair], list[str]]:
    """Give each pair a split where the files name none. Returns notes too.

    The classes are ordered by a hash of their names: the first half is seen, the rest is unseen, half of it val and
    half test. Of a seen class with at least three pairs a tenth is val and a fifth test, one at least of both, by a
    hash of the image id; the other pairs are train. Where splits are named and none is val, a tenth of the pairs of
    each class of train is val.

    Raises ``InputError`` if some pairs have a split and others none, nothing is left to train on or to evaluate, or
    there are too few classes.
    """
    named = [pair for pair in pairs if pair.split]
    if named and len(named) < len(pairs):
        lacking = next(pair for pair in pairs if not pair.split)
        raise InputError(f"{place}: {lacking.image_id} has no split, and others have one: name all splits, or none")
    if wrong := [pair for pair in named if pair.split not in SPLITS]:
        raise InputError(f"{place}: split {wrong[0].split!r} of {wrong[0].image_id} is none of {', '.join(SPLITS)}")
    found, notes = _split_named(pairs) if named else _split_by_hash(pairs, place)
    for split in SPLITS:
        if not any(pair.split == split for pair in found):
            raise InputError(f"{place}: no pair is in the split {split}: add pairs, or change the column split")
    return found, notes


def split_pair_classes(labels: Sequence[str]) -> dict[str, str]:
    """Class → ``seen``, ``val`` or ``test``, the latter two unseen: half of all classes, and two quarters."""
    ordered = sorted(set(labels), key=lambda label: (_draw(f"class/{label}"), label))
    seen = -(-len(ordered) // 2)
    val = (len(ordered) - seen) // 2
    kinds = ["seen"] * seen + ["val"] * val + ["test"] * (len(ordered) - seen - val)
    return dict(zip(ordered, kinds, strict=True))


def _split_by_hash(pairs: Sequence[Pair], place: str) -> tuple[list[Pair], list[str]]:
    kind = split_pair_classes([pair.label for pair in pairs])
    if len(kind) < FEWEST:
        raise InputError(f"{place}: {len(kind)} classes cannot be split, {FEWEST} can; or name the splits")
    held = _held_pairs([pair for pair in pairs if kind[pair.label] == "seen"], {"val": VAL_SHARE, "test": TEST_SHARE})
    kinds = [kind[pair.label] for pair in pairs]
    splits = [held.get(p.image_id, "train") if one == "seen" else one for p, one in zip(pairs, kinds, strict=True)]
    found = [pair._replace(split=split) for pair, split in zip(pairs, splits, strict=True)]
    counts = ", ".join(f"{list(kind.values()).count(name)} {name}" for name in ("seen", "val", "test"))
    return found, [f"classes are split by a hash of their names: {counts}; val and test are unseen in training"]


def _split_named(pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
    if any(pair.split == "val" for pair in pairs):
        return list(pairs), []
    held = _held_pairs([pair for pair in pairs if pair.split == "train"], {"val": VAL_SHARE})
    found = [pair._replace(split=held.get(pair.image_id, pair.split)) for pair in pairs]
    return found, [f"no pair is in the split val: {len(held)} pairs of train are val, drawn by a hash"]


def _held_pairs(pairs: Sequence[Pair], shares: Mapping[str, float]) -> dict[str, str]:
    """Image id → split of the pairs that are held out of each class, where one pair at least is left to train on."""
    members = defaultdict[str, list[str]](list)
    for pair in pairs:
        members[pair.label].append(pair.image_id)
    held = dict[str, str]()
    for ids in members.values():
        if len(ids) <= len(shares):
            continue
        ordered = sorted(ids, key=lambda image_id: (_draw(f"pair/{image_id}"), image_id))
        for split, share in shares.items():
            count = max(1, round(share * len(ids)))
            held |= dict.fromkeys(ordered[:count], split)
            ordered = ordered[count:]
    return held


def _draw(word: str) -> float:
    """A number in [0, 1) that depends on a text alone."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") / 2**64
