"""Export as a sentence-transformers model: composed queries and gallery pictures through ``encode``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from spn4cir.backbone import Backbone
from spn4cir.checkpoints import load_model, save_model
from spn4cir.errors import InputError
from spn4cir.export import refuse_vectors
from spn4cir.export.onnx import TOLERANCE, checked_pictures, fresh_folder
from spn4cir.images import takes_own_mode
from spn4cir.model import MAX_TEXT, Model, open_picture
from spn4cir.run_record import strip_places

TOKEN = "token_"
"""What the names of tokens begin with among the features."""
QUERY, DOCUMENT = "query", "document"  # sentence-transformers' tasks


class _Input(NamedTuple):
    """One input of ``encode``: a picture, a text, or both."""

    image: Any
    text: str | None


class ComposedModule(InputModule):  # type: ignore[misc]
    """A backbone as the only module of a ``SentenceTransformer``. Shapes: B inputs, E numbers of an embedding.

    An input is a text, a picture (a file or a ``PIL.Image``), or ``{"image": …, "text": …}``. A picture alone is a
    gallery item, and for ``encode_query`` a query of a picture alone; a text, with a picture or alone, is a query.

    Args:
        backbone: with one target vector (K = 1).

    Raises:
        InputError: if the backbone has several target vectors or reads given features.
    """

    output: ClassVar[str] = "sentence_embedding"

    def __init__(self, backbone: Backbone):
        super().__init__()
        refuse_vectors(backbone)
        with torch.no_grad():
            vectors, self.width = backbone.encode_target(_pixels(backbone, [None])).shape[1:]
        if vectors != 1:
            what = f"a picture has {vectors} vectors, and an embedding of sentence-transformers is one"
            raise InputError(f"backbone {backbone.name}: {what}: export it with --onnx")
        self.backbone = backbone.eval()

    @property
    def modalities(self) -> list[Any]:
        """What an input may hold."""
        return ["image", "text", ("image", "text")] if self.backbone.reads_texts else ["image"]

    def get_embedding_dimension(self) -> int:
        """E."""
        return self.width

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """B inputs → ``pixels``, tokens and (B,) booleans ``has_image``, ``has_text`` and ``is_target``.

        Args:
            inputs: as the class describes them.
            prompt: stands before each text.
            task: ``query``, ``document`` or None.

        Raises:
            InputError: for an input of another kind, a text that is empty or too long, a text that the backbone reads
                as no query, or a text with a picture as a gallery item.
        """
        entries = [_read_entry(value) for value in inputs]
        has_text = [bool(entry.text) for entry in entries]
        has_image = [entry.image is not None for entry in entries]
        if any(has_text) and not self.backbone.reads_texts:
            raise InputError(f"backbone {self.backbone.name} reads no texts")
        if task == DOCUMENT and any(text and image for text, image in zip(has_text, has_image, strict=True)):
            raise InputError("a gallery item is a picture or a text: encode a picture with a text as a query")
        features: dict[str, Any] = {"has_image": torch.tensor(has_image), "has_text": torch.tensor(has_text)}
        features["is_target"] = features["has_image"] & ~features["has_text"] & (task != QUERY) | (task == DOCUMENT)
        if any(has_image):
            features["pixels"] = _pixels(self.backbone, [entry.image for entry in entries])  # (B, 3, H, W)
        texts = [f"{prompt or ''}{entry.text}" if entry.text else "" for entry in entries]
        if long := [text for text in texts if len(text) > MAX_TEXT]:
            raise InputError(f"a text has {len(long[0])} characters; models read a sentence: at most {MAX_TEXT}")
        features |= {TOKEN + name: value for name, value in self.backbone.tokenize(texts).items()}
        return {**features, "modality": self.modalities[-1]}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` (B, E), unit norm."""
        tokens = {name.removeprefix(TOKEN): value for name, value in features.items() if name.startswith(TOKEN)}
        has_image, has_text, is_target = (features[name] for name in ("has_image", "has_text", "is_target"))
        seen = self.backbone.encode_image(features["pixels"]) if "pixels" in features else None
        found = torch.zeros(len(has_image), self.width, device=has_image.device)
        if bool((is_target & has_image).any()):
            assert seen is not None
            found = torch.where((is_target & has_image)[:, None], seen.target[:, 0].float(), found)
        if bool((is_target & has_text).any()):
            found = torch.where((is_target & has_text)[:, None], self.backbone.encode_text_target(tokens)[:, 0], found)
        if not bool(is_target.all()):
            given = None if bool(has_image.all()) else has_image, None if bool(has_text.all()) else has_text
            query = self.backbone.compose_partial(seen, tokens, *given).query.float()
            found = torch.where(is_target[:, None], found, query)
        return {**features, self.output: found}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the backbone in the layout that ``spn4cir.load`` reads, too.

        Of paths among its options only the last name is written, unless the architecture is read from that folder.
        """
        options = self.backbone.options
        stripped = {key: _strip_option(key, value) for key, value in options.items()}
        self.backbone.options = stripped
        try:
            save_model(Path(output_path), self.backbone, {})
        finally:
            self.backbone.options = options

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **places: Any) -> "ComposedModule":
        """Read what ``save`` wrote, from a folder or the hub."""
        kept = {key: places[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in places}
        return cls(load_model(Path(cls.load_dir_path(model_name_or_path, subfolder=subfolder, **kept))))


def _strip_option(name: str, value: Any) -> Any:
    """An option without folders of this machine that loading does not need; the tokenizer is saved with the model."""
    place = value.rpartition(":")[2] if isinstance(value, str) and not value.startswith("run:") else ""
    is_needed = name not in ("tokenizer", "pretrained") and place != "" and Path(place).is_dir()
    return value if is_needed else strip_places(value, name)


def _read_entry(value: Any) -> _Input:
    """One input as picture and text. Raises ``InputError`` for another kind."""
    if isinstance(value, dict):
        image, text = value.get("image"), value.get("text")
        if value.keys() <= {"image", "text"} and (image is not None or text) and isinstance(text, str | None):
            return _Input(image, text)
    elif value == "":
        raise InputError("a query needs a picture, a text or both, and this text is empty")
    elif isinstance(value, str):
        is_file = len(value) < 1000 and "\n" not in value and Path(value).suffix != "" and Path(value).is_file()
        return _Input(value, None) if is_file else _Input(None, value)
    elif isinstance(value, Image.Image | Path):
        return _Input(value, None)
    keys = f" with {', '.join(map(str, value))}" if isinstance(value, dict) else ""
    shown = f"{type(value).__name__}{keys}"
    raise InputError(f"an input is a text, a picture, or a dictionary with image and text, got {shown:.80}")


def _pixels(backbone: Backbone, images: Sequence[Any]) -> Tensor:
    """Preprocessed pictures (B, 3, H, W), of a blank one for None."""
    own_mode, blank = takes_own_mode(backbone.transform), Image.new("RGB", (64, 64))
    return torch.stack([backbone.transform(open_picture(blank if one is None else one, own_mode)) for one in images])


def export_sentence_transformers(model: Model, folder: Path) -> float:
    """Write a folder for ``SentenceTransformer(folder, trust_remote_code=True)`` and compare its embeddings.

    Args:
        model: on the CPU, in float32, with one target vector.
        folder: missing or empty.

    Returns:
        The largest difference between an exported number and the model's own.

    Raises:
        InputError: if the folder holds files, a picture has several vectors, or a difference exceeds 1e-5; nothing is
            left in the folder then.
    """
    if model.device.type != "cpu" or model.dtype != "float32":
        raise InputError("an export needs the model on the CPU, in float32: load it with device='cpu'")
    module = ComposedModule(model.backbone)
    with fresh_folder(folder) as beside:
        SentenceTransformer(modules=[module], device="cpu").save(str(beside), create_model_card=False)
        loaded = SentenceTransformer(str(beside), device="cpu", trust_remote_code=True, local_files_only=True)
        pictures = checked_pictures()
        shown = {"show_progress_bar": False, "convert_to_tensor": True}
        pairs = [(loaded.encode_document(pictures, **shown), model.embed_images(pictures)[:, 0])]
        pairs += [(loaded.encode_query(pictures, **shown), model.embed_queries(pictures))]
        if model.backbone.reads_texts:
            texts = [f"in red, with {n} hats" for n in range(len(pictures))]
            both = [{"image": picture, "text": text} for picture, text in zip(pictures, texts, strict=True)]
            pairs += [(loaded.encode_query(both, **shown), model.embed_queries(pictures, texts))]
            pairs += [(loaded.encode_query(texts, **shown), model.embed_queries(texts=texts))]
        found = max(float((mine - own).abs().max()) for mine, own in pairs)
        if not found <= TOLERANCE:  # not a number, too
            raise InputError(f"the exported embeddings differ from the model's by {found:.2g}, over {TOLERANCE:g}")
    return found
