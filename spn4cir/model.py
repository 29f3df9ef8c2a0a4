"""A trained model as people use it: pictures and texts in, embeddings out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.bank import fingerprint
from spn4cir.checkpoints import load_model, read_model
from spn4cir.config import TrainConfig
from spn4cir.distributed import own_device
from spn4cir.errors import InputError
from spn4cir.images import open_image, takes_own_mode, view
from spn4cir.types import ImageFeatures, ImageRef

Picture: TypeAlias = str | Path | Image.Image | ImageRef
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
EMBEDDED = "embedded"
MAX_TEXT = 1000
"""Characters of a text; text encoders read some 77 tokens and would ignore the rest."""


class Model:
    """A backbone with its weights.

    Args:
        backbone: in any mode; it is put in eval mode.
        name: where it came from: a folder, a hub id or ``embedded``.
        device: such as ``cuda:1``; by default a GPU where there is one.
        dtype: type that the layers compute in; embeddings are float32.
        batch_size: images, and queries, encoded at once.

    Example:
        >>> import spn4cir
        >>> model = spn4cir.load("embedded")
        >>> model.embed_queries(texts=["a red heart"]).shape
        torch.Size([1, 128])
    """

    def __init__(
        self,
        backbone: Backbone,
        name: str,
        device: str | None = None,
        dtype: Dtype = "float32",
        batch_size: int = 64,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise InputError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        try:
            self.device = torch.device(device or own_device())
            self.backbone = backbone.eval().to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device}: {str(error).splitlines()[0]}") from None
        self.name, self.dtype, self.batch_size = name, dtype, batch_size

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the image side (architecture, weights, preprocessing): models with an equal one share indexes."""
        return fingerprint(self.backbone, {}, {})

    @torch.no_grad()
    def embed_images(self, images: Sequence[Picture]) -> Tensor:
        """Embed pictures as gallery items → (N, K, E), unit norm, float32, on the CPU.

        Args:
            images: files or decoded pictures.

        Raises:
            InputError: if a file is missing or does not decode, or an embedding is not finite.
        """
        if not isinstance(images, Sequence) or isinstance(images, str):
            raise InputError("give a list of images")
        parts = [self._features(images[n : n + self.batch_size]).target for n in range(0, len(images), self.batch_size)]
        return _checked(torch.cat(parts).float().cpu(), self.name) if parts else torch.zeros(0, *self.target_shape)

    @torch.no_grad()
    def embed_queries(
        self, images: Sequence[Picture | Tensor | None] | None = None, texts: Sequence[str | None] | None = None
    ) -> Tensor:
        """Embed queries of a reference image, a modification text or both → (N, E), unit norm, float32, on the CPU.

        Args:
            images: of each query its reference image, or None; None if no query has one. A tensor (3, H, W) holds the
                pixels that the backbone's transform gives.
            texts: of each query its text, or None; None if no query has one.

        Raises:
            InputError: if a query has neither, the two differ in length, a file does not decode, or an embedding is
                not finite.
        """
        count = max(len(images or ()), len(texts or ()))
        if isinstance(images, str) or isinstance(texts, str):
            raise InputError("give a list of images and a list of texts, one of each query")
        references, modifications = images or [None] * count, texts or [None] * count
        if len(references) != len(modifications):
            raise InputError(f"{len(references)} images and {len(modifications)} texts do not make queries")
        queries = list(zip(references, modifications, strict=True))
        if wrong := [text for text in modifications if text is not None and not isinstance(text, str)]:
            raise InputError(f"a text must be a string, got {wrong[0]!r:.60}")
        if any(reference is None and not text for reference, text in queries):
            raise InputError("a query needs an image, a text or both")
        if long := [text for text in modifications if text and len(text) > MAX_TEXT]:
            raise InputError(f"a text has {len(long[0])} characters; models read a sentence: at most {MAX_TEXT}")
        parts = [self._compose(queries[n : n + self.batch_size]) for n in range(0, count, self.batch_size)]
        return _checked(torch.cat(parts), self.name) if parts else torch.zeros(0, self.target_shape[1])

    @torch.no_grad()
    def describe_images(self, images: Sequence[Picture]) -> list[dict[str, float]]:
        """What the model sees in pictures, by name: for ``freestyle`` the weights of the styles; {} for other models.

        Raises:
            InputError: if a file is missing or does not decode.
        """
        found: list[dict[str, float]] = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            columns = self.backbone.describe_reference(self._features(part).reference)
            rows = {name: values.float().tolist() for name, values in columns.items()}
            found += [{name: values[n] for name, values in rows.items()} for n in range(len(part))]
        return found

    @cached_property
    def target_shape(self) -> tuple[int, int]:
        """(K, E): vectors of an image, and their width."""
        k, e = self._features([Image.new("RGB", (64, 64))]).target.shape[1:]
        return k, e

    def _features(self, images: Sequence[Picture | Tensor]) -> ImageFeatures:
        return self.features(
            torch.stack([image if isinstance(image, Tensor) else self.pixels(image) for image in images])
        )

    def pixels(self, image: Picture) -> Tensor:
        """Decode and transform a picture → (3, H, W), as ``embed_queries`` takes it too.

        Raises:
            InputError: if a file is missing or does not decode.
        """
        transform = self.backbone.transform
        return transform(open_picture(image, takes_own_mode(transform)))

    @torch.no_grad()
    def features(self, pixels: Tensor) -> ImageFeatures:
        """What the backbone makes of preprocessed pixels (B, 3, H, W), in the model's type and on its device."""
        with self._precision():
            return self.backbone.encode_image(pixels.to(self.device))

    def _compose(self, queries: Sequence[tuple[Picture | Tensor | None, str | None]]) -> Tensor:
        has_image = torch.tensor([image is not None for image, _ in queries], device=self.device)
        features, blank = None, Image.new("RGB", (64, 64))
        if bool(has_image.any()):
            features = self._features([blank if image is None else image for image, _ in queries])
        tokens = {k: v.to(self.device) for k, v in self.backbone.tokenize([text or "" for _, text in queries]).items()}
        has_text = torch.tensor([bool(text) for _, text in queries], device=self.device)
        with self._precision():
            composed = self.backbone.compose_partial(
                features,
                tokens,
                None if bool(has_image.all()) else has_image,
                None if bool(has_text.all()) else has_text,
            )
        return composed.query.float().cpu()

    def _precision(self) -> torch.autocast:
        low = getattr(torch, self.dtype)
        return torch.autocast(self.device.type, low, enabled=self.dtype != "float32")


