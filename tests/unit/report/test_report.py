"""The report: everything from data escaped, its content, its size, and the page in a browser."""

import html
import importlib.util
import json
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spn4cir.comparison import compare_results
from spn4cir.errors import InputError
from spn4cir.evaluate import COMPOSED, IMAGE_ONLY, LATE_FUSION, TEXT_ONLY
from spn4cir.hidden_characters import show_hidden
from spn4cir.query_values import NegativeRanks
from spn4cir.report import write_report
from spn4cir.report.charts import draw_curves
from spn4cir.report.content import change_of_ranks, mean_ranks, short_names
from spn4cir.report.escaping import escape, script_json
from spn4cir.results import Ranking, Result, compute_ablation, compute_metrics
from spn4cir.shortcuts import label_queries, share_labels
from spn4cir.types import Benchmark, ImageRef, Query, recall_measures

HOSTILE = (
    "</script><script>window.pwned = 1</script>", "<img src=x onerror='window.pwned = 1'>", "\"'`&amp;<!--", "]]>",
    "rtl \u202e flipped \u2066 end", "nul \x00 bell \x07 escape \x1b[31m", "half \ud800 pair", "line\u2028end\u2029",
    "${window.pwned = 1}", "javascript:window.pwned=1", "__proto__", "a\nb\tc",
)  # fmt: skip
MODES = (COMPOSED, IMAGE_ONLY, TEXT_ONLY, LATE_FUSION)


def evaluated(queries: int = 60, seed: int = 0, texts: tuple[str, ...] = HOSTILE, gallery: int = 30) -> Result:
    """A drawn evaluation whose ids, texts, tags and needs are hostile."""
    chance = np.random.default_rng(seed)
    ids = tuple(f"{texts[n % len(texts)]}{n}" for n in range(gallery))
    asked = tuple(
        Query(
            ids[n % gallery], texts[n % len(texts)], (ids[(n + 1) % gallery],), (f"tag {texts[n % 3]}",),
            negatives=(ids[(n + 2) % gallery],) if n % 5 == 0 else (),
        )
        for n in range(queries)
    )  # fmt: skip
    benchmark = Benchmark("x/val", ids, asked, True, recall_measures(1, 5, primary=(1, 5)))
    first = {mode: chance.integers(1, gallery, (queries, 1, 1)) for mode in MODES}
    by_mode = {mode: {"gallery": np.repeat(ranks, 2, axis=2)} for mode, ranks in first.items()}
    wrong = np.zeros((queries, 1, 2), dtype=np.int64)
    wrong[::5] = 1 + np.arange(len(wrong[::5]))[:, None, None] % 3
    negatives = NegativeRanks(wrong, np.minimum(wrong, 2))
    metrics, tags = compute_metrics(benchmark, by_mode[COMPOSED], negatives)
    top = [[ids[n] for n in row] for row in chance.integers(0, gallery, (queries, 6)).tolist()]
    return Result(
        "x/val", metrics, tags, {mode: one for mode, (one, _) in compute_ablation(benchmark, by_mode).items()}, queries,
        "0123", queries=asked, benchmark=benchmark, by_mode=by_mode, negatives=negatives,
        rankings={"gallery": Ranking(by_mode[COMPOSED]["gallery"], top, [[0.0] * 6] * queries)},
    ).with_intervals()  # fmt: skip


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> ImageRef:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.new("RGB", (300, 200), "red").save(path)
    return ImageRef(path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, picture: ImageRef) -> Path:
    """The report of two models whose names are hostile too."""
    results = {HOSTILE[0]: evaluated(), "other " + HOSTILE[4]: evaluated(seed=1)}
    first, other = results
    differences = compare_results(results[first], {other: results[other]})
    describe = lambda item: f"title of {item}"  # noqa: E731
    return write_report(tmp_path_factory.mktemp("report"), results, lambda _: picture, differences, describe, shown=7)


