"""Embed pictures and queries with a model that ``spn4cir-export --onnx`` wrote.

This file lies beside the model and stands alone: it needs onnxruntime, tokenizers, pillow and numpy.

Example:
    >>> from search_onnx import OnnxModel  # doctest: +SKIP
    >>> model = OnnxModel("exported")  # doctest: +SKIP
    >>> gallery = model.embed_images(["a.png", "b.png"])  # doctest: +SKIP
    >>> query = model.embed_queries(["a.png"], ["but in red"])  # doctest: +SKIP
    >>> (query @ gallery[:, 0].T).argmax()  # doctest: +SKIP
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
File: TypeAlias = str | Path | Image.Image
MAX_TEXT = 1000
OWN_MODES = ("1", "P", "RGBA", "LA", "CMYK")


class OnnxModel:
    """An exported model. Shapes: B pictures or queries, K vectors of a picture, E numbers of a vector.

    Args:
        folder: where ``image.onnx``, ``query.onnx``, ``preprocessor.json`` and, for texts, ``tokenizer.json`` lie.
        batch_size: pictures or queries in one pass.
        providers: of onnxruntime, such as ``CUDAExecutionProvider``.
    """

    def __init__(self, folder: str | Path, batch_size: int = 32, providers: Sequence[str] = ("CPUExecutionProvider",)):
        place = Path(folder)
        self.settings: dict[str, Any] = json.loads((place / "preprocessor.json").read_text(encoding="utf-8"))
        self.batch_size = batch_size
        self.image = onnxruntime.InferenceSession(place / "image.onnx", providers=list(providers))
        self.query = onnxruntime.InferenceSession(place / "query.onnx", providers=list(providers))
        has_texts = bool(self.settings["tokens"])
        self.tokenizer = Tokenizer.from_file(str(place / "tokenizer.json")) if has_texts else None

    def embed_images(self, pictures: Sequence[File]) -> Array:
        """Pictures as gallery items → (B, K, E) float32, unit norm."""
        parts = [self._encode(part)[0] for part in self._batches(pictures)]
        return np.concatenate(parts) if parts else np.zeros((0, *self.settings["target"]), np.float32)

    def embed_queries(
        self, pictures: Sequence[File | None] | None = None, texts: Sequence[str | None] | None = None
    ) -> Array:
        """Queries of a reference picture, a text or both → (B, E) float32, unit norm.

        A picture of the gallery scores the largest dot product of the query with its K vectors.
        Raises ``ValueError`` if a query has neither, a text is too long, or the model reads no texts.
        """
        if isinstance(pictures, str) or isinstance(texts, str):
            raise ValueError("give a list of pictures and a list of texts: a picture or a text of each query")
        for text in texts or ():
            if text is not None and not isinstance(text, str):
                raise ValueError(f"a text must be a string, got {text!r:.60}")
            if text and len(text) > MAX_TEXT:
                raise ValueError(f"a text has {len(text)} characters; models read a sentence: at most {MAX_TEXT}")
        count = len(pictures or texts or ())
        queries = list(zip(pictures or [None] * count, texts or [None] * count, strict=True))
        if any(picture is None and not text for picture, text in queries):
            raise ValueError("a query needs a picture, a text or both")
        if self.tokenizer is None and any(text for _, text in queries):
            raise ValueError("this model reads no texts")
        parts = [self._compose(part) for part in self._batches(queries)]
        return np.concatenate(parts) if parts else np.zeros((0, self.settings["target"][1]), np.float32)

    def _batches(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        return [rows[n : n + self.batch_size] for n in range(0, len(rows), self.batch_size)]

    def _encode(self, pictures: Sequence[File]) -> tuple[Array, Array]:
        """Target (B, K, E) and reference (B, L, D)."""
        pixels = np.stack([read_pixels(picture, self.settings["image"]) for picture in pictures])
        target, reference = self.image.run(["target", "reference"], {"pixels": pixels})
        return target, reference

    def _compose(self, queries: Sequence[tuple[File | None, str | None]]) -> Array:
        has_image = np.array([picture is not None for picture, _ in queries])
        has_text = np.array([bool(text) for _, text in queries])
        shapes = (self.settings[name] for name in ("target", "reference"))
        target, reference = (np.zeros((len(queries), *shape), np.float32) for shape in shapes)
        if has_image.any():
            target[has_image], reference[has_image] = self._encode([p for p, _ in queries if p is not None])
        given: dict[str, Array] = {"target": target, "reference": reference}
        if self.tokenizer is not None:
            encodings = self.tokenizer.encode_batch([text or "" for _, text in queries])
            for name, column in self.settings["tokens"].items():
                given[name] = np.array([getattr(encoding, column) for encoding in encodings], np.int64)
            given |= {"has_image": has_image, "has_text": has_text}
        names = {entry.name for entry in self.query.get_inputs()}  # an export leaves out what it never reads
        (query,) = self.query.run(["query"], {name: value for name, value in given.items() if name in names})
        return query  # type: ignore[no-any-return]


def read_pixels(picture: File, settings: Mapping[str, Any]) -> Array:
    """A picture → (3, H, W) float32: upright, RGB, padded, resized, cropped, normalised.

    Pictures with a colour profile other than sRGB, or with more than 8 bits, need a conversion before this.
    """
    opened = picture if isinstance(picture, Image.Image) else Image.open(picture)
    shown = ImageOps.exif_transpose(opened)
    if not settings["rgb_last"]:
        shown = flatten_transparency(shown)
    elif shown.mode not in OWN_MODES:
        shown = shown.convert("RGB")
    size, ratio = settings["size"], settings["pad_ratio"]
    if ratio is not None and max(shown.size) / min(shown.size) >= ratio:
        side = max(shown.size) / ratio
        across, down = (max(int((side - extent) / 2), 0) for extent in shown.size)
        palette = shown.getpalette() if shown.mode == "P" else None
        shown = ImageOps.expand(shown, (across, down, across, down), 0)
        if palette:
            shown.putpalette(palette)
    w, h = shown.size
    small = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    shown = shown.resize(small, Image.Resampling.BICUBIC)
    left, top = (round((extent - size) / 2) for extent in shown.size)
    shown = shown.crop((left, top, left + size, top + size)).convert("RGB")
    values = np.asarray(shown, np.uint8).astype(np.float32).transpose(2, 0, 1) / np.float32(255)  # (3, H, W)
    mean, std = (np.array(settings[name], np.float32)[:, None, None] for name in ("mean", "std"))
    found: Array = (values - mean) / std
    return found


def flatten_transparency(picture: Image.Image) -> Image.Image:
    """The picture as RGB: transparent parts become white, or grey under light artwork."""
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture.convert("RGB")
    whole = picture.convert("RGBA")
    alpha = np.asarray(whole.getchannel("A"))
    white, grey = (
        Image.alpha_composite(Image.new("RGBA", whole.size, colour), whole).convert("RGB")
        for colour in ("white", (128, 128, 128))
    )
    darkest = np.asarray(white).min(2)[alpha > 0]
    is_light = darkest.size > 0 and (darkest < 224).mean() < 0.05 and alpha.min() < 255
    return grey if is_light else white
