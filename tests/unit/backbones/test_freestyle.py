"""Freestyle: the style vector and the prompts written out a second time, what trains, and what stays as it is."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir.backbones import build_backbone
from spn4cir.backbones.freestyle import STYLE, Freestyle
from spn4cir.backbones.shared_style import StyleFilters, StyleSpace, kmeans, read_filters
from spn4cir.checkpoints import load_model, save_model
from spn4cir.compute import checkpoint_blocks
from spn4cir.config import TrainConfig
from spn4cir.errors import InputError
from spn4cir.losses import info_nce
from spn4cir.stages import load_backbone

TEXTS = ["a red heart", "with a hat", "", "blue", "less of it"]


def patterns(count: int, seed: int = 0) -> Tensor:
    """Pictures (4 · count, 3, 64, 64) of four styles, one after the other: smooth, noisy, striped, flat blocks."""
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, count, 3, 64, 64, generator=chance)
    smooth = F.interpolate(noise[0, :, :, :4, :4], size=64, mode="bilinear")
    striped = noise[2, :, :, :, :1].expand(-1, -1, -1, 64)
    blocks = F.interpolate(noise[3, :, :, :8, :8], size=64, mode="nearest")
    return torch.cat([smooth, noise[1], striped, blocks])


def fitted(**options: Any) -> Freestyle:
    torch.manual_seed(1)
    model = build_backbone("freestyle", **options)
    assert isinstance(model, Freestyle) and model.statistics_sample == 1024
    pictures = patterns(12)
    model.fit_statistics(pictures[12:], [STYLE["names"][1 + n // 12] for n in range(36)], pictures[:12])
    assert model.statistics_sample == 0
    return model


@pytest.fixture(scope="module")
def model() -> Freestyle:
    return fitted()


def test_pictures_without_a_label_are_left_out() -> None:
    """Among labelled ones; noise without a label moves no centre."""
    pictures, labels = patterns(12), [STYLE["names"][1 + n // 12] for n in range(36)]
    one, two = (build_backbone("freestyle") for _ in range(2))
    assert isinstance(one, Freestyle) and isinstance(two, Freestyle)
    one.fit_statistics(pictures[12:], labels, pictures[:12])
    noise = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    two.fit_statistics(torch.cat([pictures[12:], noise]), [*labels, *[None] * 5], pictures[:12])
    torch.testing.assert_close(two.style_space.centres, one.style_space.centres)
    assert two.style["names"] == one.style["names"]


# --- formulas --------------------------------------------------------------------------------------------------------


def test_gram_matrices_by_their_definition(model: Freestyle) -> None:
    """In float64, entry by entry, of plain RGB."""
    pixels = patterns(1)
    mean, std = (torch.tensor(v).double()[:, None, None] for v in model._colours)
    x = pixels.double() * std + mean
    weights = {name: value.double() for name, value in model.filters.state_dict().items()}
    for number in range(3):
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = F.conv2d(padded, weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"]).clamp(min=0)
        x = (
            x[:, :, ::2, ::2].maximum(x[:, :, 1::2, ::2]).maximum(x[:, :, ::2, 1::2].maximum(x[:, :, 1::2, 1::2]))
            if number == 1
            else x
        )
    expected = []
    for picture in x:
        rows = picture.flatten(1)
        entries = [(rows[i] * rows[j]).sum() / (32 * 32) for i in range(32) for j in range(i, 32)]
        expected.append((torch.stack(entries) + 1e-6).log())
    torch.testing.assert_close(model._grams(pixels).double(), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_style_vectors_are_whitened_principal_components() -> None:
    """Unit variance, uncorrelated, the same as numpy's eigenvectors of the correlation matrix give up to sign."""
    chance = torch.Generator().manual_seed(0)
    grams = torch.randn(200, 8256, generator=chance) * torch.rand(8256, generator=chance) + 3
    grams[:, :50] += 3 * torch.randn(200, 1, generator=chance)  # one strong component
    space = StyleSpace(8256, 2, 6, 0.1)
    space.fit(grams, [n % 2 for n in range(200)])
    found = space(grams).double()
    torch.testing.assert_close(found.T @ found / 199, torch.eye(6).double(), atol=1e-3, rtol=0)
    rows = grams.double()
    rows = (rows - rows.mean(0)) / rows.std(0)
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    assert values[0] > values[1]
    expected = left[:, :6] * 199**0.5
    signs = (found * expected).sum(0).sign()
    torch.testing.assert_close(found, expected * signs, atol=1e-3, rtol=0)
    torch.testing.assert_close(space.centres[1].double(), found[1::2].mean(0), atol=1e-4, rtol=0)


