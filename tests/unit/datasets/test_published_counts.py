"""The published annotation files, counted: sections 1.1, 1.2, 6.1 and 6.3 of the specification.

They lie beside the project, in ``../shared/data``; where they do not, these tests are skipped.
"""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spn4cir.dataset import Check
from spn4cir.datasets.cirr import CIRR, _faults
from spn4cir.datasets.fashioniq import FashionIQ
from spn4cir.datasets.reading import Entry, read_entries
from spn4cir.results import metric_names, primary_names
from spn4cir.types import Triplet

DATA = Path(__file__).parents[4] / "shared" / "data"
CATEGORIES = ("dress", "shirt", "toptee")
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the published annotations are not beside the project ({DATA})"
)


@pytest.fixture(scope="module")
def fashion() -> FashionIQ:
    """FashionIQ without pictures."""
    return FashionIQ(str(DATA / "fashioniq"))


@pytest.fixture(scope="module")
def photos() -> CIRR:
    """CIRR without pictures and without the train captions."""
    return CIRR(str(DATA))


@pytest.fixture(scope="module")
def triplets(fashion: FashionIQ) -> list[Triplet]:
    """All training triplets of FashionIQ."""
    return fashion.triplets()


@pytest.fixture(scope="module")
def fashion_checks(fashion: FashionIQ) -> dict[str, Check]:
    """What the doctor finds in FashionIQ's annotations."""
    return {check.what: check for check in fashion.checks()}


@cache
def raw(path: str) -> Any:
    return json.loads((DATA / path).read_text(encoding="utf-8"))


def rows(category: str, split: str) -> list[dict[str, Any]]:
    """A caption file, read without the library."""
    found: list[dict[str, Any]] = raw(f"fashioniq/captions/cap.{category}.{split}.json")
    return found


def split_of(category: str, split: str) -> list[str]:
    found: list[str] = raw(f"fashioniq/image_splits/split.{category}.{split}.json")
    return found


@pytest.mark.parametrize(("category", "expected"), [
    ("dress", (5985, 11452, 3874, 5985, 7757)), ("shirt", (5988, 19036, 4408, 5988, 8988)),
    ("toptee", (6027, 16121, 4328, 6027, 8695)),
])  # fmt: skip
def test_fashioniq_train(triplets: list[Triplet], category: str, expected: tuple[int, ...]) -> None:
    """Triplets, images of the split file, distinct references, targets, and both."""
    start = sum(len(rows(c, "train")) for c in CATEGORIES[: CATEGORIES.index(category)])
    own = triplets[start : start + expected[0]]
    references, targets = {t.reference for t in own}, {t.targets[0] for t in own}
    listed = split_of(category, "train")
    assert (
        len(rows(category, "train")), len(set(listed)), len(references), len(targets), len(references | targets),
    ) == expected  # fmt: skip
    assert len(listed) == len(set(listed)) and references | targets <= set(listed)
    assert [(t.reference, t.targets[0]) for t in own] == [
        (r["candidate"], r["target"]) for r in rows(category, "train")
    ]
    assert len({(t.reference, t.targets[0]) for t in own}) == len(own), "a pair is never repeated inside a category"


def test_fashioniq_train_in_all(fashion: FashionIQ, triplets: list[Triplet]) -> None:
    """18,000 triplets of 25,136 images, 45,429 listed; what remains can be extra negatives (section 7.2)."""
    references, targets = {t.reference for t in triplets}, {t.targets[0] for t in triplets}
    named = references | targets
    assert (len(triplets), len(references), len(targets), len(named)) == (18000, 12525, 17839, 25136)
    listed = [i for c in CATEGORIES for i in split_of(c, "train")]
    assert (len(listed), len(set(listed))) == (46609, 45429)
    images = fashion.training_images()
    assert len(images) == len(set(images)) == 45429 and set(images[:25136]) == named
    assert (sum(i not in named for i in listed), len(set(listed) - named)) == (20593, 20293)
    assert not [t for t in triplets if t.reference == t.targets[0]]


