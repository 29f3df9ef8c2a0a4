"""CIRR from its own files: layouts, protocols, subsets, and what is said of damage."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spn4cir.datasets import load_dataset
from spn4cir.datasets.cirr import CIRR
from spn4cir.datasets.generated import entry_writer, read_generated
from spn4cir.errors import InputError
from spn4cir.results import metric_names, primary_names
from spn4cir.types import Triplet

CAPTIONS, SPLIT = "cirr/captions/cap.rc2.{}.json", "cirr/image_splits/split.rc2.{}.json"
each_split = pytest.mark.parametrize("split", ["train", "val", "test1"])


def edit(path: Path, change: Callable[[Any], object]) -> Path:
    """Change the content of a JSON file: what ``change`` returns, or what it makes of its argument."""
    content = json.loads(path.read_text(encoding="utf-8"))
    new = change(content)
    path.write_text(json.dumps(content if new is None else new), encoding="utf-8")
    return path


def set_first(path: Path, **fields: object) -> Path:
    """Change fields of the first entry."""
    return edit(path, lambda rows: rows[0].update(fields))


def refused(read: Callable[[], object]) -> str:
    """The message of an InputError, which is one line."""
    with pytest.raises(InputError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


def read_of(dataset: CIRR, split: str) -> Callable[[], object]:
    """What training or an evaluation reads of a split."""
    return dataset.triplets if split == "train" else lambda: dataset.benchmark(split)


def test_triplets_in_file_order(cirr: Path) -> None:
    """One caption each; reference and target are not confused."""
    rows = json.loads((cirr / CAPTIONS.format("train")).read_text())
    assert CIRR(str(cirr)).triplets() == [Triplet(r["reference"], (r["target_hard"],), (r["caption"],)) for r in rows]
    assert len(rows) == 18 and rows[0]["reference"] != rows[0]["target_hard"]


def test_empty_captions(cirr: Path) -> None:
    """A training triplet without a caption is left out, and that is said; a query without one stays a query."""
    set_first(cirr / CAPTIONS.format("train"), caption=" ")
    set_first(cirr / CAPTIONS.format("val"), caption="")
    dataset = CIRR(str(cirr))
    assert len(dataset.triplets()) == 17 and all(t.texts[0] for t in dataset.triplets())
    assert dataset.notes() == ["cirr: 1 training triplets without a caption are left out"]
    assert len(dataset.benchmark("val").queries) == 12
    found = {c.what: c for c in dataset.checks()}
    assert [found[f"{split}: empty captions"].examples for split in ("train", "val", "test1")] == [
        ("entry 0",), ("entry 0",), (),
    ]  # fmt: skip


def test_no_note_where_nothing_is_left_out(cirr: Path) -> None:
    """Negative control."""
    assert CIRR(str(cirr)).notes() == []


def test_val(cirr: Path) -> None:
    """All images of the split file, reference removed, subsets of six, and both metrics that select."""
    benchmark = CIRR(str(cirr)).benchmark("val")
    rows = json.loads((cirr / CAPTIONS.format("val")).read_text())
    assert benchmark == CIRR(str(cirr)).benchmark("val", "cirr/val") and benchmark.name == "cirr/val"
    assert list(benchmark.gallery) == list(json.loads((cirr / SPLIT.format("val")).read_text()))
    assert benchmark.exclude_reference and benchmark.has_known_targets and not benchmark.macro
    assert metric_names(benchmark) == ["R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"]
    assert primary_names(benchmark) == ["R@5", "Rs@1"] and not any(q.tags for q in benchmark.queries)
    assert [(q.reference, q.targets, q.text, q.name) for q in benchmark.queries] == [
        (r["reference"], (r["target_hard"],), r["caption"], str(r["pairid"])) for r in rows
    ]
    assert [list(q.candidates) for q in benchmark.queries] == [r["img_set"]["members"] for r in rows]


def test_test1(cirr: Path) -> None:
    """Its targets are not known, and are not read even if a file has some."""
    set_first(cirr / CAPTIONS.format("test1"), target_hard="test1-1-0-img1")
    benchmark = CIRR(str(cirr)).benchmark("test1")
    assert benchmark.name == "cirr/test1" and not benchmark.has_known_targets and len(benchmark.queries) == 18
    assert not [q for q in benchmark.queries if q.targets] and len({q.name for q in benchmark.queries}) == 18


def test_unknown_protocols_and_splits(cirr: Path) -> None:
    """Both say what there is; a protocol belongs to its split."""
    dataset = CIRR(str(cirr))
    assert "known: cirr/val" in refused(lambda: dataset.benchmark("val", "cirr/test1"))
    assert "known: val, test1" in refused(lambda: dataset.benchmark("test"))


@pytest.mark.parametrize("annotations", ["cirr", ""])
@pytest.mark.parametrize("tree", ["", "images", "img_raw"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_layouts(cirr: Path, annotations: str, tree: str, suffix: str) -> None:
    """Annotations in cirr/ or in the root, the NLVR2 tree in the root or in images/, and any suffix."""
    if not annotations:
        for folder in "captions", "image_splits":
            (cirr / "cirr" / folder).rename(cirr / folder)
        (cirr / "cirr").rmdir()
    for folder in "train", "dev", "test1":
        (cirr / tree).mkdir(exist_ok=True)
        (cirr / folder).rename(cirr / tree / folder)
    for path in list(cirr.rglob("*.png")):
        path.rename(path.with_suffix(suffix))
    dataset = load_dataset("cirr", str(cirr))
    assert dataset.root == cirr and len(dataset.triplets()) == 18 and len(dataset.benchmark("val").queries) == 12
    assert dataset.image("train-3-0-img1").path == cirr / tree / "train" / "7" / f"train-3-0-img1{suffix}"
    assert not [i for role in dataset.image_roles() for i in role.image_ids if not dataset.image(i).path.is_file()]


@pytest.mark.parametrize("folder", ["cirr", "cirr_dataset", "CIRR"])
@pytest.mark.parametrize("how", ["itself", "above", "environment"])
def test_where_it_is_found(cirr: Path, monkeypatch: pytest.MonkeyPatch, folder: str, how: str) -> None:
    """Under each name that is in use, given directly, one level above, or by SPN4CIR_DATA."""
    above = cirr.parent / "datasets"
    above.mkdir()
    root = cirr.rename(above / folder)
    monkeypatch.setenv("SPN4CIR_DATA", str(above if how == "environment" else above / "nowhere"))
    given = {"itself": str(root), "above": str(above), "environment": None}[how]
    dataset = load_dataset("cirr", given)
    assert dataset.root == root and dataset.image("dev-0-0-img0").path == root / "dev" / "dev-0-0-img0.png"


@pytest.mark.parametrize("how", ["itself", "above"])
def test_annotations_in_the_root_below_a_folder(cirr: Path, how: str) -> None:
    """datasets/cirr/captions looks like the root's own cirr/captions: where the pictures lie decides."""
    for folder in "captions", "image_splits":
        (cirr / "cirr" / folder).rename(cirr / folder)
    (cirr / "cirr").rmdir()
    dataset = load_dataset("cirr", str(cirr if how == "itself" else cirr.parent))
    assert dataset.root == cirr and dataset.image("dev-0-0-img0").path.is_file()


