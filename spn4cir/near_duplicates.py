"""The same picture at another size or quality: found by small versions of pictures, which such copies share."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

GRID = 8
TOLERANCE = (2, 3)
"""Levels of brightness, and of colour, that small versions of one picture may differ by. Chosen on the embedded emoji,
of which the two equal flags of Norway and Bouvet Island alone are merged; JPEG blurs colour more than brightness."""
CONTRAST = 16  # a small version of a smaller range shows too little to compare
SHAPES = 0.03  # relative difference of width to height that rounding of sizes makes
STEP = 16  # width of a cell of the search grid, in levels

Levels = np.ndarray[Any, Any]


def small_version(picture: Image.Image) -> str:
    """Return brightness and two colours (YCbCr) of a picture at 8 × 8 pixels, in hexadecimal; empty without contrast.

    The picture is resized by a triangle filter, so that a cell is a mean over many pixels of a large picture.
    """
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    small = rgb.resize((GRID, GRID), Image.Resampling.BILINEAR).convert("YCbCr")
    levels = np.asarray(small).transpose(2, 0, 1)  # (3, 8, 8)
    contrast = int((levels.max((1, 2)) - levels.min((1, 2))).max())
    return levels.tobytes().hex() if contrast >= CONTRAST else ""


def near_duplicate_ids(seen: Mapping[str, tuple[str, tuple[int, int]]]) -> dict[str, str]:
    """Image id → the first id of which it is a near-duplicate, in order; an image without any stands for itself.

    Each image is compared with the first of each class, so a class does not drift along a chain of similar images.
    Images are looked up by the means of their quarters: time is linear in the number of images unless many are alike.

    Args:
        seen: image id → what ``small_version`` gives, and width and height; an empty one resembles nothing.
    """
    leaders: list[str] = []
    vectors: Levels = np.empty((16, 3, GRID * GRID), np.int16)  # (C, 3, 64)
    shapes: Levels = np.empty(16)  # (C,)
    cells: dict[tuple[int, ...], list[int]] = {}
    found: dict[str, str] = {}
    for image_id, (small, (width, height)) in seen.items():
        found[image_id] = image_id
        if not small:
            continue
        levels = np.frombuffer(bytes.fromhex(small), np.uint8).astype(np.int16).reshape(3, GRID * GRID)
        shape, means = np.log(width / height), _means(levels)
        keys = product(*({int((m - t) // STEP), int((m + t) // STEP)} for m, t in means))
        near = [n for key in keys for n in cells.get(key, ())]
        difference = np.abs(vectors[near] - levels).max(-1, initial=0)  # (n, 3)
        is_same = (difference[:, 0] <= TOLERANCE[0]) & (difference[:, 1:].max(-1, initial=0) <= TOLERANCE[1])
        same = np.flatnonzero(is_same & (np.abs(shapes[near] - shape) <= SHAPES))
        if len(same):
            found[image_id] = leaders[min(near[n] for n in same)]
            continue
        if len(leaders) == len(vectors):
            vectors, shapes = np.concatenate([vectors, vectors]), np.concatenate([shapes, shapes])
        vectors[len(leaders)], shapes[len(leaders)] = levels, shape
        cells.setdefault(tuple(int(m // STEP) for m, _ in means), []).append(len(leaders))
        leaders.append(image_id)
    return found


def _means(levels: Levels) -> list[tuple[float, int]]:
    """Brightness of the four quarters and the two colours of a small version, each with its tolerance."""
    half = GRID // 2
    quarters = levels[0].reshape(2, half, 2, half).mean((1, 3)).ravel()  # (4,)
    return [*((float(m), TOLERANCE[0]) for m in quarters), *((float(m), TOLERANCE[1]) for m in levels[1:].mean(1))]