class Elements(HTMLParser):
    """Elements of a page with their attributes, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data


def content_of(page: Path) -> dict[str, Any]:
    scripts = Elements(page.read_text(encoding="utf-8")).scripts
    assert len(scripts) == 2  # no text began another one
    found: dict[str, Any] = json.loads(scripts[0])
    return found


# --- escaping


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_escaped(text: str) -> None:
    """As HTML, in an attribute, and as JSON in a script: read back, they are the shown text, and nothing else."""
    shown = show_hidden(text)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert html.unescape(escape(text)) == shown and not re.search("[<>\"']", escape(text))
    packed = script_json({text: [text]})
    assert json.loads(packed) == {shown: [shown]} and not re.search("[<>&]", packed)
    packed.encode("utf-8")


def test_what_stays_as_it_is() -> None:
    """Letters of all scripts, and the joiners that emoji and Persian need; what is no number is null."""
    for text in ("größer", "赤い靴", "می\u200cخواهم", "👩\u200d🍳"):
        assert show_hidden(text) == text
    assert script_json([float("nan"), float("inf"), 1.5, 2, None, True]) == "[null,null,1.5,2,null,true]"


def test_the_page_holds_only_its_own_elements(page: Path) -> None:
    """One script and one block of data; no handler, no link, and no address but of data."""
    elements = Elements(page.read_text(encoding="utf-8"))
    assert not {tag for tag, _ in elements.found} & {"img", "iframe", "link", "a", "object", "base"}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert not [name for _, attributes in elements.found for name in attributes if name in ("src", "href")]
    assert len(elements.scripts) == 2 and "pwned = 1</script>" not in page.read_text(encoding="utf-8")
    assert "default-src 'none'" in next(str(a["content"]) for _, a in elements.found if "http-equiv" in a)


# --- content


def test_the_content_is_what_was_evaluated(page: Path) -> None:
    """Ranks by model and mode, texts, lists of bounded length, each picture once."""
    content, result = content_of(page), evaluated()
    assert content["text"] == [show_hidden(str(query.text)) for query in result.queries]
    assert content["ranks"][0] == mean_ranks(result).tolist()
    assert content["columns"] == [[model, mode] for model in (0, 1) for mode in range(4)]
    assert content["modes"] == list(MODES) and len(content["ranks"]) == 8
    assert content["ranks"][6] == mean_ranks(evaluated(seed=1), TEXT_ONLY).tolist()
    worst = content["lists"]["worst"]
    assert [content["ranks"][0][n] for n in worst] == sorted(content["ranks"][0], reverse=True)[:7]
    changed = change_of_ranks({"a": result, "b": evaluated(seed=1)})
    assert [changed[n] for n in content["lists"]["changed"]] == sorted(changed, reverse=True)[:7]
    assert all(n % 15 == 0 for n in content["lists"]["wrong"]) and len(content["lists"]["wrong"]) == 4
    assert set(map(int, content["tops"])) == {n for numbers in content["lists"].values() for n in numbers}
    assert {int(n) for n in content["pictures"]} <= {*range(len(content["items"]))} and len(content["pictures"]) <= 30
    for number, tops in content["tops"].items():
        target, (wrong, *_) = content["targets"][int(number)][0], (*result.queries[int(number)].negatives, None)
        for item, state in tops[0]:
            named = "target" if item == target else "wrong" if content["items"][item] == show_hidden(str(wrong)) else ""
            assert state == named


def test_labels_of_modalities() -> None:
    """By the first ten items; any model may solve a query; a tie over the tenth rank does not."""
    ids = tuple(f"i{n}" for n in range(40))
    queries = tuple(Query(None if n == 5 else "i0", str(n), ("i1",)) for n in range(6))
    benchmark = Benchmark("x/val", ids, queries, True, recall_measures(1))
    composed, image, text = [1, 1, 11, 10, 9, 1], [11, 10, 11, 11, 30, 40], [11, 30, 12, 12, 30, 1]

    def result(*columns: list[int]) -> Result:
        ranks = {m: {"gallery": np.array([[[n, n]] for n in c])} for m, c in zip(MODES, columns, strict=False)}
        ranks[COMPOSED]["gallery"][4, 0, 1] += 3  # of the first one: ties for ranks 9 to 12
        return Result("x/val", {}, {}, {}, 6, "0", queries=queries, benchmark=benchmark, by_mode=ranks)

    one = result(composed, image, text)
    labels = ["composition required", "one modality", "unresolved", "composition required", "unresolved"]
    assert label_queries([one]) == [*labels, "no composed query"]
    assert share_labels(label_queries([one])) == {"composition required": 40, "one modality": 20, "unresolved": 40}
    other = result([20] * 6, [20, 20, 5, 20, 20, 20], [20] * 6)
    assert label_queries([one, other])[2] == "one modality"
    with pytest.raises(InputError, match="--ablate"):
        label_queries([Result("x/val", {}, {}, {}, 6, "0", queries=queries, benchmark=benchmark)])


def test_a_report_needs_an_ablation_and_first_items(tmp_path: Path, picture: ImageRef) -> None:
    """One line says so, and nothing is written."""
    result = evaluated(6)
    lists = Ranking(result.rankings["gallery"].ranks)
    for changes in ({"by_mode": {}}, {"rankings": {"gallery": lists}}):
        with pytest.raises(InputError, match="needs an evaluation with ablate"):
            write_report(tmp_path / "r", {"a": Result(**{**vars(result), **changes})}, lambda _: picture)
    assert not (tmp_path / "r").exists()


def test_curves_are_drawn_to_scale() -> None:
    """The first and the last point of a line, and a label that is escaped."""
    svg = draw_curves("<b>", (1, 10, 100), {"<i>": np.array([0.0, 50.0, 100.0])})
    points = re.search(r'points="([^"]+)"', svg)
    assert points and points[1].split() == ["40.0,226.0", "245.0,118.0", "450.0,10.0"]
    assert "<b>" not in svg and "<i>" not in svg.replace('<i class="', "")


def test_many_queries_are_quick_and_small(tmp_path: Path, picture: ImageRef) -> None:
    """20,000 queries: CPU seconds and bytes, with room for a busy machine (benchmarks/report_size.py measures)."""
    result = evaluated(
        20_000, texts=tuple(f"is darker and has longer sleeves, number {n}" for n in range(500)), gallery=2000
    )
    start = time.process_time()
    path = write_report(tmp_path, {"model": result}, lambda _: picture)
    assert time.process_time() - start < 10 and path.stat().st_size < 20e6


# --- several models

RUNS = tuple(f"emoji/clip4cir/{name}" for name in ("stage1-20260101-120000-seed0", "stage1-20260101-120000-seed1", "x"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, picture: ImageRef) -> Path:
    """The report of three runs, whose names differ at the end."""
    texts = tuple(f"is darker and has longer sleeves, number {n}" for n in range(9))
    results = {run: evaluated(seed=seed, texts=texts) for seed, run in enumerate(RUNS)}
    others = {run: results[run] for run in RUNS[1:]}
    differences = compare_results(results[RUNS[0]], others)
    return write_report(tmp_path_factory.mktemp("three"), results, lambda _: picture, differences, shown=3)


def test_every_model_has_its_tags_and_curves(three: Path) -> None:
    """Curves by mode and a table of tags for each model, by its short name; the whole path once."""
    text, short = three.read_text(encoding="utf-8"), [run.rpartition("/")[2] for run in RUNS]
    assert [text.count(run) for run in RUNS] == [1, 1, 1] and content_of(three)["models"] == short
    sections = {part.partition("</h2>")[0]: part for part in text.split("<section><h2>")[1:]}
    for name, titles in (("Curves", ["Composed queries", *short]), ("By tag", short)):
        found = re.findall("<h3>(?:<bdi>)?([^<]+)", sections[name])
        assert found == titles
    assert sections["Curves"].count("<figure>") == 2 + 2 * 3 and sections["By tag"].count("<table>") == 3
    *_, second, third = sections["By tag"].split("<h3>")
    assert second.partition("</h3>")[2] != third.partition("</h3>")[2]
    (options,) = re.findall('<select id="column">(.*?)</select>', text)
    starts = [option[:12] for option in re.findall("<option[^>]*>([^<]+)", options)]
    assert len(set(starts)) == 3 * len(MODES)  # told apart however narrow the field is


def test_short_names_tell_models_apart() -> None:
    """The fewest last folders; never an empty name, nor one name for two models."""
    assert list(short_names(["a/b/x", "a/c/x", "c/x", "embedded weights"]).values()) == [
        "b/x", "a/c/x", "c/x", "embedded weights",
    ]  # fmt: skip
    assert short_names(["runs/a/"]) == {"runs/a/": "a/"} and short_names(["", "/"]) == {"": "", "/": "/"}


# --- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or CHROMIUM is None, reason="needs playwright and chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(browser: Any, page: Path, width: int) -> None:
    """It opens from a file, asks for nothing else, runs nothing that data holds, and its filter works."""
    tab = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_selector("article")
    assert tab.locator("article").count() == 7 and tab.locator("article img").count() > 20
    assert tab.evaluate("[...document.images].every(one => one.complete && one.naturalWidth === 96)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width

    def count_after(action: Any) -> str:
        before = tab.text_content("#count")
        action()
        tab.wait_for_function("said => document.querySelector('#count').textContent !== said", arg=before)
        return str(tab.text_content("#count"))

    assert count_after(lambda: tab.select_option("#list", "")) == "60 queries of 60"
    assert tab.locator("article").count() == 20 and tab.text_content("#page") == "page 1 of 3"
    tab.click("#after")
    assert tab.text_content("#page") == "page 2 of 3"
    texts = [f"{q.text} {q.reference} {q.targets} {q.tags}" for q in evaluated().queries]
    matching = sum("onerror=" in text.lower() for text in texts)
    assert 0 < matching < 60
    assert count_after(lambda: tab.fill("#words", "ONERROR=")) == f"{matching} queries of 60"  # texts, items and tags
    assert count_after(lambda: tab.fill("#words", "")) == "60 queries of 60"
    content, result = content_of(page), evaluated()
    low = sum(2 <= rank <= 6 for rank in content["ranks"][0])
    tab.fill("#from", "2")
    assert count_after(lambda: tab.fill("#to", "6")).startswith(f"{low} ")
    tab.fill("#from", "")
    count_after(lambda: tab.fill("#to", ""))
    assert count_after(lambda: tab.select_option("#tag", "0")) == "20 queries of 60"
    labels = label_queries([result, evaluated(seed=1)])
    wanted = sum(label == "one modality" for n, label in enumerate(labels) if content["tags"][n] == [0])
    assert count_after(lambda: tab.select_option("#label", "1")).startswith(f"{wanted} ")
    assert tab.evaluate("window.pwned") is None and not said
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    tab.close()


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_several_models_in_a_browser(browser: Any, three: Path, width: int) -> None:
    """No word of a table is broken, keys show the dashes of their lines, and a card lists all ranks."""
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.goto(three.as_uri())
    tab.wait_for_selector("article")
    broken = tab.evaluate("""() => {
      const found = [];
      for (const cell of document.querySelectorAll("th, h3")) {
        const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) for (const word of walker.currentNode.data.matchAll(/[^\\s-]+/g)) {
          const range = document.createRange();
          range.setStart(walker.currentNode, word.index);
          range.setEnd(walker.currentNode, word.index + word[0].length);
          if (new Set([...range.getClientRects()].map((one) => one.top)).size > 1) found.push(word[0]);
        }
      }
      return found;
    }""")
    assert broken == [] and tab.evaluate("document.documentElement.scrollWidth") <= width
    dashes = "all => all.map(one => getComputedStyle(one).strokeDasharray + getComputedStyle(one).stroke)"
    lines, keys = (
        tab.eval_on_selector_all(f"figure:first-of-type {one}", dashes) for one in ("polyline.line", ".key line.line")
    )
    assert lines == keys and len(set(keys)) >= 4
    content, card = content_of(three), tab.locator("article").first
    number = content["lists"]["worst"][0]
    rows = card.locator(".ranks tbody tr")
    for model in range(3):
        shown = rows.nth(model).locator("td").all_text_contents()
        assert list(map(float, shown)) == [column[number] for column in content["ranks"][4 * model : 4 * model + 4]]
    assert not any(run in str(card.text_content()) for run in RUNS)
    tab.close()
