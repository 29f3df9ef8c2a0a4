"""The doctor: what is missing, broken, equal or inconsistent, and whether training can run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spn4cir.dataset import Check
from spn4cir.dataset_check import Report, examine, skip_list, table
from spn4cir.datasets import load_dataset
from spn4cir.datasets.skip import write_skip_list
from spn4cir.errors import InputError
from spn4cir.identity import PUBLISHED_CLASSES


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file: what ``change`` returns, or what it makes of its argument."""
    content = json.loads(path.read_text(encoding="utf-8"))
    new = change(content)
    path.write_text(json.dumps(content if new is None else new), encoding="utf-8")


def look(root: Path) -> Report:
    """The report on the dataset whose folder it is."""
    return examine(load_dataset(root.name, str(root)), workers=2)


def of_level(report: Report, level: str) -> dict[str, Check]:
    return {check.what: check for check in report.checks if check.level == level}


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    path.unlink()
    new = {"truncated": content[: len(content) // 2], "unreadable": b"no picture", "empty": b""}
    if damage != "missing":
        path.write_bytes(new[damage])


def copy(source: Path, target: Path) -> None:
    """Into a new file: the old one may be shared with other tests."""
    target.unlink()
    shutil.copy(source, target)


@pytest.mark.parametrize("name", ["fashioniq", "cirr"])
def test_a_whole_dataset(name: str, request: pytest.FixtureRequest) -> None:
    """Negative control of all below: no problem, every picture decodes, and the only notes are on size and overlap."""
    report = look(request.getfixturevalue(name))
    assert report.can_train and not report.broken and not report.duplicates and not of_level(report, "problem")
    decoded = [check for check in report.checks if check.what.endswith("images that decode")]
    assert len(decoded) == 4 and all(check.found == check.expected for check in decoded)
    for what in of_level(report, "note"):
        assert what.endswith(("images listed", ": triplets")) or "also" in what


@pytest.mark.parametrize(("damage", "problem"), [
    ("missing", "missing"), ("truncated", "truncated"), ("unreadable", "unreadable"), ("empty", "unreadable"),
])  # fmt: skip
@pytest.mark.parametrize(("image", "role"), [
    ("images/BDTR00005.png", "named by training triplets"), ("images/BSVA00013.png", "val galleries"),
    ("images/BDTR00013.png", "other images of train"), ("images/BTTE00003.png", "test galleries"),
])  # fmt: skip
def test_broken_pictures(fashioniq: Path, image: str, role: str, damage: str, problem: str) -> None:
    """Each kind is told apart and named; only what training and val need stands in the way."""
    spoil(fashioniq / image, damage)
    report = look(fashioniq)
    image_id = Path(image).stem
    assert report.broken == {image_id: problem}
    needed = role in ("named by training triplets", "val galleries")
    found = of_level(report, "problem" if needed else "note")[f"{role}: {problem}"]
    assert found.found == 1 and found.examples[0].startswith(str(fashioniq / image))
    decoded = next(c for c in report.checks if c.what == f"{role}: images that decode")
    assert decoded.expected is not None and decoded.found == decoded.expected - 1
    assert report.can_train is not needed and len(of_level(report, "problem")) == needed


def test_a_broken_picture_on_the_skip_list(fashioniq: Path) -> None:
    """It is a note then; another one that is not listed is a problem still."""
    spoil(fashioniq / "images/BDTR00005.png", "missing")
    write_skip_list(fashioniq, {"BDTR00005": "missing"})
    report = look(fashioniq)
    assert report.can_train
    assert "named by training triplets: missing (on the skip list)" in of_level(report, "note")
    spoil(fashioniq / "images/BDTR00006.png", "missing")
    report = look(fashioniq)
    assert not report.can_train and of_level(report, "problem")["named by training triplets: missing"].found == 2


def test_a_mended_picture_on_the_skip_list(fashioniq: Path) -> None:
    """It is still left out, which one should know."""
    write_skip_list(fashioniq, {"BDTR00005": "missing"})
    report = look(fashioniq)
    assert report.can_train and not report.broken
    assert of_level(report, "note")["images on the skip list that decode"].examples == ("BDTR00005",)


def test_equal_pictures(cirr: Path) -> None:
    """Classes of equal pixels, whatever the file; and what of a gallery was trained on."""
    copy(cirr / "train/7/train-0-0-img0.png", cirr / "train/7/train-4-0-img0.png")
    copy(cirr / "train/7/train-0-0-img0.png", cirr / "dev/dev-14-0-img0.png")
    copy(cirr / "test1/test1-0-0-img0.png", cirr / "test1/test1-1-0-img1.png")
    report = look(cirr)
    assert report.can_train and sorted(map(len, report.duplicates)) == [2, 3]
    assert ["train-0-0-img0", "train-4-0-img0", "dev-14-0-img0"] in report.duplicates
    notes = of_level(report, "note")
    assert notes["images that are a copy of another"].found == 3
    assert notes["val gallery: copies of images named by training triplets"].examples == ("dev-14-0-img0",)


def test_the_leak_of_fashioniq(fashioniq: Path) -> None:
    """By name and by pixels, the latter also under another name."""
    copy(fashioniq / "images/BDTR00003.png", fashioniq / "images/BTVA00009.png")
    notes = of_level(look(fashioniq), "note")
    assert notes["val gallery images also in train triplets"].found == 3
    assert notes["val galleries: copies of images named by training triplets"].examples == ("BTVA00009",)


@pytest.mark.parametrize(("name", "path", "change", "words"), [
    ("cirr", "cirr/captions/cap.rc2.train.json", lambda r: r[3].update(target_hard="dev-0-0-img0"),
     "entry 3, field 'target_hard': \"dev-0-0-img0\" is not in"),
    ("cirr", "cirr/captions/cap.rc2.val.json", lambda r: r[3]["img_set"]["members"].append("train-0-0-img0"),
     "entry 3, field 'img_set', field 'members': \"train-0-0-img0\" is not in"),
    ("cirr", "cirr/captions/cap.rc2.val.json", lambda r: r[3].update(reference="train-0-0-img0"),
     "entry 3: train-0-0-img0"),
    ("cirr", "cirr/captions/cap.rc2.val.json", lambda r: r[3].update(pairid=12000), "'pairid': 12000 occurs twice"),
    ("cirr", "cirr/captions/cap.rc2.val.json", lambda r: r[3].update(target_hard=r[3]["reference"]),
     "entry 3, field 'target_hard': is the reference"),
    ("cirr", "cirr/captions/cap.rc2.train.json", lambda r: [], "triplets that are left"),
    ("cirr", "cirr/captions/cap.rc2.val.json", lambda r: [], "queries of cirr/val that are left"),
    ("fashioniq", "captions/cap.shirt.val.json", lambda r: r[3].update(target="BSTR00004"),
     "entry 3, field 'target': 'BSTR00004' is not in"),
    ("fashioniq", "image_splits/split.shirt.val.json", lambda ids: [i for i in ids if i != "BSVA00008"],
     "BSVA00008"),
])  # fmt: skip
def test_files_that_do_not_fit_together(
    name: str, path: str, change: Callable[[Any], object], words: str, request: pytest.FixtureRequest
) -> None:
    """Each file is sound by itself, but training would stop: so the doctor says it cannot run, and why."""
    root = request.getfixturevalue(name)
    edit(root / path, change)
    report = look(root)
    problems = of_level(report, "problem")
    assert not report.can_train
    assert any(words in text for what, check in problems.items() for text in (what, *check.examples)), problems


def test_what_only_some_recipes_read_is_looked_at_too(fashioniq: Path, cirr: Path) -> None:
    """A protocol that is not the default, a category without queries, the split file that candidates: all reads."""
    edit(fashioniq / "captions/cap.dress.val.json", lambda rows: rows[3].update(target=rows[3]["candidate"]))
    assert {"queries of fashioniq/original-noref", "queries of fashioniq/val-union"} == of_level(
        look(fashioniq), "problem"
    ).keys()
    (fashioniq / "captions/cap.dress.val.json").write_text("[]")
    assert of_level(look(fashioniq), "problem")["queries of fashioniq/original that are left"].examples == (
        "none of dress",
    )
    (fashioniq / "image_splits/split.dress.train.json").write_text("[")
    assert "train dress: split file" in of_level(look(fashioniq), "problem")
    (cirr / "cirr/image_splits/split.rc2.test1.json").write_text("{")
    report = look(cirr)
    assert report.can_train and len(report.found) == 33  # the other splits' pictures are looked at all the same


@pytest.mark.parametrize("name", ["fashioniq", "cirr"])
def test_everything_on_the_skip_list(name: str, request: pytest.FixtureRequest) -> None:
    """No triplet and no query is left: there is nothing to train on, and nothing to select by."""
    root = request.getfixturevalue(name)
    dataset = load_dataset(name, str(root))
    write_skip_list(root, {i: "unwanted" for role in dataset.image_roles() for i in role.image_ids})
    protocols = dataset.protocols["val"]
    left = {f"queries of {protocol} that are left" for protocol in protocols}
    assert of_level(look(root), "problem").keys() == {"triplets that are left to train on"} | left


@pytest.mark.parametrize(("name", "folders"), [("fashioniq", ["images"]), ("cirr", ["train", "dev", "test1"])])
def test_no_picture_at_all(name: str, folders: list[str], request: pytest.FixtureRequest) -> None:
    """One problem that says what is expected where, not one for each image; and nothing to skip."""
    root = request.getfixturevalue(name)
    for folder in folders:
        shutil.rmtree(root / folder)
    report = look(root)
    problems = of_level(report, "problem")
    assert problems.keys() == {"images"} and "holds no pictures: expected" in problems["images"].examples[0]
    assert not report.can_train and not report.broken and problems["images"].expected
    with pytest.raises(InputError, match="a skip list would leave nothing"):
        skip_list(report, {})


def test_damaged_annotations_do_not_stop_it(fashioniq: Path) -> None:
    """The rest is looked at all the same, pictures included."""
    (fashioniq / "captions/cap.dress.train.json").write_text("[{")
    edit(fashioniq / "captions/cap.shirt.val.json", lambda rows: rows[0].update(target="../../x"))
    spoil(fashioniq / "images/BTTR00005.png", "missing")
    report = look(fashioniq)
    problems = of_level(report, "problem")
    assert "cut short" in problems["train dress: captions"].examples[0]
    assert "entry 0, field 'target'" in problems["val shirt: captions"].examples[0]
    assert report.broken == {"BTTR00005": "missing"}
    assert {c.what for c in report.checks} >= {"train shirt: triplets", "val galleries: images that decode"}


def test_published_classes(cirr: Path) -> None:
    """optimized_images.json is held against the pixels; a damaged one stops training, so it is a problem."""
    ids = [f"train-{n}-0-img{n % 2}" for n in range(18)]
    sound: list[Any] = [ids, [f"./{i}.png" for i in ids], {i: n for n, i in enumerate(ids)}]
    path = cirr / PUBLISHED_CLASSES
    path.write_text(json.dumps(sound))
    what = f"{PUBLISHED_CLASSES}: images whose class disagrees with their pixels"
    assert next(c for c in look(cirr).checks if c.what == what).level == "fact"
    wrong = [ids[:-1], sound[1][:-1], {**sound[2], ids[-1]: 0}]  # the last is said to be as the first
    path.write_text(json.dumps(wrong))
    assert of_level(look(cirr), "note")[what].examples == (ids[-1],)
    path.write_text("[[], []]")
    report = look(cirr)
    assert not report.can_train and str(path) in of_level(report, "problem")[PUBLISHED_CLASSES].examples[0]


def test_skip_lists(fashioniq: Path) -> None:
    """What is broken now, without what is mended; what a person left out for a reason of their own stays."""
    spoil(fashioniq / "images/BDTR00005.png", "missing")
    spoil(fashioniq / "images/BTTE00003.png", "truncated")
    report = look(fashioniq)
    assert skip_list(report, {}) == {"BDTR00005": "missing", "BTTE00003": "truncated"}
    before = {"BDTR00005": "truncated", "BDTR00006": "missing", "BDTR00007": "a wrong dress"}
    assert skip_list(report, before) == {
        "BDTR00005": "missing", "BTTE00003": "truncated", "BDTR00007": "a wrong dress",
    }  # fmt: skip


def test_as_json(cirr: Path) -> None:
    """The whole report, every example included, as plain JSON."""
    for n in range(4, 10):
        spoil(cirr / f"train/7/train-{n}-0-img{n % 2}.png", "missing")
    report = look(cirr)
    told = json.loads(json.dumps(report.as_json()))
    assert told.keys() == {"can_train", "dataset", "root", "checks", "broken", "duplicates", "near_duplicates"}
    assert (told["can_train"], told["dataset"], told["root"]) == (False, "cirr", str(cirr))
    assert told["broken"] == {f"train-{n}-0-img{n % 2}": "missing" for n in range(4, 10)}
    missing = next(c for c in told["checks"] if c["what"] == "named by training triplets: missing")
    assert (missing["found"], missing["expected"], missing["level"], len(missing["examples"])) == (6, 0, "problem", 6)


def test_as_table(cirr: Path) -> None:
    """Counts beside the published ones, a few examples of what is wrong, and the verdict last."""
    for n in range(4, 10):
        spoil(cirr / f"train/7/train-{n}-0-img{n % 2}.png", "missing")
    report = look(cirr)
    lines = table(report).splitlines()
    assert lines[0] == f"cirr in {cirr}" and lines[2].split() == ["found", "expected"]
    line = next(n for n, text in enumerate(lines) if text.startswith("named by training triplets: missing"))
    assert lines[line].split()[-3:] == ["6", "0", "problem"]
    named = next(check.examples for check in report.checks if check.what.endswith("triplets: missing"))
    assert lines[line + 1 : line + 5] == [*(f"    {text}" for text in named[:3]), "    … 3 more"]
    assert lines[-1].startswith("problems: 1, notes: ") and "training cannot run" in lines[-1]
    assert "--write-skip-list" in lines[-1]
    assert next(text for text in lines if text.startswith("train: triplets")).split()[-3:] == ["18", "28,225", "note"]


def test_the_embedded_dataset_has_no_root() -> None:
    """It is named as embedded."""
    assert table(Report("emoji", "embedded", [Check("a", 1)])).splitlines()[0] == "emoji in embedded"
