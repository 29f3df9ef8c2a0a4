"""FashionIQ from its own files: layouts, texts, protocols, and what is said of damage."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spn4cir.batches import TripletRows
from spn4cir.datasets import load_dataset
from spn4cir.datasets.fashioniq import FashionIQ
from spn4cir.datasets.generated import entry_writer, read_generated
from spn4cir.errors import InputError
from spn4cir.results import metric_names, primary_names
from spn4cir.types import Benchmark, Triplet

CATEGORIES = ("dress", "shirt", "toptee")
PROTOCOLS = ("fashioniq/original", "fashioniq/original-noref", "fashioniq/val-union", "fashioniq/val-union-ref")


def ids_of(category: str, split: str) -> list[str]:
    """The images of a split file of the fixture."""
    ids = [f"B{category[0].upper()}{split[:2].upper()}{n:05d}" for n in range(14)]
    return [f"B{category[0].upper()}TR00000", *ids[1:]] if split == "val" else ids


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


def galleries(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """What each category's queries are ranked over, which is the same for all of them."""
    found = {(tag, query.candidates) for query in benchmark.queries for tag in query.tags}
    assert len(found) == len(dict(found)) and {measure.over for measure in benchmark.measures} == {"candidates"}
    return dict(found)


def test_triplets_in_file_order(fashioniq: Path) -> None:
    """Dress, shirt, toptee; reference and target are not confused."""
    triplets = FashionIQ(str(fashioniq)).triplets()
    assert len(triplets) == 36 and not any(t.generated for t in triplets)
    rows = [r for c in CATEGORIES for r in json.loads((fashioniq / f"captions/cap.{c}.train.json").read_text())]
    assert [(t.reference, t.targets[0]) for t in triplets] == [(row["candidate"], row["target"]) for row in rows]
    assert {t.reference[:2] for t in triplets[:12]} == {"BD"} and {t.reference[:2] for t in triplets[24:]} == {"BT"}


def test_texts_of_training(fashioniq: Path) -> None:
    """Both captions in either order, or one alone, stripped of dots, question marks, commas and blanks."""
    set_first(fashioniq / "captions/cap.dress.train.json", captions=["?. is Red, and short., ", " has 1.5 dots?"])
    first = FashionIQ(str(fashioniq)).triplets()[0]
    assert first.texts == (
        "is Red, and short and has 1.5 dots", "has 1.5 dots and is Red, and short", "is Red, and short", "has 1.5 dots",
    )  # fmt: skip


def test_each_text_is_drawn_equally_often(fashioniq: Path) -> None:
    """Over epochs, training sees each of the four a quarter of the time."""
    triplets = FashionIQ(str(fashioniq)).triplets()
    rows, counts = TripletRows(triplets, seed=0), Counter[str]()
    for epoch in range(1000):
        triplet, text = rows[(epoch, 5)]
        assert triplet == triplets[5]
        counts[text] += 1
    assert counts.keys() == set(triplets[5].texts)
    assert all(200 < count < 300 for count in counts.values())  # 250 ± 14


@pytest.mark.parametrize(("captions", "expected"), [
    (["is red.", " ?"], ("is red",)), (["", "is red"], ("is red",)), ([".", ""], None), (["", ""], None),
])  # fmt: skip
def test_empty_captions(fashioniq: Path, captions: list[str], expected: tuple[str, ...] | None) -> None:
    """Only what says something is drawn; a triplet without any is left out, and that is said."""
    set_first(fashioniq / "captions/cap.shirt.train.json", captions=captions)
    dataset = FashionIQ(str(fashioniq))
    triplets, notes = dataset.triplets(), dataset.notes()
    if expected:
        assert triplets[12].texts == expected and len(triplets) == 36 and not notes
    else:
        assert len(triplets) == 35 and triplets[12].reference == "BSTR00001"
        assert notes == ["fashioniq: 1 training triplets without any caption are left out"]
    assert all(text for t in triplets for text in t.texts)
    listed = next(c for c in dataset.checks() if c.what == "triplets with an empty caption")
    assert listed.examples == ("train shirt, entry 0",) and listed.level == "note"


