"""Make triplets from images alone: deduplicate, match pairs, caption, write the text; what is done is skipped.

Pairs come before captions, so that only images that occur in a pair are captioned. A run that was killed goes on with
the same command; several processes share the work.

examples:
  python data_gen/make_triplets.py --dataset emoji
  python data_gen/make_triplets.py --dataset fashioniq --backbone tgcir --endpoint http://127.0.0.1:8000/v1
  python data_gen/make_triplets.py --dataset catalogue --data-root my/pictures --captions my/captions.jsonl
  python data_gen/make_triplets.py --dataset emoji --templates '[instead, unlike]' --output data/emoji/other
  torchrun --nproc_per_node 4 data_gen/make_triplets.py --dataset cirr
"""

import html
import random
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from PIL import Image, ImageDraw

from spn4cir.config import recipes_folder, training_command
from spn4cir.data_gen import draw
from spn4cir.data_gen.caption import caption_images, check_captioner
from spn4cir.data_gen.deduplicate import deduplicate
from spn4cir.data_gen.match_pairs import match_pairs
from spn4cir.data_gen.steps import GenerateConfig, digest, first_process, is_done, mark_done, run_step
from spn4cir.data_gen.texts import Rewriter, TokenCounter
from spn4cir.data_gen.write_text import describe_drops, list_texts, write_triplets
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import Row, read_json, stream_jsonl, write_text

MANY = 0.75  # of the pairs
COUNT, SIDE, MIDDLE, GAP, PAD = 20, 160, 250, 14, 10  # of the sheet
TEXT, SMALL = 18, 13  # sizes of its font
CELL = 2 * (SIDE + GAP + PAD) + MIDDLE  # width of a triplet
FEW = 256  # triplets that do not fill two of the usual batches


def make_triplets(config: GenerateConfig, dataset: Dataset) -> None:
    """All four steps, pictures to look at, and a summary."""
    check_settings(config, dataset)
    deduplicate(config, dataset)
    check_captioner(config, dataset)  # now it is known which images are broken, and which are equal
    for step in (match_pairs, caption_images, write_triplets, draw.write_window, write_sheet):
        step(config, dataset)
    if Processes().first:
        print_summary(config, dataset)
        print(f"\nnext: {suggest_training(config, dataset)}")


@first_process
def write_sheet(config: GenerateConfig, dataset: Dataset) -> None:
    """Write sheet.png and sheet.html: triplets drawn by seed from all. Names pictures that cannot be shown."""
    out, picture = config.file("sheet.html"), config.file("sheet.png")
    made_by = digest({"step": "sheet", "seed": config.seed}, config.file("triplets.done.json"))
    if is_done(out, made_by):
        return
    summary, pictures = read_summary(config), draw.Thumbnails(dataset, SIDE)
    total = summary["counts"]["triplets"]
    shown = [pictures.show(row) for row in sample_triplets(config, total)]
    title = f"{len(shown)} of {total:,} triplets of {dataset.name}"
    draw.save_png(picture, draw_sheet(title, shown))
    write_text(out, draw.html_page(title, _summary(summary) + _cards(shown)))
    mark_done(out, made_by, picture, triplets=[[row["reference"], row["target"]] for row, _, _ in shown])
    pictures.report_problems("sheet")


def sample_triplets(config: GenerateConfig, total: int) -> list[Row]:
    """Return triplets drawn by seed, in file order."""
    chosen = set(random.Random(f"{config.seed}/sheet").sample(range(total), min(COUNT, total)))
    rows = stream_jsonl(config.file("triplets.jsonl"))
    return [row for number, row in enumerate(rows) if number in chosen]


def shown_text(row: Row) -> str:
    """The text of a triplet, or all of them on one line."""
    return " / ".join(part["modification"] for part in list_texts(row))


