"""``spn4cir-demo`` as people use it: the real process, a real browser, 16 clients at once."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
import torch

from spn4cir.app_cli import demo_command
from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import save_model
from spn4cir.index.local import Index
from spn4cir.model import load
from tests.served_index import HOSTILE, NAMES, build_shop, huge_png, png

pytest.importorskip("gradio", reason="gradio is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCORE, CARD, NOTICE = ".spn-score", ".spn-card", ".spn-notice"


class Server(NamedTuple):
    """A running page."""

    url: str
    process: "subprocess.Popen[str]"
    folder: Path


def start(folder: Path, *options: object) -> Server:
    """Start the command on a free port, and wait until it says where."""
    command = [sys.executable, "-m", "spn4cir", "demo", "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if match := re.match(r"open (http://127\.0\.0\.1:\d+)", line):
            return Server(match[1], process, folder)
    raise AssertionError("".join(lines))


def stop(server: Server) -> str:
    """Interrupt it as Ctrl-C does; what it printed since."""
    server.process.send_signal(signal.SIGINT)
    return server.process.communicate(timeout=30)[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page over one small index."""
    folder = tmp_path_factory.mktemp("served")
    running = start(folder, "--index", build_shop(folder), "--max-upload-mb", 1, "--max-megapixels", 2)
    yield running
    said = stop(running)
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Server]:
    """The page over a copy of that index and one by a model that sees styles."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(server.folder / "shop.index", folder / "shop.index")
    torch.manual_seed(0)
    backbone = build_backbone("freestyle")
    pixels = torch.randn(24, 3, 64, 64)
    backbone.fit_statistics(pixels[:18], ["sketch", "art", "mosaic"] * 6, pixels[18:])
    save_model(folder / "model", backbone, {})
    Index.build(load(folder / "model"), server.folder / "shop" / "table.csv", folder / "style.index")
    running = start(folder, "--index", "shop.index", "style.index")
    yield running
    said = stop(running)
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, loaded; no script may fail, no request leave this machine, and no text of the data run."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield (opened := open_page(context, server.url))
    assert not opened.problems and not opened.outside and opened.evaluate("window.hacked") is None
    context.close()


def open_page(context: Any, url: str) -> Any:
    """The page at an address, when its first pictures are there."""
    page = context.new_page()
    page.problems, page.outside = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda one: one.url.startswith((url, "data:", "blob:")) or page.outside.append(one.url))
    page.goto(url)
    page.wait_for_selector(CARD)
    return page


def type_text(page: Any, text: str) -> None:
    page.locator("#text input, #text textarea").fill(text)
    page.keyboard.press("Enter")


def test_a_dialogue(page: Any) -> None:
    """Pick, type, see, click through, lean, filter, back, start over."""
    assert page.locator(SCORE).count() == 0 and page.locator(CARD).count() > 12
    page.locator(".spn-pick").nth(2).click()
    page.wait_for_selector(".spn-reference")
    first = page.locator(".spn-reference b").inner_text()
    assert page.locator(SCORE).count() == 12 == page.locator(CARD).count()
    assert first not in page.locator(".spn-card figcaption").all_inner_texts()  # the reference is no result
    scores = [float(text) for text in page.locator(SCORE).all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    type_text(page, "but in red")
    page.wait_for_selector("text=but in red")
    assert page.locator(".spn-trail li").count() == 1
    assert [float(text) for text in page.locator(SCORE).all_inner_texts()] != scores
    page.locator(".spn-pick").nth(0).click()
    page.wait_for_selector(".spn-trail li:nth-child(2)")
    assert page.locator(".spn-reference b").inner_text() != first
    assert page.locator("#text input, #text textarea").input_value() == ""
    page.locator(".spn-grid [data-action=more]").nth(1).click()
    page.wait_for_selector("text=More like")
    page.locator(".spn-grid [data-action=less]").nth(1).click()
    page.wait_for_selector("text=Less like")
    page.locator(".spn-chips [data-action=less]").click()
    page.wait_for_selector("text=Less like", state="detached")
    page.locator("[data-action=back]").click()
    page.wait_for_selector("text=Less like")
    page.locator(".spn-trail li button").nth(0).click()
    page.wait_for_selector(".spn-trail li:nth-child(2)", state="detached")
    assert page.locator(".spn-reference b").inner_text() == first
    assert page.locator("#text input, #text textarea").input_value() == "but in red"
    page.locator("[data-action=restart]").click()
    page.wait_for_selector(".spn-empty")
    assert page.locator(SCORE).count() == 0


def test_texts_categories_and_counts(page: Any) -> None:
    """A text alone; categories narrow the results; more of them on request; nothing to look for is a message."""
    page.locator("#search").click()
    page.wait_for_selector(NOTICE)
    assert "pick or upload a picture" in page.locator(NOTICE).inner_text()
    type_text(page, "a shoe")
    page.wait_for_selector(SCORE)
    assert page.locator(NOTICE).count() == 0 and page.locator(CARD).count() == 12
    page.locator("button:has-text('Filters')").click()
    page.locator("#count label", has_text="24").click()
    page.wait_for_selector(f"{CARD}:nth-child(13)")
    page.locator("#category input").click()
    page.locator("[role=option]", has_text="dress").click()
    page.wait_for_selector(f"{CARD}:nth-child(11)", state="detached")
    assert page.locator(CARD).count() == 10


def test_uploads(page: Any, tmp_path: Path) -> None:
    """A picture is the reference; what is corrupt, too large or a bomb is a message, and the page goes on."""
    (tmp_path / "mine.png").write_bytes(png())
    page.set_input_files("#upload input", tmp_path / "mine.png")
    page.wait_for_selector(".spn-reference")
    assert page.locator(".spn-reference b").inner_text() == "mine.png"
    assert page.locator(".spn-reference img").get_attribute("src").startswith("data:image/webp")
    type_text(page, "but blue")
    page.wait_for_selector("text=but blue")
    bad = {
        "cut.png": (png((600, 400))[:300], "does not decode"),
        "text.png": (b"no picture", "is no picture"),
        "bomb.png": (huge_png(), "100.0 megapixels: at most 2"),
        "large.png": (b"\0" * 2_000_000, "at most 1 MB"),
        "<img src=x onerror=window.hacked=1>.png": (b"", "is no picture"),
    }
    for name, (data, words) in bad.items():
        (tmp_path / name).write_bytes(data)
        page.set_input_files("#upload input", tmp_path / name)
        page.wait_for_selector(f"{NOTICE} >> text={words}")
        assert page.locator(".spn-reference b").inner_text() == "mine.png"
    hostile = tmp_path / HOSTILE[0].replace("/", "")
    hostile.write_bytes(png())
    page.set_input_files("#upload input", hostile)
    page.wait_for_selector(NOTICE, state="detached")
    assert page.locator(".spn-reference b").inner_text() == hostile.name


def test_titles_are_texts(page: Any) -> None:
    """Of the data, however they look; a title is shown as it is written."""
    page.locator("button:has-text('Filters')").click()
    page.locator("#count label", has_text="48").click()
    type_text(page, HOSTILE[0])
    page.wait_for_selector(f"{CARD}:nth-child(30)")
    page.wait_for_timeout(300)
    titles = page.locator(".spn-card figcaption").all_inner_texts()
    assert set(HOSTILE) <= set(titles)
    assert page.evaluate("[...document.querySelectorAll('.spn-card img')].every((one) => one.alt)")
    place = titles.index(HOSTILE[3])
    page.locator(".spn-pick").nth(place).click()
    page.wait_for_selector(".spn-reference")
    assert page.locator(".spn-reference b").inner_text() == HOSTILE[3]


def test_long_texts(page: Any, server: Server) -> None:
    """The box takes no more than a model reads; a client that sends more gets a message."""
    type_text(page, "a" * 10_000)
    page.wait_for_selector(f"{NOTICE}, {SCORE}")
    assert len(page.locator("#text input, #text textarea").input_value()) <= 10_000
    assert httpx.get(server.url).status_code == 200


def test_a_phone(browser: Any, server: Server) -> None:
    """Nothing is wider than the screen, and everything can be tapped."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = open_page(context, server.url)
    page.locator(".spn-pick").nth(0).tap()
    page.wait_for_selector(SCORE)
    page.locator(".spn-grid [data-action=more]").nth(0).tap()
    page.wait_for_selector("text=More like")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    heights = page.evaluate("[...document.querySelectorAll('button[data-action]')].map((one) => one.offsetHeight)")
    assert min(heights) >= 36 and not page.problems and not page.outside
    context.close()


