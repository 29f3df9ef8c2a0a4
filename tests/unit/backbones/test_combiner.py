"""CLIP4CIR's Combiner: its formula, its dropout, what trains with it, and the file that holds it alone."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spn4cir.backbones import build_backbone
from spn4cir.backbones.clip4cir import CLIP4CIR, Combiner
from spn4cir.batches import TripletBatch
from spn4cir.checkpoints import load_model, save_model
from spn4cir.cli import import_command
from spn4cir.errors import InputError
from spn4cir.importers import import_published
from spn4cir.objective import Objective

E, B = 3, 4
LAYERS = ("text_projection_layer", "image_projection_layer", "combiner_layer", "output_layer")
PUBLISHED = {
    f"{layer}.{kind}" for layer in (*LAYERS, "dynamic_scalar.0", "dynamic_scalar.3") for kind in ("weight", "bias")
}


def model(**options: Any) -> CLIP4CIR:
    torch.manual_seed(3)
    built = build_backbone("clip4cir", fusion="combiner", **options)
    assert isinstance(built, CLIP4CIR)
    return built


def inputs(backbone: CLIP4CIR) -> tuple[Tensor, dict[str, Tensor]]:
    pixels = torch.randn(B, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return pixels, backbone.tokenize(["is red", "has a flower on the left", "blue", ""])


def by_hand(state: dict[str, Tensor], image: list[float], text: list[float]) -> list[Tensor]:
    """One row, number by number, from the formula."""

    def affine(layer: str, x: list[Any]) -> list[Any]:
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        return [bias[i] + sum(weight[i, j] * x[j] for j in range(len(x))) for i in range(len(bias))]

    def relu(x: list[Any]) -> list[Any]:
        return [value if value > 0 else 0 * value for value in x]

    c = relu(affine("text_projection_layer", text)) + relu(affine("image_projection_layer", image))
    z = relu(affine("combiner_layer", c))
    (score,) = affine("dynamic_scalar.3", relu(affine("dynamic_scalar.0", c)))
    share = 1 / (1 + (-score).exp())
    out = affine("output_layer", z)
    return [out[i] + share * text[i] + (1 - share) * image[i] for i in range(len(image))]


# --- formula ---------------------------------------------------------------------------------------------------------


def test_the_combiner_is_its_formula_in_values_and_gradients() -> None:
    """Loops in float64, to 1e-12; text and image exchanged would differ."""
    dice = torch.Generator().manual_seed(0)
    combiner = Combiner(E).double().eval()
    for value in combiner.parameters():
        value.data.normal_(0, 0.5, generator=dice)
    image, text = (torch.randn(B, E, dtype=torch.double, generator=dice).requires_grad_() for _ in range(2))
    weights = torch.randn(B, E, dtype=torch.double, generator=dice)
    state = dict(combiner.named_parameters())
    wanted = torch.stack([torch.stack(by_hand(state, list(image[n]), list(text[n]))) for n in range(B)])
    found = combiner(image, text)
    assert (found - wanted).abs().max() <= 1e-12
    leaves = [image, text, *combiner.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), leaves)
    theirs = torch.autograd.grad((wanted * weights).sum(), leaves)
    assert all((a - b).abs().max() <= 1e-12 for a, b in zip(ours, theirs, strict=True))
    assert all(gradient.abs().max() > 1e-6 for gradient in ours)
    assert (combiner(text, image) - wanted).abs().max() > 1e-2


def test_sizes_are_the_published_ones() -> None:
    """E = 640: projections of 2,560 and hidden layers of 5,120, under the published names."""
    with torch.device("meta"):
        state = Combiner(640).state_dict()
    assert state.keys() == PUBLISHED
    assert state["image_projection_layer.weight"].shape == state["text_projection_layer.weight"].shape == (2560, 640)
    assert state["combiner_layer.weight"].shape == state["dynamic_scalar.0.weight"].shape == (5120, 5120)
    assert state["output_layer.weight"].shape == (640, 5120) and state["dynamic_scalar.3.weight"].shape == (1, 5120)


def test_the_query_is_the_combination_of_clips_vectors() -> None:
    """Of the vectors as CLIP gives them, not normalised; the sum and normalised inputs would differ."""
    backbone = model()
    pixels, tokens = inputs(backbone)
    with torch.no_grad():
        features, query = backbone.encode_image(pixels), backbone.encode_query(pixels, tokens)
        image, text = backbone.clip.encode_image(pixels), backbone.clip.encode_text(tokens["text"])
        for parts, same in (((image, text), True), ((image / image.norm(dim=-1, keepdim=True), text), False)):
            mixed = backbone.combiner(*parts)
            apart = (query - mixed / mixed.norm(dim=-1, keepdim=True)).abs().max()
            assert apart <= 1e-5 if same else apart > 1e-3
        added = image + text
        assert (query - added / added.norm(dim=-1, keepdim=True)).abs().max() > 1e-3
        plain = build_backbone("clip4cir").encode_image(pixels)
    assert torch.equal(features.target, plain.target)  # targets are none of its business


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_on_where_the_backbone_trains_with_it() -> None:
    """CLIP in eval mode always; the Combiner as it is told, and in eval mode twice the same."""
    backbone = model()
    pixels, tokens = inputs(backbone)
    reference = backbone.encode_image(pixels).reference.detach()

    def twice() -> bool:
        return torch.equal(backbone.compose(reference, tokens).query, backbone.compose(reference, tokens).query)

    for mode in (True, False, True):
        backbone.train(mode)
        assert not any(part.training for part in backbone.clip.modules())
        assert {part.training for part in backbone.combiner.modules()} == {mode}
        assert twice() != mode
    backbone.freeze_image_side()  # still in train mode
    assert not twice() and not backbone.clip.visual.training


def test_four_places_drop_a_half() -> None:
    """a, b, z and the scalar's hidden layer: about half of each is zero, the rest is doubled."""
    torch.manual_seed(0)
    combiner = Combiner(16).train()
    seen: list[tuple[Tensor, Tensor]] = []
    for part in combiner.modules():
        if isinstance(part, torch.nn.Dropout):
            part.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    combiner(torch.randn(64, 16), torch.randn(64, 16))
    assert [before.shape[1] for before, _ in seen] == [64, 64, 128, 128]
    for before, after in seen:
        positive = before > 0
        assert 0.45 < (after[positive] == 0).float().mean() < 0.55
        kept = positive & (after != 0)
        assert torch.equal(after[kept], 2 * before[kept])


