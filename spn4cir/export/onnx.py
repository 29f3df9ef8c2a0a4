"""Export to ONNX: two graphs, the tokenizer, the preprocessing as JSON, and a file of Python that runs them."""

import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from spn4cir.backbone import Backbone
from spn4cir.config import TrainConfig
from spn4cir.datasets import load_dataset
from spn4cir.errors import InputError
from spn4cir.export import refuse_vectors, require_packages
from spn4cir.files import write_text
from spn4cir.images import Transform, view
from spn4cir.model import Model
from spn4cir.text_tokenizer import PortableTokenizer
from spn4cir.types import ImageFeatures, Tokens

TOLERANCE = 1e-5
"""Largest difference of any number of an exported embedding, of unit norm, from the model's own."""
CHECKED_TEXTS = (
    "a red heart", "", "Make it  BLUE, and add 2 hats!", "it’s “naïve” – isn't it (really)?", "word " * 300,
    "☂ 1234 ~x.y", "ﬁne Ｆｕｌｌ　ﾀﾞ", "a\x00 red\x07 \x1b[1mhat\x1b[0m", "zero\u200bwidth \ufeffred\u2028hat",
)  # fmt: skip
PICTURES = 6
LARGEST_FILE = 1_500_000_000
"""Bytes of weights above which they lie in a file beside the graph: one file of ONNX holds 2 GB."""
OPSET = 18


class ImageGraph(nn.Module):
    """Pixels (B, 3, H, W) → target (B, K, E) and reference (B, L, D)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures."""
        features = self.backbone.encode_image(pixels)
        return features.target, features.reference


class QueryGraph(nn.Module):
    """Features of references and tokens of texts, either of which a query may lack → queries (B, E)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.has_own_text = type(backbone).compose_text is not Backbone.compose_text

    def forward(self, tokens: Tokens, reference: Tensor, target: Tensor, has_image: Tensor, has_text: Tensor) -> Tensor:
        """As ``Backbone.compose_partial`` without a shape that depends on the data; masks are (B,) booleans."""
        # zeros stand for a missing reference, as in Backbone.compose_text
        known = torch.where(has_image[:, None, None], reference, torch.zeros_like(reference))
        query = self.backbone.compose(known, tokens).query  # (B, E)
        if self.has_own_text:
            query = torch.where(has_image[:, None], query, self.backbone.compose_text(tokens).query)
        return torch.where(has_text[:, None], query, self.backbone.compose_image(ImageFeatures(reference, target)))


class ImageQueryGraph(nn.Module):
    """Reference (B, L, D) and target (B, K, E) → queries of pictures alone (B, E)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, reference: Tensor, target: Tensor) -> Tensor:
        """Compose queries without texts."""
        return self.backbone.compose_image(ImageFeatures(reference, target))


def export_onnx(model: Model, folder: Path) -> float:
    """Write a model for onnxruntime into a new folder and compare its embeddings with the model's own.

    The folder holds ``image.onnx`` (pixels → target, reference), ``query.onnx`` (reference, target, tokens and the
    masks ``has_image`` and ``has_text`` → query), ``preprocessor.json``, ``tokenizer.json`` unless the model reads no
    texts, and ``search_onnx.py``, which runs them.

    Args:
        model: on the CPU, in float32.
        folder: missing or empty.

    Returns:
        The largest difference between an exported number and the model's own.

    Raises:
        InputError: if a package is missing, the folder holds files, the model has a form that cannot be exported, or a
            difference exceeds ``TOLERANCE``; nothing is left in the folder then.
    """
    require_packages("onnx", "onnxscript", "onnxruntime", "tokenizers")
    if model.device.type != "cpu" or model.dtype != "float32":
        raise InputError("an export needs the model on the CPU, in float32: load it with device='cpu'")
    settings, tokenizer = _describe(model.backbone)
    with fresh_folder(folder) as beside:
        if tokenizer:
            tokenizer.tokenizer.save(str(beside / "tokenizer.json"))
        for name, trace in build_graphs(model.backbone).items():
            _write_graph(trace, beside / name)
        write_text(beside / "preprocessor.json", json.dumps(settings, indent=1) + "\n")
        shutil.copy(Path(__file__).with_name("search_onnx.py"), beside)
        return _compare(model, beside)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes ``folder`` unless an error occurs.

    Raises ``InputError`` if ``folder`` is a file, holds files, or cannot be made.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} is there already: give a new or empty folder")
    place = folder.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=place.parent) as beside:
            inner = Path(beside) / "model"  # with the rights of any folder, which a temporary one lacks
            inner.mkdir()
            yield inner
            if place.is_dir():
                place.rmdir()
            inner.rename(place)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None


def _describe(backbone: Backbone) -> tuple[dict[str, Any], PortableTokenizer | None]:
    """The preprocessing as JSON, and the tokenizer. Raises ``InputError`` for what JSON cannot describe."""
    refuse_vectors(backbone)
    transform = backbone.transform
    if not isinstance(transform, Transform):
        what = "is prepared by another library, which preprocessor.json cannot describe"
        raise InputError(f"backbone {backbone.name}: a picture {what}")
    image = {**vars(transform), "rgb_last": transform.own_mode}
    tokenizer = backbone.portable_tokenizer() if backbone.reads_texts else None
    if tokenizer:
        check_tokenizer(backbone, tokenizer)
    with torch.no_grad():
        features = backbone.encode_image(transform(Image.new("RGB", (64, 64)))[None])
    shapes = {"target": list(features.target.shape[1:]), "reference": list(features.reference.shape[1:])}
    about = {"format": 1, "backbone": backbone.name, "image": image, **shapes}
    return {**about, "tokens": dict(tokenizer.columns) if tokenizer else {}}, tokenizer


