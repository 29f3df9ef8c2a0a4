"""Pairs of images and texts with classes: forms of the files, splits without overlap, protocols, what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_picture
from labelled_files import write_rows
from sklearn.metrics import average_precision_score

from spn4cir.dataset_check import examine
from spn4cir.datasets.labelled_pairs import KINDS, LabelledPairs, text_id
from spn4cir.datasets.pair_splits import Pair, split_pair_classes, split_pairs
from spn4cir.errors import InputError
from spn4cir.identity import inspect_images
from spn4cir.images import ImageSource, Transform, VectorTransform, read_vector
from spn4cir.ranking import rank_queries
from spn4cir.results import compute_metrics
from spn4cir.types import VECTOR, Benchmark, ImageRef

CLASSES, EACH = 8, 6
LABELS = [f"c{n % CLASSES}" for n in range(CLASSES * EACH)]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Features of 48 pairs in eight classes, four numbers for an image and three for a text."""
    chance, folder = np.random.default_rng(0), tmp_path / "given"
    folder.mkdir()
    np.save(folder / "images.npy", chance.normal(size=(len(LABELS), 4)).astype(np.float32), allow_pickle=False)
    np.save(folder / "texts.npy", chance.normal(size=(len(LABELS), 3)), allow_pickle=False)
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
    return folder


def classes_by_use(dataset: LabelledPairs) -> dict[str, set[str]]:
    """Classes of the training, and of the queries of each split's unseen protocol."""
    found = {"train": {str(triplet.label) for triplet in dataset.triplets()}}
    for split in ("val", "test"):
        queries = dataset.benchmark(split, f"labelled_pairs/{split}-unseen").queries
        found[split] = {dataset.category(q.reference) for q in queries if q.reference is not None}
    return found


