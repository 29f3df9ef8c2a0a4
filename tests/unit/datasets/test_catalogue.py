"""A folder or a table of pictures as a dataset."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image

from spn4cir.config import TrainConfig
from spn4cir.data import load_triplets
from spn4cir.dataset_check import examine
from spn4cir.datasets import load_dataset
from spn4cir.datasets.catalogue import Catalogue
from spn4cir.datasets.skip import write_skip_list
from spn4cir.errors import InputError


def picture(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures in two folders and at the top, and what is none."""
    root = tmp_path / "shop"
    for name in ("shoes/b.png", "shoes/old/a.JPG", "hats/ü h.webp", "top.gif", ".hidden/x.png", "shoes/.x.png"):
        picture(root / name)
    (root / "notes.md").write_text("no picture")
    return root


PASSED = "catalogue: 1 files are passed over: 1 .md"
IDS = ["hats/ü h.webp", "shoes/b.png", "shoes/old/a.JPG", "top.gif"]


def test_a_folder(folder: Path) -> None:
    """Sorted ids are paths below the root; the first folder is the category; hidden names are passed over."""
    dataset = load_dataset("catalogue", str(folder))
    assert dataset.training_images() == IDS and dataset.triplets() == [] and not dataset.has_triplets
    assert [dataset.category(i) for i in IDS] == ["hats", "shoes", "shoes", ""]
    assert all(dataset.image(i).path.is_file() and dataset.label(i) == i for i in IDS)
    assert dataset.notes() == [PASSED] and dataset.caption(IDS[0]) == ""
    with pytest.raises(InputError, match="unknown image id"):
        dataset.image("shoes/.x.png")


