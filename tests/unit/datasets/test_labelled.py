"""Images with a class each: forms of sources, what is refused, limits, splits, benchmarks, and training."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import draw_picture
from labelled_files import CLASSES, EACH, PATHS, classes_by_split, classes_of, draw_classes, rows_of, write_rows
from plugins.centres import prepare_centres
from plugins.dual import Dual

from spn4cir.backbones import BACKBONES
from spn4cir.config import TrainConfig
from spn4cir.data import load_data
from spn4cir.dataset_check import examine
from spn4cir.datasets import load_dataset
from spn4cir.datasets.emoji_names import load_names, parse_attributes
from spn4cir.datasets.labelled import Labelled
from spn4cir.datasets.skip import write_skip_list
from spn4cir.errors import InputError
from spn4cir.images import open_image
from spn4cir.ranking import rank_queries
from spn4cir.results import compute_metrics, metric_names, primary_names
from spn4cir.stages import STAGES
from spn4cir.train import train
from spn4cir.types import Benchmark, Triplet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` converts goes into a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight classes of four pictures."""
    return draw_classes(tmp_path / "mine")


@pytest.mark.parametrize("name", ["m4d.csv", "m4d.parquet", "labelled.csv"])
def test_tables(root: Path, name: str) -> None:
    """The form of M4D-35k: paths start from the table's folder, and the table, or the folder, is the source."""
    place = write_rows(root / name, rows_of())
    dataset = Labelled(str(root) if name.startswith("labelled") else place)
    assert dataset.root == root and len(classes_of(dataset)) == len(PATHS)
    assert {i: c.partition("/")[2] for i, c in classes_of(dataset).items()} == dict(PATHS)
    source = "mine" if name.startswith("labelled") else "m4d"
    assert {c.partition("/")[0] for c in classes_of(dataset).values()} == {source}
    assert dataset.image(PATHS[5][0]).path == root / PATHS[5][0]
    ids = dataset.training_images()
    assert ids and list(dataset.triplets()) == [Triplet(i, (), (), dataset.category(i)) for i in ids]
    with pytest.raises(InputError, match="unknown image id"):
        dataset.image("images/9/9.png")


def test_folders_by_class(root: Path) -> None:
    """A subfolder for each class; pictures at the top are distractors of both galleries."""
    draw_picture(root / "images" / "top.png", "top")
    dataset = Labelled(str(root / "images"))
    assert classes_of(dataset) == {path.removeprefix("images/"): f"images/{path[7]}" for path, _ in PATHS}
    for split in ("val", "test"):
        benchmark = dataset.benchmark(split)
        assert benchmark.gallery[-1] == "top.png" and all("top.png" not in q.image_ids for q in _pairs(benchmark))
    assert "top.png" not in dataset.training_images() and dataset.category("top.png") == ""


def _pairs(benchmark: Benchmark) -> list[Triplet]:
    return [Triplet(q.reference, q.targets, ()) for q in benchmark.queries]