def describe_origin(row: Row) -> str:
    """Say where a triplet's text and partner come from, in a few words."""
    long = " instead of {shortened}, which was too long"
    names = [part["template"] + (long.format(**part) if "shortened" in part else "") for part in list_texts(row)]
    told = [" or ".join(names)]
    told += ["rewritten"] if any("llm_caption" in part for part in list_texts(row)) else []
    told += [f"rank {row['rank']}"] if row["rank"] is not None else []
    told += [f"similarity {row['similarity']:.2f}"] if row["similarity"] is not None else []
    return " · ".join(told)


def draw_sheet(title: str, shown: Sequence[draw.Shown]) -> Image.Image:
    """Draw triplets in two columns: reference, text, target, and the captions below the pictures."""
    cells = [_cell(*one) for one in shown]
    top = 2 * GAP + draw.line_height(24)
    lines = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    tall = [max(cell.height for cell in line) for line in lines]
    canvas = Image.new("RGB", (2 * CELL + 3 * GAP, top + sum(tall) + GAP * (len(tall) + 1)), "white")
    x = GAP + round(draw.font(24).getlength(title)) + 2 * GAP
    draw.write_lines(canvas, (GAP, GAP), [title], 24)
    if any(not draw.has_letters(text) for row, _, _ in shown for text in (shown_text(row), *row["captions"])):
        lacking = "Boxes are letters that the font of this picture lacks: see sheet.html"
        draw.write_lines(canvas, (x, GAP + 10), [lacking], SMALL, draw.GREY)
    y = top
    for line, height in zip(lines, tall, strict=True):
        for column, cell in enumerate(line):
            x = GAP + column * (CELL + GAP)
            canvas.paste(cell, (x, y))
            ImageDraw.Draw(canvas).rectangle((x, y, x + CELL - 1, y + height - 1), outline=draw.LINE)
        y += height + GAP
    return canvas