def test_where_it_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPN4CIR_DATA, then data, hold a folder of that name; else one line says what to give."""
    monkeypatch.setenv("SPN4CIR_DATA", str(folder.parent))
    with pytest.raises(InputError, match=r"shop/catalogue|catalogue is no folder of pictures"):
        load_dataset("catalogue")
    folder.rename(folder.parent / "catalogue")
    assert load_dataset("catalogue").training_images() == IDS


def test_texts_beside_pictures(folder: Path) -> None:
    """The first line, on one line; a file of captions wins; a link is not read; what is no UTF-8 is named."""
    (folder / "shoes/b.txt").write_text("a  red\tshoe\nsecond line", encoding="utf-8")
    (folder / "secret").write_text("secret")
    (folder / "top.txt").symlink_to(folder / "secret")
    dataset = Catalogue(str(folder))
    assert [dataset.caption(i) for i in IDS] == ["", "a red shoe", "", ""]
    (folder / "captions.jsonl").write_text(
        '{"file": "./shoes/b.png", "description": "given"}\n{"file": "gone.png", "description": "x"}\n'
    )
    dataset = Catalogue(str(folder))
    assert dataset.caption("shoes/b.png") == "given"
    assert "describes 1 images that are not there" in dataset.notes()[0]
    (folder / "shoes/old/a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"a\.txt cannot be read"):
        dataset.caption("shoes/old/a.JPG")


def test_links(folder: Path, tmp_path: Path) -> None:
    """A link to a picture below the root is one more; those that lead out, and links to folders, are said."""
    outside = picture(tmp_path / "outside.png")
    (folder / "inner.png").symlink_to(folder / "shoes/b.png")
    (folder / "outer.png").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    dataset = Catalogue(str(folder))
    assert dataset.training_images() == sorted([*IDS, "inner.png"])
    assert dataset.notes() == [
        f"catalogue: 2 links to folders, or out of {folder}, are not followed, such as 'loop'",
        'catalogue: 1 pipes, sockets, devices or broken links are not opened, such as "dangling.png"',
        PASSED,
    ]


@pytest.mark.parametrize("name", [
    b"a\nb.png", b"a\x1b[31m.png", b"a\\b.png", b"\xff.png", "a\u202eb.png".encode(), "a\u2028b.png".encode()
], ids=ascii)  # fmt: skip
def test_names_that_are_refused(folder: Path, name: bytes) -> None:
    """Control characters, separators of other systems, turned text and what is no Unicode: left out, and said."""
    shutil.copy(folder / "top.gif", os.fsencode(folder) + b"/" + name)
    dataset = Catalogue(str(folder))
    assert dataset.training_images() == IDS
    note, passed = dataset.notes()
    assert passed == PASSED
    assert "1 pictures are left out" in note and note.isprintable() and note.isascii()


@pytest.mark.parametrize(
    "name", ['<img src="x" onerror=alert(1)>.png', "a'b & c.png", "100%.png", "日本.png", "a #1?.png"]
)
def test_names_that_are_taken(folder: Path, name: str) -> None:
    """Anything else is a name: whoever shows it escapes it."""
    picture(folder / name)
    assert name in Catalogue(str(folder)).training_images()


@pytest.mark.parametrize("mark", ["images.done.json", "images.jsonl", "images.cache.jsonl"])
def test_what_generation_wrote_is_no_picture(folder: Path, mark: str) -> None:
    """Any of its files tells its folder, which is passed over, and said; without one, it is a folder as others."""
    picture(folder / "generated" / "sheet.png")
    plain = Catalogue(str(folder))
    assert "generated/sheet.png" in plain.training_images() and plain.notes() == [PASSED]
    (folder / "generated" / mark).write_text("")
    marked = Catalogue(str(folder))
    assert marked.training_images() == IDS
    assert marked.notes() == [
        'catalogue: 1 folders are passed over since they hold files of data generation, such as "generated/"',
        PASSED,
    ]


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    """One line that names the folder and the suffixes."""
    with pytest.raises(InputError, match=rf"{tmp_path} holds no pictures \(\.png"):
        Catalogue(str(tmp_path)).training_images()
    with pytest.raises(InputError, match="give --data-root FOLDER"):
        Catalogue(str(tmp_path / "absent"))


ROWS = [
    {"image_id": "1", "path": "shoes/b.png", "caption": "a shoe", "category": "shoe", "title": "Shoe <b>"},
    {"image_id": "http://x/2", "path": "./top.gif", "caption": None, "category": "", "title": None},
    {"image_id": "3", "path": "gone.png", "caption": " ", "category": "none", "title": ""},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pandas.DataFrame(rows, dtype=object)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="," if path.suffix == ".csv" else "\t", index=False)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables(folder: Path, suffix: str) -> None:
    """All formats say the same; a missing file stays an image, whose path is missing."""
    dataset = Catalogue(str(write_table(folder / f"mine{suffix}", ROWS)))
    assert dataset.training_images() == ["1", "http://x/2", "3"] and dataset.root == folder
    assert [dataset.image(i).path for i in dataset.training_images()] == [
        folder / "shoes/b.png", folder / "top.gif", folder / "gone.png",
    ]  # fmt: skip
    assert [dataset.caption(i) for i in dataset.training_images()] == ["a shoe", "", ""]
    assert [dataset.category(i) for i in dataset.training_images()] == ["shoe", "", "none"]
    assert dataset.label("1") == "Shoe <b>" and dataset.label("3") == "3"


def test_a_table_of_that_name_in_the_folder_is_read(folder: Path) -> None:
    """catalogue.csv says what belongs to it; without ids the paths are ids; column names as they come."""
    write_table(folder / "catalogue.csv", [{"File ": "top.gif", "TEXT": "x"}, {"File ": "./shoes/b.png", "TEXT": "NA"}])
    dataset = Catalogue(str(folder))
    assert dataset.training_images() == ["top.gif", "shoes/b.png"] and dataset.caption("shoes/b.png") == "NA"
    assert dataset.category("shoes/b.png") == ""


@pytest.mark.parametrize(("rows", "said"), [
    ([{"name": "x"}], "or image_name; there are: name; say which by 't.jsonl?image=COLUMN'"),
    ([{"path": "../x.png"}], "row 1, column 'path': '../x.png' is no path below"),
    ([{"path": "/etc/passwd"}], "row 1, column 'path'"),
    ([{"path": "a\\b.png"}], "row 1, column 'path'"),
    ([{"path": "a\tb.png"}], "row 1, column 'path'"),
    ([{"path": "a.png"}, {"path": ""}, {"path": "/b.png"}], "row 3, column 'path'"),
    ([{"path": "a.png", "id": "x"}, {"path": "b.png", "id": "x"}], "row 2, column 'image_id': \"x\" occurs twice"),
    ([{"path": "a.png", "id": "x\x00"}], "row 1, column 'image_id'"),
    ([{"path": "a.png", "id": ""}], "row 1, column 'image_id'"),
    ([{"path": {"bytes": "x"}}], "row 1, column 'path': expected a text, got"),
    ([{"path": 1.5}], "row 1, column 'path': expected a text, got 1.5"),
])  # fmt: skip
def test_rows_that_are_refused(folder: Path, rows: list[dict[str, Any]], said: str) -> None:
    """File, row and column are named, in one line."""
    path = write_table(folder / "t.jsonl", rows)
    with pytest.raises(InputError) as error:
        Catalogue(str(path)).training_images()
    assert str(path) in str(error.value) and said in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(("name", "content"), [
    ("t.csv", b""), ("t.csv", b"\xff\xfe\x00"), ("t.csv", b"image\n\"a"), ("t.jsonl", b"[1]\n"), ("t.jsonl", b"{\n"),
    ("t.parquet", b"PAR1"), ("t.jsonl", b"\xff\n"),
])  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes) -> None:
    """The file is named, in one line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"t\.{name[2:]}") as error:
        Catalogue(str(tmp_path / name)).training_images()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [
    ["top.gif,red, blue"], ["top.gif,red,blue,green"], ["top.gif,red,blue", "shoes/b.png,x"],
    ["top.gif,red", "shoes/b.png,x,y"], ["top.gif,a,b", "shoes/b.png,x,y,z"], ["top.gif,red,"],
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.filterwarnings("ignore")
def test_rows_with_a_comma_too_many(folder: Path, rows: list[str], suffix: str) -> None:
    """Nothing is cut, nothing shifted: the file, and what to do; in quotes they are read."""
    path, mark = folder / f"t{suffix}", "," if suffix == ".csv" else "\t"
    path.write_text("\n".join(["image,caption", *rows]).replace(",", mark) + "\n")
    told = "rows have more fields than the head line: texts with (commas|tabs) need quotes"
    with pytest.raises(InputError, match=told) as error:
        Catalogue(str(path)).training_images()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    quoted = [f'{name}{mark}"{text}"' for name, _, text in (row.partition(",") for row in rows)]
    path.write_text("\n".join([f"image{mark}caption", *quoted]) + "\n")
    dataset = Catalogue(str(path))
    assert dataset.training_images() == [row.partition(",")[0] for row in rows]
    assert dataset.caption("top.gif") == " ".join(rows[0].partition(",")[2].split())


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_row_that_leads_out_by_a_link(folder: Path, tmp_path: Path, where: str) -> None:
    """By itself or by its folder; a link that stays inside is fine."""
    outside = picture(tmp_path / "out" / "x.png")
    (folder / "hats/in.png").symlink_to(folder / "top.gif")
    path = write_table(folder / "t.csv", [{"path": "hats/in.png"}])
    assert Catalogue(str(path)).training_images() == ["hats/in.png"]
    (folder / "hats/x.png").symlink_to(outside) if where == "file" else (folder / "away").symlink_to(outside.parent)
    write_table(path, [{"path": "hats/in.png"}, {"path": "hats/x.png" if where == "file" else "away/x.png"}])
    with pytest.raises(InputError, match=r"row 2, column 'image': .* is a link that leaves"):
        Catalogue(str(path)).training_images()


QUERIES = "reference,modification,target,group\ntop.gif,in blue,shoes/b.png,a\ntop.gif,in blue,hats/ü h.webp,a\n"


def test_queries_of_ones_own(folder: Path) -> None:
    """Rows that ask the same are one query with several targets; without the file one line says which to write."""
    dataset = Catalogue(str(folder))
    assert not dataset.protocols
    with pytest.raises(InputError, match=r"write .*shop/queries\.csv .* reference, modification and target"):
        dataset.benchmark("val")
    (folder / "queries.csv").write_text(QUERIES, encoding="utf-8")
    benchmark = Catalogue(str(folder)).benchmark("val")
    (query,) = benchmark.queries
    assert query.targets == ("shoes/b.png", "hats/ü h.webp") and query.tags == ("a",) and query.text == "in blue"
    assert benchmark.name == "catalogue/val" and benchmark.gallery == tuple(IDS) and benchmark.exclude_reference


@pytest.mark.parametrize(("row", "said"), [
    ("gone,x,top.gif", "row 1, column 'reference': \"gone\" is no image"), ("top.gif,x,gone", "column 'target'"),
    ("top.gif, ,shoes/b.png", "column 'modification': is empty"), ("top.gif,x,top.gif", "is the reference"),
    ("", "holds no query"),
])  # fmt: skip
def test_queries_that_cannot_be_meant(folder: Path, row: str, said: str) -> None:
    """File, row and column are named."""
    (folder / "queries.csv").write_text(f"reference,modification,target\n{row}\n")
    with pytest.raises(InputError, match=said):
        Catalogue(str(folder)).benchmark("val")


def test_wrong_answers_and_needs_of_ones_own(folder: Path) -> None:
    """A row may name either, and an empty target where it names a wrong answer; rows of one query are put together."""
    rows = (
        "top.gif,in blue,shoes/b.png,,n1", "top.gif,in blue,,hats/ü h.webp,", "top.gif,blue please,shoes/b.png,,n1",
        "top.gif,in red,hats/ü h.webp,,",
    )  # fmt: skip
    (folder / "queries.csv").write_text("\n".join(("reference,modification,target,negative,need", *rows)) + "\n")
    first, second, third = Catalogue(str(folder)).benchmark("val").queries
    assert (first.targets, first.negatives, first.need) == (("shoes/b.png",), ("hats/ü h.webp",), "n1")
    assert (second.negatives, second.need, third.need) == ((), "n1", "")


def test_wrong_answers_under_a_further_name(folder: Path) -> None:
    """A column ``negatives``, a list of several in one cell, and cells of blanks, which are empty."""
    rows = ("top.gif,in blue,shoes/b.png, hats/ü h.webp,g", "top.gif,in red,shoes/b.png,  , \t")
    text = "\n".join(("reference,modification,target,Negatives,group", *rows)).replace(", hats", ",hats")
    (folder / "queries.csv").write_text(text + "\n", encoding="utf-8")
    first, second = Catalogue(str(folder)).benchmark("val").queries
    assert (first.negatives, first.tags, second.negatives, second.tags) == (("hats/ü h.webp",), ("g",), (), ())
    (folder / "queries.csv").unlink()
    asked = {"reference": "top.gif", "modification": "x", "target": "shoes/b.png"}
    row = {**asked, "negatives": ["hats/ü h.webp", "shoes/b.png"]}
    (folder / "queries.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"row 1, column 'negative': .* is a target of this query"):
        Catalogue(str(folder)).benchmark("val")
    row["negatives"] = ["hats/ü h.webp"]
    (folder / "queries.jsonl").write_text(json.dumps({**row, "target": " "}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="column 'target': is empty, and so it is in all rows"):
        Catalogue(str(folder)).benchmark("val")


@pytest.mark.parametrize(("rows", "said"), [
    (["top.gif,x,shoes/b.png,gone,"], "row 1, column 'negative': \"gone\" is no image"),
    (["top.gif,x,,,"], "row 1, column 'target': is empty, and the row names no wrong answer"),
    (["top.gif,x,,shoes/b.png,"], "row 1, column 'target': is empty, and so it is in all rows"),
    (["top.gif,x,shoes/b.png,top.gif,"], "column 'negative': is the reference"),
    (["top.gif,x,shoes/b.png,,", "top.gif,x,,shoes/b.png,"], "row 2, column 'negative': .* is a target of this query"),
    (["top.gif,x,shoes/b.png,,n", "top.gif,x,hats/ü h.webp,,m"], "row 2, column 'need': is \"m\", and in another row"),
    (["top.gif,x,shoes/b.png,,n", "top.gif,y,hats/ü h.webp,,n"], "'y'.* and 'x' phrase one need, 'n', and their"),
])  # fmt: skip
def test_wrong_answers_and_needs_that_cannot_be_meant(folder: Path, rows: list[str], said: str) -> None:
    """File, row and column are named; of two phrasings both texts."""
    text = "\n".join(("reference,modification,target,negative,need", *rows)) + "\n"
    (folder / "queries.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        Catalogue(str(folder)).benchmark("val")


def test_the_doctor_and_the_skip_list(folder: Path) -> None:
    """A broken picture stands in the way of queries over all pictures, until it is skipped; of nothing else."""
    assert examine(load_dataset("catalogue", str(folder))).can_train
    (folder / "shoes/b.png").write_bytes(b"x")
    assert examine(load_dataset("catalogue", str(folder))).can_train  # generated triplets leave it out
    others = [i for i in Catalogue(str(folder)).training_images() if i != "shoes/b.png"]
    (folder / "queries.csv").write_text(f"reference,modification,target\n{others[0]},x,{others[1]}\n")
    assert not examine(load_dataset("catalogue", str(folder))).can_train
    write_skip_list(folder, {"shoes/b.png": "unreadable"})
    skipping = load_dataset("catalogue", str(folder))
    assert not skipping.has_triplets and "shoes/b.png" not in skipping.training_images() and examine(skipping).can_train


# --- what selects where nobody has annotated anything ---


def load(folder: Path, pairs: list[tuple[str, str]], **changes: Any) -> Any:
    entries = [{"reference_name": r, "target_name": t, "captions": [f"{r} {t}"]} for r, t in pairs]
    (folder / "made.json").write_text(json.dumps(entries))
    config = TrainConfig(
        dataset="catalogue", data_root=str(folder), generated="made.json", **{"holdout": 0.1, **changes}
    )
    return load_triplets(config, load_dataset("catalogue", str(folder)), None, lambda line: None)


def test_targets_are_put_aside(tmp_path: Path) -> None:
    """No target that is asked for is learned from as one; order and seed do not matter; ranked over all images."""
    ids = [f"{n}.png" for n in range(30)]
    for n, name in enumerate(ids):
        Image.new("RGB", (2, 2), (n, 0, 0)).save(tmp_path / name)
    pairs = [(a, b) for n, a in enumerate(ids) for b in (ids[(n + 1) % 30], ids[(n + 7) % 30])]
    _, triplets, judge = load(tmp_path, pairs, holdout=0.3)
    asked = {q.targets[0] for q in judge.queries}
    assert judge.name == "catalogue/holdout-generated-0.3" and set(judge.gallery) == set(ids)
    assert asked and not asked & {t.targets[0] for t in triplets} and len(triplets) + len(judge.queries) == len(pairs)
    assert asked & {t.reference for t in triplets}  # as a reference it may be seen
    _, again, other = load(tmp_path, pairs[::-1], holdout=0.3, seed=7)
    assert {q.targets[0] for q in other.queries} == asked and set(again) == set(triplets)
    _, _, more = load(tmp_path, pairs, holdout=0.6)
    assert asked < {q.targets[0] for q in more.queries}  # negative control
    _, _, least = load(tmp_path, pairs, holdout=0.0001)
    assert len({q.targets[0] for q in least.queries}) == 1


def test_nothing_is_left_to_put_aside(folder: Path) -> None:
    """One target, or no triplets at all: one line."""
    with pytest.raises(InputError, match="holds out 2 of 2 generated triplets"):
        load(folder, [("top.gif", "shoes/b.png"), ("hats/ü h.webp", "shoes/b.png")])
    with pytest.raises(InputError, match="no triplets to train on: give generated ones"):
        load(folder, [])
