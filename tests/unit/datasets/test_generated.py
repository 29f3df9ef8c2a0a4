"""Generated triplets in the published shapes."""

import json
from pathlib import Path
from typing import Any

import pytest

from spn4cir.datasets import load_dataset
from spn4cir.datasets.cirr import CIRR as Cirr
from spn4cir.datasets.generated import entry_writer, open_generated, picture_places
from spn4cir.datasets.generated import read_generated as read
from spn4cir.errors import InputError
from spn4cir.types import Triplet

FASHIONIQ = {"candidate": "a", "target": "b", "captions": ["red", "in red"], "caption1": "x", "caption2": "y"}
CIRR = {
    "reference": "a", "target_hard": "b", "caption": ["red", "in red"], "pairid": 0, "img_set": {"members": ["-"]},
}  # fmt: skip


def read_generated(path: Path, known: tuple[str, ...] = ("a", "b", "c")) -> list[Triplet]:
    """Triplets of a file that leaves none out."""
    triplets, notes = read(path, known)
    assert not notes
    return triplets


def written(tmp_path: Path, *entries: Any) -> Path:
    path = tmp_path / "made.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@pytest.mark.parametrize("entry", [FASHIONIQ, CIRR], ids=["fashioniq", "cirr"])
def test_published_shapes(tmp_path: Path, entry: dict[str, Any]) -> None:
    """Both shapes give the same triplet, marked as generated; what is not needed is ignored."""
    expected = [Triplet("a", ("b",), ("red", "in red"), generated=True)]
    assert read_generated(written(tmp_path, entry)) == expected


def test_one_text_may_stand_alone(tmp_path: Path) -> None:
    """A text in the place of a list of one."""
    assert read_generated(written(tmp_path, {**CIRR, "caption": "red"}))[0].texts == ("red",)


def test_shapes_may_be_mixed_and_order_stays(tmp_path: Path) -> None:
    """Entries come in the order of the file."""
    found = read_generated(written(tmp_path, {**CIRR, "reference": "c"}, FASHIONIQ, CIRR))
    assert [t.reference for t in found] == ["c", "a", "a"]


def test_an_empty_list(tmp_path: Path) -> None:
    """No entries are no triplets."""
    assert read_generated(written(tmp_path)) == []


@pytest.mark.parametrize("dataset", ["emoji", "fashioniq", "cirr"])
def test_what_is_written_is_read_back(tmp_path: Path, dataset: str, fashioniq: Path, cirr: Path) -> None:
    """entry_writer and read_generated are inverse, and CIRR's shape has CIRR's fields."""
    triplet = Triplet("a", ("b",), ("red ä",), generated=True)
    root = {"fashioniq": str(fashioniq), "cirr": str(cirr)}.get(dataset)
    entry = entry_writer(load_dataset(dataset, root), tmp_path)(triplet, ("one", "two"))
    assert (entry["caption1"], entry["caption2"]) == ("one", "two")
    assert entry.keys() - {"caption1", "caption2"} == (CIRR if dataset == "cirr" else FASHIONIQ).keys() - {
        "caption1", "caption2",
    }  # fmt: skip
    assert read_generated(written(tmp_path, entry)) == [triplet]


def test_out_of_domain_files_name_images_by_address(tmp_path: Path) -> None:
    """Their paths are not read; ids are what the other two fields say."""
    entry = {
        "reference": "x/1.jpg",
        "target": "x/2.jpg",
        "reference_name": "a",
        "target_name": "b",
        "captions": ["red"],
    }
    assert read_generated(written(tmp_path, entry)) == [Triplet("a", ("b",), ("red",), generated=True)]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    """Empty texts, triplets without any, and triplets of skipped images."""
    entries = [{**FASHIONIQ, "captions": c} for c in (["red", " "], [], [""], "")] + [{**FASHIONIQ, "target": "gone"}]
    triplets, notes = read(written(tmp_path, *entries), ("a", "b"), ("gone",))
    assert triplets == [Triplet("a", ("b",), ("red",), generated=True)]
    assert [note.split(": ")[1] for note in notes] == [
        "3 triplets without any text are left out", "1 triplets of skipped images are left out",
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "field"), [
    ({"target": None}, "target"), ({"target": "z"}, "target"), ({"target": 3}, "target"),
    ({"candidate": "z"}, "candidate"),
    ({"candidate": ["a"]}, "candidate"), ({"captions": 3}, "captions"), ({"captions": [3]}, "captions"),
    ({"captions": None}, "captions"), ({"captions": {"a": "b"}}, "captions"),
])  # fmt: skip
def test_damage_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    """Each kind of damage names file, entry and field, in one line."""
    path = written(tmp_path, FASHIONIQ, {**FASHIONIQ, **change})
    with pytest.raises(InputError) as error:
        read_generated(path, known=("a", "b"))
    message = str(error.value)
    assert str(path) in message and "entry 1" in message and repr(field) in message and "\n" not in message


@pytest.mark.parametrize(("entry", "field"), [
    *[({k: v for k, v in FASHIONIQ.items() if k != gone}, gone) for gone in ("target", "captions")],
    *[({k: v for k, v in CIRR.items() if k != gone}, gone) for gone in ("reference", "target_hard", "caption")],
])  # fmt: skip
def test_missing_fields_are_named(tmp_path: Path, entry: dict[str, Any], field: str) -> None:
    """A field that is not there is named in the words of the shape."""
    with pytest.raises(InputError, match=f"entry 0, field '{field}': is missing"):
        read_generated(written(tmp_path, entry))