def test_what_is_expected_is_said(tmp_path: Path) -> None:
    """A dataset that is not there, and annotations without a picture."""
    message = refused(lambda: CIRR(str(tmp_path)))
    assert str(tmp_path) in message and "captions/, image_splits/" in message and "Cuberick-Orion/CIRR" in message


def test_the_image_tree_may_be_in_two_places(cirr: Path) -> None:
    """One split in the root, another in img_raw, and an empty folder that hides nothing."""
    (cirr / "img_raw").mkdir()
    (cirr / "dev").rename(cirr / "img_raw" / "dev")
    (cirr / "dev").mkdir()
    dataset = CIRR(str(cirr))
    assert dataset.image("dev-0-0-img0").path == cirr / "img_raw/dev/dev-0-0-img0.png"
    assert dataset.image("train-0-0-img0").path == cirr / "train/7/train-0-0-img0.png"


def test_paths(cirr: Path) -> None:
    """As the split file says; where it should lie, if it is missing; an error for an id that none lists."""
    dataset = CIRR(str(cirr))
    assert dataset.image("train-0-0-img0").path == cirr / "train/7/train-0-0-img0.png"
    (cirr / "dev/dev-0-0-img0.png").unlink()
    assert dataset.image("dev-0-0-img0").path == cirr / "dev/dev-0-0-img0.png"
    for image_id in "nothing", "../../x", "", "train/7/train-0-0-img0":
        assert refused(lambda image_id=image_id: dataset.image(image_id).path) == f"cirr: unknown image id {image_id!r}"  # type: ignore[misc]
    for folder in "train", "dev", "test1":
        shutil.rmtree(cirr / folder)
    assert "holds no pictures: expected there captions/" in refused(lambda: CIRR(str(cirr)).image("train-0-0-img0"))


