"""Images: from a file or bytes to pixels."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from spn4cir.errors import InputError
from spn4cir.files import refuse_special_file
from spn4cir.pixels import as_viewed, flatten_alpha, register_openers
from spn4cir.types import ImageRef

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ELONGATED, PADDED = 4, 2**26
"""Pictures longer than this many times their width, which padding would bring to over this many pixels, are resized
first. Others take at most 3.2 times their own memory, or 200 MB, in the published order."""
LONGEST = 64
"""Without padding, only the middle of a picture counts that is longer than this many times its width."""
OWN_MODES = ("1", "P", "RGBA", "LA", "CMYK")
"""Modes that ``RgbLastTransform`` resizes as they are. In others, such as grey, converting first changes no pixel."""
NPY = b"\x93NUMPY"  # what an .npy file begins with


@dataclass(frozen=True)
class StoredBytes:
    """The source of an image whose bytes lie in a larger file, such as a row of a table; calling it reads them.

    ``file`` is that larger file, or the first of several; ``stamp`` the size in bytes and the time of the last change
    in nanoseconds of all of them, None if there is no file.
    """

    read: Callable[[str, int], bytes]
    column: str
    row: int
    file: str
    stamp: tuple[int, int] | None

    def __call__(self) -> bytes:
        """The bytes of the image."""
        return self.read(self.column, self.row)


def decode(image: ImageRef | Path, own_mode: bool = False) -> Image.Image:
    """Decode an image and crop it to its box. Raises whatever the decoder does.

    The picture is what ``view`` gives; of an image ``as_published`` what ``keep_mode``, or else ``to_rgb``, gives. A
    crop box counts in the picture after that. Pipes and devices are not opened: they raise ``OSError``.

    ``own_mode`` keeps the modes that ``keep_mode`` keeps.
    """
    source, box, _, as_published = image if isinstance(image, ImageRef) else ImageRef(image)
    if isinstance(source, Path):
        refuse_special_file(source)
    file = source if isinstance(source, Path) else io.BytesIO(source())
    register_openers()
    try:
        opened = Image.open(file)
    except UnidentifiedImageError:
        if isinstance(file, Path):
            raise
        raise UnidentifiedImageError("cannot identify the bytes as an image") from None  # says no address
    with opened as picture:
        if picture.format in ("EPS", "IPTC"):
            raise OSError("PostScript, or what may hold it, is a program and no picture")  # a decoder would run it
        stored = keep_mode if own_mode else to_rgb
        whole = stored(picture) if as_published else view(picture, own_mode)
        if box is None:
            return whole
        if box[2] > whole.width or box[3] > whole.height:
            raise ValueError(f"the box {box} leaves the picture of {whole.width} × {whole.height} pixels")
        return whole.crop(box)


def view(picture: Image.Image, own_mode: bool = False) -> Image.Image:
    """A copy of a decoded picture as a viewer shows it, in RGB; or in the mode that ``keep_mode`` gives.

    Orientation, depth and colour profile are applied (``pixels.as_viewed``). RGB shows light artwork on transparency on
    grey, all other on white (``pixels.flatten_alpha``); in its own mode a picture keeps its transparency.
    """
    shown = as_viewed(picture)
    shown = keep_mode(shown) if own_mode else flatten_alpha(shown)
    shown.info = {}  # its orientation and its profile have been applied: nobody is to apply them again
    return shown


def read_content(image: ImageRef) -> bytes:
    """The bytes of an image's file. Raises ``OSError`` for a pipe or a device, which is not opened."""
    if callable(image.source):
        return image.source()
    refuse_special_file(image.source)
    return image.source.read_bytes()


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as RGB, pixels as they are stored; transparent parts become white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def keep_mode(picture: Image.Image) -> Image.Image:
    """A copy of a picture whose mode is one of ``OWN_MODES``, of any other as RGB; a transparent colour is ignored."""
    copied = picture.copy() if picture.mode in OWN_MODES else picture.convert("RGB")
    copied.info.pop("transparency", None)  # converting a palette later would warn of it
    return copied


