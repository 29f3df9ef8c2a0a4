"""Picture sheets of triplets and of a window: readable, whole, and never in the way."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_picture, stand_in
from PIL import Image

from spn4cir.data_gen.draw import compute_shares, draw_chart, font, has_letters, sample_pairs, wrap, write_window
from spn4cir.data_gen.make_triplets import sample_triplets, write_sheet
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.data_gen.write_text import write_triplets
from spn4cir.dataset import Dataset
from spn4cir.files import write_jsonl
from spn4cir.types import ImageRef


@pytest.fixture
def pictures(tmp_path: Path) -> Dataset:
    """Thirty pictures of several shapes, one transparent."""
    folder = tmp_path / "pictures"
    for n in range(30):
        draw_picture(folder / f"i{n}.png", n, size=[(40, 40), (300, 2), (3, 200), (90, 60)][n % 4])
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "i4.png")
    return stand_in(lambda i: ImageRef(folder / f"{i}.png"))


def written(
    folder: Path, pictures: Dataset, pairs: int = 40, captions: str = "a {n}", **settings: Any
) -> GenerateConfig:
    """A folder with triplets."""
    config = GenerateConfig(output=str(folder), templates=["target"], **settings)
    rows = [{"image_id": f"i{n}", "caption": captions.replace("{n}", str(n)), "model": "m"} for n in range(30)]
    write_jsonl(config.file("captions.jsonl"), rows)
    named = [{"reference": f"i{n % 30}", "target": f"i{(n + 7) % 30}"} for n in range(pairs)]
    shown = [{**row, "rank": 1 + n % 20, "similarity": round(0.9 - 0.02 * (n % 20), 4)} for n, row in enumerate(named)]
    write_jsonl(config.file("pairs.jsonl"), shown)
    write_triplets(config, pictures)
    return config


def test_sheet(tmp_path: Path, pictures: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty triplets with all their pictures, the summary on top; the same again elsewhere; not done twice."""
    configs = [written(tmp_path / name, pictures) for name in "ab"]
    for config in configs:
        write_sheet(config, pictures)
    page, other = (config.file("sheet.html").read_text() for config in configs)
    assert page == other and configs[0].file("sheet.png").read_bytes() == configs[1].file("sheet.png").read_bytes()
    rows = sample_triplets(configs[0], 40)
    assert len(rows) == 20 == page.count('class="card"') and page.count("<img") == 40
    assert all(f'title="{row["reference"]}"' in page and html.escape(row["captions"][0]) in page for row in rows)
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "20 of 40 triplets" in page
    assert "unique images" not in page and "<td>pairs</td><td>40</td>" in page
    with Image.open(configs[0].file("sheet.png")) as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").getdata())) > 50
    before = configs[0].file("sheet.html").stat().st_mtime_ns
    write_sheet(configs[0], pictures)
    assert configs[0].file("sheet.html").stat().st_mtime_ns == before
    drawn = sample_triplets(GenerateConfig(output=configs[0].output, seed=7), 40)
    assert drawn != rows and "cannot be shown" not in capsys.readouterr().out


