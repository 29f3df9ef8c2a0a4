"""The embedded dataset: what its splits promise."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.embedded import make_emoji
from spn4cir.datasets import load_dataset
from spn4cir.datasets.emoji import Emoji
from spn4cir.datasets.emoji_names import Attributes, load_names, parse_attributes
from spn4cir.errors import InputError
from spn4cir.images import open_image, pixel_hash
from spn4cir.measures import measure_name
from spn4cir.results import primary_names
from spn4cir.types import Benchmark

SPLITS = ("val", "test")
DATA = Emoji()
BENCHMARKS = {split: DATA.benchmark(split) for split in SPLITS}
TARGETS = {split: {t for q in BENCHMARKS[split].queries for t in q.targets} for split in SPLITS}
TRAIN = set(DATA.training_images())

each_split = pytest.mark.parametrize("split", SPLITS)


@pytest.fixture(scope="module")
def hashes() -> dict[str, str]:
    """Hash of the pixels of every image."""
    return {i: pixel_hash(open_image(DATA.image(i).path)) for i in BENCHMARKS["val"].gallery}


@pytest.fixture(scope="module")
def attributes() -> dict[str, Attributes]:
    """Attributes of every image by its name."""
    names = load_names()
    known = set(names.values())
    return {image_id: parse_attributes(name, known) for image_id, name in names.items()}


def test_sizes() -> None:
    """The sizes that the documentation and every number lean on."""
    assert len(DATA.triplets()) == 2000
    assert len(TRAIN) == len(DATA.training_images()) > 2000
    assert all(len(BENCHMARKS[split].queries) >= 1500 for split in SPLITS)
    assert all(len(TARGETS[split]) >= 300 for split in SPLITS)


@each_split
def test_queries_per_attribute(split: str) -> None:
    """Each attribute has at least 50 queries, so that a tag's metric means something."""
    counts = Counter(tag for query in BENCHMARKS[split].queries for tag in query.tags)
    assert set(counts) == {"concept", "gender", "tone", "direction", "color", "hair", "age"}
    assert min(counts.values()) >= 50


def test_targets_are_held_out() -> None:
    """Targets of val and test are disjoint from each other, from training images, and from all training triplets."""
    assert not TARGETS["val"] & TARGETS["test"]
    assert not (TARGETS["val"] | TARGETS["test"]) & TRAIN
    assert not (TARGETS["val"] | TARGETS["test"]) & {i for t in DATA.triplets() for i in (t.reference, t.targets[0])}


def test_training_triplets_use_training_images() -> None:
    """Reference and target of each triplet are training images and differ; no pair comes twice."""
    triplets = DATA.triplets()
    assert {i for t in triplets for i in (t.reference, t.targets[0])} <= TRAIN
    assert all(t.reference != t.targets[0] for t in triplets)
    assert len({(t.reference, t.targets[0]) for t in triplets}) == len(triplets)
    assert not any(t.generated for t in triplets)


@each_split
def test_references_are_not_the_other_splits_targets(split: str) -> None:
    """A query of one split never shows a target of the other."""
    (other,) = set(SPLITS) - {split}
    assert not {q.reference for q in BENCHMARKS[split].queries} & TARGETS[other]


@each_split
def test_protocol(split: str) -> None:
    """Ranked over all images, reference removed."""
    benchmark: Benchmark = BENCHMARKS[split]
    assert benchmark.name == f"emoji/{split}" and benchmark.exclude_reference
    assert set(benchmark.gallery) == TRAIN | TARGETS["val"] | TARGETS["test"]
    assert list(benchmark.gallery) == sorted(benchmark.gallery)
    names = [measure_name(measure) for measure in benchmark.measures]
    assert names == ["R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"] and primary_names(benchmark) == ["R@1"]


@each_split
def test_queries_change_exactly_one_attribute(split: str, attributes: dict[str, Attributes]) -> None:
    """By the names' attributes, reference and target differ in the query's tag."""
    for query in BENCHMARKS[split].queries:
        (tag,), reference, target = query.tags, attributes[query.reference], attributes[query.targets[0]]
        assert make_emoji.changed(reference, target) == tag
        assert [k for k in reference if reference[k] != target.get(k)] == [tag]
        assert reference.keys() == target.keys()


def test_triplets_change_exactly_one_attribute(attributes: dict[str, Attributes]) -> None:
    """So do the training triplets."""
    assert all(make_emoji.changed(attributes[t.reference], attributes[t.targets[0]]) for t in DATA.triplets())


@each_split
def test_no_query_twice(split: str) -> None:
    """The same question is not counted twice, and each has one target."""
    queries = BENCHMARKS[split].queries
    assert len({(q.reference, q.text, q.targets) for q in queries}) == len(queries)
    assert {len(q.targets) for q in queries} == {1}


@each_split
def test_subsets(split: str, hashes: dict[str, str]) -> None:
    """Six distinct images, reference and target among them; none looks like the target."""
    for query in BENCHMARKS[split].queries:
        assert len(query.candidates) == len(set(query.candidates)) == 6
        assert {query.reference, *query.targets} <= set(query.candidates)
        assert sum(hashes[i] == hashes[query.targets[0]] for i in query.candidates) == 1


