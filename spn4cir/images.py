"""Images: from a file or bytes to pixels."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from spn4cir.errors import InputError
from spn4cir.types import ImageRef

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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


def decode(image: ImageRef | Path) -> Image.Image:
    """Decode an image as RGB, cropped to its box; transparent parts become white. Raises whatever the decoder does."""
    source, box, _ = image if isinstance(image, ImageRef) else ImageRef(image)
    file = source if isinstance(source, Path) else io.BytesIO(source())
    try:
        opened = Image.open(file)
    except UnidentifiedImageError:
        if isinstance(file, Path):
            raise
        raise UnidentifiedImageError("cannot identify the bytes as an image") from None  # says no address
    with opened as picture:
        if picture.format in ("EPS", "IPTC"):
            raise OSError("PostScript, or what may hold it, is a program and no picture")  # a decoder would run it
        whole = to_rgb(picture)
        if box is None:
            return whole
        if box[2] > whole.width or box[3] > whole.height:
            raise ValueError(f"the box {box} leaves the picture of {whole.width} × {whole.height} pixels")
        return whole.crop(box)


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as RGB; transparent parts become white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def open_image(image: ImageRef | Path) -> Image.Image:
    """Decode an image as ``decode`` does. Raises ``InputError`` if the file is missing or does not decode."""
    try:
        return decode(image)
    except FileNotFoundError:
        raise InputError(f"image {image} is missing") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"image {image} does not decode: {error}") from None


def pixel_hash(picture: Image.Image) -> str:
    """Hash of size and pixels: equal exactly for images that look the same to a model."""
    digest = hashlib.sha256(f"{picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def target_pad(picture: Image.Image, ratio: float = 1.25) -> Image.Image:
    """Pad an elongated image with black until its longer side is at most ``ratio`` times the shorter one.

    Source: Baldrati et al., "Effective conditioned and composed image retrieval", CVPR 2022.
    """
    w, h = picture.size
    if max(w, h) / min(w, h) < ratio:
        return picture
    side = max(w, h) / ratio
    across, down = max(int((side - w) / 2), 0), max(int((side - h) / 2), 0)
    padded = Image.new("RGB", (w + 2 * across, h + 2 * down))
    padded.paste(picture, (across, down))
    return padded


@dataclass(frozen=True)
class Transform:
    """RGB image → (3, size, size): pad, resize the shorter side (bicubic), centre crop, normalise."""

    size: int
    pad_ratio: float | None = 1.25
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, picture: Image.Image) -> Tensor:
        """RGB image → (3, size, size)."""
        if self.pad_ratio is not None:
            picture = target_pad(picture, self.pad_ratio)
        resized = TF.resize(picture, [self.size], InterpolationMode.BICUBIC)
        pixels = TF.to_tensor(TF.center_crop(resized, [self.size, self.size]))
        normalised: Tensor = TF.normalize(pixels, list(self.mean), list(self.std))
        return normalised


class ImageSource:
    """Image ids to pixels, for one transform; ``keep`` holds decoded pixels in memory (for small datasets)."""

    def __init__(
        self, image: Callable[[str], ImageRef | Path], transform: Callable[[Image.Image], Tensor], keep: bool = False
    ):
        self.image, self.transform = image, transform
        self._kept: dict[str, Tensor] | None = {} if keep else None

    def __call__(self, image_id: str) -> Tensor:
        """(3, H, W). Raises ``InputError`` naming the file if it is missing or does not decode."""
        if self._kept is None:
            return self.transform(open_image(self.image(image_id)))
        if image_id not in self._kept:
            self._kept[image_id] = self.transform(open_image(self.image(image_id)))
        return self._kept[image_id]

    def stack(self, image_ids: Sequence[str]) -> Tensor:
        """(B, 3, H, W)."""
        return torch.stack([self(i) for i in image_ids])