def test_texts_are_foreign(tmp_path: Path, pictures: Dataset) -> None:
    """What a caption holds is text on the page, never markup, however long, wide or far away."""
    captions = '<script>alert("x")</script> 日本 {n} ' + "w" * 300 + " x" * 200
    config = written(tmp_path / "a", pictures, captions=captions, max_tokens=4000)
    write_sheet(config, pictures)
    page = config.file("sheet.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "日本" in page


def test_a_picture_that_is_lost(tmp_path: Path, pictures: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """The sheet says so in one line and shows the rest; the triplets stay."""
    config = written(tmp_path / "a", pictures, pairs=2)
    Path(str(pictures.image("i7"))).unlink()
    Path(str(pictures.image("i8"))).write_bytes(b"no picture")
    capsys.readouterr()
    write_sheet(config, pictures)
    told = capsys.readouterr().out.strip()
    assert "2 pictures cannot be shown" in told and "i7.png is missing" in told and "\n" not in told
    assert config.file("sheet.html").read_text().count("<img") == 4
    assert len(json.loads(config.file("triplets.json").read_text())) == 2


def test_wrap() -> None:
    """Lines fit, words stay in order, a word that is too wide is broken, and too many lines are cut with a mark."""
    text = "some words and " + "w" * 100 + " end"
    lines = wrap(text, 18, 150, most=100)
    assert all(font(18).getlength(line) <= 150 for line in lines) and len(lines) > 5
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("a b", 18, 150) == ["a b"] and wrap("", 18, 150) == [""]
    short = wrap("word " * 200, 18, 150, most=3)
    assert len(short) == 3 and short[-1].endswith("…") and not lines[-1].endswith("…")


@pytest.mark.parametrize(("text", "known"), [("Größe – “x”…", True), ("日本", False), ("🙂", False)])
def test_letters_of_the_font(text: str, known: bool) -> None:
    """Only what the font lacks is drawn as boxes."""
    assert has_letters(text) == known


@pytest.mark.parametrize("pairs", [1, 2, 7, 40])
def test_window(tmp_path: Path, pictures: Dataset, pairs: int) -> None:
    """Pairs from the lowest to the highest ranks of the window, each once, with rank and similarity."""
    config = written(tmp_path / "a", pictures, pairs=pairs)
    write_window(config, pictures)
    page = config.file("window.html").read_text()
    assert page.count('class="pair"') == min(pairs, 20)
    assert "rank 1 · similarity 0.900" in page and f"{pairs} pairs" in page
    with Image.open(config.file("window.png")) as picture:
        assert picture.width > 800


def test_places_of_a_window(tmp_path: Path, pictures: Dataset) -> None:
    """Ranks go up from place to place, the ends of the window among them; another seed takes other pairs."""
    import numpy as np

    config = written(tmp_path / "a", pictures, pairs=400)
    ranks = np.array([1 + n % 20 for n in range(400)])
    found = {name: [row["rank"] for row in rows] for name, rows in sample_pairs(config, ranks).items()}
    assert list(found.values()) == [
        [1] * 4,
        found["a quarter up"],
        found["the middle"],
        found["three quarters up"],
        [20] * 4,
    ]
    means = [sum(places) / 4 for places in found.values()]
    assert means == sorted(means) and abs(found["the middle"][0] - 10.5) <= 1
    config.seed = 7
    assert sample_pairs(config, ranks) != sample_pairs(GenerateConfig(output=config.output), ranks)


def test_uniform_draws_have_no_window(tmp_path: Path, pictures: Dataset) -> None:
    """There is nothing to show, and what showed another window before goes."""
    config = written(tmp_path / "a", pictures)
    write_window(config, pictures)
    assert config.file("window.png").is_file()
    write_jsonl(config.file("pairs.jsonl"), [{"reference": "i0", "target": "i1", "rank": None, "similarity": None}])
    write_window(config, pictures)
    assert not config.file("window.png").exists() and not config.file("window.html").exists()


def test_histogram(tmp_path: Path, pictures: Dataset) -> None:
    """The window beside all pairs, each as shares of its own total; without the counts of all, the window alone."""
    import numpy as np

    config, similarities = written(tmp_path / "a", pictures), np.array([0.1, 0.1, 0.9])
    alone = compute_shares(config, similarities)
    assert set(alone) == {"edges", "window"} and sum(alone["window"]) == pytest.approx(1)
    known = {"edges": [-1, 0, 1], "all": [30, 10], "window": [0, 3]}
    config.file("window.json").write_text(
        json.dumps({"histogram": known, "images": 30, "ranks": {"": [1, 21]}, "window": [1, 21]})
    )
    shares = compute_shares(config, similarities)
    assert shares == {"edges": [-1, 0, 1], "all": [0.75, 0.25], "window": [0.0, 1.0]}
    assert draw_chart(shares).tobytes() != draw_chart({**shares, "all": [0.25, 0.75]}).tobytes()
    write_window(config, pictures)
    assert "Ranks 1 to 20: 40 pairs of 30 images" in config.file("window.html").read_text()
