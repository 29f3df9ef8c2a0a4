"""TG-CIR's two stages: what trains in each, the text's twins, saving and loading, and which CLIP it stands on."""

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from spn4cir.backbones import build_backbone
from spn4cir.backbones.tgcir import TGCIR
from spn4cir.checkpoints import load_model, save_model
from spn4cir.errors import InputError
from spn4cir.images import Transform
from spn4cir.in_batch import InBatch
from spn4cir.losses import info_nce

TEXTS = ["is red", "a cat with a hat", "", "blue", "less of it"]
TEACHER = ("teacher_remain.", "teacher_replace.", "local_weight")


@pytest.fixture
def model() -> TGCIR:
    torch.manual_seed(1)
    return TGCIR()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def stage1(model: TGCIR, pixels: Tensor) -> Tensor:
    features, targets = model.encode_image(pixels), model.encode_image(pixels.flip(0))
    composed = model.compose(features.reference, model.tokenize(TEXTS))
    contrast = InBatch(torch.arange(5), 0.1)
    terms = model.extra_losses(composed, targets, contrast)
    assert list(terms) == ["tea_rank", "tea_mask", "ortho", "ckd", "kl"]
    return sum(terms.values(), contrast(composed.query, targets.target))


def stage2(model: TGCIR, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        features = model.encode_image(pixels)
    query = model.compose(features.reference, model.tokenize(TEXTS)).query
    return info_nce(query, features.target, torch.arange(5).flip(0), 0.1)


@torch.no_grad()
def outputs(model: TGCIR, pixels: Tensor) -> list[Tensor]:
    features = model.encode_image(pixels)
    return [*features, model.compose(features.reference, model.tokenize(TEXTS)).query]


def equal(one: list[Tensor], two: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(one, two, strict=True)]


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_masks_begin_as_published(model: TGCIR) -> None:
    """0.1, and ones on a quarter of the columns, another quarter for each."""
    assert model.masks.shape == (4, 128)
    masks = model.masks.tolist()
    for row in range(4):
        for column in range(128):
            assert masks[row][column] == pytest.approx(1.0 if column // 32 == row else 0.1)
    assert torch.equal(model.local_weight, torch.ones(12))


def test_all_of_stage_1_gets_a_gradient(model: TGCIR, pixels: Tensor) -> None:
    """Every parameter but CLIP's own scale trains, and learns something in one step."""
    stage1(model, pixels).backward()
    still = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert still == ["clip.logit_scale"]
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize("option", ["ortho", "ckd", "kl"])
def test_weights_of_the_terms(pixels: Tensor, option: str) -> None:
    """An option scales its own term and no other."""
    found = []
    for factor in (1.0, 3.0):
        torch.manual_seed(1)
        model = TGCIR(**{option: 0.5 * factor})  # type: ignore[arg-type]
        features, targets = model.encode_image(pixels), model.encode_image(pixels.flip(0))
        composed = model.compose(features.reference, model.tokenize(TEXTS))
        found.append(model.extra_losses(composed, targets, InBatch(torch.arange(5), 0.1)))
    for name, term in found[0].items():
        assert float((found[1][name] / term).detach()) == pytest.approx(3.0 if name == option else 1.0)


def test_it_learns(model: TGCIR, pixels: Tensor) -> None:
    """Ten steps of stage 1 on one batch bring its loss well down."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = stage1(model, pixels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def test_separating_changes_no_output(model: TGCIR, pixels: Tensor) -> None:
    """Bit for bit; the twins are tensors of their own; a second call changes nothing."""
    before = outputs(model, pixels)
    model.untie_text_side()
    assert equal(outputs(model, pixels), before) == [True] * 3 and model.options["separated"] is True
    twins = {"text_learner.weight", "text_learner.bias", "text_masks"}
    assert twins <= model.state_dict().keys()
    assert model.text_masks is not None and model.text_masks.data_ptr() != model.masks.data_ptr()
    with torch.no_grad():
        model.text_masks += 1
    held = model.text_masks
    model.untie_text_side()
    assert model.text_masks is held and not torch.equal(model.text_masks, model.masks)


@pytest.mark.parametrize("part", ["text_masks", "text_learner.bias", "masks", "learner.bias"])
def test_each_side_reads_its_own(model: TGCIR, pixels: Tensor, part: str) -> None:
    """Changing the text's twin moves queries alone; changing the shared one moves images, and no text."""
    model.untie_text_side()
    before, texts = outputs(model, pixels), model._encode_text(model.tokenize(TEXTS)["text"])
    with torch.no_grad():
        model.get_parameter(part).add_(0.5)
    after = model._encode_text(model.tokenize(TEXTS)["text"])
    assert equal(outputs(model, pixels), before) == ([True, True, False] if "text" in part else [False] * 3)
    assert torch.equal(texts, after) == ("text" not in part)


def test_twins_keep_their_type(model: TGCIR) -> None:
    """They are made where and of what the shared ones are."""
    model.double().untie_text_side()
    assert model.text_masks is not None and model.text_masks.dtype == torch.float64
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}


def trains(name: str) -> bool:
    """What stage 2 trains, by the definition: CLIP's text, its layer, its twins, and the student's gate."""
    if name.startswith("clip."):
        return not name.startswith("clip.visual.") and name != "clip.logit_scale"
    return name.startswith(("text_", "gate."))


def test_stage_2_trains_the_text_side_and_nothing_else(model: TGCIR, pixels: Tensor) -> None:
    """Exactly that requires a gradient, and gets one that is not zero."""
    model.freeze_image_side()
    stage2(model, pixels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == trains(name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trains(name), name
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {"masks", "learner.weight", "image_fc.bias"} <= set(frozen) and any(n.startswith(TEACHER) for n in frozen)


def test_steps_of_stage_2_leave_the_image_side_alone(model: TGCIR, pixels: Tensor) -> None:
    """Bit for bit after three steps, while queries move."""
    model.freeze_image_side()
    trained = [p for p in model.parameters() if p.requires_grad]
    before, side = outputs(model, pixels), model.image_state()
    held = {name: value.clone() for name, value in side.items()}
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        stage2(model, pixels).backward()
        optimizer.step()
    assert equal(outputs(model, pixels), before) == [True, True, False]
    assert "masks" in held and all(torch.equal(model.image_state()[name], value) for name, value in held.items())


def test_everything_stays_in_eval_mode(model: TGCIR) -> None:
    """As published, whatever is asked for."""
    assert not any(module.training for module in model.train().modules())


def test_reference_of_half_precision_is_close(model: TGCIR, pixels: Tensor) -> None:
    """A reference that a bank held in half precision gives nearly the same query."""
    features = model.encode_image(pixels)
    tokens = model.tokenize(TEXTS)
    exact, rounded = (model.compose(r, tokens).query for r in (features.reference, features.reference.half().float()))
    assert not torch.equal(exact, rounded) and float((exact - rounded).detach().abs().max()) < 1e-3


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separated", [False, True], ids=["stage 1", "separated"])
def test_a_saved_model_is_the_same(model: TGCIR, pixels: Tensor, tmp_path: Path, separated: bool) -> None:
    """Bit-equal vectors, of a model that has its options and its twins."""
    model.options["ckd"] = 1.5
    if separated:
        model.freeze_image_side()
        with torch.no_grad():
            model.text_masks.add_(0.3)  # type: ignore[union-attr]
    save_model(tmp_path / "run", model, {})
    loaded = load_model(tmp_path / "run")
    assert isinstance(loaded, TGCIR) and loaded.options == model.options
    assert loaded.options["separated"] is separated and loaded.options["ckd"] == 1.5
    assert equal(outputs(loaded, pixels), outputs(model, pixels)) == [True] * 3
    assert all(p.requires_grad == (n != "clip.logit_scale") for n, p in loaded.named_parameters())


def test_a_stage_1_model_goes_on_to_stage_2(model: TGCIR, pixels: Tensor, tmp_path: Path) -> None:
    """Loaded, its twins begin as what was shared; a model of stage 2 loaded keeps its own."""
    save_model(tmp_path / "one", model, {})
    second = load_model(tmp_path / "one")
    second.freeze_image_side()
    assert equal(outputs(second, pixels), outputs(model, pixels)) == [True] * 3  # type: ignore[arg-type]
    with torch.no_grad():
        second.text_masks.add_(0.3)  # type: ignore[union-attr, operator]
    save_model(tmp_path / "two", second, {})
    third = load_model(tmp_path / "two")
    third.freeze_image_side()
    assert torch.equal(third.text_masks, second.text_masks)  # type: ignore[arg-type]
    assert not torch.equal(third.text_masks, third.masks)  # type: ignore[arg-type]


def test_twins_that_are_missing_are_named(model: TGCIR, tmp_path: Path) -> None:
    """Weights without twins do not fit a note that says there are some."""
    save_model(tmp_path / "run", model, {})
    note = (tmp_path / "run" / "model.json").read_text().replace('"separated": false', '"separated": true')
    (tmp_path / "run" / "model.json").write_text(note)
    with pytest.raises(InputError, match=r"3 missing, such as text_learner\.bias"):
        load_model(tmp_path / "run")


# --- which CLIP ------------------------------------------------------------------------------------------------------


def test_images_are_not_padded(model: TGCIR) -> None:
    """A wide picture is cut at its sides, where CLIP4CIR's padding would show them."""
    wide = Image.new("RGB", (200, 100), "red")
    wide.paste("blue", (50, 0, 150, 100))
    found = model.transform(wide)
    assert found.shape == (3, 64, 64) and float(found[:, :, 2:-2].std(dim=(1, 2)).max()) < 1e-5  # blue alone
    assert isinstance(model.transform, Transform) and torch.unique(Transform(64, 1.25)(wide)[0]).numel() > 1


def test_texts_fill_the_context(model: TGCIR) -> None:
    """All positions of all texts, one too long for it among them."""
    assert model.tokenize([*TEXTS, "a red cat " * 40])["text"].shape == (6, 24)


@pytest.mark.parametrize("name", ["RN50", "coca_ViT-B-32", "ViT-B-32-SigLIP2-256"])
def test_another_layout_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything but OpenAI's vision transformer, in one line that names it and what to take."""
    small = {"RN50": {"layers": [1, 1, 1, 1], "width": 8}, "coca_ViT-B-32": {"attentional_pool": True, "layers": 1}}
    vision = {
        "image_size": 64,
        "patch_size": 16,
        "width": 64,
        "head_width": 32,
        **small.get(name, {"pool_type": "avg"}),
    }
    clip = open_clip.CLIP(32, {"layers": 1, **vision}, {"vocab_size": 9, "width": 64, "heads": 2, "layers": 1})
    clip.visual.image_mean, clip.visual.image_std = (0.5,) * 3, (0.5,) * 3
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: clip)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: None)
    with pytest.raises(InputError) as raised:
        TGCIR(name)
    assert name in str(raised.value) and "ViT-B-16-quickgelu" in str(raised.value) and "\n" not in str(raised.value)


def test_temperature_of_kl_is_positive() -> None:
    """Zero or less is an error in words."""
    with pytest.raises(InputError, match="kl_temperature"):
        TGCIR(kl_temperature=0.0)


def test_counts_of_the_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-B/16 on the meta device: the text tower that stage 2 trains, 63.4 M, and all the rest by hand."""
    config = open_clip.get_model_config("ViT-B-16-quickgelu")

    def without_weights(*_: object, **__: object) -> open_clip.CLIP:
        clip = open_clip.CLIP(**config)
        clip.visual.image_mean, clip.visual.image_std = (0.5,) * 3, (0.5,) * 3
        return clip

    monkeypatch.setattr(open_clip, "create_model", without_weights)
    with torch.device("meta"):
        model = build_backbone("tgcir", model="ViT-B-16-quickgelu", load_weights=False)
    model.freeze_image_side()
    width, layers = 512, 12
    block = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width  # attention, MLP, two norms
    tower = 49408 * width + 77 * width + layers * block + 2 * width + width * width
    assert tower == 63_428_096
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(size for name, size in sizes.items() if name.startswith("clip.")) == tower
    gate = 2 * width * width + width + width + 1
    assert sum(sizes.values()) == tower + (width * width + width) + (8 * width + 8) + 4 * width + gate
    everything = sum(p.numel() for p in model.parameters())
    image = 149_620_737 - tower + (768 * width + width) + (8 * width + 8) + 4 * width  # CLIP ViT-B/16, its scale too
    assert everything == sum(sizes.values()) + image + 2 * gate + 12
    assert all(p.is_meta for p in model.parameters())