def test_few_pictures_leave_components_at_zero() -> None:
    space = StyleSpace(8256, 2, 8, 0.1)
    space.fit(torch.randn(4, 8256, generator=torch.Generator().manual_seed(0)), [0, 1, 0, 1])
    assert space.components[:, :3].any() and not space.components[:, 3:].any() and bool(space.is_fitted)


def test_noise_is_not_blown_up() -> None:
    """Pictures that come twice, but for noise, have half as many components."""
    chance = torch.Generator().manual_seed(0)
    once = torch.randn(18, 528, generator=chance)
    grams = torch.cat([once, once + 1e-4 * torch.randn(18, 528, generator=chance)])
    space = StyleSpace(528, 2, 32, 0.1)
    space.fit(grams, [n % 2 for n in range(36)])
    unseen = space(torch.randn(50, 528, generator=chance))
    assert unseen.norm(dim=-1).max() < 10 and int(space.components.any(0).sum()) == 17


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_pictures_for_a_style_space(count: int) -> None:
    with pytest.raises(InputError, match=f"2 styles need two pictures each, got {count} in all"):
        StyleSpace(528, 2, 8, 0.1).fit(torch.randn(count, 528), [0] * count)


def written_out(model: Freestyle, pixels: Tensor) -> Tensor:
    """Embeddings of images alone, (B, E), from the formulas, in float64."""
    visual = model.clip.visual
    weights = {name: value.double() for name, value in visual.state_dict().items()}
    tables = {name: table.double() for name, table in model.tables.state_dict().items()}
    assert model.query_norms is not None and model.query_norm is not None
    norms = {name: value.double() for name, value in model.query_norms.state_dict().items()}
    mean, std = (torch.tensor(v)[:, None, None] for v in model._colours)
    space, options = model.style_space, model.options
    v = (model.filters(pixels * std + mean) - space.mean).double() @ space.components.double()
    cosines = torch.stack([F.cosine_similarity(v, centre.double()[None]) for centre in space.centres], 1)
    w = (cosines / options["style"]["temperature"]).exp()
    w = w / w.sum(1, keepdim=True)  # (B, S)
    x = F.conv2d(pixels.double(), weights["conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    first = weights["class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + weights["positional_embedding"]
    width = x.shape[2]

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight.double(), bias.double())

    x = norm(x, weights["ln_pre.weight"], weights["ln_pre.bias"])
    for number in range(6):
        if number == 0 and "shallow" in model.tables:
            shallow = torch.einsum("bs,std->btd", w, tables["shallow.weight"])
            x = torch.cat([x[:, :1], shallow, x[:, 1:]], 1)
        if number == 5 and "deep" in model.tables:
            table = tables["deep.weight"]
            deep = table[0] + torch.einsum("br,rtd->btd", v[:, :8], table[1:]) / 8**0.5
            x = torch.cat([x[:, :1], deep, x[:, 1:]], 1)
        block = {
            k.removeprefix(f"transformer.resblocks.{number}."): t
            for k, t in weights.items()
            if f"resblocks.{number}." in k
        }
        y = norm(x, norms[f"{number}.ln_1.weight"], norms[f"{number}.ln_1.bias"])
        q, k, value = F.linear(y, block["attn.in_proj_weight"], block["attn.in_proj_bias"]).chunk(3, -1)
        heads = [t.view(*t.shape[:2], 4, 32).transpose(1, 2) for t in (q, k, value)]
        attention = (heads[0] @ heads[1].transpose(-1, -2) / 32**0.5).softmax(-1) @ heads[2]
        x = x + F.linear(
            attention.transpose(1, 2).flatten(2), block["attn.out_proj.weight"], block["attn.out_proj.bias"]
        )
        y = norm(x, norms[f"{number}.ln_2.weight"], norms[f"{number}.ln_2.bias"])
        y = F.gelu(F.linear(y, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]))
        x = x + F.linear(y, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    last = model.query_norm.state_dict()
    head: Tensor = norm(x[:, 0], last["weight"], last["bias"]) @ weights["proj"]
    return F.normalize(head, dim=-1)


@pytest.mark.parametrize("place", ["both", "shallow", "deep", "none"])
@torch.no_grad()
def test_embeddings_written_out(place: str) -> None:
    """Style vector, mixture, prompts at the first and the last block, own norms; seven pictures, an odd batch."""
    model, pixels = fitted(place=place), patterns(2)[:7]
    for parameter in model.parameters():  # norms that differ from those of the gallery
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    found = model.embed_prompted(model.encode_image(pixels).reference)
    torch.testing.assert_close(found.double(), written_out(model, pixels), atol=2e-5, rtol=0)


def test_mixtures(model: Freestyle) -> None:
    """Weights sum to one; a picture of a style is nearest to its centre; text and names in the order of the options."""
    with torch.no_grad():
        seen = model.describe_reference(model.encode_image(patterns(6, seed=9)).reference)
    assert list(seen) == STYLE["names"]
    weights = torch.stack(list(seen.values()), 1)  # (24, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(24))
    assert (weights.argmax(1) == torch.arange(24) // 6).float().mean() > 0.9


# --- what depends on the style ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_prompts_change_with_the_style(model: Freestyle) -> None:
    """Other style rows give another query; of static prompts they change nothing."""
    static = fitted(prompts="static")
    for one, differs in ((model, True), (static, False)):
        reference = one.encode_image(patterns(2)).reference
        other = reference.clone()
        other[:, -1] = other[:, -1].flip(0)  # patches as they were, styles of others
        assert torch.equal(one.embed_prompted(reference), one.embed_prompted(other)) is not differs


def test_static_prompts_have_as_many_parameters() -> None:
    counts = {
        prompts: sum(
            p.numel()
            for p in build_backbone("freestyle", prompts=prompts, trains="prompts").parameters()
            if p.requires_grad
        )
        for prompts in ("style", "static")
    }
    assert counts["style"] == counts["static"] == (4 + 9) * 4 * 128


@torch.no_grad()
def test_without_prompts_the_query_is_clips_own() -> None:
    """Bit for bit, before anything is trained."""
    model = fitted(place="none")
    features = model.encode_image(patterns(2)[:5])
    assert torch.equal(model.compose_image(features), features.target[:, 0])


# --- what trains -----------------------------------------------------------------------------------------------------


def loss_of(model: Freestyle, pixels: Tensor) -> Tensor:
    features = model.encode_image(pixels)
    joint = model.compose(features.reference, model.tokenize(TEXTS)).query
    alone, text = model.compose_image(features), model.compose_text(model.tokenize(TEXTS)).query
    return sum(
        (info_nce(q, features.target, torch.arange(5).flip(0), 0.1) for q in (joint, alone, text)), torch.zeros(())
    )


@pytest.mark.parametrize("trains", ["prompts", "norms", "all"])
@pytest.mark.parametrize("place", ["both", "shallow", "deep"])
def test_gradients_reach_what_trains_and_nothing_else(trains: str, place: str) -> None:
    """After a step photographs are embedded as before, to the bit, and all that trains has moved."""
    model, pixels = fitted(trains=trains, place=place).train(), patterns(2)[:5]
    state = {name: value.clone() for name, value in model.image_state().items()}
    before = model.encode_image(pixels)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss_of(model, pixels).backward()  # type: ignore[no-untyped-call]
    silent = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not silent and not [n for n, p in model.named_parameters() if p.grad is not None and n not in trained]
    old = {name: p.detach().clone() for name, p in trained.items()}
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert not [name for name in trained if torch.equal(old[name], trained[name])]
    after = model.encode_image(pixels)
    assert torch.equal(before.reference, after.reference) and torch.equal(before.target, after.target)
    now = model.image_state()
    assert now.keys() == state.keys() and all(torch.equal(state[name], now[name]) for name in state)
    assert not set(trained) & now.keys()
    kinds = {"prompts": (), "norms": ("ln_", "query_norm"), "all": ("clip.", "query_")}[trains]
    assert all(name.startswith("tables.") or any(kind in name for kind in kinds) for name in trained)


@pytest.mark.parametrize("trains", ["prompts", "norms", "all"])
def test_activation_checkpoints_are_exact(trains: str) -> None:
    """Also once the norms of queries differ from those of photographs."""
    model, pixels = fitted(trains=trains), patterns(2)[:5]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    gradients = []
    for again in (False, True):
        if again:
            assert checkpoint_blocks(model) >= 6
        model.zero_grad()
        loss_of(model, pixels).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# --- queries ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_query_without_its_text_is_the_image_alone(model: Freestyle) -> None:
    """And without its image the text alone, in one batch with whole queries."""
    features, tokens = model.encode_image(patterns(2)[:5]), model.tokenize(TEXTS)
    has_reference = torch.tensor([True, True, False, True, False])
    has_text = torch.tensor([True, False, True, False, True])
    found = model.compose_partial(features, tokens, has_reference, has_text).query
    torch.testing.assert_close(found[[1, 3]], model.compose_image(features)[[1, 3]])
    torch.testing.assert_close(found[[2, 4]], model.compose_text(tokens).query[[2, 4]])
    torch.testing.assert_close(found[:1], model.compose(features.reference, tokens).query[:1])
    parts = model.compose_image(features)[0] + model.compose_text(tokens).query[0]
    torch.testing.assert_close(found[0], parts / parts.norm())


@torch.no_grad()
def test_any_batch_size_gives_the_same(model: Freestyle) -> None:
    pictures = patterns(17)[:67]  # more than are encoded in one pass, and odd
    whole = model.compose_image(model.encode_image(pictures))
    for size in (1, 7, 24):
        parts = [model.compose_image(model.encode_image(part)) for part in pictures.split(size)]  # type: ignore[no-untyped-call]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


def test_a_checkpoint_holds_the_style_space(model: Freestyle, tmp_path: Path) -> None:
    """It is not fitted again, and gives the same embeddings to the bit."""
    save_model(tmp_path, model, {})
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Freestyle) and loaded.statistics_sample == 0
    with torch.no_grad():
        one, two = (m.compose_image(m.encode_image(patterns(1))) for m in (model, loaded))
    assert torch.equal(one, two)


def test_a_change_of_one_setting_of_the_style_keeps_the_others(tmp_path: Path) -> None:
    """Names, width and filters are those of the checkpoint, and a change of them is refused."""
    save_model(tmp_path, fitted(style={"temperature": 0.2}), {})
    changed = load_backbone(
        TrainConfig(backbone="freestyle", init=str(tmp_path), backbone_options={"style": {"rank": 8}}), 2
    )
    assert changed.options["style"]["temperature"] == 0.2
    for name, value in {"names": ["photo", "art", "sketch", "mosaic"], "width": 32, "filters": "torchvision"}.items():
        with pytest.raises(InputError, match=f"was made with style.{name} .*: it cannot become"):
            load_backbone(
                TrainConfig(backbone="freestyle", init=str(tmp_path), backbone_options={"style": {name: value}}), 2
            )


@torch.no_grad()
def test_no_style_is_described_before_any_is_known() -> None:
    model = build_backbone("freestyle")
    assert model.describe_reference(model.encode_image(patterns(1)).reference) == {}


# --- styles ----------------------------------------------------------------------------------------------------------


def test_without_labels_styles_are_clusters() -> None:
    """k-means finds four well separated patterns; their names say that nobody named them."""
    model = build_backbone("freestyle")
    assert isinstance(model, Freestyle)
    pictures = patterns(12)
    model.fit_statistics(pictures[12:], [None] * 36, pictures[:12])
    assert model.options["style"]["names"] == [f"cluster {n}" for n in (1, 2, 3, 4)]


def test_clusters_are_directions() -> None:
    """Pictures of one direction are one cluster, however long; by distance, the short ones of all would be one."""
    chance = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4, 1, 8, generator=chance), dim=-1)
    lengths = 10 ** (2 * torch.rand(4, 30, 1, generator=chance) - 1)  # 0.1 to 10
    points = lengths * (directions + 0.05 * torch.randn(4, 30, 8, generator=chance))
    centres = kmeans(points.flatten(0, 1), 4)
    nearest = (F.normalize(points, dim=-1) @ centres.T).argmax(-1)  # (4, 30)
    assert sorted(row.unique().tolist() for row in nearest) == [[0], [1], [2], [3]]
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(4))