@pytest.mark.parametrize(("captions", "expected"), [
    (["is red.", " has dots?"], "is red and has dots"), (["Has Dots", "is red"], "Has Dots and is red"),
    (["is red", ", "], "is red and "), (["", "is red"], " and is red"),
])  # fmt: skip
def test_texts_of_val(fashioniq: Path, captions: list[str], expected: str) -> None:
    """Always the first and the second, even where one is empty (three times in val): published numbers are so made."""
    set_first(fashioniq / "captions/cap.dress.val.json", captions=captions)
    assert FashionIQ(str(fashioniq)).benchmark("val").queries[0].text == expected


@pytest.mark.parametrize("protocol", [None, *PROTOCOLS])
def test_protocols(fashioniq: Path, protocol: str | None) -> None:
    """Galleries per category, the reference, cut-offs, and what selects."""
    benchmark = FashionIQ(str(fashioniq)).benchmark("val", protocol)
    assert benchmark.name == (protocol or "fashioniq/original")
    assert benchmark.exclude_reference is (protocol in PROTOCOLS[1:3])
    assert metric_names(benchmark) == primary_names(benchmark) == ["R@10", "R@50"]
    assert benchmark.macro == CATEGORIES and benchmark.has_known_targets
    ranked = galleries(benchmark)
    for category in CATEGORIES:
        ids = ids_of(category, "val")
        if protocol in PROTOCOLS[2:]:  # references are the first 5, targets the next 8
            assert set(ranked[category]) == set(ids[:13])
        else:
            assert list(ranked[category]) == ids
    assert set(benchmark.gallery) == {i for ids in ranked.values() for i in ids}
    assert Counter(tag for q in benchmark.queries for tag in q.tags) == dict.fromkeys(CATEGORIES, 8)
    assert all(len(q.targets) == 1 and q.targets[0] != q.reference for q in benchmark.queries)


def test_unknown_protocols_and_splits(fashioniq: Path) -> None:
    """Both say what there is; the test split has no public targets and no server."""
    dataset = FashionIQ(str(fashioniq))
    assert all(p in refused(lambda: dataset.benchmark("val", "cirr/val")) for p in PROTOCOLS)
    for split in "test", "train":
        assert "known: val" in refused(lambda split=split: dataset.benchmark(split))  # type: ignore[misc]
    assert "no evaluation server" in refused(lambda: dataset.write_submission(fashioniq, {}, {}))
    assert "no evaluation server" in refused(lambda: dataset.check_submission(fashioniq / "x.json"))


def test_images_shared_by_categories_are_one(fashioniq: Path) -> None:
    """The whole gallery names an image once, each category's gallery still holds it."""
    edit(fashioniq / "image_splits/split.toptee.val.json", lambda ids: [*ids, "BSVA00003"])
    benchmark = FashionIQ(str(fashioniq)).benchmark("val")
    assert benchmark.gallery.count("BSVA00003") == 1 and len(benchmark.gallery) == 42
    assert all("BSVA00003" in galleries(benchmark)[category] for category in ("toptee", "shirt"))


def test_training_images(fashioniq: Path) -> None:
    """All of the split files and of the triplets, those of triplets first, each once."""
    set_first(fashioniq / "captions/cap.dress.train.json", target="BXXXXXXXXX")
    images = FashionIQ(str(fashioniq)).training_images()
    assert len(images) == len(set(images)) == 43
    assert images[:2] == ["BDTR00000", "BXXXXXXXXX"]