def open_image(image: ImageRef | Path, own_mode: bool = False) -> Image.Image:
    """Decode an image as ``decode`` does. Raises ``InputError`` if the file is missing or does not decode."""
    try:
        return decode(image, own_mode)
    except FileNotFoundError:
        raise InputError(f"image {image} is missing") from None
    except UnidentifiedImageError as error:
        what = "is a vector of given features, and the model reads pictures" if is_vector(image) else ""
        raise InputError(f"image {image} {what or f'does not decode: {error}'}") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"image {image} does not decode: {error}") from None


def is_vector(image: ImageRef | Path) -> bool:
    """Whether the bytes of an image begin as those of an ``.npy`` file. Raises ``OSError`` if it cannot be read."""
    source = image.source if isinstance(image, ImageRef) else image
    if not isinstance(source, Path):
        return source()[: len(NPY)] == NPY
    with source.open("rb") as file:
        return file.read(len(NPY)) == NPY


def read_vector(image: ImageRef | Path) -> Tensor:
    """Read an image that is given as features: an ``.npy`` file of D finite numbers → (D,) in float32.

    Raises ``InputError`` if it is missing, is not such a file, or holds anything else.
    """
    source = image.source if isinstance(image, ImageRef) else image
    try:
        data = source.read_bytes() if isinstance(source, Path) else source()
        if not data.startswith(NPY):
            raise ValueError("it is no .npy file")
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"features {image} are missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"features {image} cannot be read: {' '.join(str(error).split())}") from None
    if found.ndim != 1 or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        raise InputError(f"features {image}: expected a vector of finite numbers, got {found.dtype} {found.shape}")
    return torch.from_numpy(found.astype(np.float32))