@each_split
@pytest.mark.parametrize(("change", "words"), [
    (lambda d: d.update({"a-img0": "../../x"}), ", entry 'a-img0': \"../../x\" is no path below"),
    (lambda d: d.update({"a-img0": "./train/../../x.png"}), ", entry 'a-img0': \"./train/../../x.png\" is no path"),
    (lambda d: d.update({"a-img0": "/etc/passwd"}), ", entry 'a-img0': \"/etc/passwd\" is no path below"),
    (lambda d: d.update({"a-img0": 3}), ", entry 'a-img0': 3 is no path below"),
    (lambda d: d.update({"../../x": "./dev/x.png"}), ": '../../x' is no image id"),
    (lambda d: list(d), ": expected an object of image names and paths"),
])  # fmt: skip
def test_damaged_split_files_are_named(cirr: Path, split: str, change: Callable[[Any], object], words: str) -> None:
    """File and entry; no path leads out of the dataset, and the doctor says the same."""
    path = edit(cirr / SPLIT.format(split), change)
    dataset = CIRR(str(cirr))
    message = refused(read_of(dataset, split))
    assert message.startswith(str(path)) and words in message
    check = next(c for c in dataset.checks() if c.what == f"{split}: split file")
    assert check.examples == (message,) and check.level == ("note" if split == "test1" else "problem")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "is not valid JSON, or cut short"),
    "gone": (lambda p: p.unlink(), "is missing: it comes from github.com/Cuberick-Orion/CIRR"),
    "object": (lambda p: edit(p, lambda rows: {"a": rows}), ": expected a list"),
    "no entry": (lambda p: edit(p, lambda rows: [*rows[:2], 3]), ", entry 2: expected an object, got 3"),
    "no caption": (lambda p: edit(p, lambda r: r[2].pop("caption") and None), ", entry 2, field 'caption': is missing"),
    "no reference": (lambda p: edit(p, lambda r: r[2].pop("reference") and None), "entry 2, field 'reference': is mis"),
    "two captions": (lambda p: set_first(p, caption=["a", "b"]), ", entry 0, field 'caption': expected a text"),
    "number": (lambda p: set_first(p, reference=3), ", entry 0, field 'reference': expected a text, got 3"),
    "path": (lambda p: set_first(p, reference="../../x"), ", entry 0, field 'reference': \"../../x\" is no image id"),
}  # fmt: skip
BENCHMARK_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unlisted": (lambda p: set_first(p, reference="x"), ", entry 0, field 'reference': \"x\" is not in "),
    "no subset": (lambda p: edit(p, lambda r: r[2].pop("img_set") and None), ", entry 2, field 'img_set': is missing"),
    "subset": (lambda p: set_first(p, img_set=["a"]), ", entry 0, field 'img_set': expected an object"),
    "no members": (lambda p: set_first(p, img_set={}), ", entry 0, field 'img_set', field 'members': is missing"),
    "members": (lambda p: set_first(p, img_set={"members": "a"}), "field 'members': expected a list of texts"),
    "member": (lambda p: set_first(p, img_set={"members": ["../../x"]}), "field 'members': \"../../x\" is no image id"),
    "stranger": (lambda p: set_first(p, img_set={"members": ["x"]}), "field 'members': \"x\" is not in "),
    "outside": (lambda p: set_first(p, img_set={"members": []}), ", entry 0, field 'img_set': expected 6 different"),
    "no pair": (lambda p: edit(p, lambda r: r[2].pop("pairid") and None), ", entry 2, field 'pairid': is missing"),
    "pair": (lambda p: set_first(p, pairid="12000"), ", entry 0, field 'pairid': expected a whole number"),
    "pair twice": (lambda p: set_first(p, pairid=12001), ", entry 1, field 'pairid': 12001 occurs twice"),
}  # fmt: skip


