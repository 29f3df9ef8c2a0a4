"""From a file to pixels against the published steps: padding by its formula in PIL alone, then torchvision's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from spn4cir.images import MEAN, STD, ImageSource, Transform

SIZES = [  # width and height; the ratio of 1.25 is where padding begins
    (48, 64), (64, 48), (40, 40), (41, 40), (480, 640), (100, 124), (100, 125), (100, 126), (124, 100), (125, 100),
    (126, 100), (79, 99), (100, 200), (200, 100), (101, 203), (203, 101), (333, 250), (1, 1), (1, 9), (9, 1), (1, 30),
    (2, 3), (7, 99), (300, 15), (15, 300), (224, 288), (384, 383),
]  # fmt: skip


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Random pixels in a mode; what is transparent in RGBA hides a colour."""
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "RGBA":
        return Image.fromarray(noise)
    picture = Image.fromarray(noise[:, :, :3])
    return picture.quantize(16) if mode == "P" else picture.convert(mode)


def published(picture: Image.Image, size: int, pad: bool, square: bool = False) -> torch.Tensor:
    """(3, size, size): with m = max(w, h) and s = m / 1.25, borders of trunc((s - w) / 2) and trunc((s - h) / 2)."""
    w, h = picture.size
    longest = max(w, h)
    if pad and (square or longest / min(w, h) >= 1.25):
        s = longest if square else longest / 1.25
        left, top = max(int((s - w) / 2), 0), max(int((s - h) / 2), 0)
        black = Image.new("RGB", (w + 2 * left, h + 2 * top), (0, 0, 0))
        black.paste(picture, (left, top))
        picture = black
    steps = [
        transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    pixels: torch.Tensor = transforms.Compose(steps)(picture)
    return pixels


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [224, 288, 384])
def test_every_size_equals_the_published_steps(size: int, pad: bool) -> None:
    """Bit for bit, upright and lying, around the ratio where padding begins, tiny and very long."""
    transform = Transform(size, 1.25 if pad else None)
    for width, height in SIZES:
        picture = drawn(width, height)
        found = transform(picture)
        assert found.shape == (3, size, size) and found.dtype == torch.float32
        assert torch.equal(found, published(picture, size, pad)), (width, height)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("extent", [(60, 90), (90, 60), (70, 80), (3, 40)])
def test_every_mode_is_made_rgb_first(tmp_path: Path, mode: str, extent: tuple[int, int]) -> None:
    """Grey and palette as their colours, transparent parts as white, before anything is padded or resized."""
    picture = drawn(*extent, mode)
    path = tmp_path / "a.png"
    picture.save(path)
    rgb = picture.convert("RGB")
    if mode == "RGBA":
        alpha = np.asarray(picture)[:, :, 3:].astype(float) / 255
        rgb = Image.fromarray(np.rint(np.asarray(rgb) * alpha + 255 * (1 - alpha)).astype(np.uint8))
    found = ImageSource(lambda _: path, Transform(288))("a")
    atol = 0.05 if mode == "RGBA" else 0  # PIL rounds a blend in integers: one level of 256, more after bicubic
    torch.testing.assert_close(found, published(rgb, 288, pad=True), rtol=0, atol=atol)


def test_palettes_resized_before_rgb_differ(tmp_path: Path) -> None:
    """Negative control: the research code converts last, which resizes a palette without interpolation."""
    picture = drawn(60, 70, "P")
    steps = transforms.Compose([transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC)])
    late = np.asarray(steps(picture).convert("RGB"))
    early = np.asarray(steps(picture.convert("RGB")))
    assert not np.array_equal(late, early)


def test_padding_is_to_a_ratio_not_to_a_square() -> None:
    """Negative controls: square padding, and none, give other pixels for a long image and the same for a square."""
    for square, pad in ((True, True), (False, False)):
        assert not torch.equal(Transform(224)(drawn(100, 200)), published(drawn(100, 200), 224, pad, square))
        assert torch.equal(Transform(224)(drawn(40, 40)), published(drawn(40, 40), 224, pad, square))
    assert not torch.equal(Transform(224)(drawn(100, 124)), published(drawn(100, 124), 224, True, True))
