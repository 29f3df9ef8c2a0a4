"""Matchers: each gives the unit vectors that its library gives by hand."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from conftest import Toy, draw_picture
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import transforms as T

import spn4cir
from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import save_model
from spn4cir.data_gen import unicom
from spn4cir.data_gen.matchers import LOADERS, content_digest, identify, load_matcher
from spn4cir.data_gen.unicom import PUBLISHED, SIZES, Size, Unicom
from spn4cir.errors import InputError
from spn4cir.images import ImageSource

EMBEDDED = Path(spn4cir.__file__).parent / "embedded" / "clip"
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"patch_size": 16, "image_size": 32}
TEXT = {**TOWER, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
SQUARE = {"height": 32, "width": 32}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Image.Image]:
    """Three, of other shapes than models take."""
    found = []
    for n, size in enumerate([(48, 40), (40, 90), (64, 64)]):
        draw_picture(tmp_path / "pictures" / f"{n}.png", n, size)
        found.append(Image.open(tmp_path / "pictures" / f"{n}.png").convert("RGB"))
    return found


def by_matcher(name: str, pictures: list[Image.Image]) -> Tensor:
    """(B, E), checked to be of unit norm, in float32, and the same by one as by all."""
    matcher = load_matcher(name)
    assert matcher.made_by == identify(name) and json.dumps(matcher.made_by)
    pixels = torch.stack([matcher.transform(p) for p in pictures])
    found = matcher.encode(pixels)
    assert found.dtype == torch.float32 and found.ndim == 2 and len(found) == len(pictures)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(pictures)))
    torch.testing.assert_close(matcher.encode(pixels[1:2]), found[1:2])
    assert not found.requires_grad and not any(m.training for m in matcher.module.modules())
    return found


def l2_normalize(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def same(found: Tensor, expected: Tensor, other: Tensor) -> None:
    """The vectors expected; and the comparison tells them from others, which are no slip of the last bit away."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape != other.shape or (found - other).abs().max() > 1e-3


def shaken(module: torch.nn.Module) -> Any:
    """Weights that tell images apart, the same ones each time, in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return module.eval()


def test_embedded_is_what_it_was(toy: Toy) -> None:
    """Bit by bit what the clip4cir backbone's target vectors are."""
    backbone = build_backbone("clip4cir", model="embedded", pretrained=None).eval()
    ids = toy.training_images()
    with torch.inference_mode():
        expected = backbone.encode_target(ImageSource(toy.image, backbone.transform).stack(ids))[:, 0]
    matcher = load_matcher("embedded")
    found = matcher.encode(ImageSource(toy.image, matcher.transform).stack(ids))
    assert torch.equal(found, expected)
    assert not torch.equal(found[:1], expected[2:3])  # the second is a twin of the first


def test_open_clip(pictures: list[Image.Image]) -> None:
    """The library's own model and preprocessing: not the embedded matcher's, which pads."""
    clip, prepare = open_clip.create_model_from_pretrained(f"local-dir:{EMBEDDED}")
    with torch.inference_mode():
        expected = l2_normalize(clip.eval().encode_image(torch.stack([prepare(p) for p in pictures])))
    found = by_matcher(f"open_clip:local-dir:{EMBEDDED}", pictures)
    padded = by_matcher("embedded", pictures)
    same(found, expected, padded)
    torch.testing.assert_close(found[0], padded[0])  # a picture that needs no padding


def test_open_clip_weights_in_a_file(tmp_path: Path, pictures: list[Image.Image]) -> None:
    """MODEL:FILE reads a file as the weights of a named architecture, and other weights are refused."""
    config = json.loads((EMBEDDED / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"] = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 60}
    (tmp_path / "a-tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "a-tiny-clip.json")
    clip = shaken(open_clip.create_model("a-tiny-clip", pretrained=None, load_weights=False))
    path = tmp_path / "weights.safetensors"
    save_file(clip.state_dict(), path)
    prepare = open_clip.image_transform(64, is_train=False, mean=clip.visual.image_mean, std=clip.visual.image_std)
    assert clip.visual.image_size in (64, (64, 64))
    with torch.inference_mode():
        expected = l2_normalize(clip.encode_image(torch.stack([prepare(p) for p in pictures])))
    name = f"open_clip:a-tiny-clip:{path}"
    same(by_matcher(name, pictures), expected, expected.flip(0))
    assert identify(name) == {"kind": "open_clip", "model": "a-tiny-clip", "weights": content_digest(path)}
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"open_clip:a-tiny-clip:.* cannot be loaded") as error:
        load_matcher(name)
    assert "\n" not in str(error.value)


def save_timm(folder: Path, architecture: str = "test_vit") -> Any:
    """A tiny model of timm in a folder of its own schema."""
    folder.mkdir()
    model = shaken(timm.create_model(architecture, pretrained=False, num_classes=7))
    config = {"architecture": architecture, "num_classes": 7, "pretrained_cfg": {
        "input_size": [3, 160, 160], "interpolation": "bicubic", "crop_pct": 0.95, "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4], "num_classes": 7, "fixed_input_size": True,
        "first_conv": "patch_embed.proj", "classifier": "head"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


@pytest.mark.parametrize("schema", ["", "local-dir:"])
def test_timm(tmp_path: Path, pictures: list[Image.Image], schema: str) -> None:
    """The features before the classifier, by timm's own preprocessing of the folder's config."""
    model = save_timm(tmp_path / "model")
    prepare = T.Compose([T.Resize(int(160 / 0.95), T.InterpolationMode.BICUBIC), T.CenterCrop(160), T.ToTensor(),
                         T.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])])  # fmt: skip
    pixels = torch.stack([prepare(p) for p in pictures])
    with torch.inference_mode():
        states = model.forward_features(pixels)
        expected, other = (l2_normalize(model.forward_head(states, pre_logits=True)), l2_normalize(model(pixels)))
    same(by_matcher(f"timm:{schema}{tmp_path / 'model'}", pictures), expected, other)


def clip_of_transformers() -> Any:
    text = transformers.CLIPTextConfig(**TEXT).to_dict()
    vision = transformers.CLIPVisionConfig(**TOWER).to_dict()
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    ), transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)


