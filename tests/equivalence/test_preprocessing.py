"""From a file to pixels against the published steps: padding by its formula in PIL alone, then torchvision's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from spn4cir import Index
from spn4cir.backbones import build_backbone
from spn4cir.bank import fingerprint
from spn4cir.checkpoints import load_model, save_model
from spn4cir.errors import InputError
from spn4cir.identity import inspect_images
from spn4cir.images import MEAN, STD, ImageSource, RgbLastTransform, Transform
from spn4cir.model import Model
from spn4cir.types import ImageFeatures, ImageRef

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


# --- pictures that are not RGB, converted last as the published code does ---------------------------------------------


def published_late(picture: Image.Image, size: int, pad: bool) -> torch.Tensor:
    """(3, size, size): torchvision's padding with 0, resize and crop in the picture's mode; then RGB and the tensor."""
    w, h = picture.size
    steps = [transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    if pad and max(w, h) / min(w, h) >= 1.25:
        s = max(w, h) / 1.25
        left, top = max(int((s - w) / 2), 0), max(int((s - h) / 2), 0)
        steps.insert(0, transforms.Pad((left, top), 0, "constant"))
    whole = transforms.Compose(steps)(picture)
    tensor: torch.Tensor = transforms.Normalize(MEAN, STD)(transforms.ToTensor()(whole.convert("RGB")))
    return tensor


def saved_in(folder: Path, kind: str, width: int, height: int) -> Path:
    """A file whose picture opens in a mode; the palette's is transparent in one entry, or in several."""
    path = folder / f"{kind}-{width}-{height}.{'jpg' if kind == 'CMYK' else 'png'}"
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if kind == "CMYK":
        Image.fromarray(noise, "CMYK").save(path)
    elif kind == "LA":
        Image.fromarray(noise[:, :, :2].copy(), "LA").save(path)
    elif kind in ("P", "P entry", "P bytes"):
        more = {"P": {}, "P entry": {"transparency": 3}, "P bytes": {"transparency": bytes(range(0, 160, 10))}}[kind]
        Image.fromarray(noise[:, :, :3].copy()).quantize(16).save(path, **more)
    elif kind == "1":
        Image.fromarray(noise[:, :, 0] > 127).save(path)
    elif kind == "RGB hidden":
        noise[height // 3 : -height // 3, :] = 7
        Image.fromarray(noise[:, :, :3].copy()).save(path, transparency=(7, 7, 7))
    else:
        drawn(width, height, kind).save(path)
    return path


LATE = ("RGBA", "LA", "P", "P entry", "P bytes", "CMYK", "1")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # theirs warns, ours does not
@pytest.mark.parametrize("kind", [*LATE, "RGB", "L", "RGB hidden"])
@pytest.mark.parametrize("pad", [True, False])
def test_rgb_last_equals_the_published_order(tmp_path: Path, kind: str, pad: bool) -> None:
    """Bit for bit in every mode; RGB first gives other pixels wherever the two orders matter, and only there."""
    late, early = (make(224, 1.25 if pad else None) for make in (RgbLastTransform, Transform))
    for width, height in ((60, 90), (90, 60), (70, 80), (3, 40)):
        path = saved_in(tmp_path, kind, width, height)
        with Image.open(path) as opened:
            wanted = published_late(opened, 224, pad)
        found = ImageSource(lambda _, path=path: path, late)("a")  # type: ignore[misc]
        assert torch.equal(found, wanted), (kind, width, height)
        is_equal = torch.equal(found, ImageSource(lambda _, path=path: path, early)("a"))  # type: ignore[misc]
        assert is_equal == (kind in ("RGB", "L")), (kind, width, height)


def test_a_grey_jpeg_and_a_crop_in_its_own_mode(tmp_path: Path) -> None:
    """A JPEG is the same in both orders; a crop box is cut out in the picture's own mode."""
    grey, path = tmp_path / "a.jpg", saved_in(tmp_path, "RGBA", 60, 90)
    drawn(80, 60, "L").save(grey)
    both = [ImageSource(lambda _: grey, kind(64))("a") for kind in (Transform, RgbLastTransform)]
    assert torch.equal(*both)
    box = (5, 5, 45, 65)
    with Image.open(path) as opened:
        wanted = published_late(opened.crop(box), 64, True)
    assert torch.equal(ImageSource(lambda _: ImageRef(path, box), RgbLastTransform(64))("a"), wanted)


@pytest.mark.parametrize("kind", [*LATE, "RGB", "L"])
def test_hashes_of_one_treatment_are_not_used_for_the_other(tmp_path: Path, kind: str) -> None:
    """One cache file serves both; equal hashes mean equal pixels to the model under either."""
    images, cache = {"a": ImageRef(saved_in(tmp_path, kind, 60, 90))}, tmp_path / "pixels.jsonl"
    found = [
        inspect_images(images, cache, show=False, own_mode=own_mode)["a"].pixels
        for own_mode in (False, True, False, True)
    ]
    assert found[:2] == found[2:] and len(cache.read_text().splitlines()) == 2
    assert (found[0] == found[1]) == (kind in ("RGB", "L"))


def test_what_hides_another_colour_is_another_picture(tmp_path: Path) -> None:
    """Two pictures that are equal on white are one if RGB comes first, and two if it comes last."""
    images = {}
    for name, colour in (("a", (255, 0, 0, 0)), ("b", (0, 0, 255, 0))):
        Image.new("RGBA", (40, 60), colour).save(tmp_path / f"{name}.png")
        images[name] = ImageRef(tmp_path / f"{name}.png")
    for own_mode, count in ((False, 1), (True, 2)):
        assert len({found.pixels for found in inspect_images(images, show=False, own_mode=own_mode).values()}) == count


def test_the_option_is_in_the_checkpoint_and_in_every_key(tmp_path: Path) -> None:
    """A model that is loaded again, a search and an index read pictures alike; the fingerprint of a bank says it."""
    late, early = (build_backbone("clip4cir", rgb_last=flag) for flag in (True, False))
    late.load_state_dict(early.state_dict())
    assert repr(early.transform).startswith("Transform(") and "rgb_last" not in early.options
    assert fingerprint(late, {}, {}) != fingerprint(early, {}, {})
    save_model(tmp_path / "late", late, {})
    loaded = load_model(tmp_path / "late")
    assert loaded.transform == late.transform and fingerprint(loaded, {}, {}) == fingerprint(late, {}, {})
    assert not isinstance(load_model(tmp_path / "late", {"rgb_last": False}).transform, RgbLastTransform)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    path = saved_in(pictures, "RGBA", 60, 90)
    with Image.open(path) as opened:
        target = late.encode_target(published_late(opened, late.transform.size, True)[None])  # type: ignore[attr-defined]
        opened.load()
    model = Model(loaded, "late")
    for picture in (path, opened, ImageRef(path)):
        torch.testing.assert_close(model.embed_images([picture]), target, rtol=0, atol=1e-6)
    assert (Model(early, "early").embed_images([path]) - target).abs().max() > 1e-3  # negative control
    other = model.embed_images([saved_in(pictures, "RGBA", 90, 60)])
    index = Index.build(model, pictures, tmp_path / "index")  # in which an image of the index does not find itself
    query = late.compose_image(ImageFeatures(target, target)).detach()
    asked = [index.search(shown, k=1)[0].score for shown in (path.name, str(path))]
    assert asked == pytest.approx([float(query[0] @ other[0, 0])] * 2, abs=1e-5)


def test_a_transform_of_another_kind_refuses_the_option() -> None:
    """A backbone with a transform of its own would ignore it; so would a word that is no boolean."""
    with pytest.raises(InputError, match="rgb_last of backbone clip4cir cannot be 'yes'"):
        build_backbone("clip4cir", rgb_last="yes")  # type: ignore[arg-type]
