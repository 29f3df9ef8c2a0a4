"""ONNX: embeddings in onnxruntime, from pictures and texts on, equal the model's own."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_backbones import SIDE, TINY, tiny_backbone
from torch import nn

from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.backbones.shared_clip import portable_clip_tokenizer
from spn4cir.errors import InputError
from spn4cir.export import onnx as export
from spn4cir.export.onnx import CHECKED_TEXTS, build_graphs, check_tokenizer, checked_pictures, export_onnx
from spn4cir.export.search_onnx import OnnxModel, read_pixels
from spn4cir.images import RgbLastTransform, Transform, view
from spn4cir.model import MAX_TEXT, Model
from spn4cir.types import Composed, ImageFeatures, Tokens

ROOT = Path(__file__).parents[3]
ALL = (*TINY, "embedding", "masln")


def make(name: str, folder: Path) -> Backbone:
    return tiny_backbone(name, folder) if name in TINY else build_backbone(name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """SPRC with four target vectors, exported."""
    folder = tmp_path_factory.mktemp("onnx")
    model = Model(tiny_backbone("sprc", folder), "tiny", device="cpu")
    assert export_onnx(model, folder / "exported") <= export.TOLERANCE
    return model, folder / "exported"


def test_embeddings_equal_the_models(exported: tuple[Model, Path]) -> None:
    """Pictures and all kinds of query, in batches that the graphs were not traced with; nothing temporary is left."""
    model, folder = exported
    assert {path.name for path in folder.parent.iterdir()} == {"exported"}
    names = {"image.onnx", "query.onnx", "preprocessor.json", "tokenizer.json", "search_onnx.py"}
    assert {path.name for path in folder.iterdir()} == names
    loaded, pictures = OnnxModel(folder, batch_size=3), checked_pictures()
    images = loaded.embed_images(pictures)
    assert images.shape == (7, 4, 24) and np.allclose(images, model.embed_images(pictures), atol=1e-5)
    references = [pictures[0], None, pictures[2], pictures[6]]
    texts = ["in red", "a cat with a very long text", None, "and two hats"]
    queries = loaded.embed_queries(references, texts)
    assert np.allclose(queries, model.embed_queries(references, texts), atol=1e-5)
    assert np.allclose(loaded.embed_queries(texts=["in red"]), model.embed_queries(texts=["in red"]), atol=1e-5)
    assert not np.allclose(queries[0], loaded.embed_queries([pictures[0]], ["in blue"])[0], atol=1e-2)
    assert loaded.embed_images([]).shape == (0, 4, 24) and loaded.embed_queries([]).shape == (0, 24)
    for text in (None, ""):
        with pytest.raises(ValueError, match="a picture, a text or both"):
            loaded.embed_queries([None], [text])
    loaded.embed_queries(texts=["x" * MAX_TEXT])
    for texts in (["x" * (MAX_TEXT + 1)], [3], "red"):
        with pytest.raises(ValueError, match="a text"):
            loaded.embed_queries(texts=texts)  # type: ignore[arg-type]


def test_graphs_hold_no_path_of_this_machine(exported: tuple[Model, Path]) -> None:
    """The exporter notes stack traces of its own run at each node: none is left."""
    for name in ("image.onnx", "query.onnx"):
        content = (exported[1] / name).read_bytes()
        assert str(ROOT).encode() not in content and b".py" not in content and b"stack_trace" not in content


def test_the_example_of_the_page_needs_no_torch(exported: tuple[Model, Path], tmp_path: Path) -> None:
    """The code in docs/sharing.md runs in a folder with the export, and imports neither torch nor this package."""
    model, folder = exported
    pictures = checked_pictures()
    for name, picture in zip(("a.png", "b.png", "c.png"), pictures, strict=False):
        picture.convert("RGBA").save(tmp_path / name)
    page = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import sys\n.*?)```", page, re.DOTALL)
    (tmp_path / "exported").symlink_to(folder)
    check = "heavy = {'torch', 'spn4cir', 'transformers'} & {*sys.modules}\nassert not heavy, heavy\n"
    check += "print(repr(float(scores[0, 1])))"
    command = [sys.executable, "-I", "-c", f"{code}\n{check}"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    query, gallery = model.embed_queries([tmp_path / "a.png"], ["but in red"]), model.embed_images([tmp_path / "c.png"])
    assert float(told.stdout.splitlines()[-1]) == pytest.approx(float((query @ gallery[0].T).max()), abs=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if name != "sprc"])
def test_every_backbone_can_be_traced(name: str, tmp_path: Path) -> None:
    """A graph of two pictures and texts gives the backbone's numbers for five, with any parts missing."""
    backbone = make(name, tmp_path)
    graphs = build_graphs(backbone)
    traced = {
        file: torch.export.export(trace.graph, trace.inputs, dynamic_shapes=trace.shapes).module()
        for file, trace in graphs.items()
    }
    pixels = torch.randn(5, 3, backbone.transform.size, backbone.transform.size)  # type: ignore[attr-defined]
    with torch.no_grad():
        features = backbone.encode_image(pixels)
        target, reference = traced["image.onnx"](pixels)
        assert torch.allclose(target, features.target, atol=1e-5)
        if not backbone.reads_texts:
            query = traced["query.onnx"](reference, target)
            assert torch.allclose(query, backbone.compose_image(features), atol=1e-5)
            return
        tokens = backbone.tokenize(["a cat with a very long text about a hat", "", "dog", "fish", ""])
        has_image, has_text = torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 1, 1, 0]).bool()
        query = traced["query.onnx"](tokens, reference, target, has_image, has_text)
        expected = backbone.compose_partial(features, tokens, has_image, has_text).query
    assert torch.allclose(query, expected, atol=1e-5)
    assert graphs["query.onnx"].input_names[-2:] == ["has_image", "has_text"]


