"""Pixels as a viewer shows them: orientation, depth, colour profiles, light artwork on transparency."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from spn4cir.data_gen.endpoint import make_data_url
from spn4cir.images import RgbLastTransform, Transform, open_image, pixel_hash, to_rgb, view
from spn4cir.model import open_picture
from spn4cir.pixels import BACKGROUND, TURNS, as_viewed, scale_levels
from spn4cir.types import ImageRef

OUTSIDE = Path(__file__).parents[2] / ".." / "shared" / "cases"
CASES = next((place for place in (OUTSIDE, Path(__file__).parents[3] / "shared" / "cases") if place.is_dir()), OUTSIDE)


def drawn(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """A smooth picture of which no turn is like another."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    red, green, blue = 255 * x / width, 255 * y / height, 120 * (x + y < 20) + 60
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8)).convert(mode)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = value
    return exif


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_orientation_is_upright(tmp_path: Path, kind: str, value: int) -> None:
    """The picture that was stored turned is, turned back, the one that was drawn; the shape says so too."""
    upright = drawn()
    back = {6: 8, 8: 6}.get(value, value)  # the turns by a quarter undo each other, all others undo themselves
    stored = upright.transpose(TURNS[back]) if value > 1 else upright
    path, options = tmp_path / f"a.{kind.lower()}", {"quality": 100} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    stored.save(path, kind, exif=orientation(value), **options)
    found = open_image(path)
    assert found.size == (60, 40)
    difference = np.abs(np.asarray(found, int) - np.asarray(upright, int))
    assert difference.mean() <= 3 if kind == "JPEG" else not difference.any()
    with Image.open(path) as opened:
        assert open_picture(opened).tobytes() == found.tobytes()
    assert view(found).tobytes() == found.tobytes()  # nothing is left that would turn it again


def test_a_crop_box_counts_in_the_upright_picture(tmp_path: Path) -> None:
    """Boxes are drawn in what people see."""
    drawn().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=orientation(6))
    assert (
        open_image(ImageRef(tmp_path / "a.png", (10, 5, 50, 35))).tobytes() == drawn().crop((10, 5, 50, 35)).tobytes()
    )


def test_damaged_metadata_is_ignored(tmp_path: Path) -> None:
    """Neither EXIF nor a profile that cannot be read spoils sound pixels."""
    drawn().save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff no tags", icc_profile=b"no profile at all")
    assert open_image(tmp_path / "a.png").tobytes() == drawn().tobytes()


@pytest.mark.parametrize("own_mode", [False, True])
def test_rgb_last_turns_too_but_for_published_images(tmp_path: Path, own_mode: bool) -> None:
    """An imported model on photographs of one's own sees them upright; FashionIQ's and CIRR's pixels do not move."""
    stored = drawn().transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "a.png", exif=orientation(6))
    assert open_image(tmp_path / "a.png", own_mode).tobytes() == drawn().tobytes()
    published = open_image(ImageRef(tmp_path / "a.png", as_published=True), own_mode)
    assert published.size == (40, 60) and published.tobytes() == stored.tobytes()


# --- depth -----------------------------------------------------------------------------------------------------------


def grey(values: np.ndarray, path: Path) -> np.ndarray:
    """What a file of these values shows, as levels (H, W)."""
    Image.fromarray(values).save(path)
    found = np.asarray(open_image(path))
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all()
    return found[..., 0]


RAMP = np.linspace(0, 1, 60 * 40).reshape(40, 60)


@pytest.mark.parametrize(("scaled", "suffix"), [
    ((RAMP * 65535).astype(np.uint16), "png"), ((RAMP * 65535).astype(np.uint16), "tif"),
    ((RAMP * 4095).astype(np.uint16), "png"), ((RAMP * 65535).astype(np.int32), "tif"),
    ((RAMP * (2**24 - 1)).astype(np.int32), "tif"), (RAMP.astype(np.float32), "tif"),
    ((RAMP * 255).astype(np.float32), "tif"), ((RAMP * 1e6 - 4e5).astype(np.float32), "tif"),
    ((RAMP * 5000 - 2500).astype(np.int32), "tif"), ((RAMP * 300).astype(np.float32), "tif"),
])  # fmt: skip
def test_every_depth_shows_the_ramp(tmp_path: Path, scaled: np.ndarray, suffix: str) -> None:
    """12, 16, 24 bits, numbers up to 1, up to 255, and any other: black to white."""
    found = grey(scaled, tmp_path / f"a.{suffix}")
    assert np.abs(found.astype(int) - RAMP * 255).max() <= 1


