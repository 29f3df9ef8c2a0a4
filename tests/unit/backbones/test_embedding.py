"""Embedding: any tower and a neck, what trains, what a checkpoint needs, and what is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from spn4cir.backbones import build_backbone
from spn4cir.backbones.embedding import Embedding, TowerFeatures
from spn4cir.backbones.shared_clip import EMBEDDED
from spn4cir.checkpoints import load_model, save_model
from spn4cir.errors import InputError
from spn4cir.types import ImageFeatures

TOWER: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip


def pictures(count: int = 3) -> list[Image.Image]:
    chance = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(256, (70, 50, 3), generator=chance, dtype=torch.uint8).numpy())
        for _ in range(count)
    ]


def build(**options: Any) -> Embedding:
    torch.manual_seed(0)
    model = build_backbone("embedding", **options)
    assert isinstance(model, Embedding)
    return model


def timm_folder(folder: Path) -> str:
    folder.mkdir()
    torch.manual_seed(1)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    (folder / "config.json").write_text('{"architecture": "test_vit", "num_classes": 0}')
    save_file(model.state_dict(), folder / "model.safetensors")
    return f"timm:{folder}"


def transformers_folder(folder: Path) -> str:
    torch.manual_seed(1)
    transformers.ViTModel(transformers.ViTConfig(**TOWER)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return f"transformers:{folder}"


def run_folder(folder: Path) -> str:
    save_model(folder, build_backbone("clip4cir"), {})
    return f"run:{folder}"


TOWERS = {
    "embedded": lambda folder: "embedded",
    "open_clip": lambda folder: f"open_clip:local-dir:{EMBEDDED / 'clip'}",
    "timm": timm_folder,
    "transformers": transformers_folder,
    "run": run_folder,
}


@pytest.mark.parametrize("kind", TOWERS)
def test_any_tower(kind: str, tmp_path: Path) -> None:
    """Features, neck and embedding by hand; a checkpoint is the same model, without the weights it came from."""
    model = build(model=TOWERS[kind](tmp_path / "tower"), width=8)
    pixels = torch.stack([model.transform(picture) for picture in pictures()])
    with torch.no_grad():
        found = model.encode_image(pixels)
        assert model.neck is not None
        features = found.reference[:, 0].double()
        expected = F.normalize(features @ model.neck.weight.double().T + model.neck.bias.double(), dim=-1)
    assert found.reference.shape == (3, 1, model.features) and found.target.shape == (3, 1, 8)
    torch.testing.assert_close(found.target[:, 0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.compose_image(found), found.target[:, 0])
    assert not torch.allclose(found.reference[0], found.reference[1])
    save_model(tmp_path / "saved", model, {})
    for weights in (tmp_path / "tower").glob("model.safetensors"):
        weights.unlink()
    if kind == "run":
        shutil.rmtree(tmp_path / "tower")
    again = load_model(tmp_path / "saved")
    with torch.no_grad():
        same = again.encode_image(torch.stack([again.transform(picture) for picture in pictures()]))
    assert torch.equal(same.target, found.target) and torch.equal(same.reference, found.reference)


def test_necks() -> None:
    """Pooling averages neighbours; without a neck the features themselves count."""
    model, bare = build(neck="pool", width=5), build(neck="none")
    features = torch.randn(4, 1, model.features, generator=torch.Generator().manual_seed(0))
    bounds = [(n * model.features // 5, -(-(n + 1) * model.features // 5)) for n in range(5)]
    means = torch.stack([features[:, 0, first:last].mean(1) for first, last in bounds], 1)
    torch.testing.assert_close(model.embed(features), F.normalize(means, dim=-1))
    torch.testing.assert_close(bare.embed(features), F.normalize(features[:, 0], dim=-1))
    assert not next(iter(model.parameters())).requires_grad and model.neck is None


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_last_blocks_train(count: int, tmp_path: Path) -> None:
    """A gradient reaches the neck and so many blocks, and nothing else."""
    model = build(model=transformers_folder(tmp_path / "vit"), width=4, blocks=count)
    model.train()
    pixels = torch.stack([model.transform(picture) for picture in pictures()])
    model.embed(model.encode_image(pixels).reference).sum().backward()  # type: ignore[no-untyped-call]
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    blocks = {found[1] for name in reached if (found := re.search(r"layers?\.(\d+)\.", name))}
    assert blocks == {str(n) for n in range(3 - count, 3)}
    assert {name for name in reached if "layer" not in name} == {"neck.weight", "neck.bias"}
    assert all(p.requires_grad == (name in reached) for name, p in model.named_parameters() if p.grad is not None)


def test_the_last_blocks_of_images_train() -> None:
    """Of a CLIP, whose last blocks are those of texts."""
    model = build(model=f"open_clip:local-dir:{EMBEDDED / 'clip_transformer'}", width=4, blocks=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("tower")}
    pixels = torch.stack([model.transform(picture) for picture in pictures()])
    model.embed(model.encode_image(pixels).reference).sum().backward()  # type: ignore[no-untyped-call]
    assert {name for name, p in model.named_parameters() if p.grad is not None and name.startswith("tower")} == trained
    assert trained and all(".visual.transformer.resblocks." in name for name in trained)
    assert len({name.split("resblocks.")[1].split(".")[0] for name in trained}) == 1
    with pytest.raises(InputError, match="blocks, and 99 should train"):
        build(model=f"open_clip:local-dir:{EMBEDDED / 'clip_transformer'}", width=4, blocks=99)


def test_dropout_is_of_training_alone() -> None:
    """A neck that trains drops features; a model that is evaluated does not."""
    model = build(dropout=0.5)
    features = torch.randn(2, 1, model.features)
    torch.testing.assert_close(model.embed(features), model.embed(features))
    model.train()
    assert not torch.allclose(model.embed(features), model.embed(features))


def test_features_do_not_depend_on_the_neck() -> None:
    """What is cached belongs to the tower: one fingerprint for all necks, another for another tower."""
    from spn4cir.bank import fingerprint

    models = [build(width=8), build(width=16, dropout=0.0), build(model=f"open_clip:local-dir:{EMBEDDED / 'clip'}")]
    towers = [TowerFeatures(model) for model in models]
    prints = [fingerprint(tower, {"a": "b"}, {"reference": "float32"}) for tower in towers]
    assert prints[0] == prints[1] != prints[2]
    pixels = torch.stack([models[0].transform(picture) for picture in pictures()])
    with torch.no_grad():
        assert torch.equal(towers[0].encode_image(pixels).reference, models[0].encode_image(pixels).reference)


def test_texts_are_refused() -> None:
    """Tokens, queries with a text, and texts in a gallery; an empty text stands for none."""
    model = build()
    features = ImageFeatures(torch.randn(2, 1, model.features), torch.randn(2, 1, 64))
    tokens = model.tokenize(["", ""])
    none = torch.zeros(2, dtype=torch.bool)
    torch.testing.assert_close(
        model.compose_partial(features, tokens, None, none).query, model.embed(features.reference)
    )
    for ask in (
        lambda: model.tokenize(["a hat"]),
        lambda: model.compose(features.reference, tokens),
        lambda: model.compose_text(tokens),
        lambda: model.encode_text_target(tokens),
    ):
        with pytest.raises(InputError, match=r"reads images alone|cannot embed texts"):
            ask()


@pytest.mark.parametrize(("options", "match"), [
    ({"neck": "conv"}, "a neck is one of linear, pool, none"),
    ({"width": 0}, "width 0"),
    ({"dropout": 1.0}, r"dropout is in \[0, 1\)"),
    ({"width": 5000}, "5000 numbers are more than"),
    ({"blocks": 99}, "blocks, and 99 should train"),
    ({"model": "resnet50"}, "image tower 'resnet50' is unknown"),
    ({"model": "run:nowhere"}, "nowhere holds no model"),
    ({"model": "timm:no_such_model"}, "timm has no model"),
])  # fmt: skip
def test_options_that_fit_nothing(options: dict[str, Any], match: str) -> None:
    """One line that says what is wrong."""
    with pytest.raises(InputError, match=match) as error:
        build(**options)
    assert "\n" not in str(error.value)
