"""A query and its hits as one picture: the query first, then the hits in rows of five."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from spn4cir.errors import InputError
from spn4cir.files import replaced
from spn4cir.model import Picture, open_picture

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MOST = 100
"""Hits that a sheet shows."""
COLUMNS, SIDE, GAP, LINE = 5, 216, 20, 20  # pixels
HEIGHT = SIDE + 3 * LINE + GAP  # of a tile and its caption
INK, SOFT, FRAME, EMPTY = "#1a1a1a", "#6b6b6b", "#d0d0d0", "#e4e4e4"


class Tile(NamedTuple):
    """A square of a sheet, with up to three lines below it.

    ``picture`` is what the square shows; None for a missing one. A ``text`` is shown in its place.
    """

    picture: Picture | None
    caption: Sequence[str]
    text: str = ""
    frame: str = FRAME


def check_sheet(path: Path) -> None:
    """Raises ``InputError`` for a file whose suffix is no format of pictures."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--save {path}: the suffix must be one of {', '.join(FORMATS)}")


def write_sheet(path: Path, heading: str, query: Sequence[Tile], hits: Sequence[Tile]) -> None:
    """Draw a sheet, and write it whole or not at all. Raises ``InputError`` if it cannot be written."""
    check_sheet(path)
    query_rows, hit_rows = (-(-len(tiles) // COLUMNS) for tiles in (query, hits))
    width, top = COLUMNS * (SIDE + GAP) + GAP, 3 * GAP + query_rows * HEIGHT
    sheet = Image.new("RGB", (width, top + 2 * GAP + hit_rows * HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), "query", SOFT, _font(16))
    draw.line((GAP, top - GAP // 2, width - GAP, top - GAP // 2), FRAME)
    draw.text((GAP, top + GAP // 2), _wrap(heading, 16, width - 2 * GAP, 1)[0], SOFT, _font(16))
    for tiles, start in ((query, 5 * GAP // 2), (hits, top + 2 * GAP)):
        for n, tile in enumerate(tiles):
            x, y = GAP + n % COLUMNS * (SIDE + GAP), start + n // COLUMNS * HEIGHT
            sheet.paste(_square(tile), (x, y))
            for number, line in enumerate(tile.caption):
                shown = "".join(_wrap(line, 15, SIDE, 1))
                draw.text((x, y + SIDE + 3 + number * LINE), shown, SOFT if number else INK, _font(15))
    with replaced(path) as beside:
        sheet.save(beside, FORMATS[path.suffix.lower()])


def _square(tile: Tile) -> Image.Image:
    """The picture or the text of a tile, in a frame."""
    square, text = Image.new("RGB", (SIDE, SIDE), "white"), tile.text
    if not text:
        try:
            picture = open_picture(tile.picture) if tile.picture is not None else None
        except InputError:
            picture = None
        if picture is None:
            square, text = Image.new("RGB", (SIDE, SIDE), EMPTY), "the picture is missing or does not decode"
        else:
            scale = (SIDE - 2) / max(picture.size)
            small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
            square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    draw = ImageDraw.Draw(square)
    lines = _wrap(text, 19, SIDE - 24, 8)
    draw.multiline_text((SIDE / 2, SIDE / 2), "\n".join(lines), INK, _font(19), "mm", align="center")
    draw.rectangle((0, 0, SIDE - 1, SIDE - 1), outline=tile.frame, width=1 if tile.frame == FRAME else 3)
    return square


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrap(text: str, size: int, width: int, most: int) -> list[str]:
    """Lines of a width in pixels, broken at spaces if possible; the last ends in … if something is left out."""
    font, rest, lines = _font(size), " ".join(text.split())[:500], list[str]()
    while rest and len(lines) < most:
        end, last = len(rest), len(lines) == most - 1
        while end > 1 and font.getlength(rest[:end] + ("…" if last and end < len(rest) else "")) > width:
            end -= 1
        if not last and end < len(rest) and " " in rest[1 : end + 1]:
            end = rest.rindex(" ", 1, end + 1)
        lines.append(rest[:end].strip() + ("…" if last and end < len(rest) else ""))
        rest = rest[end:].strip()
    return lines