@pytest.mark.parametrize("layout", [
    "images/{id}.png", "images/{id}.jpg", "images/{id}.JPG", "images/{id}.jpeg", "images/{id}.webp",
    "images/{category}/{id}.png", "images/{category}/{id}.jpg", "resized_image/{category}/{id}.jpg",
])  # fmt: skip
def test_layouts_of_pictures(fashioniq: Path, layout: str) -> None:
    """Every published layout is found, whatever the suffix."""
    for category in CATEGORIES:
        for split in "train", "val", "test":
            for image_id in ids_of(category, split):
                new = fashioniq / layout.format(id=image_id, category=category)
                new.parent.mkdir(parents=True, exist_ok=True)
                if (old := fashioniq / "images" / f"{image_id}.png").exists():
                    old.rename(new)
    dataset = FashionIQ(str(fashioniq))
    assert dataset.image("BSTR00003").path == fashioniq / layout.format(id="BSTR00003", category="shirt")
    assert not [i for role in dataset.image_roles() for i in role.image_ids if not dataset.image(i).path.is_file()]


def test_png_is_preferred(fashioniq: Path) -> None:
    """Of several pictures with one name, the suffix decides: not the order in which a folder is listed."""
    for suffix in "webp", "jpg":
        shutil.copy(fashioniq / "images/BDTR00001.png", fashioniq / f"images/BDTR00001.{suffix}")
        shutil.copy(fashioniq / "images/BDTR00002.png", fashioniq / f"images/BDTR00002.{suffix}")
    (fashioniq / "images/BDTR00002.png").unlink()
    (fashioniq / "images/BDTR00001.txt").touch()
    dataset = FashionIQ(str(fashioniq))
    assert [dataset.image(f"BDTR0000{n}").path.suffix for n in (1, 2)] == [".png", ".jpg"]


def test_paths_of_what_is_missing(fashioniq: Path) -> None:
    """A missing picture has the path where it should lie; no picture at all is an error that says what is expected."""
    (fashioniq / "images/BDTR00001.png").unlink()
    assert FashionIQ(str(fashioniq)).image("BDTR00001").path == fashioniq / "images/BDTR00001.png"
    shutil.rmtree(fashioniq / "images")
    message = refused(lambda: FashionIQ(str(fashioniq)).image("BDTR00001"))
    assert "holds no pictures" in message and "images/ID.png" in message and "XiaoxiaoGuo/fashion-iq" in message


@pytest.mark.parametrize("image_id", ["../../x", "..", "/etc/passwd", "", "a/b", "a\\b"])
def test_no_id_leads_out(fashioniq: Path, image_id: str) -> None:
    """An id with a path in it is refused."""
    assert "is no image id" in refused(lambda: FashionIQ(str(fashioniq)).image(image_id))


@pytest.mark.parametrize("folder", ["fashioniq", "fashionIQ_dataset", "fashionIQ"])
@pytest.mark.parametrize("how", ["itself", "above", "environment"])
def test_where_it_is_found(fashioniq: Path, monkeypatch: pytest.MonkeyPatch, folder: str, how: str) -> None:
    """Under each name that is in use, given directly, one level above, or by SPN4CIR_DATA."""
    root = fashioniq.rename(fashioniq.parent / "all") if folder == "fashioniq" else fashioniq
    above = root.parent / "datasets"
    above.mkdir()
    root = root.rename(above / folder)
    monkeypatch.setenv("SPN4CIR_DATA", str(above if how == "environment" else above / "nowhere"))
    given = {"itself": str(root), "above": str(above), "environment": None}[how]
    assert load_dataset("fashioniq", given).root == root