def test_fashioniq_candidates_are_in_the_published_order(fashion: FashionIQ, triplets: list[Triplet]) -> None:
    """Reference, then target, in file order: the numbers of published banks (section 1.3)."""
    walked = list(dict.fromkeys(i for t in triplets for i in (t.reference, t.targets[0])))
    assert fashion.training_images()[:25136] == walked == fashion.image_roles()[0].image_ids


def test_fashioniq_images_of_two_categories() -> None:
    """1,180 train images are in both shirt and toptee; dress shares none."""
    listed = {category: set(split_of(category, "train")) for category in CATEGORIES}
    assert len(listed["shirt"] & listed["toptee"]) == 1180
    assert not listed["dress"] & (listed["shirt"] | listed["toptee"])


def test_fashioniq_captions_of_train(triplets: list[Triplet], fashion_checks: dict[str, Check]) -> None:
    """36,000 of 5.3 words, at most 18; 12 are empty and one more holds only a dot; none of these is ever drawn."""
    texts = [text for c in CATEGORIES for row in rows(c, "train") for text in row["captions"]]
    words = [len(text.split()) for text in texts]
    assert (len(texts), round(sum(words) / len(words), 1), max(words)) == (36000, 5.3, 18)
    assert (sum(not text for text in texts), sum(not text.strip(".?, ") for text in texts)) == (12, 13)
    assert Counter(len(t.texts) for t in triplets) == {4: 18000 - 13, 1: 13}
    assert all(text == text.strip(".?, ") != "" for t in triplets for text in t.texts)
    empty = fashion_checks["triplets with an empty caption"].examples
    assert Counter(where.split()[0] for where in empty)["train"] == 13


def test_fashioniq_texts_of_train(triplets: list[Triplet]) -> None:
    """Both orders and each alone, of the stripped captions, for all triplets that have two."""
    given = [[text.strip(".?, ") for text in row["captions"]] for c in CATEGORIES for row in rows(c, "train")]
    assert not [
        (first, second)
        for triplet, (first, second) in zip(triplets, given, strict=True)
        if first and second
        and triplet.texts != (f"{first} and {second}", f"{second} and {first}", first, second)
    ]  # fmt: skip


@pytest.mark.parametrize(("category", "expected"), [
    ("dress", (2017, 3817, 1331, 2017, 2628)), ("shirt", (2038, 6346, 1541, 2038, 3089)),
    ("toptee", (1961, 5373, 1454, 1961, 2902)),
])  # fmt: skip
def test_fashioniq_val(fashion: FashionIQ, category: str, expected: tuple[int, ...]) -> None:
    """Queries, gallery of the original split, distinct references, targets, and both: the gallery of the union."""
    benchmark, union = fashion.benchmark("val"), fashion.benchmark("val", "fashioniq/val-union")
    gathered = {q.candidates for q in union.queries if q.tags == (category,)}
    asked = [q for q in benchmark.queries if q.tags == (category,)]
    references, targets = {q.reference for q in asked}, {t for q in asked for t in q.targets}
    sizes = (len(asked), len(asked[0].candidates), len(references), len(targets))
    assert (*sizes, len(next(iter(gathered)))) == expected
    assert list(asked[0].candidates) == split_of(category, "val")
    assert (
        len({q.candidates for q in asked}) == len(gathered) == 1 and set(next(iter(gathered))) == references | targets
    )
    same = [replace(q, candidates=asked[0].candidates) for q in union.queries if q.tags == (category,)]
    assert same == asked
    assert [q.text for q in asked] == [
        " and ".join(text.strip(".?, ") for text in row["captions"]) for row in rows(category, "val")
    ]


