"""Twenty triplets to look at: as a picture, and as a page with the summary on top."""

import html
import random
from typing import Any

from PIL import Image, ImageDraw

from data_gen.draw import (
    GREY,
    LINE,
    Pictures,
    image_tag,
    line_height,
    page,
    paste_centred,
    save_png,
    table,
    wrap,
    write_lines,
)
from data_gen.files import Row, digest, is_done, mark_done, stream_jsonl
from data_gen.processes import Processes
from data_gen.report import facts, read_summary
from data_gen.settings import GenerateConfig
from spn4cir.files import write_text as write_file
from spn4cir.types import Dataset

COUNT, SIDE, MIDDLE, GAP = 20, 160, 250, 14
TEXT, SMALL = 18, 13
WIDTH = 2 * SIDE + MIDDLE + 4 * GAP  # of a cell


def write_sheet(config: GenerateConfig, dataset: Dataset) -> None:
    """Write sheet.png and sheet.html: triplets drawn by seed from all. A picture that cannot be shown is said to be."""
    processes, out = Processes(), config.file("sheet.html")
    made_by = digest({"step": "sheet", "seed": config.seed}, config.file("triplets.done.json"))
    done = is_done(out, made_by) and config.file("sheet.png").is_file()
    processes.wait()
    if processes.first and not done:
        out.with_suffix(".done.json").unlink(missing_ok=True)
        summary, pictures = read_summary(config), Pictures(dataset, SIDE)
        rows = sample(config, summary["counts"]["triplets"])
        shown = [(row, pictures(row["reference"]), pictures(row["target"])) for row in rows]
        total = summary["counts"]["triplets"]
        title = f"{len(rows)} of {total:,} triplets of {dataset.name}"
        save_png(config.file("sheet.png"), draw_sheet(title, shown))
        write_file(out, page(title, _summary(summary) + _cards(shown)))
        mark_done(out, made_by, triplets=[[row["reference"], row["target"]] for row in rows])
        pictures.tell("sheet")
    processes.wait()


def sample(config: GenerateConfig, total: int) -> list[Row]:
    """Triplets drawn by seed, in file order."""
    chosen = set(random.Random(f"{config.seed}/sheet").sample(range(total), min(COUNT, total)))
    rows = stream_jsonl(config.file("triplets.jsonl"))
    return [row for number, row in enumerate(rows) if number in chosen]


def about(row: Row) -> str:
    """Where a triplet's text and partner come from, in a few words."""
    told = [row["template"] + (f" instead of {row['shortened']}, which was too long" if "shortened" in row else "")]
    if "llm_caption" in row:
        told.append("rewritten")
    if row["rank"] is not None:
        told.append(f"rank {row['rank']}")
    if row["similarity"] is not None:
        told.append(f"similarity {row['similarity']:.2f}")
    return " · ".join(told)


def draw_sheet(title: str, shown: list[tuple[Row, Image.Image, Image.Image]]) -> Image.Image:
    """Two columns of triplets: reference, text, target, and the captions of both pictures below them."""
    cells = [_cell(*one) for one in shown]
    lines = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    top = 3 * GAP + line_height(24)
    height = top + sum(max(cell.height for cell in line) + GAP for line in lines) + GAP
    canvas = Image.new("RGB", (2 * WIDTH + 3 * GAP, height), "white")
    write_lines(canvas, (GAP, GAP), [title], 24)
    y = top
    for line in lines:
        for column, cell in enumerate(line):
            canvas.paste(cell, (GAP + column * (WIDTH + GAP), y))
        tall = max(cell.height for cell in line)
        y += tall + GAP
        ImageDraw.Draw(canvas).line((GAP, y - GAP // 2, canvas.width - GAP, y - GAP // 2), fill=LINE)
    return canvas


def _cell(row: Row, reference: Image.Image, target: Image.Image) -> Image.Image:
    captions = [wrap(text, SMALL, SIDE, most=5) for text in row["captions"]]
    text, told = wrap(row["modification"], TEXT, MIDDLE), wrap(about(row), SMALL, MIDDLE)
    height = SIDE + 4 + max(map(len, captions)) * line_height(SMALL)
    middle = len(text) * line_height(TEXT) + 6 + len(told) * line_height(SMALL)
    canvas = Image.new("RGB", (WIDTH, max(height, middle)), "white")
    for picture, lines, x in zip((reference, target), captions, (0, SIDE + MIDDLE + 2 * GAP), strict=True):
        paste_centred(canvas, picture, (x, 0), SIDE)
        write_lines(canvas, (x, SIDE + 4), lines, SMALL, GREY)
    y = write_lines(canvas, (SIDE + GAP, max(0, (SIDE - middle) // 2)), text, TEXT)
    write_lines(canvas, (SIDE + GAP, y + 6), told, SMALL, GREY)
    return canvas


def _summary(summary: dict[str, Any]) -> str:
    tables = table("Counts", facts(summary))
    tables += table(
        "Dropped", [(reason, f"{count:,}") for reason, count in summary["dropped"].items()] or [("none", 0)]
    )
    tables += table("Templates", [(name, f"{count:,}") for name, count in summary["templates"].items()])
    settings = table("", [(name, value) for name, value in summary["settings"].items() if value is not None])
    return f'<div class="tables">{tables}</div><details><summary>Settings</summary>{settings}</details>\n'


def _cards(shown: list[tuple[Row, Image.Image, Image.Image]]) -> str:
    cards = []
    for row, *pictures in shown:
        names, captions = (row["reference"], row["target"]), row["captions"]
        sides = [
            f"<div>{image_tag(picture, name)}<small>{html.escape(caption)}</small></div>"
            for picture, name, caption in zip(pictures, names, captions, strict=True)
        ]
        text = f'<div class="text">{html.escape(row["modification"])}<small>{html.escape(about(row))}</small></div>'
        cards.append(f'<div class="card">{sides[0]}{text}{sides[1]}</div>')
    return '<div class="grid">\n' + "\n".join(cards) + "\n</div>"