# --- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("train_clip", [True, False])
def test_what_trains_gets_a_gradient(stage: int, train_clip: bool) -> None:
    """The Combiner in any case; CLIP if it is told to, and in stage 2 without its visual tower; nothing else."""
    backbone = model(train_clip=train_clip)
    pixels, tokens = inputs(backbone)
    if stage == 2:
        backbone.freeze_image_side()
    backbone.train()
    rows = torch.arange(B)
    objective = Objective(backbone, 0.01)
    objective(TripletBatch(tokens, rows, rows.flip(0)[:, None], rows[:, None], pixels=pixels)).backward()
    moved = {name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert moved == trained
    assert {name.removeprefix("combiner.") for name in trained if name.startswith("combiner.")} == PUBLISHED
    parts = {name.split(".")[1] for name in trained if name.startswith("clip.")}
    if not train_clip:
        assert not parts
    else:
        assert "transformer" in parts and ("visual" in parts) == (stage == 1)


def test_a_clip_that_is_frozen_sees_few_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a batch give what the batch gives; one that trains sees it whole."""
    monkeypatch.setattr("spn4cir.backbones.shared_vision.IMAGES_IN_ONE_PASS", 3)
    frozen, free = model(train_clip=False), model()
    pixels, _ = inputs(frozen)
    seen: list[int] = []
    for backbone in (frozen, free):
        backbone.clip.visual.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    apart = (frozen.encode_image(pixels).target - free.encode_image(pixels).target).abs().max()
    assert apart <= 1e-6 and seen == [3, 1, 4]


@pytest.mark.parametrize(("options", "said"), [
    ({"fusion": "product"}, "no fusion 'product'; known: sum, combiner"),
    ({"train_clip": False}, "leaves nothing to train"),
])  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_backbone("clip4cir", **options)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_saving_and_loading_changes_no_bit(tmp_path: Path) -> None:
    """Whatever of it differs from the defaults is in the options."""
    backbone = model(train_clip=False)
    pixels, tokens = inputs(backbone)
    save_model(tmp_path, backbone, {})
    loaded = load_model(tmp_path)
    assert loaded.options == backbone.options and not loaded.training
    assert torch.equal(loaded.encode_query(pixels, tokens), backbone.encode_query(pixels, tokens))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in backbone.parameters()]


def test_a_sum_goes_on_as_a_combiner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first stage's CLIP is kept to the bit, the Combiner is new, and that is said."""
    first = build_backbone("clip4cir")
    with torch.no_grad():
        first.clip.token_embedding.weight.mul_(1.5)
    save_model(tmp_path, first, {})
    second = load_model(tmp_path, {"fusion": "combiner", "train_clip": False})
    assert "initialised anew" in capsys.readouterr().out
    own = second.state_dict()
    assert {key for key in own if key not in first.state_dict()} == {f"combiner.{name}" for name in PUBLISHED}
    assert all(torch.equal(own[key], value) for key, value in first.state_dict().items())


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path, CLIP4CIR]:
    """A file as the original's second stage writes it, the folder of its CLIP, and what both together are."""
    whole = model()
    dice = torch.Generator().manual_seed(9)
    for value in whole.parameters():
        value.data.add_(0.02 * torch.randn(value.shape, generator=dice))
    clip = build_backbone("clip4cir")
    clip.load_state_dict({key: value for key, value in whole.state_dict().items() if key.startswith("clip.")})
    save_model(tmp_path / "base", clip, {})
    torch.save({"epoch": 5, "Combiner": whole.combiner.state_dict()}, tmp_path / "combiner.pt")
    return tmp_path / "combiner.pt", tmp_path / "base", whole