def overlaps(classes: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Uses that share a class."""
    return [(a, b) for a in classes for b in classes if a < b and classes[a] & classes[b]]


@pytest.mark.parametrize("place", ["embedded", "given"])
def test_no_class_is_both_seen_and_unseen(place: str, given: Path) -> None:
    """Training, val-unseen and test-unseen have no class in common; val and test share no pair."""
    dataset = LabelledPairs(None if place == "embedded" else str(given))
    classes = classes_by_use(dataset)
    assert all(classes.values()) and not overlaps(classes)
    images = {s: {i for p in dataset.protocols[s] for i in dataset.benchmark(s, p).image_ids} for s in ("val", "test")}
    train = set(dataset.training_images())
    assert not images["val"] & images["test"] and not train & (images["val"] | images["test"])


def test_an_overlap_is_seen(given: Path) -> None:
    """Negative control: where files put a class into both val and test, the comparison above and the report say so."""
    unseen = {label: "train" if label < "c4" else "val" for label in LABELS}
    (given / "splits.txt").write_text("\n".join("test" if n >= 40 else unseen[x] for n, x in enumerate(LABELS)))
    dataset = LabelledPairs(str(given))
    assert overlaps(classes_by_use(dataset)) == [("test", "val")]
    found = [check.found for check in dataset.checks() if check.what == "unseen classes of both val and test"]
    assert found == [4]


def test_half_of_the_classes_are_seen() -> None:
    """Whatever the order of the labels; a quarter each is unseen in val and in test."""
    kinds = split_pair_classes(LABELS)
    assert sorted(kinds.values()) == ["seen"] * 4 + ["test"] * 2 + ["val"] * 2
    assert split_pair_classes(LABELS[::-1]) == kinds


def test_protocols(given: Path) -> None:
    """Each ranks the other kind only; relevant is the class; generalised has unseen queries and all items."""
    dataset = LabelledPairs(str(given))
    assert dataset.protocols["test"] == tuple(f"labelled_pairs/test-{kind}" for kind in KINDS)
    galleries: dict[str, set[str]] = {}
    asked: dict[str, list[tuple[str | None, str | None]]] = {}
    for kind in KINDS:
        benchmark = dataset.benchmark("test", f"labelled_pairs/test-{kind}")
        galleries[kind] = set(benchmark.gallery)
        asked[kind] = [(query.reference, query.text) for query in benchmark.queries]
        label = {item: dataset.category(item.removeprefix("text of ")) for item in benchmark.gallery}
        text_of = {text: item for item, text in benchmark.texts.items()}
        for query in benchmark.queries:
            others = [item for item in benchmark.gallery if (item in benchmark.texts) == (query.reference is not None)]
            own = label[query.reference if query.reference is not None else text_of[str(query.text)]]
            assert set(query.candidates) == set(others)
            assert set(query.targets) == {item for item in others if label[item] == own}
    assert galleries["generalised"] == galleries["seen"] | galleries["unseen"]
    assert not galleries["seen"] & galleries["unseen"] and asked["generalised"] == asked["unseen"] != asked["seen"]


def test_average_precision_is_scikit_learns(given: Path) -> None:
    """mAP over the whole ranking, by direction and its mean, for random vectors; and not that of other vectors."""
    dataset = LabelledPairs(str(given))
    benchmark = dataset.benchmark("test", "labelled_pairs/test-generalised")
    torch.manual_seed(0)
    vectors = {item: torch.nn.functional.normalize(torch.randn(5), dim=0) for item in benchmark.gallery}
    text_of = {text: item for item, text in benchmark.texts.items()}
    items = [q.reference if q.reference is not None else text_of[str(q.text)] for q in benchmark.queries]
    target, query = (torch.stack([vectors[item] for item in ids]) for ids in (benchmark.gallery, items))
    name = f"mAP@{len(benchmark.texts)}"

    def ours(query: torch.Tensor) -> tuple[float, dict[str, float]]:
        metrics, tags = compute_metrics(benchmark, rank_queries(benchmark, query, target[:, None]))
        return metrics[name], {tag: values[name] for tag, values in tags.items()}

    expected: dict[str, list[float]] = {"image to text": [], "text to image": []}
    for one, vector in zip(benchmark.queries, query, strict=True):
        scores = [float(vector @ vectors[item]) for item in one.candidates]
        relevant = [item in one.targets for item in one.candidates]
        expected[one.tags[0]].append(average_precision_score(relevant, scores))
    means = {tag: 100 * float(np.mean(values)) for tag, values in expected.items()}
    mean, by_tag = ours(query)
    assert by_tag == pytest.approx(means, abs=1e-4) and mean == pytest.approx(np.mean(list(means.values())), abs=1e-4)
    assert ours(query.flip(0))[0] != pytest.approx(mean, abs=1e-2)


def test_given_features(given: Path) -> None:
    """An image is a vector, a text its numbers, and both come back exactly; equal vectors have equal hashes."""
    images, texts = (np.load(given / name, allow_pickle=False) for name in ("images.npy", "texts.npy"))
    images[1] = images[0]
    np.save(given / "images.npy", images, allow_pickle=False)
    dataset = LabelledPairs(str(given))
    source = ImageSource(dataset.image, VectorTransform(4))
    assert torch.equal(source.stack(["1", "2", "48"]), torch.from_numpy(images[[0, 1, 47]]))
    numbers = [np.float32(part) for part in dataset.caption("7").removeprefix(VECTOR).split()]
    assert numbers == texts[6].astype(np.float32).tolist()
    found = inspect_images({i: dataset.image(i) for i in ("1", "2", "3")}, show=False)
    hashes = [found[i].pixels for i in ("1", "2", "3")]
    assert hashes[0] == hashes[1] != hashes[2] and all(hashes)
    assert len(report := examine(dataset).found) == 48 and not [one for one in report.values() if one.problem]
    with pytest.raises(InputError, match=r"row 3 is a vector of given features, and the model reads pictures"):
        ImageSource(dataset.image, Transform(32))("3")
    with pytest.raises(InputError, match="given:D"):
        ImageSource(dataset.image, VectorTransform(5))("3")


def test_vectors_are_read_without_pickle(tmp_path: Path) -> None:
    """Objects, matrices, numbers that are not finite, pictures, and missing files are refused with their names."""
    for name, value in (("a", np.ones((2, 2))), ("b", np.array([1.0, np.nan])), ("c", np.array(["x"]))):
        np.save(tmp_path / f"{name}.npy", value, allow_pickle=False)
    np.save(tmp_path / "d.npy", np.array([{}], dtype=object), allow_pickle=True)
    draw_picture(tmp_path / "e.png", 1)
    for name, message in (
        ("a.npy", "vector"), ("b.npy", "finite"), ("c.npy", "vector"), ("d.npy", "cannot be read"),
        ("e.png", "no .npy"), ("f.npy", "missing"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as caught:
            read_vector(ImageRef(tmp_path / name))
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["pairs.csv", "mine.parquet"])
def test_tables(tmp_path: Path, name: str) -> None:
    """A table of image, text and label, also by its folder; split columns hold; a row without a text is refused."""
    rows = []
    for n, label in enumerate(LABELS):
        draw_picture(tmp_path / f"{n}.png", n)
        split = "train" if label < "c4" and n < 32 else "test"
        rows.append({"img_path": f"{n}.png", "caption": f"text {n}", "label": label, "split": split})
    place = write_rows(tmp_path / name, rows)
    dataset = LabelledPairs(str(tmp_path) if name.startswith("pairs") else place)
    assert dataset.seen_classes == ("c0", "c1", "c2", "c3")
    assert dataset.protocols["val"] == ("labelled_pairs/val-seen",)
    assert dataset.benchmark("test").texts[text_id("47.png")] == "text 47"
    assert all(triplet.texts == (dataset.caption(str(triplet.reference)),) for triplet in dataset.triplets())
    first = dataset.triplets()[0]
    again = next(row for row in rows if row["img_path"] == first.reference) | {"caption": "another text"}
    with_more = LabelledPairs(write_rows(tmp_path / name, [*rows, again]))
    assert with_more.triplets()[0].texts == (*first.texts, "another text")
    assert len(with_more.triplets()) == len(dataset.triplets()) and with_more.benchmark("test") == dataset.benchmark(
        "test"
    )
    assert any("1 images have several texts" in note for note in with_more.notes())
    rows[5]["caption"] = ""
    with pytest.raises(InputError, match=r'"5\.png" has no text'):
        LabelledPairs(write_rows(tmp_path / name, rows))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def enlarge(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = np.load(folder / name).astype(np.float64)
        values[1, 0] = 1e300
        np.save(folder / name, values)

    return change


@pytest.mark.parametrize(("damage", "message"), [
    (remove("texts.npy"), r"texts\.npy is missing"),
    (write("images.npy", "no array"), r"images\.npy cannot be read"),
    (write("labels.txt", "a\nb\n"), r"images\.npy has 48 rows, labels\.txt 2"),
    (write("labels.txt", "a\n" * 47 + "\n"), r"labels\.txt, line 48: the class is empty"),
    (write("labels.txt", "a\n" * 48), "1 classes cannot be split, 4 can"),
    (write("splits.txt", "train\n" * 47 + "\n"), "48 has no split"),
    (write("splits.txt", "train\n" * 47 + "dev\n"), "split 'dev' of 48 is none of"),
    (write("splits.txt", "train\n" * 48), "no pair is in the split test"),
    (enlarge("images.npy"), r"images\.npy, row 2: a number is not finite, or too large"),
])  # fmt: skip
def test_damaged_features_are_named(given: Path, damage: Callable[[Path], None], message: str) -> None:
    """One line with the file and what is wrong; the whole folder is fine."""
    assert LabelledPairs(str(given)).triplets()
    damage(given)
    with pytest.raises(InputError, match=message) as caught:
        LabelledPairs(str(given))
    assert "\n" not in str(caught.value)


def test_class_vectors(given: Path) -> None:
    """A row for each class that classes.txt names; another number of rows is refused."""
    assert LabelledPairs(str(given)).class_vectors() == {}
    np.save(given / "class_vectors.npy", np.eye(8), allow_pickle=False)
    (given / "classes.txt").write_text("\n".join(f"c{n}" for n in range(8)))
    assert LabelledPairs(str(given)).class_vectors()["c2"][2] == 1
    (given / "classes.txt").write_text("\n".join(f"c{n}" for n in range(7)))
    with pytest.raises(InputError, match="must name as many different classes"):
        LabelledPairs(str(given))


def test_a_class_of_few_pairs_is_trained_on() -> None:
    """A seen class with two pairs has none held out; one of three has one each."""
    kinds = split_pair_classes(LABELS)
    seen = [label for label, kind in kinds.items() if kind == "seen"]
    pairs = [Pair(f"{label}/{n}", "text", label) for label in kinds for n in range(2 if label == seen[0] else 3)]
    splits = {pair.image_id: pair.split for pair in split_pairs(pairs, "here")[0]}
    assert sorted(splits[f"{seen[0]}/{n}"] for n in range(2)) == ["train", "train"]
    assert sorted(splits[f"{seen[1]}/{n}"] for n in range(3)) == ["test", "train", "val"]


def test_the_files_are_not_needed_where_the_ids_are(given: Path, tmp_path: Path) -> None:
    """The benchmark of a moved folder is the same."""
    before: Benchmark = LabelledPairs(str(given)).benchmark("val")
    shutil.move(given, tmp_path / "moved")
    assert LabelledPairs(str(tmp_path / "moved")).benchmark("val") == before