def test_labels_that_are_no_styles() -> None:
    model = build_backbone("freestyle")
    with pytest.raises(
        InputError, match=r"names is photo, sketch, art, mosaic, and the references' labels are oil, photo"
    ):
        model.fit_statistics(patterns(1), ["oil"] * 4, patterns(1))


@pytest.mark.parametrize("layout", ["torchvision", "style transfer"])
def test_filters_of_a_file(layout: str, tmp_path: Path) -> None:
    """What either file does to colours first joins the first convolution: features are the same as by hand."""
    chance = torch.Generator().manual_seed(0)
    keys = ("features.0", "features.2", "features.5") if layout == "torchvision" else ("2", "5", "9")
    shapes = ((64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3))
    state = {
        f"{key}.weight": 0.1 * torch.randn(shape, generator=chance) for key, shape in zip(keys, shapes, strict=True)
    }
    state |= {f"{key}.bias": torch.randn(shape[0], generator=chance) for key, shape in zip(keys, shapes, strict=True)}
    state |= {"0.weight": torch.randn(3, 3, 1, 1, generator=chance), "0.bias": torch.randn(3, generator=chance)}
    torch.save(state, tmp_path / "vgg.pth")
    pixels = torch.rand(2, 3, 32, 32, generator=chance)
    if layout == "torchvision":
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        x = (pixels - mean) / std
    else:
        x = F.conv2d(pixels, state["0.weight"], state["0.bias"])
    for key in keys:
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), state[f"{key}.weight"], state[f"{key}.bias"]).relu()
        x = F.max_pool2d(x, 2) if key == keys[1] else x
    gram = torch.einsum("bchw,bdhw->bcd", x, x) / (16 * 16)
    rows, columns = torch.triu_indices(128, 128)
    found = StyleFilters(str(tmp_path / "vgg.pth"))(pixels)
    torch.testing.assert_close(found, (gram[:, rows, columns] + 1e-6).log(), atol=1e-2, rtol=1e-3)


