"""Twenty triplets to look at: as a picture, and as a page with the summary on top."""

import html
import random
from typing import Any

from PIL import Image, ImageDraw

from spn4cir.data_gen.draw import (
    GREY,
    LINE,
    Pictures,
    font,
    image_tag,
    known_letters,
    line_height,
    page,
    paste_centred,
    save_png,
    table,
    wrap,
    write_lines,
)
from spn4cir.data_gen.files import Row, digest, is_done, mark_done, stream_jsonl
from spn4cir.data_gen.processes import Processes
from spn4cir.data_gen.report import facts, read_summary
from spn4cir.data_gen.settings import GenerateConfig
from spn4cir.files import write_text as write_file
from spn4cir.types import Dataset

COUNT, SIDE, MIDDLE, GAP, PAD = 20, 160, 250, 14, 10
TEXT, SMALL = 18, 13
WIDTH = 2 * (SIDE + GAP + PAD) + MIDDLE  # of a cell


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
    top = 2 * GAP + line_height(24)
    lines = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    tall = [max(cell.height for cell in line) for line in lines]
    canvas = Image.new("RGB", (2 * WIDTH + 3 * GAP, top + sum(tall) + GAP * (len(tall) + 1)), "white")
    x = GAP + round(font(24).getlength(title)) + 2 * GAP
    write_lines(canvas, (GAP, GAP), [title], 24)
    if any(not known_letters(text) for row, _, _ in shown for text in (row["modification"], *row["captions"])):
        write_lines(
            canvas,
            (x, GAP + 10),
            ["Boxes are letters that the font of this picture lacks: see sheet.html"],
            SMALL,
            GREY,
        )
    y = top
    for line, height in zip(lines, tall, strict=True):
        for column, cell in enumerate(line):
            x = GAP + column * (WIDTH + GAP)
            canvas.paste(cell, (x, y))
            ImageDraw.Draw(canvas).rectangle((x, y, x + WIDTH - 1, y + height - 1), outline=LINE)
        y += height + GAP
    return canvas


def _cell(row: Row, reference: Image.Image, target: Image.Image) -> Image.Image:
    captions = [wrap(text, SMALL, SIDE, most=5) for text in row["captions"]]
    text, told = wrap(row["modification"], TEXT, MIDDLE), wrap(about(row), SMALL, MIDDLE)
    height = SIDE + 4 + max(map(len, captions)) * line_height(SMALL)
    middle = len(text) * line_height(TEXT) + 6 + len(told) * line_height(SMALL)
    canvas = Image.new("RGB", (WIDTH, max(height, middle) + 2 * PAD), "white")
    for picture, lines, x in zip((reference, target), captions, (PAD, WIDTH - PAD - SIDE), strict=True):
        paste_centred(canvas, picture, (x, PAD), SIDE)
        write_lines(canvas, (x, PAD + SIDE + 4), lines, SMALL, GREY)
    y = write_lines(canvas, (PAD + SIDE + GAP, PAD + max(0, (SIDE - middle) // 2)), text, TEXT)
    write_lines(canvas, (PAD + SIDE + GAP, y + 6), told, SMALL, GREY)
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
