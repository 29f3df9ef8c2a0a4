"""Photographs and their other styles, as ``data_gen/stylize.py`` writes them and as DSR is published."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_picture, write_json

from spn4cir.dataset_check import examine
from spn4cir.datasets import load_dataset
from spn4cir.datasets.dsr import DSR
from spn4cir.datasets.skip import write_skip_list
from spn4cir.datasets.style_folders import GROUP, KINDS, STYLES, draw_groups, split_items
from spn4cir.datasets.styles import Styles
from spn4cir.errors import InputError
from spn4cir.measures import measure_name
from spn4cir.results import primary_names

SUFFIXES = {"images": ".jpg", "sketch": ".jpg", "art": ".png", "mosaic": ".jpeg"}


def entry(name: str) -> dict[str, str]:
    return {"image": f"{name}.jpg", "caption": f"{name}.txt"}


def write_lists(root: Path, **lists: Sequence[Any]) -> Path:
    for name, entries in lists.items():
        write_json(root / f"{name}.json", [entry(one) if isinstance(one, str) else one for one in entries])
    return root


def draw_layout(root: Path, names: Sequence[str]) -> Path:
    """A photograph in four styles and a caption of two lines for each name."""
    for name in names:
        for style, suffix in SUFFIXES.items():
            draw_picture(root / style / f"{name}{suffix}", f"{style}/{name}", (12, 12))
        (root / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "text" / f"{name}.txt").write_text(f" a picture\tof {name} \nsecond line", encoding="utf-8")
    return root


def names_of(count: int) -> list[str]:
    return [f"f{n % 3}/p{n:03d}" for n in range(count)]


def names_in(dataset: Styles | DSR, split: str) -> list[str]:
    if split == "train":
        return [dataset.label(i) for i in dataset.training_images()]
    return [dataset.label(i) for i in dataset.benchmark(split).gallery]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty photographs as DSR ships them: no val.json."""
    root, names = tmp_path_factory.mktemp("data") / "dsr", names_of(60)
    draw_layout(root, names)
    test = names[::5]
    return write_lists(root, dataset=names, test=test, train=[name for name in names if name not in test])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Four photographs of train, one of val and two of test."""
    names = names_of(7)
    return write_lists(draw_layout(tmp_path / "styles", names), train=names[:4], val=names[4:5], test=names[5:])


def test_the_published_layout(published: Path) -> None:
    """Val is every twentieth photograph of train, which is said; the splits are disjoint and complete."""
    dataset = DSR(str(published))
    splits = {split: names_in(dataset, split) for split in ("train", "val", "test")}
    train = [name for n, name in enumerate(names_of(60)) if n % 5]
    assert splits["test"] == names_of(60)[::5] and splits["val"] == train[::20] == [train[0], train[20], train[40]]
    assert sorted(name for names in splits.values() for name in names) == sorted(names_of(60))
    assert [note for note in dataset.notes() if "no val.json" in note and "3, is val" in note] == dataset.notes()
    assert all(dataset.image(i).path.is_file() for role in dataset.image_roles() for i in role.image_ids)


def test_without_lists(published: Path, tmp_path: Path) -> None:
    """dataset.json alone gives the same splits by position; with it, the lists count."""
    whole = write_lists(draw_layout(tmp_path / "whole", names_of(60)), dataset=names_of(60))
    one, other = DSR(str(published)), DSR(str(whole))
    assert all(names_in(one, split) == names_in(other, split) for split in ("train", "val", "test"))
    assert "split by position" in other.notes()[0]
    write_lists(whole, train=names_of(60)[:2], test=names_of(60)[2:4], val=names_of(60)[4:5])
    listed = DSR(str(whole))
    assert names_in(listed, "train") == names_of(60)[:2] and listed.notes() == []


def test_splits_by_position() -> None:
    """Every fifth is test, every twentieth of the others val."""
    splits = split_items(range(1000))
    assert splits["test"] == [*range(0, 1000, 5)] and splits["val"][:3] == [1, 26, 51] and len(splits["val"]) == 40
    assert sorted(n for numbers in splits.values() for n in numbers) == [*range(1000)]


def test_triplets(small: Path) -> None:
    """Per photograph: each style alone, the caption alone, and each style with the caption."""
    triplets = Styles(str(small)).triplets()
    assert len(triplets) == 4 * 7 and all(t.targets == ("images/f0/p000.jpg",) for t in triplets[:7])
    assert [(t.reference, t.texts, t.label) for t in triplets[:7]] == [
        ("sketch/f0/p000.jpg", (), "sketch"), ("art/f0/p000.png", (), "art"), ("mosaic/f0/p000.jpeg", (), "mosaic"),
        (None, ("a picture of f0/p000",), "text"),
        ("sketch/f0/p000.jpg", ("a picture of f0/p000",), "sketch"),
        ("art/f0/p000.png", ("a picture of f0/p000",), "art"),
        ("mosaic/f0/p000.jpeg", ("a picture of f0/p000",), "mosaic"),
    ]  # fmt: skip


def test_what_a_photograph_lacks(small: Path) -> None:
    """A style or a caption that is missing: those queries are left out, and it is counted."""
    (small / "art/f0/p000.png").unlink()
    (small / "text/f1/p001.txt").unlink()
    (small / "text/f2/p002.txt").write_text("\n")
    write_lists(small, train=[*names_of(3), {"image": "f0/p003.jpg"}])
    dataset = Styles(str(small))
    kinds = Counter((dataset.label(t.targets[0]), bool(t.texts)) for t in dataset.triplets())
    assert kinds == {
        ("f0/p000", False): 2, ("f0/p000", True): 3, ("f1/p001", False): 3, ("f2/p002", False): 3, ("f0/p003", False): 3
    }  # fmt: skip
    checks = {check.what: check for check in dataset.checks()}
    assert checks["train: photographs without art"].examples == ("f0/p000",)
    assert checks["train: photographs without caption"].examples == ("f1/p001", "f2/p002", "f0/p003")
    assert checks["train: photographs without sketch"].found == 0 and checks["test: photographs"].found == 2
    assert dataset.benchmark("val").macro == KINDS and examine(dataset).can_train


def test_without_captions(small: Path) -> None:
    """Metrics are means over the kinds that there are."""
    for split in ("train", "val", "test"):
        entries = json.loads((small / f"{split}.json").read_text())
        write_json(small / f"{split}.json", [{**one, "caption": None} for one in entries])
    dataset = Styles(str(small))
    assert dataset.benchmark("test").macro == STYLES and len(dataset.triplets()) == 12
    assert dataset.caption("images/f0/p000.jpg") == "" and examine(dataset).can_train


def test_chosen_kinds(small: Path) -> None:
    """The attribute decides which kinds of queries take part."""
    dataset = Styles(str(small))
    dataset.kinds = ("sketch", "text")
    assert {t.label for t in dataset.triplets()} == {"sketch", "text"} and len(dataset.triplets()) == 8
    assert dataset.benchmark("test").macro == ("sketch", "text")


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_full_gallery(published: Path, split: str) -> None:
    """All photographs of the split are ranked, by queries of seven kinds; R@1 selects."""
    benchmark = DSR(str(published)).benchmark(split)
    assert benchmark.name == f"dsr/{split}" and not benchmark.exclude_reference and benchmark.macro == KINDS
    assert Counter(query.tags for query in benchmark.queries) == {(kind,): len(benchmark.gallery) for kind in KINDS}
    assert [measure_name(m) for m in benchmark.measures] == ["R@1", "R@5"] and primary_names(benchmark) == ["R@1"]
    for query in benchmark.queries:
        ((kind,), (target,)) = query.tags, query.targets
        assert target in benchmark.gallery and target.startswith("images/")
        assert (query.text is not None) == kind.endswith("text") and (query.reference is None) == (kind == "text")
        assert query.reference is None or query.reference.startswith(f"{kind.split()[0]}/{target[7:-4]}.")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty photographs of test, so that two are left over."""
    names = [f"a/{n:02d}" for n in range(52)]
    return write_lists(draw_layout(tmp_path_factory.mktemp("g") / "styles", names), train=names[:2], test=names[2:])


