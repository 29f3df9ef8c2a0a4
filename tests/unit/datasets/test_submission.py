"""CIRR's submission files: what is written, and that each kind of damage is named. The published examples are sound."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spn4cir.datasets.cirr import CIRR
from spn4cir.datasets.submission import check_submission, write_submission
from spn4cir.errors import InputError
from spn4cir.types import Benchmark

SHARED = Path(__file__).parents[4] / "shared" / "data" / "cirr"
METRICS = {"recall": 50, "recall_subset": 3}
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the published annotations are not beside the project ({SHARED})"
)


class Case(NamedTuple):
    """A benchmark, and a sound submission to it."""

    benchmark: Benchmark
    content: dict[str, Any]


def lists_for(benchmark: Benchmark, metric: str) -> dict[str, list[str]]:
    """Sound answers to all queries."""
    found = {}
    for query in benchmark.queries:
        pool = benchmark.gallery if metric == "recall" else query.candidates
        images = [i for i in pool if i != query.reference]
        random.Random(query.name).shuffle(images)
        found[query.name] = images[: METRICS[metric]]
    return found


@cache
def example(metric: str) -> dict[str, Any]:
    """A published submission."""
    path = SHARED / "submission_examples" / f"test1_pred_ranks_{metric}.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="session")
def published() -> Benchmark:
    """The queries of the real test1."""
    return CIRR(str(SHARED)).benchmark("test1")


@pytest.fixture(params=["small", pytest.param("published", marks=needs_shared)])
def kind(request: pytest.FixtureRequest) -> str:
    """On the small tree everywhere, on the published examples where they are."""
    return str(request.param)


@pytest.fixture(params=METRICS)
def case(request: pytest.FixtureRequest, kind: str, cirr: Path) -> Case:
    """A sound submission of either metric."""
    metric = request.param
    if kind == "published":
        return Case(request.getfixturevalue("published"), example(metric))
    benchmark = CIRR(str(cirr)).benchmark("test1")
    return Case(benchmark, {"version": "rc2", "metric": metric, **lists_for(benchmark, metric)})


def check(tmp_path: Path, content: object, benchmark: Benchmark) -> str:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, separators=(",", ":")))
    return check_submission(path, benchmark)


def refused(tmp_path: Path, content: object, benchmark: Benchmark) -> str:
    """The message of the InputError, which is one line and names the file."""
    with pytest.raises(InputError) as error:
        check(tmp_path, content, benchmark)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "mine.json")) and "\n" not in message
    assert len(message) < len(str(tmp_path)) + 250
    return message


def test_sound_submissions(tmp_path: Path, case: Case) -> None:
    """The published examples and the small ones; said in one line."""
    told = check(tmp_path, case.content, case.benchmark)
    metric = case.content["metric"]
    assert f"a sound {metric} submission, {len(case.benchmark.queries)} queries of {METRICS[metric]} images" in told


def test_order_of_entries_is_free(tmp_path: Path, case: Case) -> None:
    """An object has no order."""
    assert "sound" in check(tmp_path, dict(reversed(case.content.items())), case.benchmark)


def other(case: Case, of: str) -> dict[str, Any]:
    """A sound content with one list changed: of the second query."""
    name = case.benchmark.queries[1].name
    query, images = case.benchmark.queries[1], list(case.content[name])
    outside = next(i for i in case.benchmark.gallery if i not in (*query.candidates, *images))
    changed: dict[str, Any] = {
        "short": images[:-1], "long": [*images, outside], "empty": [], "twice": [*images[:-1], images[0]],
        "reference": [*images[:-1], query.reference], "unknown": [*images[:-1], "dev-0-0-img0"],
        "path": ["../../x", *images[1:]], "number in it": [*images[:-1], 7], "null in it": [None, *images[1:]],
        "text": images[0], "object": dict.fromkeys(images, 1), "null": None, "number": 3, "list in it": [images],
        "stranger": [*images[:-1], outside],
    }  # fmt: skip
    return {**case.content, name: changed[of]}


@pytest.mark.parametrize(("of", "words"), [
    ("short", "expected {length} images, got {less}"), ("long", "expected {length} images, got {more}"),
    ("empty", "expected {length} images, got 0"), ("twice", "\"{first}\" occurs twice"),
    ("reference", "its own reference '{reference}' is in the list"),
    ("unknown", "\"dev-0-0-img0\" is not in the gallery"), ("path", "\"../../x\" is not in the gallery"),
    ("number in it", "expected a list of image names, got 7 in it"), ("null in it", "image names, got null in it"),
    ("text", "expected a list of image names, got \"{first}"), ("object", "expected a list of image names, got {{"),
    ("null", "image names, got null"), ("number", "image names, got 3"), ("list in it", "image names, got ["),
])  # fmt: skip
def test_a_damaged_list_is_named(tmp_path: Path, case: Case, of: str, words: str) -> None:
    """The file, the pair id, and what is wrong with its list."""
    query, length = case.benchmark.queries[1], METRICS[case.content["metric"]]
    first = case.content[query.name][0]
    expected = words.format(length=length, less=length - 1, more=length + 1, first=first, reference=query.reference)
    message = refused(tmp_path, other(case, of), case.benchmark)
    assert f"mine.json, entry '{query.name}': " in message and expected in message


def test_an_image_outside_the_subset(tmp_path: Path, case: Case) -> None:
    """Damage in the small ranking; in the large one any image of the gallery is right."""
    if case.content["metric"] == "recall":
        name = case.benchmark.queries[1].name
        outside = next(
            i for i in case.benchmark.gallery if i not in case.content[name] + [case.benchmark.queries[1].reference]
        )
        content = {**case.content, name: [*case.content[name][:-1], outside]}
        assert "sound" in check(tmp_path, content, case.benchmark)
    else:
        assert "is no member of its subset" in refused(tmp_path, other(case, "stranger"), case.benchmark)


@pytest.mark.parametrize("key", ["version", "metric"])
def test_version_and_metric(tmp_path: Path, case: Case, kind: str, key: str) -> None:
    """A missing or wrong one is named, with what it must be; a long one is not printed whole."""
    must = "'rc2'" if key == "version" else "'recall' or 'recall_subset'"
    gone = refused(tmp_path, {k: v for k, v in case.content.items() if k != key}, case.benchmark)
    assert gone.endswith(f"the entry {key!r} is missing; it must be {must}")
    for value in ["rc1", "", None, 2, ["rc2"], "x" * 1000, "RECALL"][: 1 if kind == "published" else None]:
        message = refused(tmp_path, {**case.content, key: value}, case.benchmark)
        assert f"mine.json, entry {key!r}: must be {must}, got {json.dumps(value)[:50]}" in message


def test_the_other_metric(tmp_path: Path, case: Case) -> None:
    """Lists of one metric under the name of the other: the lengths tell."""
    turned = next(m for m in METRICS if m != case.content["metric"])
    message = refused(tmp_path, {**case.content, "metric": turned}, case.benchmark)
    assert f"expected {METRICS[turned]} images, got {METRICS[case.content['metric']]}" in message
    assert f"(and {len(case.benchmark.queries) - 1} more entries with a fault)" in message


def test_pair_ids(tmp_path: Path, case: Case) -> None:
    """One too few, one too many, and one under another name."""
    name = case.benchmark.queries[0].name
    images = case.content[name]
    fewer = {k: v for k, v in case.content.items() if k != name}
    assert refused(tmp_path, fewer, case.benchmark).endswith(f"mine.json, pair id '{name}' is missing")
    message = refused(tmp_path, {**case.content, "999": images}, case.benchmark)
    assert message.endswith('entry "999" is no pair id of cirr/test1')
    message = refused(tmp_path, {**fewer, f" {name}": images}, case.benchmark)
    assert f'entry " {name}" is no pair id' in message and "(and 1 more entries with a fault)" in message


def test_a_pair_id_twice(tmp_path: Path, case: Case) -> None:
    """Of two lists a decoder keeps the last without a word: an error here."""
    name = case.benchmark.queries[0].name
    text = json.dumps(case.content)[:-1] + f', "{name}": {json.dumps(case.content[name])}}}'
    assert f'the key "{name}" occurs twice' in refused(tmp_path, text, case.benchmark)


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda text: text[:-30], "is not valid JSON, or cut short"), (lambda text: "", "is not valid JSON"),
    (lambda text: f"[{text}]", "expected an object of pair ids"), (lambda text: "null", "expected an object"),
    (lambda text: f"x = {text}", "is not valid JSON"), (lambda text: '"recall"', "expected an object"),
    (lambda text: "{}", "the entry 'version' is missing"),
])  # fmt: skip
def test_files_that_are_no_object(tmp_path: Path, case: Case, spoil: Callable[[str], str], words: str) -> None:
    """Cut, empty, a list, no JSON."""
    assert words in refused(tmp_path, spoil(json.dumps(case.content)), case.benchmark)


def test_the_limit_of_the_server(tmp_path: Path, case: Case) -> None:
    """5 MB are too much, one byte less is not: blanks count, though they say nothing."""
    text = json.dumps(case.content, separators=(",", ":"))
    assert "5,000,000 bytes, but the server takes less than 5,000,000" in refused(
        tmp_path, text.ljust(5_000_000), case.benchmark
    )
    assert "4,999,999 bytes" in check(tmp_path, text.ljust(4_999_999), case.benchmark)


def test_no_file(tmp_path: Path, cirr: Path) -> None:
    """A missing file, and a folder in its place."""
    dataset = CIRR(str(cirr))
    for path, words in (tmp_path / "x.json", "x.json is missing"), (tmp_path, "is no regular file"):
        with pytest.raises(InputError, match=words):
            dataset.check_submission(path)


def test_what_is_written(tmp_path: Path, cirr: Path) -> None:
    """Two files in the server's form: keys sorted, lists cut to 50 and 3, no blanks; and both are sound."""
    dataset = CIRR(str(cirr))
    benchmark = dataset.benchmark("test1")
    ranked = {q.name: [i for i in benchmark.gallery if i != q.reference] for q in benchmark.queries}
    within = {q.name: [i for i in q.candidates if i != q.reference] for q in reversed(benchmark.queries)}
    paths = dataset.write_submission(tmp_path / "new" / "submission", ranked, within)
    assert [p.name for p in paths] == ["recall_submission.json", "recall_subset_submission.json"]
    for path, (metric, length), lists in zip(paths, METRICS.items(), (ranked, within), strict=True):
        text = path.read_text()
        content = json.loads(text)
        assert (content.pop("version"), content.pop("metric")) == ("rc2", metric)
        assert content == {name: images[:length] for name, images in lists.items()}
        assert list(content) == sorted(content) and " " not in text
        assert f"a sound {metric} submission" in dataset.check_submission(path)
    assert sorted(p.name for p in (tmp_path / "new" / "submission").iterdir()) == [p.name for p in paths]


@pytest.mark.parametrize("spoiled", METRICS)
def test_nothing_is_written_that_the_server_would_refuse(tmp_path: Path, cirr: Path, spoiled: str) -> None:
    """One faulty list of one metric: neither file is there, nor the folder."""
    benchmark = CIRR(str(cirr)).benchmark("test1")
    lists = {metric: lists_for(benchmark, metric) for metric in METRICS}
    name = benchmark.queries[3].name
    lists[spoiled][name] = lists[spoiled][name][:-1]
    with pytest.raises(InputError, match=f"entry '{name}': expected {METRICS[spoiled]} images"):
        write_submission(tmp_path / "out", lists["recall"], lists["recall_subset"], benchmark)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, cirr: Path, place: str) -> None:
    """A file in its place is named."""
    benchmark = CIRR(str(cirr)).benchmark("test1")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file.* cannot be made: "):
        write_submission(
            tmp_path / place, lists_for(benchmark, "recall"), lists_for(benchmark, "recall_subset"), benchmark
        )