def test_no_copy_of_a_held_out_target(hashes: dict[str, str]) -> None:
    """No other image has the pixels of a val or test target: it would be a right answer counted as wrong, or a leak."""
    copies = Counter(hashes.values())
    assert max(copies.values()) > 1  # there are copies, among the training images
    assert {copies[hashes[i]] for i in TARGETS["val"] | TARGETS["test"]} == {1}


def test_no_empty_text() -> None:
    """Every modification says something, without stray blanks or gaps of a template."""
    texts = [text for t in DATA.triplets() for text in t.texts]
    texts += [query.text for split in SPLITS for query in BENCHMARKS[split].queries]
    assert not [text for text in texts if not text.strip() or text != " ".join(text.split()) or "{" in text]


def test_texts_do_not_name_the_whole_target() -> None:
    """A text never holds the target's full name: the reference is needed."""
    compared = [(q.text, DATA.label(q.targets[0])) for s in SPLITS for q in BENCHMARKS[s].queries]
    assert sum(name.lower() in text.lower() for text, name in compared) <= 0.02 * len(compared)


@pytest.mark.parametrize("image_id", ["", "unknown", "../../x", "..", "/etc/passwd", "1f34e.png"])
def test_unknown_ids_raise(image_id: str) -> None:
    """An unknown id is an InputError that shows it; no id leads out of the folder of pictures."""
    with pytest.raises(InputError, match="unknown image id"):
        DATA.image(image_id)


def test_label_of_an_unknown_id_raises() -> None:
    """A label is refused like a path, not with a KeyError."""
    with pytest.raises(InputError, match="unknown image id 'unknown'"):
        DATA.label("unknown")


def test_all_pictures_are_there() -> None:
    """Each id has its file, and a name to show."""
    assert not [i for i in BENCHMARKS["val"].gallery if not DATA.image(i).path.is_file() or not DATA.label(i)]


def test_unknown_split_and_dataset() -> None:
    """Both say what there is."""
    with pytest.raises(InputError, match="known: val, test"):
        DATA.benchmark("train")
    with pytest.raises(InputError, match=r"known: .*emoji"):
        load_dataset("emojis")


def test_regenerating_gives_the_shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """make_emoji writes byte for byte what ships, so the pinned packages and the code still belong together."""
    shipped = make_emoji.FOLDER
    monkeypatch.setattr(make_emoji, "FOLDER", tmp_path)
    make_emoji.build()
    names = {path.name for path in shipped.iterdir()}
    assert (
        {path.name for path in tmp_path.iterdir()} == names == {"images.json", "train.jsonl", "val.jsonl", "test.jsonl"}
    )
    assert [n for n in sorted(names) if (tmp_path / n).read_bytes() != (shipped / n).read_bytes()] == []


@pytest.mark.parametrize(("name", "expected"), [
    ("green apple", {"concept": "apple", "color": "green"}),
    ("up-left arrow", {"concept": "arrow", "direction": "up-left"}),
    ("thumbs down dark skin tone", {"concept": "thumb", "direction": "down", "tone": "dark"}),
    ("man dark skin tone red hair",
     {"concept": "person", "gender": "man", "age": "adult", "hair": "red hair", "tone": "dark"}),
    ("old woman", {"concept": "person", "gender": "woman", "age": "older", "hair": "plain"}),
    ("mermaid", {"concept": "merperson", "gender": "woman"}),
    ("pizza", {"concept": "pizza"}),
])  # fmt: skip
def test_parse(name: str, expected: dict[str, str]) -> None:
    """Names fall into the attributes that a person would see."""
    assert parse_attributes(name, {name}) == expected


def test_parse_sees_the_default_of_what_has_variants() -> None:
    """A name without tone or direction has the default one where its variants are named."""
    names = {"mage", "mage dark skin tone", "man mage", "woman mage", "person running", "person running facing right"}
    assert parse_attributes("mage", names) == {"tone": "default", "concept": "mage", "gender": "person"}
    assert parse_attributes("person running", names)["direction"] == "left"


@pytest.mark.parametrize(("a", "b", "expected"), [
    ({"concept": "x", "gender": "man"}, {"concept": "x", "gender": "woman"}, "gender"),
    ({"concept": "x", "gender": "man"}, {"concept": "y", "gender": "woman"}, None),
    ({"concept": "x", "gender": "man"}, {"concept": "x", "gender": "man"}, None),
    ({"concept": "x", "gender": "man"}, {"concept": "x"}, None),
    ({"concept": "x", "color": "red"}, {"concept": "y", "color": "red"}, "concept"),
    ({"concept": "x", "direction": "up"}, {"concept": "y", "direction": "up"}, None),
])  # fmt: skip
def test_changed(a: dict[str, str], b: dict[str, str], expected: str | None) -> None:
    """The one attribute that differs; None for none, for two, and where the words alone would say it all."""
    assert make_emoji.changed(a, b) == expected