def test_a_combiner_is_joined_with_its_clip(
    published: tuple[Path, Path, CLIP4CIR], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """``spn4cir-import … --base``: bit-equal queries, each name accounted for; another CLIP would give others."""
    path, base, whole = published
    output = tmp_path / "joined"
    words = ["spn4cir-import", "--backbone", "clip4cir", str(path), "--base", str(base), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    import_command()
    said = capsys.readouterr().out
    assert f"CLIP and all else from {base}" in said and "progress of its training: epoch" in said
    pixels, tokens = inputs(whole)
    found = load_model(output)
    assert torch.equal(found.encode_query(pixels, tokens), whole.encode_query(pixels, tokens))
    note = json.loads((output / "model.json").read_text())
    assert note["options"]["fusion"] == "combiner" and note["imported_from"] == "combiner.pt"
    other = build_backbone("clip4cir")
    save_model(tmp_path / "other", other, {})
    strange = import_published(path, tmp_path / "strange", "clip4cir", {}, tmp_path / "other")
    assert (strange.encode_query(pixels, tokens) - whole.encode_query(pixels, tokens)).abs().max() > 1e-3


def test_what_cannot_be_joined(published: tuple[Path, Path, CLIP4CIR], tmp_path: Path) -> None:
    """One line each: no base, a base for a whole model, another width, a missing tensor, a model beside."""
    path, base, whole = published

    def refused(said: str, folder: Path | None, content: dict[str, Any] | None = None, **options: str) -> None:
        if content:
            torch.save(content, path)
        with pytest.raises(InputError, match=said) as raised:
            import_published(path, tmp_path / "out", "clip4cir", options, folder)
        assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()

    refused("CLIP is not in it: give --base FOLDER", None)
    refused("leave out --model", base, model="embedded")
    refused("holds no model", tmp_path)
    state = whole.combiner.state_dict()
    refused("1 missing, such as combiner.dynamic_scalar.3.bias", base, {
        "Combiner": {key: value for key, value in state.items() if key != "dynamic_scalar.3.bias"}
    })  # fmt: skip
    refused("of another shape", base, {"Combiner": Combiner(64).state_dict()})
    refused("not finite", base, {"Combiner": {**state, "output_layer.bias": torch.full((128,), math.nan)}})
    clip = {key.removeprefix("clip."): value for key, value in whole.state_dict().items() if key.startswith("clip.")}
    refused("a whole model, which needs no --base", base, {"CLIP": clip}, model="embedded")
