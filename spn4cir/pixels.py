"""A decoded picture as a viewer shows it: upright, in sRGB, in 8 bits, light artwork on a background that shows it."""

import importlib
import io
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Orientation in EXIF → what turns the picture upright."""
ORIENTATION, PHOTOMETRIC = 274, 262  # tags of EXIF and TIFF
BITS = (8, 10, 12, 14, 16, 24, 32)
BACKGROUND = (128, 128, 128)
"""What light artwork on transparency is shown on. Middle grey also shows dark details of the artwork."""
LIGHT, DARK_SHARE = 32, 0.05
"""Artwork is light if less than this share of its visible pixels is this many levels below white, shown on white."""
COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # mode → colour space of the profiles that fit it
SAME = 2  # levels that sRGB and a profile may differ by and count as equal
OPENERS = (("pillow_heif", "register_heif_opener"), ("pillow_jxl", ""))
"""Optional packages that teach Pillow a format, and the function to call; importing pillow_jxl is enough."""
NO_PICTURES = frozenset({"EPS", "IPTC", "MPEG"})  # formats that Pillow recognises; it shows none, or runs a program


@cache
def register_openers() -> None:
    """Let Pillow open the formats of the optional packages that are installed."""
    for module, function in OPENERS:
        with suppress(ImportError):
            opener: Any = importlib.import_module(module)
            if function:
                getattr(opener, function)()


@cache
def picture_suffixes() -> frozenset[str]:
    """Return the file name endings, in lower case, of all formats that this Pillow turns into a picture."""
    register_openers()
    known = Image.registered_extensions()  # loads all plugins
    pictures = {name for name, (factory, _) in Image.OPEN.items() if name not in NO_PICTURES and not _is_stub(factory)}
    return frozenset(suffix for suffix, name in known.items() if name in pictures or name == "MPO")  # MPO opens as JPEG


def _is_stub(factory: Any) -> bool:
    """Whether Pillow recognises a format and has no decoder for it."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def as_viewed(picture: Image.Image) -> Image.Image:
    """Return the picture turned upright, in 8 bits a channel and in sRGB; transparency stays.

    A picture that needs none of that is returned as it is. Metadata that cannot be read is ignored, as viewers do.

    Depth: a grey picture of 16 or 32 bits is divided by the largest number of the fewest bits (8, 10, 12, 14, 16, 24 or
    32) that hold its values. Numbers with a fraction are 0 to 1 if all lie there, else 0 to 255 if all lie there. In
    any other case, and where only one level would be left of several values, the smallest value becomes black and the
    largest white. What is no number becomes black.
    """
    picture.load()
    profile, turn = picture.info.get("icc_profile"), TURNS.get(_orientation(picture))
    shown = _in_eight_bits(picture) if picture.mode.startswith(("I", "F")) else picture
    if profile or shown.mode == "LAB":
        shown = _in_srgb(shown, profile)
    return shown if turn is None else shown.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    try:  # after the pixels are loaded: Pillow turns a TIFF itself, and then forgets its orientation
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # foreign metadata: whatever its reader raises, the pixels are sound
        return 1


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of numbers with a fraction → L, or LA where a value is transparent."""
    values = np.asarray(picture)  # (H, W)
    levels = scale_levels(values)
    if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # a TIFF whose smallest value is white
        levels = 255 - levels
    shown = Image.fromarray(levels)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        shown.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return shown


def scale_levels(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return values of any type as levels of 0 to 255 in uint8, by the rule of ``as_viewed``."""
    is_float = values.dtype.kind == "f"
    finite = values[np.isfinite(values)] if is_float else values
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    low, high = float(finite.min()), float(finite.max())
    whites = [1.0, 255.0] if is_float else [2.0**bits - 1 for bits in BITS]
    white = next((white for white in whites if low >= 0 and high <= white), None)
    levels = _stretch(values, *((low, high) if white is None else (0.0, white)))
    return _stretch(values, low, high) if low < high and levels.min() == levels.max() else levels


def _stretch(values: np.ndarray[Any, Any], black: float, white: float) -> np.ndarray[Any, Any]:
    if white == black:
        return np.where(values == black, 128, 0).astype(np.uint8)
    scaled = (values.astype(np.float32) - black) * (255 / (white - black))
    levels: np.ndarray[Any, Any] = np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255)).astype(np.uint8)
    return levels


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert by the profile; the picture itself where that is sRGB, does not fit or cannot be read."""
    has_alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    mode = picture.mode if picture.mode in (*COLOUR_SPACES, "LAB") else "L" if picture.mode == "LA" else "RGB"
    transform = _transform(None if mode == "LAB" else profile, mode)
    if transform is None:
        return picture
    whole = picture.convert("RGBA") if has_alpha else picture
    shown = ImageCms.applyTransform(picture.convert(mode) if picture.mode != mode else picture, transform)
    assert shown is not None  # it is only if it is done in place
    if has_alpha:
        shown.putalpha(whole.getchannel("A"))
    return shown


@lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> Any:
    """The transform from a profile to sRGB for a mode; None where none is needed, or it does not fit."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        if profile and source.profile.xcolor_space.strip() != COLOUR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode in ("L", "RGB"):  # most profiles are sRGB under some name: then no pixel is to change
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3) if mode == "RGB" else steps[None]
        probe = Image.fromarray(colours)
        shown = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
        if np.abs(shown - np.asarray(probe.convert("RGB"))).max() <= SAME:
            return None
    return transform


def flatten_alpha(picture: Image.Image) -> Image.Image:
    """Return the picture as RGB: transparent parts become white, or ``BACKGROUND`` under light artwork."""
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture.convert("RGB")
    whole = picture.convert("RGBA")
    alpha = whole.getchannel("A")
    white = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    if alpha.getextrema()[0] == 255 or not _is_light(white, alpha):
        return white
    return Image.alpha_composite(Image.new("RGBA", whole.size, BACKGROUND), whole).convert("RGB")


def _is_light(white: Image.Image, alpha: Image.Image) -> bool:
    """Whether what is visible of a picture hardly differs from the white that it is shown on."""
    red, green, blue = white.split()
    counts = ImageChops.darker(ImageChops.darker(red, green), blue).histogram(alpha)  # of visible pixels
    return sum(counts) > 0 and sum(counts[: 256 - LIGHT]) < DARK_SHARE * sum(counts)
