"""Photographs drawn in other styles: a pencil sketch, a painting and a mosaic, by filters of Pillow and numpy alone.

Each function takes an RGB picture and returns one of the same size, which depends on its arguments alone. Lines and
strokes are as wide as a part of the shorter side, so that small and large pictures are drawn alike.
"""

import math
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

FILTERS = f"1/pillow {PIL.__version__}/numpy {np.__version__}"  # raise the number when a picture is drawn otherwise
DIVISOR = 16  # of the published data
COLOURS = 24  # of a painting's palette
LAYERS = ((1 / 20, 0), (1 / 40, 20), (1 / 80, 30))
"""Of a painting: the width of strokes, and the error from 0 to 255 from which on they are painted."""
TINT = 18  # strokes of one colour differ by up to this much
SCALE = 3  # a painting is drawn larger and shrunk, so that its strokes have soft edges


def draw_sketch(photo: Image.Image) -> Image.Image:
    """Draw with a pencil, grey on white: shading by colour dodge, and lines where the brightness changes.

    Colour dodge is grey / (1 - blur(1 - grey)) = grey / blur(grey), which makes flat parts white.
    """
    side = min(photo.size)
    grey = photo.convert("L")
    blurred = grey.filter(ImageFilter.GaussianBlur(max(1.0, side / 24)))
    shading = np.minimum(1, (_values(grey) + 0.1) / (_values(blurred) + 0.1))  # (H, W); 0.1 keeps dark parts calm
    smooth = np.pad(_values(grey.filter(ImageFilter.GaussianBlur(side / 250))), 1, "edge")
    slope = np.hypot(*np.gradient(smooth))[1:-1, 1:-1]  # (H, W)
    steepest = max(0.08, float(np.quantile(slope, 0.98)))
    lines = np.clip((slope / steepest - 0.1) / 0.9, 0, 1)
    return Image.fromarray(np.rint(255 * shading * (1 - 0.85 * lines)).astype(np.uint8))


def draw_art(photo: Image.Image) -> Image.Image:
    """Paint in few, vivid colours: strokes follow the edges, wide ones first, then narrow ones where details are."""
    side = min(photo.size)
    vivid = ImageEnhance.Color(photo.filter(ImageFilter.MedianFilter(3))).enhance(1.6)
    few = vivid.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    smooth = _values(few.convert("L").filter(ImageFilter.GaussianBlur(max(1.0, side / 60))))
    down, right = np.gradient(np.pad(smooth, 1, "edge"))
    angles = (np.arctan2(down, right) + math.pi / 2)[1:-1, 1:-1]  # along the edges
    mean = few.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    canvas = Image.new("RGB", (photo.width * SCALE, photo.height * SCALE), mean)
    colours, random = np.asarray(few, np.int16), np.random.default_rng(0)
    for share, tolerance in LAYERS:
        painted = canvas.resize(photo.size, Image.Resampling.BOX)
        error = np.asarray(ImageChops.difference(painted, few).convert("L").filter(ImageFilter.BoxBlur(1)))
        _paint_strokes(canvas, colours, angles, error >= tolerance, max(2.0, side * share), random)
    return canvas.resize(photo.size, Image.Resampling.BOX)


def _paint_strokes(canvas: Image.Image, colours: Any, angles: Any, wanted: Any, width: float, random: Any) -> None:
    """Paint strokes on a shuffled, uneven grid where they are wanted (H, W): colours (H, W, 3), angles (H, W)."""
    step, draw = 0.6 * width, ImageDraw.Draw(canvas)
    grid = np.stack(np.meshgrid(*(np.arange(0, length, step) for length in wanted.shape), indexing="ij"), -1)
    places = random.permutation(grid.reshape(-1, 2)) + random.uniform(-step / 2, step / 2, (grid.size // 2, 2))
    tints = random.integers(-TINT, TINT + 1, (len(places), 1))
    rows, columns = np.clip(places.T.astype(int), 0, np.array(wanted.shape)[:, None] - 1)
    inks = np.clip(colours[rows, columns] + tints, 0, 255)
    half = 0.7 * width * np.stack([np.sin(angles[rows, columns]), np.cos(angles[rows, columns])], -1)
    ends = SCALE * np.concatenate([(places - half)[:, ::-1], (places + half)[:, ::-1]], 1)  # (N, 4), x before y
    for place, ink in zip(ends[wanted[rows, columns]].tolist(), inks[wanted[rows, columns]].tolist(), strict=True):
        draw.line(place, tuple(ink), round(width * SCALE / 2))


def draw_mosaic(photo: Image.Image, divisor: int = DIVISOR) -> Image.Image:
    """Lower the resolution: the mean of each block, shown as a block.

    Each side is divided by ``divisor``, which is 16 in the published data. Of an emoji 4 × 4 blocks are left.
    """
    blocks = max(1, photo.width // divisor), max(1, photo.height // divisor)
    return photo.resize(blocks, Image.Resampling.BOX).resize(photo.size, Image.Resampling.NEAREST)


def _values(grey: Image.Image) -> Any:
    """(H, W) from 0 to 1."""
    return np.asarray(grey, np.float64) / 255
