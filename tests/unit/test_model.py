"""A model as people use it: where it is loaded from, and what it makes of pictures and texts."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import draw_picture
from PIL import Image
from tiny_backbones import TINY, tiny_backbone

import spn4cir
from spn4cir.checkpoints import save_model
from spn4cir.errors import InputError
from spn4cir.model import Model
from spn4cir.types import ImageRef


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{n}.png" for n in range(5)]
    for path in paths:
        draw_picture(path, path.name)
    return paths


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of a tiny model."""
    save_model(tmp_path / "saved", tiny_backbone("clip4cir", tmp_path), {})
    return tmp_path / "saved"


def test_embeddings_are_those_of_the_backbone(saved: Path, pictures: list[Path]) -> None:
    """Whatever the pictures are given as, and whatever the batch size."""
    model, small = spn4cir.load(saved, device="cpu"), spn4cir.load(str(saved), device="cpu", batch_size=2)
    opened = [Image.open(path) for path in pictures]
    pixels = torch.stack([model.backbone.transform(one.convert("RGB")) for one in opened])
    with torch.no_grad():
        features = model.backbone.encode_image(pixels)
        tokens = model.backbone.tokenize(["red"] * 5)
        composed = model.backbone.compose(features.reference, tokens).query
    for given in (pictures, [str(path) for path in pictures], opened, [ImageRef(path) for path in pictures]):
        assert torch.allclose(model.embed_images(given), features.target, atol=1e-6)
        assert torch.allclose(small.embed_images(given), features.target, atol=1e-6)
        assert torch.allclose(small.embed_queries(given, ["red"] * 5), composed, atol=1e-6)
    assert model.target_shape == (1, 24) and model.embed_images([]).shape == (0, 1, 24)
    assert model.embed_queries([], []).shape == (0, 24)


@pytest.mark.parametrize("name", TINY)
def test_queries_of_one_part_and_of_both_in_one_call(name: str, tmp_path: Path, pictures: list[Path]) -> None:
    """Each is what it is alone."""
    model = Model(tiny_backbone(name, tmp_path), "tiny", device="cpu")
    mixed = model.embed_queries([pictures[0], None, pictures[1]], [None, "in red", "in blue"])
    alone = (
        model.embed_queries([pictures[0]]),
        model.embed_queries(texts=["in red"]),
        model.embed_queries([pictures[1]], ["in blue"]),
    )
    assert torch.allclose(mixed, torch.cat(alone), atol=1e-5)
    assert torch.allclose(mixed.norm(dim=1), torch.ones(3), atol=1e-5)


def test_half_precision(saved: Path, pictures: list[Path]) -> None:
    """Layers compute in bfloat16; embeddings are float32 and near."""
    whole, half = (spn4cir.load(saved, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))  # type: ignore[arg-type]
    exact, near = (model.embed_images(pictures) for model in (whole, half))
    assert near.dtype == torch.float32 and not torch.equal(exact, near)
    assert float((exact * near).sum(2).min()) > 0.99 and whole.fingerprint == half.fingerprint


def test_the_fingerprint_is_of_the_image_side(saved: Path, tmp_path: Path) -> None:
    """An index of stage 1 serves stage 2, which trains the text side."""
    model, other = (Model(tiny_backbone("clip4cir", tmp_path), "x", device="cpu") for _ in range(2))
    assert model.fingerprint == other.fingerprint == spn4cir.load(saved).fingerprint
    side = other.backbone.image_state()
    text = next(value for name, value in other.backbone.state_dict().items() if name not in side)
    with torch.no_grad():
        text.add_(1)
    assert Model(other.backbone, "x", device="cpu").fingerprint == model.fingerprint
    with torch.no_grad():
        next(iter(side.values())).add_(1)
    assert Model(other.backbone, "x", device="cpu").fingerprint != model.fingerprint


def test_a_hub_id_is_read_from_the_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the hub's cache, offline."""
    cache = tmp_path / "cache"
    repository = cache / "models--owner--name"
    (repository / "snapshots").mkdir(parents=True)
    saved.rename(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = spn4cir.load("owner/name")
    assert model.name == "owner/name" and model.target_shape == (1, 24)
    with pytest.raises(InputError, match="model owner/other: there is no such folder, and the hub did not give it"):
        spn4cir.load("owner/other")
    (repository / "snapshots" / "abc" / "model.json").unlink()
    with pytest.raises(InputError, match=r"model\.json is missing"):
        spn4cir.load("owner/name")


def test_what_cannot_be_embedded(saved: Path, tmp_path: Path) -> None:
    model = spn4cir.load(saved, device="cpu")
    (tmp_path / "broken.png").write_bytes(b"x")
    cases = {
        "broken.png does not decode": lambda: model.embed_images([tmp_path / "broken.png"]),
        "is missing": lambda: model.embed_images([tmp_path / "nothing.png"]),
        "a query needs an image, a text or both": lambda: model.embed_queries([None], [None]),
        "1 images and 2 texts": lambda: model.embed_queries([None], ["a", "b"]),
        "a text has 10000 characters": lambda: model.embed_queries(texts=["x" * 10_000]),
        "model nothing is missing": lambda: spn4cir.load("nothing"),
        "holds no model": lambda: spn4cir.load(tmp_path),
        "batch_size must be at least 1": lambda: spn4cir.load(saved, batch_size=0),
        "dtype must be": lambda: spn4cir.load(saved, dtype="int8"),  # type: ignore[arg-type]
        "device nowhere": lambda: spn4cir.load(saved, device="nowhere"),
    }
    for message, call in cases.items():
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_embeddings_that_are_not_finite(tmp_path: Path, pictures: list[Path]) -> None:
    backbone = tiny_backbone("clip4cir", tmp_path)
    with torch.no_grad():
        for value in backbone.image_state().values():
            value.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        Model(backbone, "broken", device="cpu").embed_images(pictures)