def test_two_models_and_a_sketch(browser: Any, pair: Server) -> None:
    """Side by side; a model that sees styles takes a sketch that is drawn with the mouse."""
    page = open_page(browser.new_context(), pair.url)
    page.locator("text=Draw a sketch").click()
    page.locator("text=Search by the sketch").click()
    page.wait_for_selector(f"{NOTICE} >> text=draw something first")
    area = page.locator("canvas").bounding_box()
    page.mouse.move(area["x"] + 40, area["y"] + 40)
    page.mouse.down()
    page.mouse.move(area["x"] + 200, area["y"] + 180, steps=5)
    page.mouse.up()
    page.locator("#text input, #text textarea").fill("but blue")
    page.locator("text=Search by the sketch").click()
    page.wait_for_selector(f"#results-1 {SCORE}")
    assert page.locator("#text input, #text textarea").input_value() == "but blue"
    assert page.locator(".spn-reference b").inner_text() == "sketch"
    assert re.search(r"(photo|sketch|art|mosaic) [01]\.\d\d", page.locator(".spn-reference small").inner_text())
    assert page.locator(f"#results-0 {CARD}").count() == page.locator(f"#results-1 {CARD}").count() == 12
    page.locator("#results-1 .spn-pick").nth(0).click()
    page.wait_for_selector(".spn-trail li:nth-child(2)")
    assert not page.problems and not page.outside
    page.context.close()