def load(
    source: str | Path = EMBEDDED, *, device: str | None = None, dtype: Dtype = "float32", batch_size: int = 64
) -> Model:
    """Load a model for search.

    Args:
        source: a run or checkpoint folder, a Hugging Face hub id such as ``owner/name``, or ``embedded`` for the small
            embedded CLIP, which no triplet has trained. A folder takes precedence over a hub id of the same name.
        device: such as ``cuda:1``; by default a GPU where there is one.
        dtype: type that the layers compute in.
        batch_size: images, and queries, encoded at once.

    Raises:
        InputError: if there is no such model, or its files are incomplete.

    Example:
        >>> import spn4cir
        >>> spn4cir.load("embedded").embed_images([]).shape
        torch.Size([0, 1, 128])
    """
    name, folder = str(source), Path(source)
    if name == EMBEDDED and not (folder / "model.json").is_file():
        return Model(build_backbone(TrainConfig.backbone), name, device, dtype, batch_size)
    if not folder.is_dir():
        is_hub_id = isinstance(source, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
        if not is_hub_id:
            raise InputError(f"model {name} is missing: give a run folder, a hub id OWNER/NAME, or {EMBEDDED}")
        return Model(load_model(_download(name)), name, device, dtype, batch_size)
    return Model(load_model(folder), str(folder.resolve()), device, dtype, batch_size)


def _download(name: str) -> Path:
    """The folder of a hub repository in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.yaml", "tokenizer/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"model {name}: there is no such folder, and the hub did not give it: {reason}") from None
    read_model(folder)
    return folder


def open_picture(picture: Picture, own_mode: bool = False) -> Image.Image:
    """Decode a picture as ``images.view`` shows it. Raises ``InputError`` if it is missing or does not decode."""
    if isinstance(picture, Image.Image):
        return view(picture, own_mode)
    if not isinstance(picture, str | Path | ImageRef):
        raise InputError(f"an image is a file or a decoded picture, got {type(picture).__name__}")
    return open_image(picture if isinstance(picture, ImageRef) else Path(picture), own_mode)


def _checked(vectors: Tensor, name: str) -> Tensor:
    if not bool(vectors.isfinite().all()):
        raise InputError(f"model {name}: embeddings are not finite: check its weights")
    return vectors