def test_fashioniq_val_in_all(fashion: FashionIQ) -> None:
    """6,016 queries over 15,415 images; four protocols that differ in gallery and reference alone."""
    original = fashion.benchmark("val", "fashioniq/original")
    without = fashion.benchmark("val", "fashioniq/original-noref")
    assert fashion.benchmark("val") == original
    assert (len(original.queries), len(original.gallery), len(set(original.gallery))) == (6016, 15415, 15415)
    assert sum(len(ids) for ids in {q.candidates for q in original.queries}) == 15536
    assert (original.exclude_reference, without.exclude_reference) == (False, True)
    assert (original.queries, original.measures) == (without.queries, without.measures)
    union, kept = fashion.benchmark("val", "fashioniq/val-union"), fashion.benchmark("val", "fashioniq/val-union-ref")
    assert (union.exclude_reference, kept.exclude_reference) == (True, False)
    assert (union.queries, union.gallery, union.measures) == (kept.queries, kept.gallery, kept.measures)


def test_fashioniq_test() -> None:
    """Queries and images of the test split, whose targets are not public."""
    assert [len(rows(c, "test")) for c in CATEGORIES] == [2024, 2038, 2056]
    assert [len(split_of(c, "test")) for c in CATEGORIES] == [3818, 6346, 5374]
    assert {tuple(row) for c in CATEGORIES for row in rows(c, "test")} == {("candidate", "captions")}


def test_fashioniq_leak(fashion_checks: dict[str, Check]) -> None:
    """400 images of the val galleries are in training triplets, 811 in the train split files; the doctor names each."""
    named = {i for c in CATEGORIES for row in rows(c, "train") for i in (row["candidate"], row["target"])}
    val = {i for c in CATEGORIES for i in split_of(c, "val")}
    train = {i for c in CATEGORIES for i in split_of(c, "train")}
    for what, where, count in ("triplets", named, 400), ("split files", train, 811):
        check = fashion_checks[f"val gallery images also in train {what}"]
        assert (check.found, check.expected, check.level) == (count, count, "note")
        assert check.examples == tuple(sorted(val & where))


def test_fashioniq_is_what_is_published(fashion_checks: dict[str, Check]) -> None:
    """By the doctor too: every published count is found, and nothing stands in the way but the missing pictures."""
    assert not [c for c in fashion_checks.values() if c.expected is not None and c.found != c.expected]
    assert not [c for c in fashion_checks.values() if c.level == "problem"]
    assert len([c for c in fashion_checks.values() if c.what.endswith(("triplets", "listed"))]) == 18 + 1


@pytest.mark.parametrize(("split", "images", "folder"), [
    ("train", 16939, "train"), ("val", 2297, "dev"), ("test1", 2315, "test1"),
])  # fmt: skip
def test_cirr_images(photos: CIRR, split: str, images: int, folder: str) -> None:
    """Split files of NLVR2 names and paths, no image in two splits."""
    listed = raw(f"cirr/image_splits/split.rc2.{split}.json")
    roles = {"train": "other images of train", "val": "val gallery", "test1": "test1 gallery"}
    role = next(r for r in photos.image_roles() if r.name == roles[split])
    assert len(listed) == images and role.image_ids == list(listed)
    assert all(path.startswith(f"./{folder}/") and path.endswith(f"/{i}.png") for i, path in listed.items())


@pytest.mark.parametrize(("split", "queries", "gallery", "references", "mean", "longest"), [
    ("val", 4181, 2297, 2165, 11.0, 47), ("test1", 4148, 2315, 2178, 10.7, 53),
])  # fmt: skip
def test_cirr_queries(
    photos: CIRR, split: str, queries: int, gallery: int, references: int, mean: float, longest: int
) -> None:
    """Queries, gallery, references, words, and subsets of six that hold reference and target."""
    benchmark = photos.benchmark(split)
    words = [len(q.text.split()) for q in benchmark.queries]
    assert (len(benchmark.queries), len(benchmark.gallery)) == (queries, gallery)
    assert len({q.reference for q in benchmark.queries}) == references
    assert (round(sum(words) / len(words), 1), max(words)) == (mean, longest)
    assert all(
        {q.reference, *q.targets} <= set(q.candidates) and len(set(q.candidates)) == 6 for q in benchmark.queries
    )
    assert len({q.name for q in benchmark.queries}) == queries and benchmark.exclude_reference
    entries = raw(f"cirr/captions/cap.rc2.{split}.json")
    assert len({entry["img_set"]["id"] for entry in entries}) == 503
    assert ("target_hard" in entries[0], "target_soft" in entries[0]) == (split == "val",) * 2


