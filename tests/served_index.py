"""A small index whose titles and names are as hostile as those of a stranger's data, for tests of the page."""

import csv
import io
from html import escape
from pathlib import Path

from PIL import Image

from spn4cir.index.local import Index
from spn4cir.model import load
from tests.conftest import draw_picture

HOSTILE = (
    '<img src=x onerror="window.hacked=1">',
    '"><script>window.hacked=1</script>',
    "${window.hacked=1}",
    "{{constructor.constructor('window.hacked=1')()}}",
    "`${window.hacked=1}`",
    "' onmouseover='window.hacked=1",
)
NAMES = ("a b#1?.png", "<b>&amp;.png", "50%25.png", "ü.png", 'q"uote.png')
KINDS = ("dress", "shirt", "<i>hat</i>")


def build_shop(folder: Path) -> Path:
    """Build an index of 30 pictures by the embedded model; its folder. Readers of tables drop tags, not entities."""
    names = [*NAMES, *(f"shoes/{n}.png" for n in range(25))]
    for name in names:
        draw_picture(folder / "shop" / name, name)
    with (folder / "shop" / "table.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "title", "category"))
        rows.writerows((name, escape(title_of(n)), KINDS[n % 3]) for n, name in enumerate(names))
    Index.build(load(), folder / "shop" / "table.csv", folder / "shop.index")
    return folder / "shop.index"


def title_of(number: int) -> str:
    """The title of a picture of the shop."""
    return HOSTILE[number] if number < len(HOSTILE) else f"shoe number {number}"


def png(size: tuple[int, int] = (40, 30), colour: str = "red") -> bytes:
    """A picture as a file."""
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def huge_png() -> bytes:
    """A picture of 100 megapixels, in a few kilobytes."""
    data = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(data, "PNG")
    return data.getvalue()
