"""Triplets of one's own in a table: columns, images by each of the three rules, what is refused, and training."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import TRAIN, Toy, draw_picture, toy_config
from pyarrow import parquet

from spn4cir import batches
from spn4cir.config import TrainConfig
from spn4cir.data import load_data, load_triplets
from spn4cir.datasets import DATASETS, load_dataset
from spn4cir.datasets.pairs import Pairs
from spn4cir.datasets.skip import write_skip_list
from spn4cir.errors import InputError
from spn4cir.images import open_image
from spn4cir.train import train
from spn4cir.triplets import TripletTable
from spn4cir.types import Triplet

NAMES = [f"images/{n}.png" for n in range(6)]
ROWS = [
    {"reference": NAMES[n], "modification": f"text {n}", "target": NAMES[n + 1]} for n in range(5)
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` converts goes into a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six pictures."""
    for name in NAMES:
        draw_picture(tmp_path / "mine" / name, name)
    return tmp_path / "mine"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    made = datasets.Dataset.from_list(list(rows))
    writers: dict[str, Callable[[], Any]] = {
        ".csv": lambda: made.to_csv(str(path)),
        ".tsv": lambda: made.to_csv(str(path), sep="\t"),
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".parquet": lambda: made.to_parquet(str(path)),
        "": lambda: made.save_to_disk(str(path)),
    }
    writers[path.suffix]()
    return path


EXPECTED = [Triplet(row["reference"], (row["target"],), (row["modification"],)) for row in ROWS]