def pixel_hash(picture: Image.Image) -> str:
    """Hash of size and pixels, and of mode and palette if it is not RGB: equal hashes look the same to a model."""
    kind = "" if picture.mode == "RGB" else f"{picture.mode} {picture.getpalette()}"
    digest = hashlib.sha256(f"{picture.size}{kind}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def target_pad(picture: Image.Image, ratio: float = 1.25) -> Image.Image:
    """Pad an elongated image with zeros until its longer side is at most ``ratio`` times the shorter one.

    Zeros are black in RGB, transparent in RGBA and LA, white in CMYK, and the first colour of a palette.

    Source: Baldrati et al., "Effective conditioned and composed image retrieval", CVPR 2022.
    """
    w, h = picture.size
    if max(w, h) / min(w, h) < ratio:
        return picture
    side = max(w, h) / ratio
    across, down = max(int((side - w) / 2), 0), max(int((side - h) / 2), 0)
    padded: Image.Image = TF.pad(picture, [across, down, across, down])
    return padded


def pad_and_resize(picture: Image.Image, size: int, ratio: float = 1.25) -> Image.Image:
    """Pad as ``target_pad`` does, then resize the shorter side to ``size`` (bicubic).

    A picture that padding would make huge is resized before it is padded: memory is then that of the result, and pixels
    differ at the borders of the picture, by less than one pixel's width. All other pictures give the same bits.
    """
    w, h = picture.size
    longer = max(w, h)
    if longer <= ELONGATED * min(w, h) or longer * longer / ratio <= PADDED:
        published: Image.Image = TF.resize(target_pad(picture, ratio), [size], InterpolationMode.BICUBIC)
        return published
    side = int(size * ratio)
    inner = [max(1, round(extent * side / longer)) for extent in (w, h)]
    across, down = ((size if extent < longer else side) - given for extent, given in zip((w, h), inner, strict=True))
    small = picture.resize((inner[0], inner[1]), Image.Resampling.BICUBIC)
    padded: Image.Image = TF.pad(small, [across // 2, down // 2, across - across // 2, down - down // 2])
    return padded


def crop_to_middle(picture: Image.Image, ratio: int = LONGEST) -> Image.Image:
    """The middle of a picture that is longer than ``ratio`` times its width (or height); any other as it is.

    Resizing the shorter side of such a picture would need memory without bound, and a centre crop keeps less still.
    """
    w, h = picture.size
    across, down = min(w, ratio * h), min(h, ratio * w)
    left, top = (w - across) // 2, (h - down) // 2
    return picture if (w, h) == (across, down) else picture.crop((left, top, left + across, top + down))


@dataclass(frozen=True)
class Transform:
    """RGB image → (3, size, size): pad, resize the shorter side (bicubic), centre crop, normalise."""

    size: int
    pad_ratio: float | None = 1.25
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    own_mode: ClassVar[bool] = False  # whether it takes pictures as ``keep_mode`` gives them, instead of RGB

    def __call__(self, picture: Image.Image) -> Tensor:
        """RGB image → (3, size, size)."""
        if self.pad_ratio is None:
            resized = TF.resize(crop_to_middle(picture), [self.size], InterpolationMode.BICUBIC)
        else:
            resized = pad_and_resize(picture, self.size, self.pad_ratio)
        cropped = TF.center_crop(resized, [self.size, self.size])
        normalised: Tensor = TF.normalize(TF.to_tensor(cropped.convert("RGB")), list(self.mean), list(self.std))
        return normalised


class RgbLastTransform(Transform):
    """The same steps in the picture's own mode, converted to RGB after the crop, as the published code does.

    What is transparent then shows the colour that it hides, and palettes are resized by the nearest neighbour.
    """

    own_mode = True


@dataclass(frozen=True)
class VectorTransform:
    """For models that read given features instead of pictures: checks that a vector has ``size`` numbers."""

    size: int

    def __call__(self, vector: Tensor) -> Tensor:
        """(D,) → (D,). Raises ``InputError`` if D is not ``size``."""
        if vector.shape != (self.size,):
            raise InputError(f"features of {len(vector)} numbers, and the model reads {self.size}: set image: given:D")
        return vector


def takes_vectors(transform: Callable[..., Tensor]) -> bool:
    """Whether a transform takes vectors, as ``read_vector`` gives them, instead of pictures."""
    return isinstance(transform, VectorTransform)


def takes_own_mode(transform: Callable[[Image.Image], Tensor]) -> bool:
    """Whether a transform takes pictures as ``keep_mode`` gives them; any other takes RGB."""
    return isinstance(transform, Transform) and transform.own_mode


def load_pixels(image: ImageRef | Path, transform: Callable[..., Tensor]) -> Tensor:
    """(3, H, W), or (D,) of given features. Raises ``InputError`` naming the file if it is missing or broken."""
    if takes_vectors(transform):
        return transform(read_vector(image))
    return transform(open_image(image, takes_own_mode(transform)))


class ImageSource:
    """Image ids to pixels, for one transform; ``keep`` holds decoded pixels in memory (for small datasets)."""

    def __init__(self, image: Callable[[str], ImageRef | Path], transform: Callable[..., Tensor], keep: bool = False):
        self.image, self.transform = image, transform
        self._kept: dict[str, Tensor] | None = {} if keep else None

    def __call__(self, image_id: str) -> Tensor:
        """(3, H, W), or (D,) of given features. Raises ``InputError`` naming the file if it is missing or broken."""
        if self._kept is not None and image_id in self._kept:
            return self._kept[image_id]
        pixels = load_pixels(self.image(image_id), self.transform)
        if self._kept is not None:
            self._kept[image_id] = pixels
        return pixels

    def stack(self, image_ids: Sequence[str]) -> Tensor:
        """(B, 3, H, W), or (B, D) of given features."""
        return torch.stack([self(i) for i in image_ids])