def test_filters_that_are_none(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    for source, told in (
        (str(tmp_path / "a.pth"), "neither torchvision's vgg19"),
        (str(tmp_path / "b.pth"), "no weights from"),
    ):
        with pytest.raises(InputError, match=told):
            read_filters(source)


@pytest.mark.parametrize(("options", "told"), [
    ({"prompts": "soft"}, "prompts cannot be 'soft'; known: style, static"),
    ({"place": "middle"}, "place cannot be 'middle'; known: none, shallow, deep, both"),
    ({"trains": "text"}, "trains cannot be 'text'"),
    ({"tokens": 0}, "tokens must be at least 1"),
    ({"style": {"width": 4}}, "rank must be from 1 to style.width 4, got 8"),
    ({"style": {"names": ["a"]}}, "at least two different names"),
    ({"style": {"temperature": 0.0}}, "must be above 0"),
    ({"style": {"temperature": "warm"}}, "style.temperature cannot be 'warm'"),
    ({"style": {"colour": 1}}, "style has no 'colour'; known: names, width, temperature, rank, filters"),
    ({"place": "none", "trains": "prompts"}, "nothing to train"),
    ({"model": "RN50"}, "freestyle needs a CLIP with a ViT"),
])  # fmt: skip
def test_options_that_fit_nothing(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        build_backbone("freestyle", load_weights=False, **options)


def test_uniform_weights_at_temperature_one() -> None:
    """Why the temperature is low: at 1, as published, the most likely of four styles has hardly more than a quarter."""
    vectors = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    mild, sharp = StyleSpace(528, 4, 64, 1.0), StyleSpace(528, 4, 64, 0.1)
    for space in (mild, sharp):
        space.centres.copy_(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)))
    assert mild.weights(vectors).amax(1).mean() < 0.31 < 0.5 < sharp.weights(vectors).amax(1).mean()
    assert math.isclose(float(sharp.weights(vectors).sum()), 100, rel_tol=1e-5)
