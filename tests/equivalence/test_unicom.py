"""Unicom against its formulas written out, and its published files: names, shapes, checksums, downloads."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from spn4cir.data_gen import unicom
from spn4cir.data_gen.unicom import (
    PUBLISHED,
    SIZES,
    Size,
    Unicom,
    Weights,
    check_weights,
    detect_size,
    find_weights,
    load_unicom,
)
from spn4cir.errors import InputError

TINY = Size(image=12, patch=4, width=8, depth=2, heads=2, embedding=5)
Array = NDArray[np.float64]
erf = np.vectorize(math.erf)


def published_layout(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file."""
    w, e, flat = size.width, size.embedding, size.patches * size.width
    layout: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, size.patches, w),
        "patch_embed.proj.weight": (w, 3, size.patch, size.patch),
        "patch_embed.proj.bias": (w,),
    }
    for n in range(size.depth):
        shapes: dict[str, tuple[int, ...]] = {
            "norm1.weight": (w,), "norm1.bias": (w,), "norm2.weight": (w,), "norm2.bias": (w,),
            "attn.qkv.weight": (3 * w, w), "attn.proj.weight": (w, w), "attn.proj.bias": (w,),
            "mlp.fc1.weight": (4 * w, w), "mlp.fc1.bias": (4 * w,), "mlp.fc2.weight": (w, 4 * w), "mlp.fc2.bias": (w,),
        }  # fmt: skip
        layout |= {f"blocks.{n}.{name}": shape for name, shape in shapes.items()}
    layout |= {"norm.weight": (w,), "norm.bias": (w,), "feature.0.weight": (w, flat), "feature.2.weight": (e, w)}
    for place, width in ((1, w), (3, e)):
        layout |= {f"feature.{place}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        layout[f"feature.{place}.num_batches_tracked"] = ()
    return layout


def random_state(size: Size = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough that ReLU6 cuts at both ends, and BatchNorm's statistics are not 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_layout(size).items():
        value = torch.randn(shape, generator=draw, dtype=torch.float64)
        value = 2 * value if ".mlp.fc1" in name else value
        value = value.abs() + 0.5 if name.endswith("running_var") else value
        state[name] = torch.tensor(7) if name.endswith("num_batches_tracked") else value
    return state


def written_out(
    state: dict[str, Tensor], pixels: Array, size: Size, activation: Callable[[Array], Array]
) -> tuple[Array, list[float]]:
    """(3, image, image) → (E,) in float64 by loops over patches, heads and queries; and the range before ReLU6."""
    w = {name: value.double().numpy() for name, value in state.items()}
    side, p, d = size.image // size.patch, size.patch, size.width // size.heads
    rows = []
    for y in range(side):
        for x in range(side):
            patch = pixels[:, y * p : (y + 1) * p, x * p : (x + 1) * p]
            rows.append(np.einsum("ochw,chw->o", w["patch_embed.proj.weight"], patch) + w["patch_embed.proj.bias"])
    x_ = np.stack(rows) + w["pos_embed"][0]  # (P, width)

    def layer_norm(v: Array, name: str) -> Array:
        centred = v - v.mean()
        return centred / np.sqrt((centred**2).mean() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    seen: list[float] = []
    for n in range(size.depth):
        b = f"blocks.{n}"
        normed = np.stack([layer_norm(v, f"{b}.norm1") for v in x_])
        query, key, value = (normed @ part.T for part in np.split(w[f"{b}.attn.qkv.weight"], 3))
        mixed = np.zeros_like(normed)
        for head in range(size.heads):
            span = slice(head * d, (head + 1) * d)
            for i in range(len(normed)):
                scores = np.array([query[i, span] @ key[j, span] / math.sqrt(d) for j in range(len(normed))])
                weights = np.exp(scores - scores.max())
                mixed[i, span] = sum(weights[j] / weights.sum() * value[j, span] for j in range(len(normed)))
        x_ = x_ + mixed @ w[f"{b}.attn.proj.weight"].T + w[f"{b}.attn.proj.bias"]
        for i, v in enumerate(x_.copy()):
            hidden = w[f"{b}.mlp.fc1.weight"] @ layer_norm(v, f"{b}.norm2") + w[f"{b}.mlp.fc1.bias"]
            seen += [hidden.min(), hidden.max()]
            x_[i] = v + w[f"{b}.mlp.fc2.weight"] @ activation(hidden) + w[f"{b}.mlp.fc2.bias"]
    out = np.concatenate([layer_norm(v, "norm") for v in x_])
    for linear, norm in ((0, 1), (2, 3)):
        out = w[f"feature.{linear}.weight"] @ out - w[f"feature.{norm}.running_mean"]
        scale = w[f"feature.{norm}.weight"] / np.sqrt(w[f"feature.{norm}.running_var"] + 2e-5)
        out = out * scale + w[f"feature.{norm}.bias"]
    return out, [min(seen), max(seen)]


def relu6(v: Array) -> Array:
    return np.minimum(np.maximum(v, 0), 6)


def gelu(v: Array) -> Array:
    return v * 0.5 * (1 + erf(v / math.sqrt(2)))


def relu(v: Array) -> Array:
    return np.maximum(v, 0)


def model_of(state: dict[str, Tensor], size: Size = TINY) -> Unicom:
    """In float64."""
    model = Unicom(size).double()
    model.load_state_dict(state)
    return model.requires_grad_(False)


PIXELS = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def apart(one: Tensor, other: Array) -> float:
    """The largest difference, as a part of the largest number."""
    return float(np.abs(one.numpy() - other).max() / np.abs(other).max())


def test_equals_the_formulas() -> None:
    """To 1e-12 in float64, each image by itself; with another activation, or one weight changed, it does not."""
    state = random_state()
    found = model_of(state)(PIXELS)
    for activation, equal in ((relu6, True), (gelu, False), (relu, False)):
        pairs = [written_out(state, one.numpy(), TINY, activation) for one in PIXELS]
        expected = np.stack([vector for vector, _ in pairs])
        assert (apart(found, expected) <= 1e-12) == equal
        assert equal or apart(found, expected) > 1e-3
        assert all(lowest < 0 and highest > 6 for _, (lowest, highest) in pairs)  # both ends of ReLU6 matter


def test_every_tensor_is_read() -> None:
    """A change of any weight or statistic changes the vectors; only the counters of BatchNorm do not matter."""
    state = random_state()
    base = model_of(state)(PIXELS)
    for name in state:
        draw = torch.Generator().manual_seed(3)
        other = {**state, name: state[name] + torch.rand(state[name].shape, generator=draw).to(state[name].dtype)}
        moved = (model_of(other)(PIXELS) - base).abs().max()
        assert (moved > 1e-6) != name.endswith("num_batches_tracked"), name


def test_model_does_not_move() -> None:
    """It starts in eval mode: the same image alone or in company gives the same vector, and no statistic moves."""
    model = model_of(random_state())
    assert not any(module.training for module in model.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.testing.assert_close(model(PIXELS)[1:2], model(PIXELS[1:2]), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", SIZES)
def test_published_layout(name: str) -> None:
    """Each size has exactly the published names and shapes, and is recognised by them."""
    with torch.device("meta"):
        model = Unicom(name)
    state = model.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_layout(SIZES[name])
    assert detect_size(state, Path("x.pt")) == SIZES[name]
    assert model.size.patches == {"ViT-B/32": 49, "ViT-B/16": 196, "ViT-L/14": 256, "ViT-L/14@336px": 576}[name]
    others = [published_layout(size) for other, size in SIZES.items() if other != name]
    assert published_layout(SIZES[name]) not in others


def save(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As it is published, counters included."""
    return {name: value.half() for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("counters", [True, False])
def test_a_file_loads_with_every_key(tmp_path: Path, prefix: str, counters: bool) -> None:
    """Half precision becomes single, value for value; a prefix of training and missing counters do not matter."""
    state = half(random_state())
    kept = {n: v for n, v in state.items() if counters or not n.endswith("num_batches_tracked")}
    model = load_unicom(save(tmp_path / "x.pt", {prefix + n: v for n, v in kept.items()}), TINY)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[n], kept[n].to(loaded[n].dtype)) for n in kept)
    assert all(v.dtype == torch.float32 for v in model.parameters()) and not model.training
    expected = written_out({n: v.double() for n, v in state.items()}, PIXELS[0].numpy(), TINY, relu6)[0]
    assert apart(model(PIXELS[:1].float())[0].double(), expected) < 1e-4


@pytest.mark.parametrize(("change", "told"), [
    (lambda s: s.pop("blocks.1.attn.qkv.weight"), r"1 missing: blocks\.1\.attn\.qkv\.weight$"),
    (lambda s: s.update({"blocks.1.attn.qkv.bias": torch.ones(24)}), r"1 unexpected: blocks\.1\.attn\.qkv\.bias$"),
    (lambda s: s.update({"norm.bias": torch.ones(9)}), r"1 of another shape: norm\.bias \(9,\) for \(8,\)$"),
    (lambda s: s.update({"norm.bias": torch.full((8,), torch.nan)}), r"norm\.bias holds numbers that are not finite"),
    (lambda s: s.update({"epoch": 3}), "holds more than named tensors: epoch$"),
    (lambda s: [s.pop(n) for n in list(s) if "blocks.1" in n], r"11 missing: blocks\.1.* …$"),
])  # fmt: skip
def test_a_file_that_does_not_fit(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], told: str) -> None:
    """Missing, unexpected, misshapen or broken: one line that names the file and the tensors."""
    state = half(random_state())
    change(state)
    with pytest.raises(InputError, match=told) as error:
        load_unicom(save(tmp_path / "x.pt", state), TINY)
    assert "\n" not in str(error.value) and str(tmp_path / "x.pt") in str(error.value)


def test_a_size_that_nobody_published(tmp_path: Path) -> None:
    """Without stated dimensions they are recognised, or the line tells what was found; a file of another kind too."""
    with pytest.raises(InputError, match=r"none of unicom's sizes .* images of 12 pixels, patches of 4, width 8, 2 bl"):
        load_unicom(save(tmp_path / "x.pt", random_state()))
    with pytest.raises(InputError, match=r"holds no weights of unicom: 'patch_embed\.proj\.weight' not found"):
        load_unicom(save(tmp_path / "y.pt", {"fc.weight": torch.ones(2)}))
    (tmp_path / "z.pt").write_bytes(b"<html>not found</html>" * 3)
    with pytest.raises(InputError, match=r"z\.pt is no file of torch\.save"):
        load_unicom(tmp_path / "z.pt")


def test_names_of_sizes() -> None:
    """Both spellings of the size for 336 pixels; another name is told the known ones."""
    assert unicom.known_size("ViT-L/14@336") == unicom.known_size("ViT-L/14@336px") == "ViT-L/14@336px"
    for name in ("ViT-L/14@", "vit-l/14", "ViT-B/32@336", ""):
        with pytest.raises(InputError, match=r"no size .* known: ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px"):
            unicom.known_size(name)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny ViT-B/32 at an address of its own, with an empty cache; returns the published file."""
    site = tmp_path / "site"
    (site / "b32").mkdir(parents=True)
    path = save(site / "b32" / "FP16-ViT-B-32.pt", half(random_state()))
    weights = Weights(path.name, "b32", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(unicom, "RELEASES", site.as_uri())
    monkeypatch.setitem(PUBLISHED, "ViT-B/32", weights)
    monkeypatch.setitem(SIZES, "ViT-B/32", TINY)
    monkeypatch.setenv("SPN4CIR_CACHE", str(tmp_path / "cache"))
    return path


def test_downloads_once(tmp_path: Path, release: Path) -> None:
    """The file comes whole into the cache, checked; the second time no network is needed; it loads."""
    path = find_weights("ViT-B/32")
    assert path == tmp_path / "cache" / "unicom" / release.name
    assert path.read_bytes() == release.read_bytes()
    release.unlink()
    assert find_weights("ViT-B/32") == path
    assert load_unicom(path).size == TINY
    assert not list(path.parent.glob("*.partial"))


def test_no_network_and_no_file(tmp_path: Path, release: Path) -> None:
    """One line: what is missing, where it is published, where to put it; nothing half is left."""
    release.unlink()
    with pytest.raises(InputError, match=r"needs FP16-ViT-B-32\.pt, which cannot be downloaded .*: get .*b32/FP16"):
        find_weights("ViT-B/32")
    assert str(tmp_path / "cache" / "unicom") in _told("ViT-B/32") and "\n" not in _told("ViT-B/32")
    assert not list((tmp_path / "cache" / "unicom").iterdir())


def _told(name: str) -> str:
    with pytest.raises(InputError) as error:
        find_weights(name)
    return str(error.value)


def test_a_download_of_something_else(tmp_path: Path, release: Path) -> None:
    """What arrives with another checksum is not kept."""
    release.write_bytes(release.read_bytes() + b"x")
    assert "invalid hash value" in _told("ViT-B/32")
    assert not (tmp_path / "cache" / "unicom" / release.name).exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checksum_mismatch_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a published name and another content: expected, found, and what to do; in the cache or by path."""
    monkeypatch.setenv("SPN4CIR_CACHE", str(tmp_path))
    path = tmp_path / "unicom" / PUBLISHED[name].file
    path.parent.mkdir()
    save(path, half(random_state()))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    for attempt in (lambda: find_weights(name), lambda: check_weights(path)):
        with pytest.raises(InputError, match=f"SHA-256 is {found}, expected {PUBLISHED[name].sha256}; delete it"):
            attempt()
    assert path.exists()  # nothing of a person's is deleted
    own = path.rename(tmp_path / "own.pt")
    assert check_weights(own) == found  # under another name it is what it is


def test_a_published_checksum_is_accepted(release: Path) -> None:
    """The control: the right content under the published name."""
    assert check_weights(release) == PUBLISHED["ViT-B/32"].sha256