def siglip() -> Any:
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=TOWER)
    return transformers.SiglipModel(config), transformers.SiglipImageProcessor(size=SQUARE)


def dinov2() -> Any:
    processor = transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    return transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)), processor


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**TOWER)), transformers.ViTImageProcessor(size=SQUARE)


def vit_classifier() -> Any:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER))
    return model, transformers.ViTImageProcessor(size=SQUARE)


def resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config), transformers.ViTImageProcessor(size=SQUARE)


def no_class_token() -> Any:
    config = transformers.ViTMSNConfig(**TOWER)
    return transformers.ViTMSNModel(config), transformers.ViTImageProcessor(size=SQUARE)


def first(states: Tensor) -> Tensor:
    return states[:, 0]


KINDS: dict[str, tuple[Callable[[], Any], str, Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "clip": (clip_of_transformers, "the image embedding",
             lambda m, x: m.visual_projection(m.vision_model(x).pooler_output),
             lambda m, x: m.vision_model(x).pooler_output),
    "siglip": (siglip, "the image embedding", lambda m, x: m.vision_model(x).pooler_output,
               lambda m, x: m.vision_model(x).last_hidden_state.mean(1)),
    "dinov2": (dinov2, "the pooled output", lambda m, x: first(m(x).last_hidden_state),
               lambda m, x: m(x).last_hidden_state.mean(1)),
    "vit": (vit, "the pooled output",
            lambda m, x: torch.tanh(m.pooler.dense(first(m(x).last_hidden_state))),
            lambda m, x: first(m(x).last_hidden_state)),
    "a classifier": (vit_classifier, "the class token", lambda m, x: first(m.vit(x).last_hidden_state),
                     lambda m, x: m(x).logits),
    "resnet": (resnet, "the pooled output", lambda m, x: m(x).last_hidden_state.mean((2, 3)),
               lambda m, x: m(x).last_hidden_state.amax((2, 3))),
    "vit_msn": (no_class_token, "the class token", lambda m, x: first(m(x).last_hidden_state),
                lambda m, x: m(x).last_hidden_state.mean(1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_transformers(tmp_path: Path, pictures: list[Image.Image], kind: str) -> None:
    """The vector that stands for an image, of each family; a pooler whose weights are missing is not read."""
    make, says, expected, other = KINDS[kind]
    model, processor = make()
    shaken(model).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pixels = torch.cat([processor(images=p, return_tensors="pt")["pixel_values"] for p in pictures])
    name = f"transformers:{tmp_path / 'model'}"
    with torch.inference_mode():
        same(by_matcher(name, pictures), l2_normalize(expected(model, pixels)), l2_normalize(other(model, pixels)))
    assert load_matcher(name).says == says


def test_transformers_without_all_weights(tmp_path: Path) -> None:
    """A model that would be partly random is refused, by the name of what is missing."""
    model, processor = vit()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = sorted(name for name in weights if "layer.1" in name or "layers.1" in name)
    assert lost
    save_file({n: v for n, v in weights.items() if n not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks {len(lost)} weights of its model, such as "):
        load_matcher(f"transformers:{tmp_path}")


def test_transformers_without_a_vector(tmp_path: Path) -> None:
    """A model that needs text as well, and gives no image features, is refused in one line."""
    config = transformers.ViltConfig(**TEXT, num_images=-1)
    transformers.ViltModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size=SQUARE).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="gives no vector for an image") as error:
        load_matcher(f"transformers:{tmp_path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["clip4cir", "sprc"])
def test_run(tmp_path: Path, pictures: list[Image.Image], name: str) -> None:
    """A checkpoint of ours: its target vector, or the mean of its four, of unit norm again."""
    from tiny_backbones import tiny_backbone

    backbone: Backbone = tiny_backbone(name, tmp_path).eval()
    save_model(tmp_path / "run", backbone, {})
    with torch.inference_mode():
        targets = backbone.encode_target(torch.stack([backbone.transform(p) for p in pictures]))  # (B, K, E)
    assert targets.shape[1] == {"clip4cir": 1, "sprc": 4}[name]
    found = by_matcher(f"run:{tmp_path / 'run'}", pictures)
    if targets.shape[1] == 1:
        assert torch.equal(found, targets[:, 0])
    else:
        same(found, l2_normalize(targets.sum(1)), targets[:, 0])


@pytest.mark.parametrize("published", [True, False])
def test_unicom(tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch, published: bool) -> None:
    """By size from the cache, or by file; its preprocessing is the original's, without padding."""
    size = Size(image=32, patch=16, width=8, depth=1, heads=2, embedding=6)
    monkeypatch.setitem(SIZES, "ViT-B/32", size)
    monkeypatch.setenv("SPN4CIR_CACHE", str(tmp_path))
    model = shaken(Unicom(size))
    path = tmp_path / "unicom" / ("FP16-ViT-B-32.pt" if published else "own.pt")
    path.parent.mkdir()
    torch.save(model.state_dict(), path)
    weights = unicom.Weights(path.name, "b32", unicom.check_weights(path) if not published else _sha256(path))
    if published:
        monkeypatch.setitem(PUBLISHED, "ViT-B/32", weights)
    name = "unicom:ViT-B/32" if published else f"unicom:{path}"
    assert identify(name)["weights"] == _sha256(path)
    prepare = T.Compose([T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(), T.Normalize(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))])  # fmt: skip
    matcher = load_matcher(name)
    assert all(torch.equal(matcher.transform(p), prepare(p)) for p in pictures)
    with torch.inference_mode():
        expected = l2_normalize(model(torch.stack([prepare(p) for p in pictures])))
    same(by_matcher(name, pictures), expected, expected.flip(0))


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    """A folder that is moved or renamed is the same matcher; one byte of its weights or config makes another."""
    save_timm(tmp_path / "a")
    first_ = identify(f"timm:{tmp_path / 'a'}")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("about")
    assert identify(f"timm:local-dir:{tmp_path / 'b'}") == first_
    seen = [first_]
    for file in ("model.safetensors", "config.json"):
        path = tmp_path / "b" / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # in the middle, which no look at the ends would see
        path.write_bytes(content)
        assert identify(f"timm:{tmp_path / 'b'}") not in seen
        seen.append(identify(f"timm:{tmp_path / 'b'}"))


@pytest.mark.parametrize(("name", "told"), [
    ("nothing", r"'nothing' is unknown; known: embedded, unicom:.*, open_clip:.*, timm:.*, transformers:.*run:FOLDER$"),
    ("ViT-B-32:openai", r"is unknown; known: embedded"),
    ("embedded:x", r"is unknown; known: embedded"),
    ("timm:", r"is unknown; known: embedded"),
    ("unicom:ViT-H/14", r"unicom has no size 'ViT-H/14'; known: ViT-B/32, "),
    ("unicom:gone.pt", r"gone\.pt is missing"),
    ("open_clip:ViT-B-3:openai", r"no model 'ViT-B-3'; the closest of \d+ are .*ViT-B-32"),
    ("open_clip:ViT-B-32", r"needs a tag .*, got ''; known: openai, laion"),
    ("open_clip:ViT-B-32:gone", r"needs a tag .*, got 'gone'; known: openai, laion"),
    ("open_clip:ViT-B-32:openai", r"another activation: it is open_clip:ViT-B-32-quickgelu:openai$"),
    ("open_clip:ViT-B-32-quickgelu:laion2b_e16", r"needs a tag|it is open_clip:ViT-B-32:laion2b_e16$"),
    ("open_clip:local-dir:gone", r"there is no folder gone"),
    ("open_clip:hf-hub:org/gone", r"get https://huggingface\.co/org/gone and give its folder"),
    ("open_clip:ViT-B-32-quickgelu:openai", r"get https://huggingface\.co/\S+ and give its file"),
    ("timm:resnet1", r"no model 'resnet1'; the closest of \d+ are resnet"),
    ("timm:resnet18", r"get https://huggingface\.co/timm/resnet18\S+ and give its folder, as timm:FOLDER"),
    ("timm:local-dir:gone", r"there is no folder gone"),
    ("transformers:org/gone", r"get https://huggingface\.co/org/gone and give its folder, as transformers:FOLDER"),
    ("transformers:./gone", r"there is no folder gone"),
    ("run:gone", r"gone holds no model: model\.json is missing"),
])  # fmt: skip
def test_what_is_not_there(name: str, told: str, caplog: pytest.LogCaptureFixture) -> None:
    """One line that says what is known, or where to get it."""
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match=told) as error:
        load_matcher(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("kind", ["timm", "transformers", "open_clip:local-dir"])
def test_an_empty_folder(tmp_path: Path, kind: str) -> None:
    """Named, in one line."""
    with pytest.raises(InputError, match="cannot be loaded") as error:
        load_matcher(f"{kind}:{tmp_path}")
    assert "\n" not in str(error.value)


def test_every_kind_is_tested() -> None:
    """A new kind comes with its test."""
    assert LOADERS.keys() == {"embedded", "unicom", "open_clip", "timm", "transformers", "run"}
