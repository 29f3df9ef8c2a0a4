"""The window of ranks to look at: how similar its pairs are, beside all others, and what pairs it holds."""

import html
from typing import Any

from PIL import Image, ImageDraw

from spn4cir.data_gen.draw import (
    BLUE,
    GREY,
    INK,
    LINE,
    Pictures,
    font,
    image_tag,
    page,
    paste_centred,
    save_png,
    write_lines,
)
from spn4cir.data_gen.files import Row, stream_jsonl
from spn4cir.data_gen.processes import Processes
from spn4cir.data_gen.settings import GenerateConfig
from spn4cir.files import read_json
from spn4cir.files import write_text as write_file
from spn4cir.types import Dataset

PLACES = {"lowest ranks": 0.0, "a quarter up": 0.25, "the middle": 0.5, "three quarters up": 0.75, "highest ranks": 1.0}
EACH, SIDE, GAP = 4, 110, 14
LEFT, PLOT_HEIGHT = 145, 200
WIDTH = LEFT + EACH * (2 * SIDE + 2 * GAP) + GAP
BINS = 40


def write_window(config: GenerateConfig, dataset: Dataset) -> None:
    """Write window.png and window.html about the pairs of a window; of uniform draws there is nothing to show."""
    processes = Processes()
    if processes.first:
        files = [config.file("window.png"), config.file("window.html")]
        for path in files:
            path.unlink(missing_ok=True)  # of a window before this one
        ranks, similarities = _columns(config)
        if len(ranks):
            pictures = Pictures(dataset, SIDE)
            rows = {
                name: [(row, pictures(row["reference"]), pictures(row["target"])) for row in found]
                for name, found in sample_pairs(config, ranks).items()
            }
            told = describe(config, ranks, similarities)
            chart = draw_chart(histogram(config, similarities))
            save_png(files[0], _sheet(told, chart, rows))
            write_file(files[1], _page(told, chart, rows))
            pictures.tell("window")
            print(f"match: look at the window in {files[1]}")
    processes.wait()


def _columns(config: GenerateConfig) -> tuple[Any, Any]:
    """Ranks and similarities of all pairs that have one, as arrays."""
    import numpy as np

    found = [(row["rank"], row["similarity"]) for row in stream_jsonl(config.file("pairs.jsonl")) if row.get("rank")]
    ranks, similarities = zip(*found, strict=True) if found else ((), ())
    return np.array(ranks, dtype=np.int64), np.array(similarities, dtype=np.float64)


def sample_pairs(config: GenerateConfig, ranks: Any) -> dict[str, list[Row]]:
    """Pairs whose ranks are nearest to several places of the window, a few of each place, drawn by seed."""
    import numpy as np

    draw = np.random.default_rng(config.seed).random(len(ranks))  # among equally near ones
    low, high = ranks.min(), ranks.max()
    chosen, taken = dict[str, Any](), np.zeros(len(ranks), dtype=bool)
    for name, place in PLACES.items():
        distance = np.abs(ranks - (low + place * (high - low))) + 1e9 * taken
        nearest = np.lexsort((draw, distance))[: min(EACH, int((~taken).sum()))]
        taken[nearest] = True
        chosen[name] = nearest[np.argsort(ranks[nearest], kind="stable")].tolist()
    wanted = {number for found in chosen.values() for number in found}
    ranked = (row for row in stream_jsonl(config.file("pairs.jsonl")) if row.get("rank"))
    rows = {number: row for number, row in enumerate(ranked) if number in wanted}
    return {name: [rows[number] for number in found] for name, found in chosen.items() if found}


def describe(config: GenerateConfig, ranks: Any, similarities: Any) -> list[str]:
    """The window in words: ranks, and the similarities of its pairs."""
    import numpy as np

    known = _window_file(config)
    stated = {tuple(window) for window in known.get("ranks", {}).values() if window}
    first, end = stated.pop() if len(stated) == 1 else (int(ranks.min()), int(ranks.max()) + 1)
    images = f" of {known['images']:,} images" if "images" in known else ""
    low, *quarters, high = np.quantile(similarities, [0, 0.25, 0.5, 0.75, 1])
    middle = ", ".join(f"{value:.3f}" for value in quarters)
    return [
        f"Ranks {first:,} to {end - 1:,}: {len(ranks):,} pairs{images}",
        f"similarity from {low:.3f} to {high:.3f}, quarters at {middle}",
    ]


def _window_file(config: GenerateConfig) -> dict[str, Any]:
    path = config.file("window.json")
    return dict(read_json(path)) if path.is_file() else {}