def check_tokenizer(backbone: Backbone, tokenizer: PortableTokenizer) -> None:
    """Raises ``InputError`` if a tokenizer gives other numbers than the backbone's own for ``CHECKED_TEXTS``."""
    expected = backbone.tokenize(CHECKED_TEXTS)
    encodings = tokenizer.tokenizer.encode_batch(list(CHECKED_TEXTS))
    for name, column in tokenizer.columns.items():
        found = [getattr(encoding, column) for encoding in encodings]
        if expected[name].tolist() != found:
            raise InputError(
                f"backbone {backbone.name}: the exported tokenizer gives other {name} than the model's own"
            )


class Trace(NamedTuple):
    """A module, example inputs, which of their dimensions vary, and names of inputs and outputs."""

    graph: nn.Module
    inputs: tuple[Any, ...]
    shapes: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]


def build_graphs(backbone: Backbone) -> dict[str, Trace]:
    """The modules to export, by file name."""
    from torch.export import Dim

    rows = {0: Dim("batch")}
    with torch.no_grad():
        blank = backbone.transform(Image.new("RGB", (64, 64)))  # (3, H, W)
        pixels = torch.randn(2, *blank.shape, generator=torch.Generator().manual_seed(0))
        features = backbone.encode_image(pixels)
    image = Trace(ImageGraph(backbone), (pixels,), (rows,), ["pixels"], ["target", "reference"])
    inputs: tuple[Any, ...] = (features.reference, features.target)
    names = ["reference", "target"]
    if not backbone.reads_texts:
        query = Trace(ImageQueryGraph(backbone), inputs, (rows, rows), names, ["query"])
        return {"image.onnx": image, "query.onnx": query}
    tokens = backbone.tokenize(["a red heart on a blue ground", "a hat"])  # (2, T) each
    shortest, longest = (next(iter(backbone.tokenize([text]).values())).shape[1] for text in ("", "word " * 1000))
    columns = rows if shortest == longest else {**rows, 1: Dim("length", min=shortest, max=longest)}
    inputs = (tokens, *inputs, torch.tensor([True, False]), torch.tensor([True, True]))
    names = [*tokens, *names, "has_image", "has_text"]
    shapes = dict.fromkeys(tokens, columns), *[rows] * 4
    query = Trace(QueryGraph(backbone), inputs, shapes, names, ["query"])
    return {"image.onnx": image, "query.onnx": query}


def _write_graph(trace: Trace, path: Path) -> None:
    """Write a module as ONNX. Raises ``InputError`` if it cannot be traced."""
    weights = sum(value.nbytes for value in trace.graph.state_dict().values())
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports what it does not fold
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                trace.graph.eval(), trace.inputs, dynamo=True, opset_version=OPSET, verbose=False,
                dynamic_shapes=trace.shapes, input_names=trace.input_names, output_names=trace.output_names,
            )  # fmt: skip
        assert program is not None
        _strip_traces(program.model)
        program.save(path, external_data=weights > LARGEST_FILE)
    except (torch.onnx.OnnxExporterError, RuntimeError, ImportError) as error:  # or onnxscript is too old
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path.name}: torch {torch.__version__} cannot export this backbone: {said}") from None
    finally:
        logger.setLevel(level)


def _strip_traces(model: Any) -> None:
    """Remove what the exporter notes of its own run, such as stack traces with paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for part in (node, *node.outputs):
                part.doc_string = None
                part.metadata_props.clear()
        for part in (graph, *graph.inputs, *getattr(graph, "initializers", {}).values()):
            part.doc_string = None
            part.metadata_props.clear()


def _compare(model: Model, folder: Path) -> float:
    """The largest difference of exported embeddings of pictures and of queries of each kind. Raises ``InputError``."""
    from spn4cir.export.search_onnx import OnnxModel

    exported = OnnxModel(folder, batch_size=4)  # so that the graphs see batches of several sizes
    pictures = checked_pictures()
    texts: list[str | None] = [CHECKED_TEXTS[n % len(CHECKED_TEXTS)][: 5 * 60] or None for n in range(len(pictures))]
    references = [None if n % 3 == 1 and texts[n] else picture for n, picture in enumerate(pictures)]
    modifications = texts if model.backbone.reads_texts else None
    kinds = [(pictures, None)] if modifications is None else [(references, modifications), (pictures, modifications)]
    pairs = [(exported.embed_images(pictures), model.embed_images(pictures))]
    pairs += [(exported.embed_queries(*kind), model.embed_queries(*kind)) for kind in kinds]
    found = max(float(np.abs(mine - own.numpy()).max()) for mine, own in pairs)
    if not found <= TOLERANCE:  # not a number, too
        raise InputError(f"the exported embeddings differ from the model's by {found:.2g}, over {TOLERANCE:g}")
    return found


def checked_pictures() -> list[Image.Image]:
    """Real pictures to compare embeddings on: some of the embedded ones, and a long one that is padded."""
    dataset = load_dataset(TrainConfig.dataset)
    ids = dataset.training_images()
    chosen = [dataset.image(ids[n * len(ids) // PICTURES]) for n in range(PICTURES)]
    sources = [image.source() if callable(image.source) else image.source.read_bytes() for image in chosen]
    pictures = [Image.open(io.BytesIO(source)) for source in sources]
    for picture in pictures:
        picture.load()
    wide = Image.new("RGB", (3 * pictures[0].width, pictures[0].height), "white")
    for n, picture in enumerate(pictures[:3]):
        wide.paste(view(picture), (n * pictures[0].width, 0))
    return [*pictures, wide]