@each_split
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_captions_are_named(cirr: Path, split: str, damage: str) -> None:
    """File, entry and field stand in the message, from the loader and from the doctor's look at the files."""
    spoil, words = DAMAGE[damage]
    path = cirr / CAPTIONS.format(split)
    spoil(path)
    dataset = CIRR(str(cirr))
    message = refused(read_of(dataset, split))
    assert message.startswith(str(path)) and words in message
    check = next(c for c in dataset.checks() if c.what == f"{split}: captions")
    assert check.examples[0].startswith(str(path)) and words in check.examples[0]
    assert check.level == ("note" if split == "test1" else "problem")


@pytest.mark.parametrize("split", ["val", "test1"])
@pytest.mark.parametrize("damage", BENCHMARK_DAMAGE)
def test_damaged_queries_are_named(cirr: Path, split: str, damage: str) -> None:
    """What an evaluation needs besides: members and pair ids."""
    spoil, words = BENCHMARK_DAMAGE[damage]
    path = cirr / CAPTIONS.format(split)
    spoil(path)
    message = refused(lambda: CIRR(str(cirr)).benchmark(split))
    assert message.startswith(str(path)) and words in message


@pytest.mark.parametrize(("split", "value", "words"), [
    ("val", "dev-13-0-img1", "field 'img_set': its members lack 'dev-13-0-img1'"),
    ("val", "train-0-0-img0", "field 'target_hard': \"train-0-0-img0\" is not in "),
    ("val", "../../x", "field 'target_hard': \"../../x\" is no image id"),
    ("train", "dev-0-0-img0", "field 'target_hard': \"dev-0-0-img0\" is not in "),
    ("train", None, "field 'target_hard': expected a text, got null"),
])  # fmt: skip
def test_targets_that_cannot_be(cirr: Path, split: str, value: object, words: str) -> None:
    """A target outside gallery, subset or split names file, entry, field and, where there is one, the split file."""
    path = set_first(cirr / CAPTIONS.format(split), target_hard=value)
    message = refused(read_of(CIRR(str(cirr)), split))
    assert message.startswith(f"{path}, entry 0, {words}")
    assert not words.endswith("is not in ") or message.endswith(str(cirr / SPLIT.format(split)))


def test_a_gallery_without_the_target(cirr: Path) -> None:
    """An image that the split file forgot, though a query's answer."""
    target = json.loads((cirr / CAPTIONS.format("val")).read_text())[0]["target_hard"]
    split = edit(cirr / SPLIT.format("val"), lambda d: d.pop(target) and None)
    message = refused(lambda: CIRR(str(cirr)).benchmark("val"))
    assert message.startswith(str(cirr / CAPTIONS.format("val"))) and f'"{target}" is not in {split}' in message
    assert "entry 0, field 'target_hard'" in message


def test_a_reference_that_is_its_target(cirr: Path) -> None:
    """It is never ranked, so the query has no answer: an error, no crash of the evaluation; in training, a note."""
    for split in "val", "train":
        path = cirr / CAPTIONS.format(split)
        set_first(path, target_hard=json.loads(path.read_text())[0]["reference"])
    dataset = CIRR(str(cirr))
    assert "entry 0, field 'target_hard': is the reference" in refused(lambda: dataset.benchmark("val"))
    assert len(dataset.triplets()) == 18
    found = {c.what: c for c in dataset.checks()}
    assert [found[f"{split}: reference equal to target"].found for split in ("train", "val", "test1")] == [1, 1, 0]