def test_groups_of_24(grouped: Path) -> None:
    """Each query is ranked within its photograph's group, which the group shares; what is left over is dropped."""
    dataset = Styles(str(grouped))
    assert dataset.protocols == {"val": ("styles/val",), "test": ("styles/test", "styles/test-batch24")}
    benchmark = dataset.benchmark("test", "styles/test-batch24")
    assert len(benchmark.gallery) == 2 * GROUP == 48 and len(benchmark.queries) == 7 * 48
    assert len({id(query.candidates) for query in benchmark.queries}) == 2
    groups = {query.candidates for query in benchmark.queries}
    assert len(groups) == 2 and {len(group) for group in groups} == {24}
    assert sorted(i for group in groups for i in group) == sorted(benchmark.gallery)
    assert all(query.targets[0] in query.candidates for query in benchmark.queries)
    measures = [(measure_name(m), m.over, m.primary) for m in benchmark.measures]
    assert measures == [("R@1", "candidates", True), ("R@5", "candidates", False)]
    assert benchmark == Styles(str(grouped)).benchmark("test", "styles/test-batch24")
    assert len(dataset.benchmark("test").gallery) == 50  # negative control: the full gallery drops nothing


def test_groups_are_drawn() -> None:
    """By a fixed seed and not in the order of the list; fewer than 24 make none."""
    photos = [str(n) for n in range(48)]
    first, second = draw_groups(photos)
    assert sorted([*first, *second]) == sorted(photos) and {*first} != {*photos[:24]}
    assert first[:3] == ("15", "11", "46") and draw_groups(photos[:23]) == [] and len(draw_groups(photos[:24])) == 1