def histogram(config: GenerateConfig, similarities: Any) -> dict[str, list[float]]:
    """Edges, and the share of the window's pairs and of all pairs in each bin; without the latter if nobody counted."""
    import numpy as np

    known = _window_file(config).get("histogram")
    if known:
        return {name: _shares(values) if name != "edges" else values for name, values in known.items()}
    counts, edges = np.histogram(similarities, bins=BINS)
    return {"edges": edges.tolist(), "window": _shares(counts.tolist())}


def _shares(counts: list[float]) -> list[float]:
    return [count / max(sum(counts), 1) for count in counts]


def draw_chart(shares: dict[str, list[float]]) -> Image.Image:
    """Bars of the window's pairs before those of all pairs, each as shares of its own total."""
    canvas = Image.new("RGB", (WIDTH - 2 * GAP, PLOT_HEIGHT + 60), "white")
    draw, edges = ImageDraw.Draw(canvas), shares["edges"]
    used = [n for n in range(len(edges) - 1) if any(shares[name][n] for name in shares if name != "edges")]
    low, high = edges[used[0]], edges[used[-1] + 1]
    top = max(max(values) for name, values in shares.items() if name != "edges")

    def across(value: float) -> int:
        return 20 + round((value - low) / (high - low) * (canvas.width - 40))

    for name, ink in (("all", LINE), ("window", BLUE)):
        for n in used if name in shares else ():
            height = round(shares[name][n] / top * PLOT_HEIGHT)
            left, right = across(edges[n]), across(edges[n + 1]) - 1
            if height:
                draw.rectangle((left, 20 + PLOT_HEIGHT - height, max(left, right), 20 + PLOT_HEIGHT), fill=ink)
    for n in used if "all" in shares else ():  # where the window's bars stand before them
        y = 20 + PLOT_HEIGHT - round(shares["all"][n] / top * PLOT_HEIGHT)
        draw.line((across(edges[n]), y, across(edges[n + 1]) - 1, y), fill=GREY)
    draw.line((20, 20 + PLOT_HEIGHT, canvas.width - 20, 20 + PLOT_HEIGHT), fill=GREY)
    for n in range(6):
        value = low + n / 5 * (high - low)
        draw.text((across(value), 24 + PLOT_HEIGHT), f"{value:.2f}", fill=GREY, font=font(13), anchor="ma")
    draw.text((canvas.width // 2, 40 + PLOT_HEIGHT), "similarity", fill=GREY, font=font(13), anchor="ma")
    for y, (name, told, ink) in enumerate((("window", "pairs of the window", BLUE), ("all", "all pairs", LINE))):
        if name in shares:
            draw.rectangle((24, 4 + 18 * y, 36, 16 + 18 * y), fill=ink)
            draw.text((42, 2 + 18 * y), f"{told}, as shares of their own", fill=INK, font=font(13))
    return canvas


def _sheet(
    told: list[str], chart: Image.Image, rows: dict[str, list[tuple[Row, Image.Image, Image.Image]]]
) -> Image.Image:
    tall, top = SIDE + 34, 90 + chart.height
    canvas = Image.new("RGB", (WIDTH, top + tall * len(rows) + GAP), "white")
    write_lines(canvas, (GAP, GAP), told, 20)
    canvas.paste(chart, (GAP, 78))
    for n, (name, pairs) in enumerate(rows.items()):
        y = top + n * tall
        write_lines(canvas, (GAP, y + SIDE // 2 - 10), [name], 14)
        for column, (row, *pictures) in enumerate(pairs):
            x = LEFT + column * (2 * SIDE + 2 * GAP)
            for k, picture in enumerate(pictures):
                paste_centred(canvas, picture, (x + k * (SIDE + 4), y), SIDE)
            write_lines(canvas, (x, y + SIDE + 4), [_short(row)], 13, GREY)
    return canvas


def _short(row: Row) -> str:
    return f"rank {row['rank']:,} · similarity {row['similarity']:.3f}"


def _page(told: list[str], chart: Image.Image, rows: dict[str, list[tuple[Row, Image.Image, Image.Image]]]) -> str:
    body = f"<p>{html.escape(told[1])}</p>\n{image_tag(chart, 'distribution of similarities', 'chart')}\n"
    for name, pairs in rows.items():
        cells = [
            f'<div class="pair">{image_tag(one, row["reference"])} {image_tag(other, row["target"])}'
            f"<small>{_short(row)}</small></div>"
            for row, one, other in pairs
        ]
        body += f'<h2>{html.escape(name)}</h2>\n<div class="pairs">{"".join(cells)}</div>\n'
    return page(told[0], body)