def test_what_the_doctor_sees_of_entries(cirr: Path) -> None:
    """Ids that no split lists, subsets of the wrong size, images outside their subset: each with its entry."""
    path = cirr / CAPTIONS.format("val")
    rows = json.loads(path.read_text())
    rows[1]["img_set"]["members"].remove(rows[1]["target_hard"])
    rows[2]["img_set"]["members"][5] = rows[2]["img_set"]["members"][4]
    rows[3]["img_set"]["members"].append("nowhere-img0")
    path.write_text(json.dumps(rows))
    found = {c.what: c for c in CIRR(str(cirr)).checks()}
    lost, size = found["val: ids in captions that no split lists"], found["val: subsets without 6 different members"]
    outside = found["val: references or targets outside their subset"]
    assert (lost.examples, lost.level) == (("entry 3: nowhere-img0",), "problem")
    assert size.examples == ("entry 1: 5 members", "entry 2: 5 members", "entry 3: 7 members") and size.level == "note"
    assert (outside.examples, outside.level) == ((f"entry 1: {rows[1]['target_hard']}",), "problem")
    assert not [c for c in found.values() if c.what.startswith("train") and c.what.endswith("subset") and c.found]


def test_test1_is_not_needed(cirr: Path) -> None:
    """Without it training and val work; a submission says which file is missing."""
    for path in CAPTIONS.format("test1"), SPLIT.format("test1"):
        (cirr / path).unlink()
    dataset = CIRR(str(cirr))
    assert len(dataset.triplets()) == 18 and len(dataset.benchmark("val").queries) == 12
    assert dataset.image("dev-0-0-img0").path.is_file()
    assert not [c for c in dataset.checks() if c.level == "problem"]
    assert "split.rc2.test1.json is missing" in refused(lambda: dataset.check_submission(cirr / "x.json"))


def test_roles_of_images(cirr: Path) -> None:
    """What training and val need is told from what is merely listed."""
    edit(cirr / SPLIT.format("train"), lambda d: d.update({"train-99-0-img0": "./train/7/train-99-0-img0.png"}))
    dataset = CIRR(str(cirr))
    roles = {role.name: role for role in dataset.image_roles()}
    assert {name: (len(role.image_ids), role.needed) for name, role in roles.items()} == {
        "named by training triplets": (18, True), "val gallery": (15, True),
        "other images of train": (1, False), "test1 gallery": (54, False),
    }  # fmt: skip
    assert len(dataset.training_images()) == 19


def test_generated_triplets_in_the_published_shape(cirr: Path, tmp_path: Path) -> None:
    """What is written for CIRR has its fields and is read back over its images, or the text of a rewriter."""
    dataset = CIRR(str(cirr))
    triplet = Triplet("train-0-0-img0", ("train-1-0-img1",), ("a dog", "a dog instead of a cat"), generated=True)
    entry = entry_writer(dataset, tmp_path)(triplet, ("a cat", "a dog"))
    assert entry == {
        "pairid": 0, "reference": "train-0-0-img0", "target_hard": "train-1-0-img1",
        "caption": ["a dog", "a dog instead of a cat"], "img_set": {"members": [""]}, "caption1": "a cat",
        "caption2": "a dog",
    }  # fmt: skip
    path = tmp_path / "cap.rc2.train.extend_clip.json"
    path.write_text(json.dumps([entry, {**entry, "llm_caption": "make it a dog"}]))
    rewritten = replace(triplet, texts=("make it a dog",))  # of published *_llm files
    assert read_generated(path, dataset.training_images()) == ([triplet, rewritten], [])
    path.write_text(json.dumps([{**entry, "llm_caption": ["one", "other"]}, {**entry, "llm_caption": " "}]))
    several = replace(triplet, texts=("one", "other"))
    assert read_generated(path, dataset.training_images()) == ([several, triplet], [])  # an empty one says nothing
    path.write_text(json.dumps([entry, {**entry, "target_hard": "dev-0-0-img0"}]))
    assert "entry 1, field 'target_hard': 'dev-0-0-img0' is no training image" in refused(
        lambda: read_generated(path, dataset.training_images())
    )


def test_the_fixture_is_whole(cirr: Path) -> None:
    """Negative control of all of the above."""
    assert not [c for c in CIRR(str(cirr)).checks() if c.level == "problem"]