def test_a_small_split_has_no_groups(small: Path) -> None:
    """A protocol that has no query is not offered."""
    with pytest.raises(InputError, match=r"no protocol 'styles/test-batch24' for split test; known: styles/test"):
        Styles(str(small)).benchmark("test", "styles/test-batch24")


UNSAFE = ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "a\\b.jpg", "a\nb.jpg", "a/\x1b.jpg", "", ".", 3, ["a"], None]


@pytest.mark.parametrize("key", ["image", "caption"])
@pytest.mark.parametrize("value", UNSAFE)
def test_unsafe_paths(small: Path, key: str, value: object) -> None:
    """What leads out of the folder, or is no path, is refused in one line; a caption may be null."""
    write_lists(small, train=["f0/p000", {**entry("f1/p001"), key: value}])
    if key == "caption" and value is None:
        assert Styles(str(small)).caption("images/f1/p001.jpg") == ""
        return
    with pytest.raises(InputError, match=rf"train\.json, entry 1, field '{key}': ") as error:
        Styles(str(small))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["images/f0/p000.jpg", "art/f0/p000.png", "text/f0/p000.txt", "sketch/f0"])
def test_links(small: Path, tmp_path: Path, place: str) -> None:
    """A link out of the folder is refused, of a picture, a caption or a folder; one inside it is followed."""
    moved = small / "moved"
    (small / place).rename(moved)
    (small / place).symlink_to(moved)
    assert len(Styles(str(small)).triplets()) == 28
    moved.rename(tmp_path / "outside")
    (small / place).unlink()
    (small / place).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=f"{place}.* is a link, or lies behind a link, that leaves") as error:
        Styles(str(small))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "said"), [
    (None, r"train\.json is missing: it comes from python data_gen/stylize\.py"),
    ('[{"image": "a/b.jpg"', r"train\.json is not valid JSON, or cut short"),
    ("{}", r"train\.json: expected a list"),
    ('["a/b.jpg"]', r"train\.json, entry 0: expected an object"),
    ('[{"caption": "a/b.txt"}]', r"train\.json, entry 0, field 'image': is missing"),
])  # fmt: skip
def test_lists_that_are_torn(small: Path, content: str | None, said: str) -> None:
    """The file is named, and the entry; the list of an unfinished folder is missing, and the command goes on."""
    (small / "train.json").unlink()
    if content is not None:
        (small / "train.json").write_text(content)
    with pytest.raises(InputError, match=said):
        Styles(str(small))


