"""What picture sheets are made of: thumbnails, wrapped texts, and pages that need no other file."""

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from spn4cir.errors import InputError
from spn4cir.types import Dataset

INK, GREY, LINE, BLUE = "#1c1c1c", "#6b6b6b", "#d9d9d9", "#2b6cb0"
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


@lru_cache(16)
def font(size: int) -> Any:
    """The font that comes with Pillow; it knows Latin letters only."""
    return ImageFont.load_default(size)


def known_letters(text: str) -> bool:
    """Whether ``font`` has all letters of a text: those of Europe's Latin alphabets, and common punctuation."""
    return all(letter < "\u0180" or "\u2010" <= letter <= "\u2044" for letter in text)


class Pictures:
    """Thumbnails of a dataset's images, and a word about those that cannot be shown.

    Args:
        dataset: says where images lie.
        size: of the longer side.

    Attributes:
        problems: what was wrong with each image that has no thumbnail.
    """

    def __init__(self, dataset: Dataset, size: int):
        self._dataset, self._size = dataset, size
        self.problems: dict[str, str] = {}

    def __call__(self, image_id: str) -> Image.Image:
        """The image, small, transparent parts white; a grey square if it cannot be shown."""
        from spn4cir.images import open_image

        try:
            picture = open_image(self._dataset.path(image_id))
        except InputError as error:
            self.problems[image_id] = str(error)
            blank = Image.new("RGB", (self._size, self._size), LINE)
            write_lines(blank, (8, 8), ["no picture"], 14, GREY)
            return blank
        scale = self._size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)

    def tell(self, sheet: str) -> None:
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
    x, y = place
    canvas.paste(picture, (x + (size - picture.width) // 2, y + (size - picture.height) // 2))


def data_url(picture: Image.Image) -> str:
    """A picture as an address that holds it."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def save_png(path: Path, picture: Image.Image) -> None:
    """All of the file or none. Raises ``InputError`` where it cannot be written."""
    beside = path.with_name(path.name + ".tmp")
    try:
        try:
            picture.save(beside, "PNG")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def image_tag(picture: Image.Image, title: str, kind: str = "") -> str:
    """An ``img`` that holds its picture."""
    told = html.escape(title)
    return f'<img src="{data_url(picture)}" alt="{told}" title="{told}"{kind and f" class={kind}"}>'


def table(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    """Two columns of names and values."""
    cells = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def page(title: str, body: str) -> str:
    """A whole page around a body."""
    told = html.escape(title)
    head = f'<meta charset="utf-8"><title>{told}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{told}</h1>\n{body}\n</body></html>\n'