@pytest.mark.parametrize("values", [
    np.array([[30000, 30001]], np.uint16), np.array([[0.5, 0.5001]], np.float32), np.array([[7e9, 8e9]], np.float32),
    np.array([[-3.0, np.nan]], np.float32), np.array([[np.inf, 0.2, 0.9]], np.float32),
])  # fmt: skip
def test_what_differs_is_not_one_colour(values: np.ndarray) -> None:
    """Values that would fall on one level are stretched; what is no number is black, infinity white."""
    levels = scale_levels(values)
    assert levels.min() < levels.max()


@pytest.mark.parametrize("values", [np.full((2, 2), np.nan, np.float32), np.full((2, 2), 1e9, np.float32)])
def test_one_value_is_one_colour(values: np.ndarray) -> None:
    """Without an error."""
    assert len(np.unique(scale_levels(values))) == 1


def test_small_values_stay_as_they_are(tmp_path: Path) -> None:
    """A 16-bit file that holds 8-bit values shows them."""
    values = np.array([[0, 3, 128, 255]], np.uint16)
    assert grey(values, tmp_path / "a.png").tolist() == values.tolist()


def test_the_smallest_value_may_be_white(tmp_path: Path) -> None:
    """A TIFF says so."""
    values = (RAMP * 65535).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.abs(np.asarray(open_image(tmp_path / "a.tif"), int)[..., 0] - 255 * (1 - RAMP)).max() <= 1


# --- colour profiles -------------------------------------------------------------------------------------------------


def wide_gamut() -> bytes:
    """A display profile that is not sRGB: the same primaries in another order of magnitude of red and green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12], profile[red + 4 : red + 12],
    )  # fmt: skip
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_profile_is_applied(tmp_path: Path, mode: str) -> None:
    """A profile whose red is green swaps the two; transparency and rgb_last alike."""
    picture = Image.new(mode, (8, 8), (200, 20, 30, 255)[: len(mode)])
    picture.save(tmp_path / "a.png", icc_profile=wide_gamut())
    for own_mode in (False, True):
        found = open_image(tmp_path / "a.png", own_mode)
        assert found.mode == (mode if own_mode else "RGB")
        red, green, blue = found.getpixel((3, 3))[:3]
        assert abs(red - 20) <= 3 and abs(green - 200) <= 3 and abs(blue - 30) <= 3
    published = open_image(ImageRef(tmp_path / "a.png", as_published=True))
    assert published.getpixel((3, 3)) == (200, 20, 30)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK"])
def test_a_profile_of_another_colour_space_is_ignored(tmp_path: Path, mode: str) -> None:
    """An RGB profile says nothing of grey or CMYK; a palette's colours are RGB."""
    picture, path = drawn(mode=mode), tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path, icc_profile=wide_gamut())
    assert (open_image(path).tobytes() == picture.convert("RGB").tobytes()) == (mode != "P")


