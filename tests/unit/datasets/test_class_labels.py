"""Tables and settings of labels: what is refused, limits of classes, and splits by class."""

from pathlib import Path

import datasets
import pytest
from conftest import draw_picture
from labelled_files import CLASSES, EACH, PATHS, classes_of, draw_classes, rows_of, write_rows

from spn4cir.datasets.class_labels import LabelledImage, LabelSettings, limit_classes, split_classes
from spn4cir.datasets.labelled import Labelled
from spn4cir.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` converts goes into a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight classes of four pictures."""
    return draw_classes(tmp_path / "mine")


@pytest.mark.parametrize(("text", "message"), [
    ("min_image: 3", "unknown key 'min_image'; did you mean 'min_images'"),
    ("min_images: 0", "min_images: expected a whole number of at least 1, got 0"),
    ("min_images: true", "min_images: expected a whole number of at least 1, got true"),
    ("max_images: many", "max_images: expected a whole number"),
    ("{min_images: 5, max_images: 4}", "max_images: 4 is less than min_images, 5"),
    ("sources: [a.csv]", "sources: expected names and places"),
    ("sources: {a/b: a.csv}", 'sources: "a/b" is no name'),
    ("sources: {a: 3}", "sources, a: expected a folder or a table, got 3"),
    ("sources: {a: gone.csv}", r"gone\.csv is missing"),
    ("- 3", "must hold keys and values"),
    ("{", "cannot be read as YAML"),
])  # fmt: skip
def test_settings_that_are_refused(root: Path, text: str, message: str) -> None:
    """One line that names the file and the key; none of these, and nothing is refused."""
    (root / "labelled.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        Labelled(str(root))
    assert "\n" not in str(error.value) and str(root) in str(error.value)
    (root / "labelled.yaml").write_text("max_images: null")
    assert len(classes_of(Labelled(str(root / "images")))) == len(PATHS)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd.png", "a\\b.png", "images/out.png"])
def test_unsafe_paths(root: Path, path: str) -> None:
    """A path, or a link, that leaves the table's folder, or cannot be written down, is named by its row."""
    draw_picture(root.parent / "secret.png", 0)
    (root / "images" / "out.png").symlink_to(root.parent / "secret.png")
    rows = [*rows_of(), {"img_path": path, "label": "c0"}]
    place = root / "mine.csv"
    write_rows(place, rows)
    with pytest.raises(InputError, match=f"row {len(rows)}, column 'im"):
        Labelled(str(place))
    write_rows(place, rows[:-1])
    assert len(classes_of(Labelled(str(place)))) == len(PATHS)


def test_a_torn_table(root: Path) -> None:
    """A last row that is cut short is an error; an empty label that is written out is a distractor."""
    place = root / "mine.csv"
    whole = write_rows(place, rows_of())
    lines = place.read_text()
    place.write_text(lines[: lines.rindex(",")])
    with pytest.raises(InputError, match=rf"mine\.csv, line {len(PATHS) + 1}: 1 of 2 fields: the file is cut short"):
        Labelled(whole)
    place.write_text(lines[: lines.rindex(",") + 1])
    dataset = Labelled(whole)
    assert dataset.category(PATHS[-1][0]) == "" and PATHS[-1][0] in dataset.benchmark("val").gallery


@pytest.mark.parametrize(("changed", "message"), [
    ({"label": "c\n0"}, None), ({"label": "c\x000"}, "column 'label'"), ({"img_path": PATHS[EACH][0]}, "row 5"),
    ({"split": "training"}, "row 1, column 'split': \"training\" is none of train, val, test, distractor, validation"),
    ({"split": ""}, "column 'split'"), ({"source": "a/b"}, "row 1, column 'source': \"a/b\" holds a slash"),
])  # fmt: skip
def test_cells_that_are_refused(root: Path, changed: dict[str, str], message: str | None) -> None:
    """Labels of several lines become one line; control characters, unknown splits and images twice are errors."""
    rows = rows_of(split=["train"] * len(PATHS)) if "split" in changed else rows_of()
    rows[0].update(changed)  # pandas leaves cells of a new column empty in the other rows
    place = write_rows(root / "mine.parquet", rows)
    if message is None:
        assert Labelled(place).category(PATHS[0][0]) == "mine/c 0"
        return
    with pytest.raises(InputError, match=message):
        Labelled(place)


def test_rows_of_one_picture(root: Path) -> None:
    """They are one image if they say the same, else both rows are named."""
    rows, place = rows_of(), root / "mine.csv"
    write_rows(place, [*rows, rows[2]])
    assert len(classes_of(Labelled(str(place)))) == len(rows)
    write_rows(place, [*rows, rows[2] | {"label": "other"}])
    with pytest.raises(InputError) as error:
        Labelled(str(place))
    told = f'{place}, row {len(rows) + 1}, column \'label\': "other", where {place}, row 3 has "{rows[2]["label"]}" for'
    assert str(error.value) == f"{told} the same picture"


def test_too_little(root: Path) -> None:
    """No label, too few classes, no place: one line each."""
    write_rows(root / "mine.csv", [{"img_path": path} for path, _ in PATHS])
    with pytest.raises(InputError, match="one column must be called label"):
        Labelled(str(root / "mine.csv"))
    write_rows(root / "mine.csv", rows_of()[: 2 * EACH])
    with pytest.raises(InputError, match="2 classes cannot be split"):
        Labelled(str(root / "mine.csv"))
    with pytest.raises(InputError, match="is missing: give a folder"):
        Labelled(str(root / "gone"))


def test_limits() -> None:
    """Small classes go, large ones keep the images of the least hash, whatever the order of the rows."""
    images = [
        LabelledImage(f"{label}{n}", label, "s") for label, size in (("a", 9), ("b", 2), ("c", 4)) for n in range(size)
    ]
    images.append(LabelledImage("d", "", "s"))
    settings = LabelSettings(min_images=3, max_images=4)
    kept, notes = limit_classes(images, settings)
    counts = {label: sum(image.label == label for image in kept) for label in "abc"}
    assert counts == {"a": 4, "b": 0, "c": 4} and kept[-1].image_id == "d"
    assert notes[0] == "1 classes with fewer than 3 images are left out: 2 images" and "1 classes with more" in notes[1]
    assert {*limit_classes(images[::-1], settings)[0]} == {*kept}
    assert [image.image_id for image in kept if image.label == "a"] != [f"a{n}" for n in range(4)]
    assert limit_classes(images, LabelSettings()) == (images, [])


@pytest.mark.parametrize("count", [3, 4, 10, 1000])
def test_no_class_is_in_two_splits(count: int) -> None:
    """A fifth and a twentieth of the classes, one at least; a class stays where it is when others come."""
    labels = [f"c{n}" for n in range(count)]
    found = split_classes(labels)
    sizes = {split: [*found.values()].count(split) for split in ("train", "val", "test")}
    assert min(sizes.values()) >= 1 and found == split_classes(labels[::-1])
    if count == 1000:
        assert 160 < sizes["test"] < 240 and 30 < sizes["val"] < 75
        more = split_classes([*labels, *(f"d{n}" for n in range(500))])
        assert {label: more[label] for label in labels} == found


def test_limits_beside_a_table(root: Path) -> None:
    """Given a table, ``labelled.yaml`` beside it limits its classes; the sources that it names are not read."""
    place = write_rows(root / "mine.csv", rows_of())
    (root / "labelled.yaml").write_text("{max_images: 2, sources: {gone: gone.csv}}")
    dataset = Labelled(place)
    assert len(classes_of(dataset)) == 2 * CLASSES and len(dataset.benchmark("test").queries) % 2 == 0
    assert "labelled: 8 classes with more than 2 images keep 2, drawn by a hash of the id" in dataset.notes()
    (root / "labelled.yaml").unlink()
    assert len(classes_of(Labelled(place))) == len(PATHS)


def test_a_name_on_the_hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository, here in the current folder; its name is the source, or the name that ``labelled.yaml`` gives it."""
    images = [{"bytes": (root / path).read_bytes(), "path": path} for path, _ in PATHS]
    columns = {"image": images, "label": [label for _, label in PATHS]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    (tmp_path / "some" / "one").mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "some/one/train.parquet"))
    monkeypatch.chdir(tmp_path)
    assert set(classes_of(Labelled("hf:some/one")).values()) == {f"one/{label}" for _, label in PATHS}
    (root / "labelled.yaml").write_text("sources: {hub: 'hf:some/one', here: images/}")
    found = Labelled(str(root / "labelled.yaml"))
    assert {c.partition("/")[0] for c in classes_of(found).values()} == {"hub", "here"} and found.root == root