def test_an_index_that_is_removed(browser: Any, pair: Server) -> None:
    """While the page is open: a message; the page goes on, and finds the index when it is back."""
    page = open_page(browser.new_context(), pair.url)
    moved, elsewhere = pair.folder / "shop.index", pair.folder / "elsewhere"
    moved.rename(elsewhere)
    type_text(page, "a shoe")
    page.wait_for_selector(f"{NOTICE} >> text=has been removed")
    page.locator(".spn-pick").nth(0).click()
    page.wait_for_selector(f"{NOTICE} >> text=has been removed")
    assert httpx.post(f"{pair.url}/search", data={"text": "a shoe"}).status_code == 503
    assert httpx.post(f"{pair.url}/search", data={"text": "a shoe", "index": 1}).status_code == 200
    elsewhere.rename(moved)
    type_text(page, "a shoe again")
    page.wait_for_selector(SCORE)
    page.context.close()


def test_sixteen_clients(server: Server) -> None:
    """Are answered without an error, each with its own results."""
    texts = [f"shoe {n}" for n in range(16)]

    def ask(text: str) -> Any:
        with httpx.Client(timeout=60) as client:
            told = [client.post(f"{server.url}/search", data={"text": text}, files={"image": png()}) for _ in range(4)]
        return [(one.status_code, [hit["id"] for hit in one.json()["hits"]]) for one in told]

    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(ask, texts))
    for text, answers in zip(texts, told, strict=True):
        alone = httpx.post(f"{server.url}/search", data={"text": text}, files={"image": png()}).json()
        assert answers == [(200, [hit["id"] for hit in alone["hits"]])] * 4


@pytest.mark.parametrize("path", [
    "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/static/../../etc/passwd",
    "/assets/..%2f..%2f..%2fetc%2fpasswd", "/gradio_api/proxy=http://127.0.0.1", "/gradio_api/run-history/buckets",
    "/image/..%2Fshop%2Ftable.csv", "/monitoring", "/gradio_api/api/follow", "/gradio_api/upload",
])  # fmt: skip
def test_what_is_not_served(server: Server, path: str) -> None:
    """No file of this machine, nothing of Gradio that the page does not need."""
    for method in ("GET", "POST"):
        request = httpx.Request(method, server.url)
        raw = request.url.copy_with(raw_path=path.encode())
        with httpx.Client() as client:
            told = client.send(httpx.Request(method, raw))
        assert told.status_code in (403, 404, 405) and b"root:" not in told.content, told.text
        assert "/gradio_api/" in path or list(told.json()) == ["message"], told.text


def test_limits_of_the_process(server: Server) -> None:
    """Bytes, pixels, and the name by which it is asked; every picture of the index by its id."""

    def body() -> Iterator[bytes]:
        for _ in range(40):
            yield b"\0" * 100_000

    told = httpx.post(f"{server.url}/upload", content=body())
    assert told.status_code == 413 and told.json() == {"message": "the upload is too large: at most 1 MB"}
    told = httpx.post(f"{server.url}/search", files={"image": huge_png()})
    assert told.status_code == 413 and "100.0 megapixels" in told.json()["message"]
    told = httpx.get(server.url, headers={"host": "elsewhere.example"})
    assert told.status_code == 400 and "unknown host name" in told.json()["message"]
    told = httpx.get(f"{server.url}/search")
    assert told.status_code == 405 and told.json() == {"message": "/search takes POST, not GET"}
    for name in NAMES:
        assert httpx.get(f"{server.url}/image/{quote(name, safe='')}").status_code == 200, name


@pytest.mark.parametrize(("options", "words"), [
    (("--index", "nowhere"), "nowhere holds no index"),
    (("--index", "a", "b", "c"), "--index takes one or two, got 3"),
    (("--index", "a", "--model", "embedded"), "exclude each other"),
    (("--model", "nowhere"), "model nowhere is missing"),
    (("--port", "99999"), "--port must be from 0 to 65535"),
    (("--host", "192.0.2.1"), "--host 192.0.2.1 --port 7860: "),
    (("--max-upload-mb", "0"), "--max-upload-mb must be above 0"),
    (("--batch-size", "0"), "--batch-size must be above 0"),
])  # fmt: skip
def test_bad_options(
    options: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One line each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["spn4cir-demo", *(options if "--port" in str(options) else (*options, "--port=0"))]
    )
    if "--host" in options:
        sys.argv.remove("--port=0")
    with pytest.raises(SystemExit) as stopped:
        demo_command()
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and words in told and told.startswith("error: ") and told.count("\n") == 1