def test_an_srgb_profile_changes_no_pixel(tmp_path: Path) -> None:
    """Whatever it is called: rounding would otherwise move ordinary photographs by a level."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("png", "jpg"):
        drawn().save(tmp_path / f"a.{kind}", icc_profile=profile)
        with Image.open(tmp_path / f"a.{kind}") as opened:
            assert "icc_profile" in opened.info
            assert open_image(tmp_path / f"a.{kind}").tobytes() == opened.convert("RGB").tobytes()


# --- light artwork on transparency -----------------------------------------------------------------------------------


def artwork(level: int, detail: int | None = None, share: float = 0.0) -> Image.Image:
    """A square of a grey level on transparency, of which a share has another level."""
    picture = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    picture.paste((level, level, level, 255), (10, 10, 30, 30))
    if detail is not None:
        count = round(400 * share)
        picture.paste((detail, detail, detail, 255), (10, 10, 10 + min(20, count), 10 + max(1, count // 20)))
    return picture


@pytest.mark.parametrize(("picture", "is_on_grey"), [
    (artwork(255), True), (artwork(230), True), (artwork(224), True), (artwork(220), False), (artwork(0), False),
    (artwork(255, 0, 0.5), False), (artwork(255, 0, 0.1), False), (artwork(255, 0, 0.04), True),
])  # fmt: skip
def test_light_artwork_is_shown_on_grey(tmp_path: Path, picture: Image.Image, is_on_grey: bool) -> None:
    """What white would hide is on grey; all other artwork on white, to the bit; published images always on white."""
    picture.save(tmp_path / "a.png")
    found = open_image(tmp_path / "a.png")
    assert found.getpixel((0, 0)) == (BACKGROUND if is_on_grey else (255, 255, 255))
    published = open_image(ImageRef(tmp_path / "a.png", as_published=True))
    assert published.tobytes() == to_rgb(picture).tobytes()
    assert (found.tobytes() == published.tobytes()) == (not is_on_grey)


def test_nothing_to_see_is_white(tmp_path: Path) -> None:
    """All transparent."""
    Image.new("RGBA", (5, 5), (9, 9, 9, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getcolors() == [(25, (255, 255, 255))]


# --- ordinary pictures do not move -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpg", "png", "grey.jpg", "grey.png", "palette.png", "alpha.png", "cmyk.jpg"])
def test_ordinary_pictures_are_bit_equal(tmp_path: Path, kind: str) -> None:
    """As a viewer shows them and as published are the same bits, in both orders, with and without padding."""
    mode = {"grey": "L", "palette": "P", "alpha": "RGBA", "cmyk": "CMYK"}.get(kind.partition(".")[0], "RGB")
    for size in ((60, 40), (40, 90), (300, 200), (64, 64)):
        drawn(*size, mode=mode).save(tmp_path / f"a.{kind}")
        path = tmp_path / f"a.{kind}"
        for transform in (Transform(32), Transform(32, None), RgbLastTransform(32), RgbLastTransform(32, None)):
            both = [
                transform(open_image(ImageRef(path, as_published=flag), transform.own_mode)) for flag in (True, False)
            ]
            assert torch.equal(*both)
        assert pixel_hash(open_image(path)) == pixel_hash(open_image(ImageRef(path, as_published=True)))


def test_a_captioning_server_gets_the_same_pixels(tmp_path: Path) -> None:
    """Sent as it is shown, with nothing in it that would turn or convert it again."""
    stored = drawn().transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "a.png", exif=orientation(6), icc_profile=wide_gamut())
    content = base64.b64decode(make_data_url(open_image(tmp_path / "a.png")).partition(",")[2])
    sent = Image.open(io.BytesIO(content))
    assert sent.tobytes() == open_image(tmp_path / "a.png").tobytes() and sent.size == (60, 40)
    assert "icc_profile" not in sent.info and not sent.getexif()
    assert as_viewed(sent) is sent


# --- the cases that were reported ------------------------------------------------------------------------------------


@pytest.mark.skipif(not CASES.is_dir(), reason="the reported inputs lie beside the checkout, which is not there")
def test_reported_cases() -> None:
    """Sideways is upright, 16-bit pictures differ, white artwork differs."""
    shown = {path.name: open_image(path) for path in sorted((CASES / "02_exif").iterdir())}
    assert shown["stored_sideways.png"].tobytes() == shown["upright.png"].tobytes()
    for name in ("exif3.jpg", "exif6.jpg", "exif8.jpg"):
        difference = np.asarray(shown[name], int) - np.asarray(shown["exif_upright.jpg"], int)
        assert shown[name].size == (96, 64) and np.abs(difference).mean() < 4
    for case in ("03_grey16", "12_white_on_transparent"):
        found = [open_image(path) for path in sorted((CASES / case).iterdir()) if not path.name.startswith("plain")]
        assert all(low + 40 < high for one in found for low, high in one.getextrema())
    assert len({pixel_hash(one) for one in found}) == 3  # rings, stripes, dots
