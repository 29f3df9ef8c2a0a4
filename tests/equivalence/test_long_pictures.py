"""Long pictures: the published bits wherever padding is affordable, bounded memory everywhere."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from spn4cir.data_gen.matchers import Matcher
from spn4cir.images import PADDED, RgbLastTransform, Transform, crop_to_middle, pad_and_resize, target_pad

EXTREME = [(1, 60_000), (60_000, 1), (750, 30_000), (30_000, 750)]
ROOM = 400_000  # kilobytes: the picture itself has 66,000, and padded it would have 2,100,000


def striped(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Broad stripes along both sides."""
    y, x = np.ogrid[:height, :width]
    rows, columns = (y // max(1, height // 24) % 2) * 200 + 40, (x // max(1, width // 6) % 2) * 200 + 40
    shape = (height, width)
    channels = [np.broadcast_to(part.astype(np.uint8), shape) for part in (rows, columns)]
    return Image.fromarray(np.stack([*channels, channels[0]], -1)).convert(mode)


def published(picture: Image.Image, size: int) -> Image.Image:
    resized: Image.Image = TF.resize(target_pad(picture), [size], InterpolationMode.BICUBIC)
    return resized


@pytest.mark.parametrize("extent", [(40, 160), (40, 161), (20, 900), (900, 20), (700, 3000), (3000, 700), (1, 300)])
@pytest.mark.parametrize("mode", ["RGB", "P", "1", "RGBA"])
def test_ordinary_pictures_are_padded_first(extent: tuple[int, int], mode: str) -> None:
    """Bit for bit, in every mode."""
    picture = striped(*extent, mode)
    assert pad_and_resize(picture, 64).tobytes() == published(picture, 64).tobytes()
    assert crop_to_middle(picture) is picture or max(extent) > 64 * min(extent)


def test_where_bits_differ() -> None:
    """Only beyond 4 times as long as wide and 67 million padded pixels; and there at the picture's borders alone."""
    last = int((PADDED * 1.25) ** 0.5)
    for long, is_equal in ((last, True), (last + 100, False)):
        for extent in ((1000, long), (long, 1000)):
            picture = striped(*extent)
            found, expected = (np.asarray(make(picture, 64), int) for make in (pad_and_resize, published))
            assert found.shape == expected.shape and np.array_equal(found, expected) == is_equal
            centre = found[:, 30:34] if extent[0] < extent[1] else found[30:34]
            wanted = expected[:, 30:34] if extent[0] < extent[1] else expected[30:34]
            assert np.abs(centre - wanted)[..., 0].mean() < 25  # stripes along the length, shifted by half a pixel
            assert abs(found.mean() - expected.mean()) < 6


@pytest.mark.parametrize("extent", EXTREME)
@pytest.mark.parametrize("pad_ratio", [1.25, None])
def test_memory_is_bounded(extent: tuple[int, int], pad_ratio: float | None) -> None:
    """For backbones that pad, and for those and matchers that crop; what is long is still seen."""
    picture = striped(*extent)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in (Transform, RgbLastTransform):
        pixels = kind(288, pad_ratio)(picture)
        assert pixels.shape == (3, 288, 288) and float(pixels.std()) > 0.02
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < ROOM


def test_matchers_of_other_packages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transform that resizes the shorter side first sees the middle of an endless picture, and others whole."""
    seen = []

    def transform(picture: Image.Image) -> torch.Tensor:
        seen.append(picture.size)
        return TF.to_tensor(picture)

    matcher = Matcher(torch.nn.Linear(1, 1), transform, lambda pixels: pixels, {}, "")
    for extent in (*EXTREME, (40, 30)):
        matcher.transform(striped(*extent))
    assert seen == [(1, 64), (64, 1), (750, 30_000), (30_000, 750), (40, 30)]


def test_the_middle_is_what_a_centre_crop_keeps(tmp_path: Path) -> None:
    """Cropped to the middle, a long picture gives what the whole one gives."""
    picture = striped(8, 1200)
    whole = TF.center_crop(TF.resize(picture, [32], InterpolationMode.BICUBIC), [32, 32])
    found = TF.center_crop(TF.resize(crop_to_middle(picture), [32], InterpolationMode.BICUBIC), [32, 32])
    assert whole.tobytes() == found.tobytes()