def test_folders_by_split_and_class(root: Path) -> None:
    """Where all first folders are splits, classes are the second ones."""
    for number, split in enumerate(("train", "validation", "test")):
        (root / split).mkdir()
        (root / "images" / str(number)).rename(root / split / "same")
    for number in range(3, CLASSES):
        (root / "images" / str(number)).rename(root / "train" / str(number))
    dataset = Labelled(str(root))
    assert classes_by_split(dataset)["val"] == classes_by_split(dataset)["test"] == {"mine/same"}
    assert [c.found for c in dataset.checks() if c.what.startswith("classes of both")] == [1, 1]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_tables_of_images(root: Path, form: str) -> None:
    """A column of images and one of classes, by their names; a class of -1 is none; splits of the table count."""
    names = [f"kind {n}" for n in range(CLASSES)]
    images = [{"bytes": (root / path).read_bytes(), "path": path} for path, _ in PATHS]
    columns = {"image": images, "label": [*(n // EACH for n in range(len(PATHS) - 1)), -1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    made = datasets.Dataset.from_dict(columns, features=features)
    place = root / ("shop" if form == "saved" else "shop.parquet")
    if form == "saved":
        halves = {"train": made.select(range(20)), "test": made.select(range(20, 32))}
        datasets.DatasetDict(halves).save_to_disk(str(place))
    else:
        made.to_parquet(str(place))
    dataset = Labelled(str(place))
    ids = list(dataset._images)
    assert len(ids) == len(PATHS) and dataset.category(ids[0]) == "shop/kind 0" and dataset.category(ids[-1]) == ""
    assert open_image(dataset.image(ids[0])).size == (48, 40)
    found = classes_by_split(dataset)
    assert not found["train"] & found["val"] and not found["train"] & found["test"]
    if form == "saved":
        assert found["test"] == {"shop/kind 5", "shop/kind 6", "shop/kind 7"} and len(found["val"]) == 1
        assert any("no image is in the split val: 1 labels of train are val" in note for note in dataset.notes())


def test_several_sources(root: Path, tmp_path: Path) -> None:
    """Equal labels of two sources are two classes, in one split; a column names sources below each."""
    draw_picture(tmp_path / "other" / "a.png", "a")
    sources = ["left" if n % 2 else "right" for n in range(len(PATHS))]
    write_rows(root / "one.csv", rows_of(source=sources))
    listed = {"products": "one.csv", "cars": "images", "far": str(root / "images")}
    (root / "labelled.yaml").write_text(json.dumps({"sources": listed, "min_images": 2}))
    for place in (root, root / "labelled.yaml"):
        dataset = Labelled(str(place))
        assert dataset.category("products/images/0/0.png") == "products:right/c0"
        assert dataset.category("cars/0/0.png") == "cars/0" and dataset.category("far/0/0.png") == "far/0"
        assert dataset.image("cars/0/1.png").path == root / "images/0/1.png"
        assert len(classes_of(dataset)) == 3 * len(PATHS)
        found = classes_by_split(dataset)
        assert len(set.union(*found.values())) == 4 * CLASSES == sum(map(len, found.values()))
        for split in found.values():  # the same label, so the same split
            assert {c.replace("cars", "far") for c in split if c[:4] == "cars"} == {c for c in split if c[:3] == "far"}
        tags = {tag for split in ("val", "test") for q in dataset.benchmark(split).queries for tag in q.tags}
        assert tags == {"products:left", "products:right", "cars", "far"}
        for query in dataset.benchmark("test").queries:
            assert {dataset.category(i) for i in query.targets} == {dataset.category(query.reference or "")}


def test_a_source_that_names_splits_beside_one_that_does_not(root: Path) -> None:
    """Equal labels are in the split that is named, so that no class of one is trained on and asked for in another."""
    write_rows(root / "one.csv", rows_of(split=["train" if n < 16 else "test" for n in range(len(PATHS))]))
    write_rows(root / "two.csv", rows_of())
    (root / "labelled.yaml").write_text(json.dumps({"sources": {"one": "one.csv", "two": "two.csv"}}))
    found = {split: {c.split("/")[1] for c in names} for split, names in classes_by_split(Labelled(str(root))).items()}
    assert not found["train"] & found["test"] and {c for names in found.values() for c in names} == {
        c for _, c in PATHS
    }


def test_classes_of_train_and_test_are_told(root: Path) -> None:
    rows = rows_of(split=["train" if n % 4 < 2 else "test" for n in range(len(PATHS))])
    notes = Labelled(write_rows(root / "closed.csv", rows)).notes()
    assert any(f"test: {CLASSES - 1} classes are in train too" in note for note in notes)


def test_splits_that_are_named(root: Path) -> None:
    """A column split wins over the hash; distractors are only ranked, and those of another split are not."""
    by_class = ["train", "train", "val", "test", "test", "distractor", "test", "val"]
    rows = rows_of(split=[by_class[n // EACH] for n in range(len(PATHS))])
    for row in rows[6 * EACH :]:
        row["label"] = ""
    dataset = Labelled(write_rows(root / "mine.csv", rows))
    assert classes_by_split(dataset) == {
        "train": {"mine/c0", "mine/c1"},
        "val": {"mine/c2"},
        "test": {"mine/c3", "mine/c4"},
    }
    for split, own, other in (("test", "images/6/", "images/7/"), ("val", "images/7/", "images/6/")):
        benchmark = dataset.benchmark(split)
        starts = [i[:9] for i in benchmark.gallery]
        assert starts.count(own) == starts.count("images/5/") == EACH and other not in starts
        used = {i for pair in _pairs(benchmark) for i in pair.image_ids}
        assert not [i for i in used if not dataset.category(i)] and len(used) == len(benchmark.queries)
    assert not any("split by a hash" in note for note in dataset.notes())


def test_queries_without_partners(root: Path) -> None:
    """Dropped, counted, and still ranked; without any pair there is no protocol."""
    rows = rows_of(split=["train"] * 16 + ["val"] * 8 + ["test"] * 8)
    rows[-1]["label"] = "alone"
    dataset = Labelled(write_rows(root / "mine.csv", rows))
    assert len(dataset.benchmark("test").queries) == 7 and len(dataset.benchmark("test").gallery) == 8
    assert [n for n in dataset.notes() if "alone" in n] == [
        "labelled: test: 1 images are alone in their class, so they are in the gallery and are no queries"
    ]
    assert len(dataset.benchmark("val").queries) == 8 and not any("val: " in note for note in dataset.notes())
    for number in range(24, 32):
        rows[number]["label"] = f"alone {number}"
    dataset = Labelled(write_rows(root / "mine.csv", rows))
    assert dict(dataset.protocols) == {"val": ("labelled/val",)}
    with pytest.raises(InputError, match="no class of the split test has two images"):
        dataset.benchmark("test")


def test_measures_by_hand(root: Path) -> None:
    """Rankings with fewer than five partners: only the first m = min(n, 5) ranks count for mMP@5; by source too."""
    rows = rows_of(split=["train"] * 24 + ["val"] * 4 + ["test"] * 4, source=["s"] * 28 + ["t"] * 4)
    for row, label, source in zip(rows[24:], "aaabbbbb", "ssstttt" + "t", strict=True):
        row.update(split="test", label=label, source=source)
    rows[0]["split"] = rows[1]["split"] = "val"
    dataset = Labelled(write_rows(root / "mine.csv", rows))
    benchmark = dataset.benchmark("test")
    assert [len(q.targets) for q in benchmark.queries] == [2, 2, 2, 4, 4, 4, 4, 4] and benchmark.exclude_reference
    assert metric_names(benchmark)[-3:] == ["macro mMP@5", "macro R@1", "macro mAP@8"]
    assert primary_names(benchmark) == ["mMP@5"]
    angles = [0.0, 1.0, 3.1, 4.0, 5.25, 6.55, 8.3, 10.4]  # no two distances from one of them are equal
    places = torch.tensor(angles, dtype=torch.float64) / 7
    vectors = torch.stack([places.cos(), places.sin()], 1)
    metrics, tags = compute_metrics(benchmark, rank_queries(benchmark, vectors, vectors[:, None]))
    expected: dict[str, list[float]] = {"mMP@5": [], "R@1": [], "mAP@8": []}
    of_five = []
    labels = "aaabbbbb"
    for n in range(8):
        order = sorted((i for i in range(8) if i != n), key=lambda i, n=n: abs(float(places[i] - places[n])))
        hits = np.array([labels[i] == labels[n] for i in order])
        m = min(int(hits.sum()), 5)
        expected["mMP@5"].append(hits[:m].sum() / m)
        of_five.append(hits[:5].sum() / 5)
        expected["R@1"].append(float(hits[0]))
        precision = hits.cumsum() / np.arange(1, 8)
        expected["mAP@8"].append((precision * hits).sum() / hits.sum())
    assert 0 < np.mean(expected["mMP@5"]) < 1 and np.mean(of_five) != pytest.approx(np.mean(expected["mMP@5"]))
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(100 * np.mean(values))
        assert tags["s"][name] == pytest.approx(100 * np.mean(values[:3]))
        assert tags["t"][name] == pytest.approx(100 * np.mean(values[3:]))
    flat, _ = compute_metrics(
        benchmark, rank_queries(benchmark, vectors[:1].repeat(8, 1), vectors[:1, None].repeat(8, 1, 1))
    )
    assert flat["mMP@5"] == pytest.approx(100 * (3 * 2 / 7 + 5 * 4 / 7) / 8)  # equal scores are as good as chance


@pytest.mark.parametrize("name", ["labelled", "labelled_pairs"])
def test_emoji_have_the_pixels_of_the_emoji(name: str) -> None:
    """Also light ones on transparency, which pictures of one's own show on grey."""
    dataset, emoji = load_dataset(name), load_dataset("emoji")
    assert all(dataset.image(i) == emoji.image(i) for i in dataset.training_images())


def test_embedded_emoji() -> None:
    """Without a root: concepts of at least three images, unseen ones evaluated, names to show."""
    dataset = load_dataset("labelled")
    assert isinstance(dataset, Labelled) and dataset.root is None
    found, names = classes_by_split(dataset), load_names()
    assert [len(found[split]) for split in ("train", "val", "test")] == [105, 7, 30]
    assert not found["train"] & found["val"] and not found["train"] & found["test"]
    assert len(dataset.training_images()) == 1593 and len(dataset.benchmark("test").queries) == 366
    image_id = dataset.training_images()[0]
    concept = parse_attributes(names[image_id], set(names.values()))["concept"]
    assert dataset.category(image_id) == f"emoji/{concept}" and dataset.label(image_id) == names[image_id]
    assert open_image(dataset.image(image_id)).size == (72, 72)


def test_the_report_and_the_skip_list(root: Path) -> None:
    """Counts by split and source; a missing image is named; what the skip list leaves out is no target."""
    place = write_rows(root / "mine.csv", rows_of())
    report = examine(Labelled(place))
    assert report.can_train and sum(c.found for c in report.checks if c.what.endswith(", mine: classes")) == CLASSES
    lost = load_dataset("labelled", place).benchmark("test").queries[0].targets[0]
    (root / lost).unlink()
    assert examine(Labelled(place)).broken == {lost: "missing"}
    write_skip_list(root, {lost: "missing"})
    benchmark = load_dataset("labelled", place).benchmark("test")
    assert benchmark.name == "labelled/test+skip" and all(lost not in pair.image_ids for pair in _pairs(benchmark))


@pytest.fixture
def settings(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A training of two steps against centres of classes."""
    monkeypatch.setitem(BACKBONES, "dual", Dual)
    monkeypatch.setitem(STAGES, "centres", prepare_centres)
    place = write_rows(root / "mine.csv", rows_of())
    return TrainConfig(
        dataset="labelled", data_root=place, backbone="dual", batch_size=8, epochs=2, max_steps=2,
        log_every=1, output=str(tmp_path / "run"),
    )  # fmt: skip


def test_training(settings: TrainConfig) -> None:
    """Triplets without targets train against class centres, and mMP@5 of unseen classes selects."""
    data = load_data(settings, lambda line: None)
    references, targets = data.sample_references(6, 0)
    assert len(references) == 6 and len(targets) == 2 and data.selection.name == "labelled/val"
    result = json.loads((train(settings, "centres") / "result.json").read_text())
    assert "mMP@5" in json.dumps(result)


def test_holdout_needs_targets(settings: TrainConfig) -> None:
    """Labels alone leave nothing to rank: one line says so."""
    settings.holdout = 0.1
    with pytest.raises(InputError, match="holdout needs triplets with targets"):
        load_data(settings, lambda line: None)