CAPTIONS, SPLIT = "captions/cap.dress.{}.json", "image_splits/split.dress.{}.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "is not valid JSON, or cut short"),
    "gone": (lambda p: p.unlink(), "is missing: it comes from github.com/XiaoxiaoGuo/fashion-iq"),
    "object": (lambda p: edit(p, lambda rows: {"a": rows}), ": expected a list"),
    "no entry": (lambda p: edit(p, lambda rows: [*rows[:2], "x"]), ", entry 2: expected an object, got \"x\""),
    "no target": (lambda p: edit(p, lambda rows: rows[2].pop("target") and None), ", entry 2, field 'target': is mis"),
    "no captions": (lambda p: edit(p, lambda rows: rows[2].pop("captions") and None), "2, field 'captions': is mis"),
    "number": (lambda p: set_first(p, candidate=3), ", entry 0, field 'candidate': expected a text, got 3"),
    "path": (lambda p: set_first(p, target="../../x"), ", entry 0, field 'target': \"../../x\" is no image id"),
    "text": (lambda p: set_first(p, captions="red"), ", entry 0, field 'captions': expected a list of texts"),
    "null": (lambda p: set_first(p, captions=["red", None]), ", entry 0, field 'captions': expected a list of texts"),
    "three": (lambda p: set_first(p, captions=["a", "b", "c"]), ", entry 0, field 'captions': expected 2 captions"),
    "one": (lambda p: set_first(p, captions=["a"]), ", entry 0, field 'captions': expected 2 captions, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_captions_are_named(fashioniq: Path, split: str, damage: str) -> None:
    """File, entry and field stand in the message, from the loader and from the doctor's look at the files."""
    spoil, words = DAMAGE[damage]
    path = fashioniq / CAPTIONS.format(split)
    spoil(path)
    dataset = FashionIQ(str(fashioniq))
    message = refused(dataset.triplets if split == "train" else lambda: dataset.benchmark("val"))
    assert message.startswith(str(path)) and words in message
    assert [(c.what, c.examples) for c in dataset.checks() if c.level == "problem"] == [
        (f"{split} dress: captions", (message,))
    ]


@pytest.mark.parametrize(("change", "words"), [
    (lambda ids: {"a": ids}, ": expected a list of image ids"), (lambda ids: [*ids, 3], ", entry 14: 3 is no image id"),
    (lambda ids: ["../../x", *ids], ", entry 0: \"../../x\" is no image id"),
    (lambda ids: [*ids, ids[3]], "entry 14: 'BDVA00003' occurs twice"),
])  # fmt: skip
def test_damaged_split_files_are_named(fashioniq: Path, change: Callable[[Any], object], words: str) -> None:
    """File and entry stand in the message."""
    path = edit(fashioniq / SPLIT.format("val"), change)
    message = refused(lambda: FashionIQ(str(fashioniq)).benchmark("val"))
    assert message.startswith(str(path)) and words in message


@pytest.mark.parametrize(("lost", "entry", "field"), [("BDVA00002", 2, "candidate"), ("BDVA00007", 2, "target")])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_gallery_without_the_target(fashioniq: Path, lost: str, entry: int, field: str, protocol: str) -> None:
    """The caption file, the entry, the field and the split file are named; the union needs no split file."""
    split = edit(fashioniq / SPLIT.format("val"), lambda ids: [i for i in ids if i != lost])
    dataset = FashionIQ(str(fashioniq))
    if protocol in PROTOCOLS[2:]:
        assert lost in dataset.benchmark("val", protocol).gallery
        return
    assert refused(lambda: dataset.benchmark("val", protocol)) == (
        f"{fashioniq / CAPTIONS.format('val')}, entry {entry}, field '{field}': '{lost}' is not in {split}"
    )


def test_a_reference_that_is_its_target(fashioniq: Path) -> None:
    """It can be ranked only where the reference is; elsewhere it is an error, no crash of the evaluation."""
    set_first(fashioniq / "captions/cap.dress.val.json", target="BDTR00000")
    dataset = FashionIQ(str(fashioniq))
    assert dataset.benchmark("val").queries[0].targets == ("BDTR00000",)
    assert "cap.dress.val.json, entry 0, field 'target': is the reference" in refused(
        lambda: dataset.benchmark("val", PROTOCOLS[1])
    )
    same = next(c for c in dataset.checks() if c.what == "reference equal to target")
    assert (same.found, same.level, same.examples) == (1, "note", ("val dress, entry 0",))


def test_the_test_split_is_not_needed(fashioniq: Path) -> None:
    """Nothing is read of it but by the doctor, to whom it is a note."""
    for category in CATEGORIES:
        (fashioniq / f"captions/cap.{category}.test.json").unlink()
        (fashioniq / f"image_splits/split.{category}.test.json").unlink()
    dataset = FashionIQ(str(fashioniq))
    assert len(dataset.triplets()) == 36 and len(dataset.benchmark("val").queries) == 24
    assert not [c for c in dataset.checks() if c.level == "problem"]
    assert len([c for c in dataset.checks() if c.what.startswith("test ") and c.level == "note"]) == 6


def test_roles_of_images(fashioniq: Path) -> None:
    """What training and val need is told from what is merely listed."""
    roles = {role.name: role for role in FashionIQ(str(fashioniq)).image_roles()}
    assert {name: (len(role.image_ids), role.needed) for name, role in roles.items()} == {
        "named by training triplets": (39, True), "val galleries": (42, True),
        "other images of train": (3, False), "test galleries": (42, False),
    }  # fmt: skip


def test_the_overlap_of_val_and_train(fashioniq: Path) -> None:
    """Images of a val gallery that training shows are counted, against the published number."""
    edit(fashioniq / SPLIT.format("val"), lambda ids: [*ids, "BDTR00013"])  # listed in train, but in no triplet
    found = {c.what: c for c in FashionIQ(str(fashioniq)).checks()}
    triplets = found["val gallery images also in train triplets"]
    listed = found["val gallery images also in train split files"]
    assert (triplets.found, triplets.expected, triplets.level) == (3, 400, "note")
    assert triplets.examples == ("BDTR00000", "BSTR00000", "BTTR00000")
    assert (listed.found, listed.expected) == (4, 811) and "BDTR00013" in listed.examples


@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_that_no_split_lists(fashioniq: Path, split: str) -> None:
    """In val they stand in the way; training may name an image that its split file forgot."""
    set_first(fashioniq / CAPTIONS.format(split), target="BXXXXXXXXX")
    found = {c.what: c for c in FashionIQ(str(fashioniq)).checks()}
    lost = found[f"{split}: ids in captions that no split lists"]
    assert lost.examples == ("BXXXXXXXXX",) and lost.level == ("problem" if split == "val" else "note")
    assert found[f"{'val' if split == 'train' else 'train'}: ids in captions that no split lists"].found == 0


def test_generated_triplets_in_the_published_shape(fashioniq: Path, tmp_path: Path) -> None:
    """What is written for FashionIQ has its fields and is read back over its images, or the text of a rewriter."""
    dataset = FashionIQ(str(fashioniq))
    triplet = Triplet("BDTR00000", ("BSTR00001",), ("a red shirt",), generated=True)
    entry = entry_writer(dataset, tmp_path)(triplet, ("a dress", "a red shirt"))
    assert entry == {
        "target": "BSTR00001", "candidate": "BDTR00000", "captions": ["a red shirt"],
        "caption1": "a dress", "caption2": "a red shirt",
    }  # fmt: skip
    path = tmp_path / "cap.extend_clip.train.json"
    path.write_text(json.dumps([entry, {**entry, "llm_caption": "make it a shirt"}]))
    rewritten = replace(triplet, texts=("make it a shirt",))  # of published *_llm files
    assert read_generated(path, dataset.training_images()) == ([triplet, rewritten], [])
    path.write_text(json.dumps([{**entry, "llm_caption": ["one", "other"]}, {**entry, "llm_caption": " "}]))
    several = replace(triplet, texts=("one", "other"))
    assert read_generated(path, dataset.training_images()) == ([several, triplet], [])  # an empty one says nothing
    path.write_text(json.dumps([{**entry, "target": "BDVA00001"}]))
    assert "entry 0, field 'target': 'BDVA00001' is no training image" in refused(
        lambda: read_generated(path, dataset.training_images())
    )


def test_pictures_are_read(fashioniq: Path) -> None:
    """Negative control of all of the above: the fixture is whole."""
    dataset = FashionIQ(str(fashioniq))
    assert not [c for c in dataset.checks() if c.level == "problem"]
    with Image.open(dataset.image("BTVA00013").path) as picture:
        assert picture.size == (48, 40)