@pytest.mark.parametrize("name", ["triplets.csv", "triplets.tsv", "triplets.jsonl", "triplets.parquet", "more.parquet"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_tables(root: Path, name: str, given: str) -> None:
    """A file, or the folder that it lies in; paths start from that folder."""
    path = write(root / name, ROWS)
    dataset = load_dataset("pairs", str(path if given == "file" else root))
    triplets = dataset.triplets()
    assert isinstance(triplets, TripletTable) and list(triplets) == EXPECTED and dataset.root == root
    assert dataset.training_images() == NAMES and dataset.image(NAMES[2]).path == root / NAMES[2]
    assert not dataset.protocols and dataset.checks()[0].found == 5


def test_training_keeps_the_table(root: Path) -> None:
    """What training draws from is the table, and no list of objects, whatever selects."""
    rows = [{"reference": NAMES[n % 6], "modification": f"text {n}", "target": NAMES[(n + 1) % 6]} for n in range(40)]
    config = TrainConfig(dataset="pairs", data_root=str(write(root / "t.parquet", rows)), holdout=0.1)
    loaded = load_triplets(config, load_dataset("pairs", config.data_root), None, lambda line: None)
    assert isinstance(loaded[1], TripletTable) and 0 < len(loaded[1]) < 40


def test_a_saved_folder_and_a_hub_name(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths start from the saved folder; a hub name needs images of its own."""
    write(tmp_path / "saved", ROWS)
    (root / "images").rename(tmp_path / "saved" / "images")
    assert list(load_dataset("pairs", str(tmp_path / "saved")).triplets()) == EXPECTED
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "train.parquet", ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="hf:owner/name: columns reference and target hold no images"):
        load_dataset("pairs", "hf:owner/name").triplets()


def test_columns_of_megapairs(root: Path) -> None:
    """Several texts, hard negatives, and several targets."""
    rows = [{"q_img": NAMES[0], "q_text": ["a", "b"], "t_img": NAMES[1], "hns": [NAMES[2], NAMES[3]]}]
    rows.append({"q_img": NAMES[4], "q_text": ["c"], "t_img": NAMES[5], "hns": []})
    path = write(root / "t.jsonl", rows)
    assert list(Pairs(str(path)).read_triplets()) == [
        Triplet(NAMES[0], (NAMES[1],), ("a", "b"), negatives=(NAMES[2], NAMES[3])),
        Triplet(NAMES[4], (NAMES[5],), ("c",)),
    ]
    lists = [{"reference": "", "targets": [NAMES[1], NAMES[2]], "texts": ["a"]}]
    assert list(Pairs(str(write(root / "s.parquet", lists))).read_triplets()) == [
        Triplet(None, (NAMES[1], NAMES[2]), ("a",))
    ]


@pytest.mark.parametrize("beside", ["catalogue.csv", "catalogue.parquet", "catalogue"])
def test_images_of_a_catalogue_beside_it(root: Path, tmp_path: Path, beside: str) -> None:
    """By their ids, in any form, captions too; all of its images may be candidates."""
    ids = [f"id {n}" for n in range(6)]
    rows: list[dict[str, Any]] = [
        {"image": name, "image_id": i, "caption": f"of {i}"} for name, i in zip(NAMES, ids, strict=True)
    ]
    if beside == "catalogue.parquet":
        rows = [{**row, "image": {"bytes": (root / row["image"]).read_bytes(), "path": row["image"]}} for row in rows]
    if beside == "catalogue":
        (root / beside).mkdir()
        (root / "images").rename(root / beside / "images")
        write(root / beside / "metadata.csv", rows)
    else:
        write(root / beside, rows)
    draw_picture(tmp_path / NAMES[3], NAMES[3])
    write(root / "triplets.csv", [{"reference": ids[0], "modification": "x", "target": ids[3]}])
    dataset = load_dataset("pairs", str(root))
    assert list(dataset.triplets()) == [Triplet(ids[0], (ids[3],), ("x",))]
    assert dataset.training_images() == ids and dataset.caption(ids[2]) == "of id 2"
    assert open_image(dataset.image(ids[3])).tobytes() == open_image(tmp_path / NAMES[3]).tobytes()
    write(
        root / "triplets.csv", [{"reference": ids[0], "modification": "x", "target": name} for name in (ids[1], "gone")]
    )
    with pytest.raises(InputError, match=r'triplets\.csv, row 2: "gone" is no image of the catalogue'):
        load_dataset("pairs", str(root)).triplets()


@pytest.mark.parametrize("paths", [True, False])
def test_images_in_the_table(root: Path, paths: bool) -> None:
    """Bytes with their paths, each image once; without paths each cell is an image."""

    def cell(name: str) -> dict[str, Any]:
        return {"bytes": (root / name).read_bytes(), "path": Path(name).name if paths else None}

    rows = [{**row, "reference": cell(row["reference"]), "target": cell(row["target"])} for row in ROWS]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"reference": kind, "modification": pa.string(), "target": kind})
    parquet.write_table(pa.Table.from_pylist(rows, schema), root / "t.parquet")
    dataset = load_dataset("pairs", str(root / "t.parquet"))
    triplets = dataset.triplets()
    assert len(dataset.training_images()) == (6 if paths else 10)
    for triplet, row in zip(triplets, ROWS, strict=True):
        for image_id, name in ((triplet.reference, row["reference"]), (triplet.targets[0], row["target"])):
            assert open_image(dataset.image(str(image_id))).tobytes() == open_image(root / name).tobytes()
    assert (triplets[1].reference, triplets[1].targets) == (
        ("1.png", ("2.png",)) if paths else ("train/2/reference", ("train/2/target",))
    )
    assert dataset.image(str(triplets[4].reference)).name.endswith("t.parquet, row 5")
    if paths:
        rows[4]["target"]["path"] = "1.png"
        rows[4]["target"]["bytes"] += b"x"
        parquet.write_table(pa.Table.from_pylist(rows, schema), root / "t.parquet")
        with pytest.raises(InputError, match=r'row 5, .*"1.png" is another image than in .*row 2: one path, one image'):
            load_dataset("pairs", str(root / "t.parquet")).triplets()


@pytest.mark.parametrize(("change", "said"), [
    ({"target": ""}, "t.jsonl, row 3, column 'target': is empty"),
    ({"reference": "", "modification": ""}, "t.jsonl, row 3, column 'modification': is empty as the reference is"),
    ({"target": "../x.png"}, "t.jsonl, row 3, column 'of images': '../x.png' is no path below"),
    ({"reference": "/etc/passwd"}, "t.jsonl, row 3, column 'of images': '/etc/passwd' is no path below"),
    ({"target": "images/link.png"}, "t.jsonl, row 3, column 'of images': .* is a link that leaves"),
])  # fmt: skip
def test_rows_that_are_refused(root: Path, tmp_path: Path, change: dict[str, str], said: str) -> None:
    """File, row and column."""
    draw_picture(tmp_path / "x.png", "x")
    (root / "images/link.png").symlink_to(tmp_path / "x.png")
    rows = [dict(row) for row in ROWS]
    rows[2].update(change)
    with pytest.raises(InputError, match=said) as error:
        load_dataset("pairs", str(write(root / "t.jsonl", rows))).triplets()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rows", "said"), [
    ([{"q_img": "a", "t_img": "b", "words": "c"}],
     "must be called modification or .* or captions; there are: q_img, t_img, words"),
    ([{"image": "a", "target": "b", "text": "c"}], "must be called reference or q_img or candidate; there are: image"),
    ([{"reference": 1.5, "target": "b", "text": "c"}], "column 'reference': expected texts or lists of texts"),
])  # fmt: skip
def test_columns_that_are_missing(root: Path, rows: list[dict[str, Any]], said: str) -> None:
    """The file, what is missing, and what there is."""
    with pytest.raises(InputError, match=rf"t\.parquet.*{said}"):
        load_dataset("pairs", str(write(root / "t.parquet", rows))).triplets()


def test_places_that_hold_no_triplets(root: Path) -> None:
    """One line."""
    with pytest.raises(InputError, match=r"mine holds no triplets\.csv"):
        load_dataset("pairs", str(root)).triplets()
    with pytest.raises(InputError, match=r"pairs: .*absent is no folder"):
        load_dataset("pairs", str(root / "absent"))


def test_the_skip_list(root: Path) -> None:
    """Triplets that name a skipped image are left out."""
    write(root / "triplets.csv", ROWS)
    write_skip_list(root, {NAMES[2]: "unreadable"})
    assert list(load_dataset("pairs", str(root)).triplets()) == [EXPECTED[n] for n in (0, 3, 4)]


# --- training ---


class Listed(Pairs):
    """The same triplets as a list."""

    name = "listed"

    def read_triplets(self) -> Any:
        return list(super().read_triplets())


@pytest.fixture
def table(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy dataset's pictures, triplets and validation queries as a table of triplets."""
    rows = [
        {"reference": f"{t.reference}.png", "target": f"{t.targets[0]}.png", "modification": list(t.texts)}
        for t in toy.read_triplets()
    ]
    queries = [
        {"reference": f"{q.reference}.png", "modification": q.text, "target": f"{q.targets[0]}.png"}
        for q in toy.read_benchmark("val").queries
        if {q.reference, *q.targets} <= {*TRAIN} & {t.reference for t in toy.read_triplets()}
    ]
    write(toy.folder / "triplets.parquet", rows)
    write(toy.folder / "queries.csv", queries)
    monkeypatch.setitem(DATASETS, "listed", Listed)
    return toy.folder


@pytest.mark.parametrize("stage", [1, 2])
def test_training_from_a_table_is_training_from_a_list(
    stage: int, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same order the same texts, known targets and losses, to the last digit."""

    def same_order(items: Any, key: str) -> Any:
        order = np.random.RandomState(len(key)).permutation(len(items))
        return items[order] if isinstance(items, np.ndarray) else [items[n] for n in order]

    monkeypatch.setattr(batches, "shuffle", same_order)
    start = train(toy_config(table, epochs=1), 1) if stage == 2 else None
    found = {}
    for name in ("pairs", "listed"):
        config = toy_config(table, dataset=name, backbone="clip4cir", log_every=1, init=start and str(start))
        folder = train(config, stage)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[name] = [line["loss"] for line in lines if "loss" in line]
    assert found["pairs"] == found["listed"] and len(found["pairs"]) == 10 and len(set(found["pairs"])) > 5


def test_the_holdout_of_a_table(table: Path) -> None:
    """Rest and held-out triplets are all triplets; the rest stays a table, generated ones behind it."""
    made = [{"candidate": "i00.png", "target": "i01.png", "captions": ["x"]}]
    (table / "made.json").write_text(json.dumps(made))
    config = toy_config(table, dataset="pairs", holdout=0.3, generated="made.json")
    data = load_data(config, print)
    assert isinstance(data.triplets, TripletTable) and 0 < len(data.selection.queries) < 40
    asked = {(q.reference, *q.targets, q.text) for q in data.selection.queries}
    rest = list(data.triplets)
    assert len(rest) == 41 - len(asked) and rest[-1] == Triplet("i00.png", ("i01.png",), ("x",), generated=True)
    assert not asked & {(t.reference, *t.targets, t.texts[0]) for t in rest}
    again = load_data(toy_config(table, dataset="pairs", holdout=0.6, seed=5), print)
    assert asked < {(q.reference, *q.targets, q.text) for q in again.selection.queries}
    few = load_data(toy_config(table, dataset="pairs", max_annotated=7), print)
    assert list(few.triplets) == list(load_dataset("pairs", str(table)).triplets())[:7]
    named = list(dict.fromkeys(i for t in rest for i in t.image_ids))
    assert data.candidate_images(config) == list(dict.fromkeys([*named, *data.dataset.training_images()]))


def test_cells_of_a_csv_are_what_is_written(tmp_path: Path) -> None:
    """Nothing is guessed: ids keep their zeros, and texts that look like numbers or like nothing stay texts."""
    for name in ("007", "NA", "1e3"):
        draw_picture(tmp_path / "catalogue" / f"{name}.png", name)
    (tmp_path / "catalogue" / "catalogue.csv").write_text(
        "image,image_id\n007.png,007\nNA.png,NA\n1e3.png,1e3\n", encoding="utf-8"
    )
    (tmp_path / "triplets.csv").write_text(
        "reference,target,modification\n007,NA,None\nNA,1e3,null\n1e3,007,12\n007,1e3,\n", encoding="utf-8"
    )
    triplets = Pairs(str(tmp_path)).triplets()
    assert [(t.reference, t.targets, t.texts) for t in triplets] == [
        ("007", ("NA",), ("None",)), ("NA", ("1e3",), ("null",)), ("1e3", ("007",), ("12",)), ("007", ("1e3",), ()),
    ]  # fmt: skip