@pytest.mark.parametrize("name", [name for name in ALL if name != "embedding"])
def test_tokenizers_agree(name: str, tmp_path: Path) -> None:
    """The exported tokenizer gives the backbone's tokens, and another one is refused."""
    backbone = make(name, tmp_path)
    tokenizer = backbone.portable_tokenizer()
    check_tokenizer(backbone, tokenizer)
    tokenizer.tokenizer.enable_truncation(5)
    with pytest.raises(InputError, match="gives other"):
        check_tokenizer(backbone, tokenizer)


def test_openai_tokenizer_agrees() -> None:
    """The tokenizer of published CLIP models, which is Python in open_clip, as a file of tokenizers."""
    tokenizer = open_clip.get_tokenizer("RN50")
    texts = [
        *CHECKED_TEXTS,
        "don't you've 3rd été <b> a_b",
        "\n tabs\tand  more ",
        "\x80 a\x1cb ŉ ǆ ｈ‘q’ e\u0301 ａ\u0301",
    ]
    found = [encoding.ids for encoding in portable_clip_tokenizer(tokenizer).encode_batch(texts)]
    assert tokenizer(texts).tolist() == found


@pytest.mark.parametrize("ratio", [None, 1.25])
@pytest.mark.parametrize("own_mode", [False, True])
def test_preprocessing_agrees(ratio: float | None, own_mode: bool) -> None:
    """Bit for bit: long pictures, small ones, palettes, transparency, light artwork."""
    kind = RgbLastTransform if own_mode else Transform
    transform = kind(SIDE, ratio)
    settings = {**vars(transform), "rgb_last": own_mode}
    light = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
    light.paste((250, 250, 250, 255), (10, 10, 30, 30))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 301, 3), np.uint8))
    pictures = [*checked_pictures(), light, noise, noise.convert("L"), noise.convert("P"), noise.resize((33, 127))]
    for picture in pictures:
        own = transform(view(picture, own_mode))
        assert np.array_equal(read_pixels(picture, settings), own.numpy()), picture


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each: a taken folder, given features, a foreign transform, no tokenizer, an export that differs."""
    backbone = tiny_backbone("clip4cir", tmp_path / "tiny")
    model = Model(backbone, "tiny", device="cpu")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    with pytest.raises(InputError, match="new or empty folder"):
        export_onnx(model, tmp_path / "taken")
    given = build_backbone("masln", image="given:4", text="given:4")
    with pytest.raises(InputError, match="reads given features"):
        export_onnx(Model(given, "x", device="cpu"), tmp_path / "a")
    monkeypatch.setattr(backbone, "transform", lambda picture: torch.zeros(3, SIDE, SIDE))
    with pytest.raises(InputError, match=r"preprocessor.json cannot describe"):
        export_onnx(model, tmp_path / "a")
    monkeypatch.undo()
    mixed = build_backbone("masln", text="given:4")
    with pytest.raises(InputError, match="no tokenizer"):
        export_onnx(Model(mixed, "x", device="cpu"), tmp_path / "a")
    with pytest.raises(InputError, match="portable_tokenizer"):
        Backbone.portable_tokenizer(backbone)
    assert not (tmp_path / "a").exists()


def test_a_difference_is_an_error(exported: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that differ by more than the tolerance stop an export: here those of other weights, and no numbers."""
    model, folder = exported
    assert export._compare(model, folder) <= export.TOLERANCE
    parameter = model.backbone.blip2.vision_projection.bias
    before = parameter.detach().clone()
    for change in (0.01, float("nan")):
        with torch.no_grad():
            parameter.add_(change)
        monkeypatch.setattr("spn4cir.model._checked", lambda vectors, name: vectors)
        with pytest.raises(InputError, match="differ from the model's by"):
            export._compare(model, folder)
        with torch.no_grad():
            parameter.copy_(before)


class Untraceable(Backbone):
    """Its query depends on the data in a way that no graph can hold."""

    name = "untraceable"
    reads_texts = False

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.transform, self.options = Transform(8), {}

    def tokenize(self, texts: Any) -> Tokens:
        return {"text": torch.tensor([[len(text)] for text in texts])}

    def encode_image(self, pixels: torch.Tensor) -> ImageFeatures:
        if float(pixels.sum()) > 1e9:
            raise AssertionError
        found = torch.nn.functional.normalize(pixels.flatten(1) * self.scale, dim=-1)[:, None]
        return ImageFeatures(found, found)

    def compose(self, reference: torch.Tensor, tokens: Tokens) -> Composed:
        return Composed(reference[:, 0])

    def image_side(self) -> list[Any]:
        return [self.scale]


def test_what_cannot_be_traced_is_one_line(tmp_path: Path) -> None:
    """A plug-in whose code no graph can hold is named in one line, and nothing is left."""
    with pytest.raises(InputError, match=r"image.onnx: torch .* cannot export this backbone") as told:
        export_onnx(Model(Untraceable(), "x", device="cpu"), tmp_path / "a")
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_settings_are_json(exported: tuple[Model, Path]) -> None:
    """What a program in another language reads."""
    settings = json.loads((exported[1] / "preprocessor.json").read_text())
    assert settings["image"]["size"] == SIDE and settings["image"]["pad_ratio"] == 1.25
    assert settings["target"] == [4, 24] and settings["tokens"] == {"text": "ids", "mask": "attention_mask"}
