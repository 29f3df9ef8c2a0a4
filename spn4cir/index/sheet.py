"""A query and its hits as one picture: the query first, then the hits in rows of five."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
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
OTHER_FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf")
"""Fonts of the system, tried for letters that Pillow's own font lacks."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Tile(NamedTuple):
    """A square of a sheet: a picture, None for a missing one, or a text; with up to three lines below it."""

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
    draw.line((GAP, top - GAP // 2, width - GAP, top - GAP // 2), FRAME)
    for title, tiles, start in (("query", query, 0), (heading, hits, top - GAP // 2)):
        draw.text((GAP, start + GAP), title, SOFT, _font(16))
        for n, tile in enumerate(tiles):
            x, y = GAP + n % COLUMNS * (SIDE + GAP), start + 5 * GAP // 2 + n // COLUMNS * HEIGHT
            sheet.paste(_square(tile), (x, y))
            for number, text in enumerate(tile.caption[:3]):
                font = _font(15, _is_foreign(text))
                line = "".join(_wrap(text, font, SIDE, 1))
                draw.text((x, y + SIDE + 3 + number * LINE), line, SOFT if number else INK, font)
    with replaced(path) as beside:
        sheet.save(beside, FORMATS[path.suffix.lower()])


def _square(tile: Tile) -> Image.Image:
    """The picture or the text of a tile, in a frame."""
    picture, text, paper = None, tile.text, "white"
    if not text and tile.picture is not None:
        with suppress(InputError):
            picture = open_picture(tile.picture)
    if not text and picture is None:
        text, paper = "the picture is missing or does not decode", EMPTY
    square = Image.new("RGB", (SIDE, SIDE), paper)
    if picture is not None:
        scale = (SIDE - 2) / max(picture.size)
        small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    draw, font = ImageDraw.Draw(square), _font(19, _is_foreign(text))
    lines = "\n".join(_wrap(text, font, SIDE - 24, 7))
    draw.multiline_text((SIDE / 2, SIDE / 2), lines, INK, font, "mm", align="center")
    draw.rectangle((0, 0, SIDE - 1, SIDE - 1), outline=tile.frame, width=1 if tile.frame == FRAME else 3)
    return square


@cache
def _font(size: int, foreign: bool = False) -> Font:
    for name in OTHER_FONTS if foreign else ():
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _is_foreign(text: str) -> bool:
    return any(letter > "\u024f" and not "\u2010" <= letter <= "\u2027" for letter in text)


def _wrap(text: str, font: Font, width: int, most: int) -> list[str]:
    """Lines of a width in pixels, broken at spaces if possible; the last ends in … if something is left out."""
    rest, lines = " ".join(text.split())[:300], list[str]()
    while rest and len(lines) < most:
        tail = "…" if len(lines) == most - 1 else ""
        end = len(rest)
        if font.getlength(rest) > width:
            places = range(1, len(rest))
            end = max(1, bisect_right(places, width, key=lambda end: int(font.getlength(rest[:end] + tail))))
            if not tail and " " in rest[1 : end + 1]:
                end = rest.rindex(" ", 1, end + 1)
        lines.append(rest[:end].strip() + (tail if end < len(rest) else ""))
        rest = rest[end:].strip()
    return lines
