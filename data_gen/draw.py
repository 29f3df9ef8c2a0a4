"""Pictures and pages to look at: what they are made of, and those of a window of ranks."""

import html
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spn4cir.data_gen.endpoint import make_data_url
from spn4cir.data_gen.steps import GenerateConfig, first_process
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.files import Row, read_json, replaced, stream_jsonl, write_text

# a triplet or a pair with the thumbnails of its reference and its target
Shown: TypeAlias = "tuple[Row, Image.Image, Image.Image]"
INK, GREY, LINE, BLUE = "#1c1c1c", "#6b6b6b", "#d9d9d9", "#2b6cb0"
PLACES = {"lowest ranks": 0.0, "a quarter up": 0.25, "the middle": 0.5, "three quarters up": 0.75, "highest ranks": 1.0}
EACH, SIDE, GAP, LEFT, PLOT_HEIGHT, BINS = 4, 110, 14, 145, 200, 40
WIDTH = LEFT + EACH * (2 * SIDE + 2 * GAP) + GAP
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; margin: 2em auto; max-width: 1200px; padding: 0 1em }
table { border-collapse: collapse; margin: 0 2em 1em 0 } td { padding: 2px 12px 2px 0; vertical-align: top }
td + td { text-align: right; font-variant-numeric: tabular-nums } .tables { display: flex; flex-wrap: wrap }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(540px, 1fr)); gap: 12px }
.card { display: grid; grid-template-columns: 160px 1fr 160px; gap: 12px; border: 1px solid #d9d9d9; padding: 10px }
.pairs { display: flex; flex-wrap: wrap; gap: 12px } .pair { border: 1px solid #d9d9d9; padding: 8px }
img { max-width: 160px; max-height: 160px } .chart { max-width: 100%; max-height: none }
.text { font-size: 18px; align-self: center; overflow-wrap: anywhere } small { color: #6b6b6b; display: block }
small { overflow-wrap: anywhere } caption { text-align: left; font-weight: 600 } details { margin: 0 0 1em }
"""


@first_process
def write_window(config: GenerateConfig, dataset: Dataset) -> None:
    """Write window.png and window.html about the pairs of a window; of uniform draws there is nothing to show."""
    picture, page = config.file("window.png"), config.file("window.html")
    for path in (picture, page):
        path.unlink(missing_ok=True)  # of a window before this one
    pairs = stream_jsonl(config.file("pairs.jsonl"))
    found = np.array([(row["rank"], row["similarity"]) for row in pairs if row.get("rank")]).reshape(-1, 2)
    ranks, similarities = found[:, 0].astype(np.int64), found[:, 1]
    if len(ranks):
        pictures = Thumbnails(dataset, SIDE)
        rows = {name: [pictures.show(row) for row in few] for name, few in sample_pairs(config, ranks).items()}
        lines = describe_window(config, ranks, similarities)
        chart = draw_chart(compute_shares(config, similarities))
        save_png(picture, _draw_window(lines, chart, rows))
        write_text(page, _window_page(lines, chart, rows))
        pictures.report_problems("window")
        print(f"match: look at the window in {page}")


def sample_pairs(config: GenerateConfig, ranks: Any) -> dict[str, list[Row]]:
    """Pairs whose ranks are nearest to several places of the window, a few of each place, drawn by seed."""
    draw = np.random.default_rng(config.seed).random(len(ranks))  # among equally near ones
    low, high = ranks.min(), ranks.max()
    chosen, taken = dict[str, Any](), np.zeros(len(ranks), dtype=bool)
    for name, place in PLACES.items():
        distance = np.abs(ranks - (low + place * (high - low))) + 1e9 * taken
        nearest = np.lexsort((draw, distance))[: min(EACH, int((~taken).sum()))]
        taken[nearest] = True
        chosen[name] = nearest[np.argsort(ranks[nearest], kind="stable")].tolist()
    ranked = (row for row in stream_jsonl(config.file("pairs.jsonl")) if row.get("rank"))
    rows = {number: row for number, row in enumerate(ranked) if taken[number]}
    return {name: [rows[number] for number in found] for name, found in chosen.items() if found}


def describe_window(config: GenerateConfig, ranks: Any, similarities: Any) -> list[str]:
    """The window in words: ranks, and the similarities of its pairs."""
    known = _window_file(config)
    stated = {tuple(window) for window in known.get("ranks", {}).values() if window}
    first, end = stated.pop() if len(stated) == 1 else (int(ranks.min()), int(ranks.max()) + 1)
    images = f" of {known['images']:,} images" if "images" in known else ""
    low, *quarters, high = (f"{value:.3f}" for value in np.quantile(similarities, [0, 0.25, 0.5, 0.75, 1]))
    told = f"similarity from {low} to {high}, quarters at {', '.join(quarters)}"
    return [f"Ranks {first:,} to {end - 1:,}: {len(ranks):,} pairs{images}", told]


def _window_file(config: GenerateConfig) -> dict[str, Any]:
    path = config.file("window.json")
    return dict(read_json(path)) if path.is_file() else {}


def compute_shares(config: GenerateConfig, similarities: Any) -> dict[str, list[float]]:
    """Return the edges of bins, and the share of the window's pairs, and of all pairs if counted, in each bin."""
    known = _window_file(config).get("histogram")
    if not known:
        counts, edges = np.histogram(similarities, bins=BINS)
        known = {"edges": edges.tolist(), "window": counts.tolist()}
    shares = {name: [n / max(sum(counts), 1) for n in counts] for name, counts in known.items() if name != "edges"}
    return {"edges": known["edges"], **shares}


def draw_chart(shares: dict[str, list[float]]) -> Image.Image:
    """Bars of the window's pairs before those of all pairs, each as shares of its own total."""
    canvas = Image.new("RGB", (WIDTH - 2 * GAP, PLOT_HEIGHT + 60), "white")
    draw, edges, bottom = ImageDraw.Draw(canvas), shares["edges"], 20 + PLOT_HEIGHT
    bars = {name: values for name, values in shares.items() if name != "edges"}
    used = [n for n in range(len(edges) - 1) if any(values[n] for values in bars.values())]
    low, high, top = edges[used[0]], edges[used[-1] + 1], max(map(max, bars.values()))

    def across(value: float) -> int:
        return 20 + round((value - low) / (high - low) * (canvas.width - 40))

    tops = {name: [bottom - round(values[n] / top * PLOT_HEIGHT) for n in used] for name, values in bars.items()}
    sides = [(across(edges[n]), max(across(edges[n]), across(edges[n + 1]) - 1)) for n in used]
    for name, ink in (("all", LINE), ("window", BLUE)):
        for (left, right), y in zip(sides, tops.get(name, ()), strict=False):
            if y < bottom:
                draw.rectangle((left, y, right, bottom), fill=ink)
    for (left, right), y in zip(sides, tops.get("all", ()), strict=False):  # where the window's bars hide them
        draw.line((left, y, right, y), fill=GREY)
    draw.line((20, bottom, canvas.width - 20, bottom), fill=GREY)
    for value in (low + n / 5 * (high - low) for n in range(6)):
        draw.text((across(value), bottom + 4), f"{value:.2f}", fill=GREY, font=font(13), anchor="ma")
    draw.text((canvas.width // 2, bottom + 20), "similarity", fill=GREY, font=font(13), anchor="ma")
    for y, (name, told, ink) in enumerate((("window", "pairs of the window", BLUE), ("all", "all pairs", LINE))):
        if name in shares:
            draw.rectangle((24, 4 + 18 * y, 36, 16 + 18 * y), fill=ink)
            draw.text((42, 2 + 18 * y), f"{told}, as shares of their own", fill=INK, font=font(13))
    return canvas


def _draw_window(told: list[str], chart: Image.Image, rows: Mapping[str, Sequence[Shown]]) -> Image.Image:
    tall, top = SIDE + 34, 90 + chart.height
    canvas = Image.new("RGB", (WIDTH, top + tall * len(rows) + GAP), "white")
    write_lines(canvas, (GAP, GAP), told, 20)
    canvas.paste(chart, (GAP, 78))
    for n, (name, pairs) in enumerate(rows.items()):
        y = top + n * tall
        write_lines(canvas, (GAP, y + SIDE // 2 - 10), [name], 14)
        for column, (row, reference, target) in enumerate(pairs):
            x = LEFT + column * (2 * SIDE + 2 * GAP)
            paste_centred(canvas, reference, (x, y), SIDE)
            paste_centred(canvas, target, (x + SIDE + 4, y), SIDE)
            write_lines(canvas, (x, y + SIDE + 4), [_short(row)], 13, GREY)
    return canvas


def _short(row: Row) -> str:
    return f"rank {row['rank']:,} · similarity {row['similarity']:.3f}"


def _window_page(told: list[str], chart: Image.Image, rows: Mapping[str, Sequence[Shown]]) -> str:
    body = f"<p>{html.escape(told[1])}</p>\n{image_tag(chart, 'distribution of similarities', 'chart')}\n"
    for name, pairs in rows.items():
        cells = [
            f'<div class="pair">{image_tag(one, row["reference"])} {image_tag(other, row["target"])}'
            f"<small>{_short(row)}</small></div>"
            for row, one, other in pairs
        ]
        body += f'<h2>{html.escape(name)}</h2>\n<div class="pairs">{"".join(cells)}</div>\n'
    return html_page(told[0], body)


@lru_cache(16)
def font(size: int) -> Any:
    """The font that comes with Pillow; it knows Latin letters only."""
    return ImageFont.load_default(size)


def has_letters(text: str) -> bool:
    """Whether ``font`` has all letters of a text: those of Europe's Latin alphabets, and common punctuation."""
    return all(letter < "\u0180" or "\u2010" <= letter <= "\u2044" for letter in text)


class Thumbnails:
    """Thumbnails of a dataset's images, ``size`` pixels on the longer side; ``problems`` of those that have none."""

    def __init__(self, dataset: Dataset, size: int):
        self._dataset, self._size = dataset, size
        self.problems: dict[str, str] = {}

    def show(self, row: Row) -> Shown:
        """Return a triplet or a pair with both thumbnails."""
        return row, self._thumbnail(row["reference"]), self._thumbnail(row["target"])

    def _thumbnail(self, image_id: str) -> Image.Image:
        """The image, small, transparent parts white; a grey square if it cannot be shown."""
        from spn4cir.images import open_image

        try:
            picture = open_image(self._dataset.image(image_id))
        except InputError as error:
            self.problems[image_id] = str(error)
            blank = Image.new("RGB", (self._size, self._size), LINE)
            write_lines(blank, (8, 8), ["no picture"], 14, GREY)
            return blank
        width, height = (max(1, round(side * (self._size / max(picture.size)))) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)

    def report_problems(self, sheet: str) -> None:
        """One line if some images cannot be shown."""
        if self.problems:
            first = next(iter(self.problems.values()))
            print(f"{sheet}: {len(self.problems)} pictures cannot be shown, such as: {first}")


def wrap(text: str, size: int, width: int, most: int = 8) -> list[str]:
    """Lines of at most ``width`` pixels, ``most`` of them; words that are wider are broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font(size).getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " …"]


def line_height(size: int) -> int:
    """Pixels from one line to the next."""
    return round(size * 1.35)


def write_lines(canvas: Image.Image, place: tuple[int, int], lines: Sequence[str], size: int, ink: str = INK) -> int:
    """Write lines from a place downwards; returns where the next one would stand."""
    draw, (x, y) = ImageDraw.Draw(canvas), place
    for line in lines:
        draw.text((x, y), line, fill=ink, font=font(size))
        y += line_height(size)
    return y


def paste_centred(canvas: Image.Image, picture: Image.Image, place: tuple[int, int], size: int) -> None:
    """Put a thumbnail into the middle of a square."""
    canvas.paste(picture, (place[0] + (size - picture.width) // 2, place[1] + (size - picture.height) // 2))


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a picture, whole or not at all. Raises ``InputError`` where it cannot be written."""
    with replaced(path) as beside:
        picture.save(beside, "PNG")


def image_tag(picture: Image.Image, title: str, kind: str = "") -> str:
    """An ``img`` that holds its picture."""
    told = html.escape(title)
    return f'<img src="{make_data_url(picture)}" alt="{told}" title="{told}"{kind and f" class={kind}"}>'


def html_table(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    """Two columns of names and values."""
    cells = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def html_page(title: str, body: str) -> str:
    """A whole page around a body."""
    told = html.escape(title)
    head = f'<meta charset="utf-8"><title>{told}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{told}</h1>\n{body}\n</body></html>\n'