def test_cirr_val_targets(photos: CIRR) -> None:
    """2,206 targets and 2,265 images in use; soft targets have one of four scores."""
    benchmark = photos.benchmark("val")
    targets = {t for q in benchmark.queries for t in q.targets}
    assert (len(targets), len(targets | {q.reference for q in benchmark.queries})) == (2206, 2265)
    scores = {s for entry in raw("cirr/captions/cap.rc2.val.json") for s in entry["target_soft"].values()}
    assert scores == {1.0, 0.5, 0.2, -1.0}
    assert metric_names(benchmark) == ["R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"]
    assert primary_names(benchmark) == ["R@5", "Rs@1"]


def test_cirr_is_what_is_published(photos: CIRR) -> None:
    """By the doctor too: but for the train captions, which are not here, every published count is found."""
    checks = {check.what: check for check in photos.checks()}
    assert [c.what for c in checks.values() if c.level == "problem"] == ["train: captions"]
    assert "cap.rc2.train.json is missing" in checks["train: captions"].examples[0]
    assert checks["test1: empty captions"].examples == ("entry 1387",)
    counted = {what: check for what, check in checks.items() if what.endswith(("listed", "triplets"))}
    assert len(counted) == 5 and all(check.found == check.expected for check in counted.values())


def test_cirr_faults_are_seen_at_full_size(photos: CIRR) -> None:
    """Negative control: of val's real entries, one spoiled in each way is named and no other."""
    entries = read_entries(DATA / "cirr" / "captions" / "cap.rc2.val.json")
    listed = set(photos.benchmark("val").gallery)
    assert not [c for c in _faults(entries, "val", listed) if c.found]
    row = raw("cirr/captions/cap.rc2.val.json")[17]
    members = row["img_set"]["members"]
    spoiled = {
        "ids in captions that no split lists": {"img_set": {"members": [*members[:-1], "x"]}},
        "subsets without 6 different members": {"img_set": {"members": [*members, members[0]]}},
        "references or targets outside their subset": {"reference": next(iter(listed - set(members)))},
        "reference equal to target": {"target_hard": row["reference"]},
        "empty captions": {"caption": "  "},
    }
    for what, change in spoiled.items():
        changed = [*entries[:17], Entry(Path("x"), 17, {**row, **change}), *entries[18:]]
        found = {c.what: c.examples for c in _faults(changed, "val", listed) if c.found}
        assert len(found[f"val: {what}"]) == 1 and found[f"val: {what}"][0].startswith("entry 17")


@pytest.mark.parametrize(("metric", "size", "length"), [("recall", 4192413, 50), ("recall_subset", 294618, 3)])
def test_published_submissions(photos: CIRR, metric: str, size: int, length: int) -> None:
    """4,150 keys: version, metric and all 4,148 pair ids, from 12063 to 39059; no list holds its reference."""
    path = DATA / "cirr" / "submission_examples" / f"test1_pred_ranks_{metric}.json"
    content = raw(f"cirr/submission_examples/{path.name}")
    assert path.stat().st_size == size < 5_000_000 and len(content) == 4150
    assert (content.pop("version"), content.pop("metric")) == ("rc2", metric)
    queries = photos.benchmark("test1").queries
    assert content.keys() == {q.name for q in queries} and {len(images) for images in content.values()} == {length}
    assert (min(map(int, content)), max(map(int, content))) == (12063, 39059)
    assert not [q for q in queries if q.reference in content[q.name]]
    assert f"a sound {metric} submission, 4148 queries of {length} images, {size:,} bytes" in photos.check_submission(
        path
    )
