"""sentence-transformers: what ``encode`` gives equals the model's own embeddings."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_backbones import TINY, tiny_backbone

import spn4cir
from spn4cir.backbones import build_backbone
from spn4cir.errors import InputError
from spn4cir.export import sentence_transformers as export
from spn4cir.export.onnx import checked_pictures
from spn4cir.export.sentence_transformers import export_sentence_transformers
from spn4cir.model import Model

ONE_VECTOR = (*(name for name in TINY if name != "sprc"), "embedding", "masln")


@pytest.fixture
def freestyle(tmp_path: Path) -> tuple[Model, SentenceTransformer]:
    """A model whose query of a picture alone is not the picture's target, and its export."""
    model = Model(tiny_backbone("freestyle", tmp_path), "tiny", device="cpu")
    assert export_sentence_transformers(model, tmp_path / "exported") <= 1e-5
    return model, SentenceTransformer(str(tmp_path / "exported"), device="cpu", trust_remote_code=True)


def same(one: np.ndarray, other: torch.Tensor) -> bool:  # type: ignore[type-arg]
    return np.allclose(one, other.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ONE_VECTOR)
def test_every_backbone_with_one_vector(name: str, tmp_path: Path) -> None:
    """The export's own comparison passes, and the folder is one that ``spn4cir.load`` reads."""
    model = Model(tiny_backbone(name, tmp_path) if name in TINY else build_backbone(name), "tiny", device="cpu")
    assert export_sentence_transformers(model, tmp_path / "exported") <= 1e-5
    again, pictures = spn4cir.load(tmp_path / "exported", device="cpu"), checked_pictures()[:3]
    assert torch.allclose(again.embed_images(pictures), model.embed_images(pictures), atol=1e-6)


def test_each_kind_of_input(freestyle: tuple[Model, SentenceTransformer], tmp_path: Path) -> None:
    """Pictures and texts, alone and together, as query, as document and as neither; mixed in one call, by file too."""
    model, loaded = freestyle
    first, second = checked_pictures()[:2]
    path = tmp_path / "second.png"
    second.save(path)
    target, query = model.embed_images([first])[0], model.embed_queries([first])[0]
    assert float((target - query).abs().max()) > 1e-2
    assert same(loaded.encode(first), target) and same(loaded.encode_document(first), target)
    assert same(loaded.encode_query(first), query)
    found = loaded.encode([{"image": str(path), "text": "in red"}, {"image": first, "text": "blue"}], batch_size=1)
    assert same(found, model.embed_queries([path, first], ["in red", "blue"]))
    assert same(loaded.encode(["blue", "a red heart"]), model.embed_queries(texts=["blue", "a red heart"]))
    assert same(loaded.encode([str(path), {"image": first}]), model.embed_images([path, first])[:, 0])
    assert same(loaded.encode_query([str(path)]), model.embed_queries([path]))
    tokens = model.backbone.tokenize(["a red heart"])
    assert same(loaded.encode_document(["a red heart"]), model.backbone.encode_text_target(tokens)[:, 0].detach())
    assert same(loaded.encode("heart", prompt="a red "), model.embed_queries(texts=["a red heart"])[0])
    assert loaded.get_embedding_dimension() == 24 and loaded.modalities == ["image", "text", ("image", "text")]
    assert loaded.similarity(found, found).shape == (2, 2)
    assert len(loaded.encode([])) == 0


def test_no_path_of_weights_is_written(tmp_path: Path) -> None:
    """The file that the weights came from is in neither note, and the model keeps its options."""
    model = Model(build_backbone("clip4cir"), "tiny", device="cpu")
    model.backbone.options["pretrained"] = "/home/alice/secret/weights.pt"
    export_sentence_transformers(model, tmp_path / "exported")
    for path in (tmp_path / "exported").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path
    assert model.backbone.options["pretrained"] == "/home/alice/secret/weights.pt"


def test_what_is_refused(freestyle: tuple[Model, SentenceTransformer], tmp_path: Path) -> None:
    """One line each: several vectors, texts that are no targets, inputs of other kinds, a taken folder."""
    model, loaded = freestyle
    picture = checked_pictures()[0]
    with pytest.raises(InputError, match=r"4 vectors.*--onnx"):
        export_sentence_transformers(Model(tiny_backbone("sprc", tmp_path), "x", device="cpu"), tmp_path / "a")
    with pytest.raises(InputError, match="new or empty"):
        export_sentence_transformers(model, tmp_path / "exported")
    with pytest.raises(InputError, match="gallery item is a picture or a text"):
        loaded.encode_document([{"image": picture, "text": "in red"}])
    for wrong in (3, {"audio": picture}, {"image": picture, "text": 3}, {"text": ""}, None):
        with pytest.raises(InputError, match="an input is a text, a picture"):
            loaded[0].preprocess([wrong])
    with pytest.raises(InputError, match="this text is empty"):
        loaded.encode_query([""])
    for long in ("x" * 1001, {"image": picture, "text": "x" * 1001}):
        with pytest.raises(InputError, match="1001 characters"):
            loaded.encode_query([long])
    with pytest.raises(InputError, match=r"is missing"):
        loaded[0].preprocess([Path("nowhere.png")])
    with pytest.raises(ValueError, match="mixes multiple modalities"):  # sentence-transformers' own rule
        loaded.encode([picture, "a red heart"])
    only = export.ComposedModule(build_backbone("embedding"))
    assert only.modalities == ["image"]
    with pytest.raises(InputError, match="reads no texts"):
        only.preprocess(["a red heart"])
    with pytest.raises(InputError, match="given features"):
        export.ComposedModule(build_backbone("masln", image="given:4"))
    texts = export.ComposedModule(tiny_backbone("clip4cir", tmp_path))
    with pytest.raises(InputError, match="cannot embed texts as targets"):
        texts(texts.preprocess(["a red heart"], task="document"))
    assert not (tmp_path / "a").exists()


def test_a_difference_is_an_error(
    freestyle: tuple[Model, SentenceTransformer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that does not give back the model's numbers is not kept."""
    forward = export.ComposedModule.forward

    def shifted(*given: object, **more: object) -> dict[str, object]:
        found = forward(*given, **more)  # type: ignore[arg-type]
        return {**found, "sentence_embedding": found["sentence_embedding"] + 1e-4}

    monkeypatch.setattr(export.ComposedModule, "forward", shifted)
    with pytest.raises(InputError, match=r"differ from the model's by 0.0001, over 1e-05"):
        export_sentence_transformers(freestyle[0], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_package_works_without_them(tmp_path: Path) -> None:
    """Where a package of the extra is missing, the command says which and how to get it; all else is unaffected."""
    hide = "import importlib.util as u; find = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == {!r} else find(name, *rest)\n"
    call = "import sys; sys.argv = ['spn4cir-export', {!r}, 'out', '--run', 'embedded']\n"
    call += "from spn4cir.export_cli import export_command; export_command()"
    for option, package in (("--onnx", "onnxruntime"), ("--sentence-transformers", "sentence_transformers")):
        code = hide.format(package) + call.format(option)
        told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert told.returncode == 2
        assert told.stderr == f"error: the package {package} is missing: pip install 'spn4cir[export]'\n"