@pytest.mark.parametrize("entry", [3, "a", None, ["a", "b", "red"]])
def test_entries_that_are_no_objects(tmp_path: Path, entry: Any) -> None:
    """File and entry are named."""
    with pytest.raises(InputError, match=r"made\.json, entry 1: expected an object"):
        read_generated(written(tmp_path, FASHIONIQ, entry))


@pytest.mark.parametrize("content", [b"", b"[", b"\xff\xfe", b"{}", b"3", b'"text"'])
def test_files_that_are_no_lists(tmp_path: Path, content: bytes) -> None:
    """Broken JSON, other encodings and other JSON name the file."""
    path = tmp_path / "made.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"made\.json"):
        read_generated(path)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    """The message names the file and the command."""
    with pytest.raises(InputError, match=r"absent\.json are missing: make them with python data_gen/make_triplets\.py"):
        read_generated(tmp_path / "absent.json")


# --- images of no dataset ---

OTHER = {
    "reference": "images/1.png", "target": "images/2.png", "reference_name": "http://x/1", "target_name": "http://x/2",
    "captions": ["red"],
}  # fmt: skip


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder of two pictures, and a place for generated files in it."""
    for name in ("1", "2"):
        picture = tmp_path / "other" / "images" / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(b"")
    (tmp_path / "other" / "generated").mkdir()
    return tmp_path / "other"


def at(folder: Path, *entries: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "made.json"


@pytest.mark.parametrize("where", ["", "generated"])
def test_other_images_have_places(cirr: Path, other: Path, where: str) -> None:
    """Paths start from the file's folder or the one above; the dataset knows the images, its own stay as they are."""
    whole = Cirr(str(cirr))
    mixed = {**CIRR, "reference": "train-0-0-img0", "target_hard": "train-1-0-img1"}
    dataset, triplets, notes = open_generated(at(other / where, OTHER, mixed), whole)
    assert triplets[0] == Triplet("http://x/1", ("http://x/2",), ("red",), generated=True) and not notes
    assert dataset.image("http://x/2").path == other / "images/2.png"
    assert dataset.image("train-0-0-img0").path == whole.image("train-0-0-img0").path
    assert dataset.training_images() == [*whole.training_images(), "http://x/1", "http://x/2"]
    assert dataset.benchmark("val") == whole.benchmark("val") and dataset.triplets() == whole.triplets()
    assert open_generated(at(other, mixed), whole)[0] is whole  # nothing to add


def test_other_images_below_the_current_directory(cirr: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders further above are looked at below the current directory only."""
    path = at(other / "a" / "b" / "c", OTHER)
    with pytest.raises(InputError, match="put a copy of this file into the folder that its paths start from"):
        open_generated(path, Cirr(str(cirr)))
    monkeypatch.chdir(other)
    assert open_generated(path, Cirr(str(cirr)))[0].image("http://x/1").path == other / "images/1.png"


@pytest.mark.parametrize(("change", "said"), [
    ({"reference": "/root_path/cc/1.jpg"}, "field 'reference': .* data_gen/sample_images.py"),
    ({"target": "../1.png"}, "field 'target': .* no path below a folder"),
    ({"target": 3}, "field 'target': expected a"),
    ({"reference": "images/9.png"}, "field 'reference': .* lies neither in"),
    ({"reference_name": "http://x/2"}, "field 'target': .* one id, one picture"),
    ({"target_name": "dev-0-0-img0"}, "field 'target_name': .* one that is evaluated on"),
])  # fmt: skip
def test_other_images_that_are_refused(cirr: Path, other: Path, change: dict[str, Any], said: str) -> None:
    """File, entry and field, in one line; private paths of published files say what to do instead."""
    path, dataset = at(other, {**OTHER, **change}), Cirr(str(cirr))
    with pytest.raises(InputError, match=said) as error:
        open_generated(path, dataset, [*dataset.benchmark("val").gallery, "dev-0-0-img0"])
    assert f"{path}, entry 0" in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_is_missing(cirr: Path, other: Path) -> None:
    """An id that no dataset knows needs one; other shapes have none."""
    with pytest.raises(InputError, match="field 'target': is missing"):
        open_generated(at(other, {k: v for k, v in OTHER.items() if k != "target"}), Cirr(str(cirr)))
    with pytest.raises(InputError, match="field 'candidate': 'a' is no training image"):
        open_generated(at(other, FASHIONIQ), Cirr(str(cirr)))


@pytest.mark.parametrize("out", ["other/generated", "elsewhere"])
def test_places_are_found_again(
    cirr: Path, other: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What picture_places writes, open_generated finds: beside the pictures, or elsewhere below the same folder."""
    from spn4cir.datasets.catalogue import Catalogue

    monkeypatch.chdir(tmp_path)
    catalogue, folder = Catalogue(str(other)), tmp_path / out / "deep"
    triplet = Triplet("images/1.png", ("images/2.png",), ("red",), generated=True)
    entry = entry_writer(catalogue, folder)(triplet, ("one", "two"))
    assert entry.keys() == {*OTHER, "caption1", "caption2"} and not str(entry["reference"]).startswith(("/", ".."))
    path = at(folder, entry)
    dataset, triplets, _ = open_generated(path, Cirr(str(cirr)))
    assert triplets == [triplet] and dataset.image("images/2.png").path == other / "images/2.png"
    assert read(path, catalogue.training_images()) == ([triplet], [])  # as a catalogue, its ids are known


def test_places_that_are_too_far(other: Path, tmp_path: Path) -> None:
    """Then paths start from the root of the pictures, into which a copy of the file belongs."""
    from spn4cir.datasets.catalogue import Catalogue

    assert picture_places(Catalogue(str(other)), tmp_path / "a" / "b" / "c")("images/1.png") == "images/1.png"
