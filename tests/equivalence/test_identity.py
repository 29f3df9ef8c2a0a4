"""The parallel pass over hashes finds the classes that a comparison of all pairs of pixels finds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spn4cir import identity
from spn4cir.identity import canonical_ids, inspect_images
from spn4cir.images import open_image
from spn4cir.types import ImageRef

LOSSLESS: list[dict[str, object]] = [
    {"format": "PNG", "compress_level": 1},
    {"format": "PNG", "compress_level": 9, "optimize": True},
    {"format": "WEBP", "lossless": True},
    {"format": "BMP"},
    {"format": "TIFF", "compression": "tiff_lzw"},
]
SIZES = [(16, 16), (2, 3), (3, 2), (17, 5), (1, 6), (6, 1)]


def pairwise(paths: dict[str, Path]) -> dict[str, str]:
    """The straightforward way: all images decoded, each compared with the canonical ones so far."""
    pixels = {i: np.asarray(open_image(path)) for i, path in paths.items()}
    found: dict[str, str] = {}
    for i, one in pixels.items():
        equal = (j for j in dict.fromkeys(found.values()) if np.array_equal(pixels[j], one))
        found[i] = next(equal, i)
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """113 files of several formats, modes and sizes: copies, near copies, equal bytes in another shape."""
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    originals: list[Image.Image] = []
    for width, height in SIZES:
        originals += [
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
            Image.new("RGB", (width, height), "white"),  # as bytes, those of one area are equal
            Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA"),
            Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)),
        ]
    originals += [Image.new("RGBA", (16, 16), (9, 9, 9, 0)), Image.new("P", (16, 16))]
    paths: dict[str, Path] = {}
    for n in range(103):
        picture = originals[int(rng.integers(len(originals)))]
        if n % 4 == 0:  # a near copy: one value of one pixel differs by one
            values = np.array(picture.convert("RGB"))
            values[-1, -1, -1] ^= 1
            picture = Image.fromarray(values)
        options = LOSSLESS[n % len(LOSSLESS)]
        if picture.mode != "RGB" and options["format"] != "PNG":
            picture = picture if picture.mode == "RGBA" and options["format"] == "WEBP" else picture.convert("RGB")
        path = paths[f"i{n}"] = folder / f"{n}.{options['format']}"
        picture.save(path, **{"exact": True, **options} if options["format"] == "WEBP" else options)  # type: ignore[arg-type]
    for n in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / f"j{n}.jpg", quality=80)
        paths[f"j{n}"] = folder / f"j{n}.jpg"
        open_image(folder / f"j{n}.jpg").save(folder / f"j{n}.png")  # what a lossy file decodes to
        paths[f"p{n}"] = folder / f"j{n}.png"
    return paths


def classes(paths: dict[str, Path], cache: Path | None = None, workers: int | None = None) -> dict[str, str]:
    found = inspect_images({i: ImageRef(path) for i, path in paths.items()}, cache, workers, show=False)
    assert not any(one.problem for one in found.values())
    return canonical_ids({i: one.pixels for i, one in found.items()})


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("block", [1, 7, 16, 1000])
def test_parallel_is_pairwise(
    mixed: dict[str, Path], monkeypatch: pytest.MonkeyPatch, workers: int, block: int
) -> None:
    """The same classes in the same order, whatever the workers and the (ragged) blocks; there are some of each kind."""
    monkeypatch.setattr(identity, "BLOCK", block)
    expected = pairwise(mixed)
    assert list(classes(mixed, workers=workers).items()) == list(expected.items())
    assert 20 < len(set(expected.values())) < 90
    assert all(expected[f"p{n}"] == f"j{n}" for n in range(5))


def test_cached_is_pairwise(mixed: dict[str, Path], tmp_path: Path) -> None:
    """Also when some images are known from before, in another order, and a line of the cache is torn."""
    cache, expected = tmp_path / "cache.jsonl", pairwise(mixed)
    classes(dict(list(reversed(mixed.items()))[:60]), cache)
    cache.write_bytes(cache.read_bytes()[:-30])
    assert classes(mixed, cache) == classes(mixed, cache) == expected


def test_one_pixel_makes_another_class(mixed: dict[str, Path], tmp_path: Path) -> None:
    """Negative control: a copy is found before one of its values is changed, and not after; both ways agree."""
    cache, copy = tmp_path / "cache.jsonl", tmp_path / "copy.png"
    values = np.array(open_image(mixed["j0"]))
    Image.fromarray(values).save(copy)
    paths = {**mixed, "copy": copy}
    assert classes(paths, cache)["copy"] == pairwise(paths)["copy"] == "j0"
    values[20, 15, 1] ^= 1
    Image.fromarray(values).save(copy)
    assert classes(paths, cache)["copy"] == pairwise(paths)["copy"] == "copy"


def test_transposed_shapes_are_apart(tmp_path: Path) -> None:
    """Negative control: 2×3 and 3×2 of the same bytes are not equal."""
    paths = {}
    for width, height in ((2, 3), (3, 2), (1, 6), (6, 1)):
        paths[f"{width}x{height}"] = tmp_path / f"{width}x{height}.png"
        Image.frombytes("RGB", (width, height), bytes(range(18))).save(paths[f"{width}x{height}"])
    assert classes(paths) == pairwise(paths) == {i: i for i in paths}