def _cell(row: Row, reference: Image.Image, target: Image.Image) -> Image.Image:
    captions = [draw.wrap(text, SMALL, SIDE, most=5) for text in row["captions"]]
    text, told = draw.wrap(shown_text(row), TEXT, MIDDLE), draw.wrap(describe_origin(row), SMALL, MIDDLE)
    height = SIDE + 4 + max(map(len, captions)) * draw.line_height(SMALL)
    middle = len(text) * draw.line_height(TEXT) + 6 + len(told) * draw.line_height(SMALL)
    canvas = Image.new("RGB", (CELL, max(height, middle) + 2 * PAD), "white")
    for picture, lines, x in zip((reference, target), captions, (PAD, CELL - PAD - SIDE), strict=True):
        draw.paste_centred(canvas, picture, (x, PAD), SIDE)
        draw.write_lines(canvas, (x, PAD + SIDE + 4), lines, SMALL, draw.GREY)
    y = draw.write_lines(canvas, (PAD + SIDE + GAP, PAD + max(0, (SIDE - middle) // 2)), text, TEXT)
    draw.write_lines(canvas, (PAD + SIDE + GAP, y + 6), told, SMALL, draw.GREY)
    return canvas


def _summary(summary: Mapping[str, Any]) -> str:
    dropped, templates = ([(name, f"{n:,}") for name, n in summary[part].items()] for part in ("dropped", "templates"))
    tables = draw.html_table("Counts", list_facts(summary)) + draw.html_table("Dropped", dropped or [("none", "0")])
    tables += draw.html_table("Templates", templates)
    settings = draw.html_table("", [(name, value) for name, value in summary["settings"].items() if value is not None])
    return f'<div class="tables">{tables}</div><details><summary>Settings</summary>{settings}</details>\n'


def _cards(shown: Sequence[draw.Shown]) -> str:
    cards = []
    for row, reference, target in shown:
        captions = [f"<small>{html.escape(caption)}</small>" for caption in row["captions"]]
        left = f"<div>{draw.image_tag(reference, row['reference'])}{captions[0]}</div>"
        right = f"<div>{draw.image_tag(target, row['target'])}{captions[1]}</div>"
        origin = f"<small>{html.escape(describe_origin(row))}</small>"
        text = f'<div class="text">{html.escape(shown_text(row))}{origin}</div>'
        cards.append(f'<div class="card">{left}{text}{right}</div>')
    return '<div class="grid">\n' + "\n".join(cards) + "\n</div>"


def check_settings(config: GenerateConfig, dataset: Dataset) -> None:
    """Raise ``InputError`` at once for what would stop a late step, unless that is done already."""
    recipes = recipes_folder()
    if config.recipe and not (recipes / config.recipe).is_file():
        raise InputError(f"recipe {config.recipe} is not in {recipes}")
    check_captioner(config, dataset)
    if not config.file("triplets.done.json").is_file():
        TokenCounter(config.tokenizer)
        if rewriter := Rewriter.of(config):
            rewriter.engine.look()


def read_summary(config: GenerateConfig) -> Any:
    """Read what ``write_summary`` wrote. Raises ``InputError`` if it is missing or damaged."""
    return read_json(config.file("summary.json"), "python data_gen/write_text.py")


def list_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Counts and means of a summary, as names and values to show to people."""
    counted = [(name.replace("_", " "), value) for name, value in summary["counts"].items() if value is not None]
    means = [("words of a text, on average", summary["mean_words"]), ("tokens", summary["mean_tokens"])]
    return [(name, f"{value:,}") for name, value in [*counted, *means]]


def print_summary(config: GenerateConfig, dataset: Dataset) -> None:
    """Print the counts, the drop reasons, eight examples, and where the pictures are."""
    summary = read_summary(config)
    print("\nsummary: " + ", ".join(f"{name} {value}" for name, value in list_facts(summary)))
    print(f"dropped: {describe_drops(summary['dropped']) or 'none'}")
    if summary["dropped"].get("difference has nothing to say", 0) > MANY * summary["counts"]["pairs"]:
        print("most pairs of captions share no word, so no change can be named: try --templates '[instead]'")
    print("\nfor example:")
    step = max(1, summary["counts"]["triplets"] // 8)
    for row in islice(stream_jsonl(config.file("triplets.jsonl")), 0, 8 * step, step):
        print(f"  {row['captions'][0]}  +  «{shown_text(row)}»  →  {row['captions'][1]}")
    files = [config.file(name) for name in ("triplets.json", "triplets.parquet", "sheet.html", "sheet.png")]
    print(f"\n{dataset.name}: " + ", ".join(str(path) for path in files if path.is_file()))


def suggest_training(config: GenerateConfig, dataset: Dataset) -> str:
    """What to type to train on them: the preset's recipe, or the dataset's for generated triplets, or stage 1."""
    usual = f"{config.dataset}/{config.backbone}_stage2_generated.yaml"
    recipe = config.recipe or (usual if (recipes_folder() / usual).is_file() else None)
    stage = 2 if recipe and "_stage2" in recipe else 1
    means = ["--config", f"recipes/{recipe}"]
    if not recipe:
        is_known = (recipes_folder() / config.dataset / f"{config.backbone}_stage1.yaml").is_file()
        named = ["--dataset", config.dataset, "--backbone", config.backbone]
        means = named if is_known else ["--config", "FILE", *named]  # there is no recipe: settings of one's own
    words = [*training_command(stage).split(), *means]
    if config.data_root and (recipe is None or recipe.startswith(f"{config.dataset}/")):
        words += ["--data-root", config.data_root]  # another dataset's recipe has its own
    words += ["--generated", str(config.file("triplets.json"))]
    triplets = read_summary(config)["counts"]["triplets"]
    if triplets < FEW and not dataset.has_triplets:
        words += ["--batch-size", str(max(2, triplets // 4))]  # the usual one would not be filled
    return shlex.join(words)


main = partial(run_step, make_triplets, __doc__)  # the command spn4cir-triplets

if __name__ == "__main__":
    main()