def test_files_that_are_torn(small: Path) -> None:
    """The report names a photograph that is missing and a picture that is cut; a caption that is no text is refused."""
    (small / "images/f0/p000.jpg").unlink()
    whole = (small / "sketch/f1/p001.jpg").read_bytes()
    (small / "sketch/f1/p001.jpg").write_bytes(whole[: len(whole) // 2])
    report = examine(Styles(str(small)))
    assert not report.can_train and report.broken["images/f0/p000.jpg"] == "missing"
    assert report.broken.keys() == {"images/f0/p000.jpg", "sketch/f1/p001.jpg"}
    (small / "text/f0/p000.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"f0/p000\.txt cannot be read"):
        Styles(str(small)).triplets()
    assert any("cannot be read" in check.examples[0] for check in Styles(str(small)).checks() if check.examples)


def test_odd_suffixes(small: Path) -> None:
    """Those of the pictures count, not those of the list; of two, the listed one; upper case too; dots in names."""
    (small / "images/f0/p000.jpg").rename(small / "images/f0/p000.JPEG")
    draw_picture(small / "sketch/f1/p001.png", "other")
    draw_layout(small, ["f0/v1.2"])
    write_lists(small, train=["f0/p000", "f1/p001", "f0/v1.2"])
    dataset = Styles(str(small))
    assert dataset.training_images() == ["images/f0/p000.JPEG", "images/f1/p001.jpg", "images/f0/v1.2.jpg"]
    references = [t.reference for t in dataset.triplets() if t.label == "sketch" and not t.texts]
    assert references == ["sketch/f0/p000.jpg", "sketch/f1/p001.jpg", "sketch/f0/v1.2.jpg"]


def test_photographs_that_are_listed_twice(small: Path) -> None:
    """Each counts once, in test rather than in val, in val rather than in train; which is said."""
    names = names_of(7)
    write_lists(small, train=[*names, names[0]], val=[names[4], names[5]])
    dataset = Styles(str(small))
    assert [names_in(dataset, split) for split in ("train", "val", "test")] == [names[:4], names[4:5], names[5:]]
    assert "5 photographs are listed twice, such as f2/p005" in dataset.notes()[0]
    assert dataset.notes()[0].removeprefix("styles: ") in [check.what for check in dataset.checks()]


def test_names_and_captions(small: Path) -> None:
    """Of all styles of a photograph; the first line, on one line; nothing for what is unknown."""
    dataset = Styles(str(small))
    for image_id in ("images/f0/p000.jpg", "art/f0/p000.png"):
        assert dataset.label(image_id) == "f0/p000" and dataset.caption(image_id) == "a picture of f0/p000"
    assert dataset.caption("images/gone.jpg") == "" and dataset.label("images/gone.jpg") == "images/gone.jpg"
    for unknown in ("images/gone.jpg", "../x.jpg", "text/f0/p000.txt", "train.json"):
        with pytest.raises(InputError, match="unknown image id"):
            dataset.image(unknown)


def test_where_they_lie(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data/styles and data/dsr; where they are missing, one line says where they come from."""
    monkeypatch.setenv("SPN4CIR_DATA", str(tmp_path / "gone"))
    for name, said in (("styles", "python data_gen/stylize.py"), ("dsr", "Curise/FreeStyleRet-DSR .*CC-BY-NC-4.0")):
        with pytest.raises(InputError, match=rf"{name}: .*gone.{name} does not hold the dataset.*{said}") as error:
            load_dataset(name)
        assert "\n" not in str(error.value)
    monkeypatch.setenv("SPN4CIR_DATA", str(tmp_path))
    assert len(load_dataset("styles").training_images()) == 4
    small.rename(tmp_path / "DSR")
    assert len(load_dataset("dsr").training_images()) == 4


def test_published_counts(published: Path) -> None:
    """Beside what is found, of DSR alone."""
    checks = {check.what: check for check in DSR(str(published)).checks()}
    expected = {split: checks[f"{split}: photographs"].expected for split in ("train", "val", "test")}
    assert expected == {"train": 7600, "val": 400, "test": 2000} and checks["test: photographs"].level == "note"
    assert {check.expected for check in Styles(str(published)).checks() if check.what.endswith("photographs")} == {None}


def test_skipped_images(grouped: Path) -> None:
    """A photograph that is left out is no target and no candidate."""
    first = Styles(str(grouped)).benchmark("test", "styles/test-batch24").gallery[0]
    write_skip_list(grouped, {first: "blurred"})
    dataset = load_dataset("styles", str(grouped))
    for protocol in ("styles/test", "styles/test-batch24"):
        benchmark = dataset.benchmark("test", protocol)
        assert benchmark.name == f"{protocol}+skip" and first not in benchmark.gallery and benchmark.skipped == 1
        assert not any(first in (*query.targets, *query.candidates) for query in benchmark.queries)
