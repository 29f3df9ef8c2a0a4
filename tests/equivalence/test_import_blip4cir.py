"""Imported weights against BLIP4CIR written out by hand, through the command; what is refused, and what is said."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from published_blip import CONTAINERS, EMBED, HEAD, IDS, TEXTS, WORDS, State, contained, published, query_and_target
from torch import Tensor

from spn4cir.backbone import Backbone
from spn4cir.checkpoints import load_model
from spn4cir.cli import import_command
from spn4cir.search import scores_of


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the words of a BERT alone; what BLIP adds is left to the importer."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


Imports = Callable[..., Backbone]


def import_file(folder: Path, words: Path, content: object) -> Path:
    """Through the command; returns the checkpoint."""
    torch.save(content, folder / "published.pt")
    output = folder / "imported"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--backbone", "blip4cir", str(folder / "published.pt"), "--output", str(output)]
        patch.setattr(sys, "argv", ["spn4cir-import", *arguments, "--tokenizer", str(words)])
        import_command()
    return output


@pytest.fixture
def imports(tmp_path: Path, words: Path) -> Imports:
    """``imports(content)``: through the command and back from disk."""
    return lambda content: load_model(import_file(tmp_path, words, content))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """What the command makes of stage 1's file."""
    return import_file(tmp_path_factory.mktemp("stage1"), words, contained(published(), "BLIP_Retrieval"))


def double(state: State) -> State:
    return {name: value.double() for name, value in state.items()}


def some_pixels(size: int = 64) -> Tensor:
    return torch.randn(len(TEXTS), 3, size, size, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def apart(backbone: Backbone, state: State, pixels: Tensor) -> float:
    """Greatest difference between the two, of reference tokens, queries and targets."""
    wanted = query_and_target(double(state), pixels)
    own = pixels.to(next(backbone.parameters()).dtype)
    features = backbone.encode_image(own)
    query = backbone.compose(features.reference, backbone.tokenize(TEXTS)).query
    found = (features.reference, query, features.target[:, 0])
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def our_name(name: str) -> str:
    """A published name in transformers' words, with our prefix."""
    name = name.replace("visual_encoder.cls_token", "vision_model.embeddings.class_embedding")
    name = name.replace("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding")
    name = name.replace("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding")
    name = name.replace("visual_encoder.norm", "vision_model.post_layernorm")
    name = re.sub(r"visual_encoder\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm", name)
    name = re.sub(r"visual_encoder\.blocks\.(\d+)\.attn", r"vision_model.encoder.layers.\1.self_attn", name)
    name = re.sub(r"visual_encoder\.blocks\.(\d+)\.mlp", r"vision_model.encoder.layers.\1.mlp", name)
    return "blip." + name.replace("self_attn.proj.", "self_attn.projection.")


# --- equality ---------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_definition(checkpoint: Path) -> None:
    """What the definition reads is what the tokenizer gives, cut where the mask ends."""
    tokens = load_model(checkpoint).tokenize(TEXTS)
    assert [row[: int(mask.sum())].tolist() for row, mask in zip(tokens["ids"], tokens["mask"], strict=True)] == IDS


@pytest.mark.parametrize("container", CONTAINERS)
def test_imported_weights_give_the_published_vectors(imports: Imports, container: str) -> None:
    """Reference tokens, queries of padded texts, and targets, in float32 and in float64; and every tensor by name."""
    state = published()
    backbone = imports(contained(state, container))
    assert backbone.state_dict().keys() == {our_name(name) for name in state}
    assert all(torch.equal(backbone.state_dict()[our_name(name)], value) for name, value in state.items())
    assert apart(backbone, state, some_pixels()) <= 1e-5
    assert apart(backbone.double(), state, some_pixels()) <= 1e-10


def test_gradients_are_those_of_the_definition(checkpoint: Path) -> None:
    """Of each parameter, through one number made of queries and targets."""
    state = {name: value.requires_grad_() for name, value in double(published()).items()}
    weights = torch.randn(2, len(TEXTS), EMBED, generator=torch.Generator().manual_seed(2)).double()
    _, query, target = query_and_target(state, some_pixels())
    (query * weights[0] + target * weights[1]).sum().backward()
    backbone = load_model(checkpoint, {"train_vision": True}).double()
    features = backbone.encode_image(some_pixels())
    query = backbone.compose(features.reference, backbone.tokenize(TEXTS)).query
    (query * weights[0] + features.target[:, 0] * weights[1]).sum().backward()
    found = dict(backbone.named_parameters())
    assert len(found) == len(state)
    for name, value in state.items():
        own = found[our_name(name)].grad
        assert own is not None and value.grad is not None and float((own - value.grad).abs().max()) <= 1e-10, name
    assert min(float(v.grad.abs().max()) for n, v in state.items() if v.grad is not None and "key.bias" not in n) > 1e-6


def test_scores_are_dot_products(checkpoint: Path) -> None:
    """Each query against each target: one vector a target, so the maximum over them is its dot product."""
    state, pixels = published(), some_pixels()
    backbone = load_model(checkpoint).double()
    with torch.no_grad():
        query, target = backbone.encode_query(pixels, backbone.tokenize(TEXTS)), backbone.encode_target(pixels)
        _, queries, targets = query_and_target(double(state), pixels)
    found = scores_of(query, target)
    for i, q in enumerate(queries):
        for j, t in enumerate(targets):
            assert abs(float(found[i, j]) - sum(float(a) * float(b) for a, b in zip(q, t, strict=True))) <= 1e-10


def cubic(distance: float) -> float:
    """Weight of a sample in bicubic interpolation with a = -0.75, as torch has it."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(positions: Tensor, old: int, new: int) -> Tensor:
    """(1, old² + 1, D) → (1, new² + 1, D), sample by sample; places beyond the edge repeat it."""
    grid = positions[0, 1:].reshape(old, old, -1)
    rows = [positions[0, 0]]
    for y in range(new):
        for x in range(new):
            v, u = (y + 0.5) * old / new - 0.5, (x + 0.5) * old / new - 0.5
            total = torch.zeros_like(positions[0, 0])
            for i in range(math.floor(v) - 1, math.floor(v) + 3):
                for j in range(math.floor(u) - 1, math.floor(u) + 3):
                    sample = grid[min(max(i, 0), old - 1), min(max(j, 0), old - 1)]
                    total = total + cubic(v - i) * cubic(u - j) * sample
            rows.append(total)
    return torch.stack(rows)[None]


@pytest.mark.parametrize("size", [192, 384])
def test_blips_own_file_for_384_pixels(imports: Imports, capsys: pytest.CaptureFixture[str], size: int) -> None:
    """Its positions are resized bicubically if they are for another size; what is not needed is ignored by name."""
    state = published(size, patch=96, width=HEAD)
    backbone = imports(contained(published(size, 96, HEAD, momentum=True), "model"))
    told = capsys.readouterr().out
    assert ("positions resized from 2×2 to 4×4" in told) == (size == 192)
    for reason in ("momentum copy", "settings of its training", "progress of its training"):
        assert reason in told
    whole = double(state)
    if size == 192:
        whole["visual_encoder.pos_embed"] = resized(whole["visual_encoder.pos_embed"], 2, 4)
    assert backbone.transform(Image.new("RGB", (90, 70))).shape == (3, 384, 384)
    assert apart(backbone.double(), whole, some_pixels(384)) <= (1e-5 if size == 192 else 1e-10)
    moved = whole | {"visual_encoder.pos_embed": whole["visual_encoder.pos_embed"].flip(1)}
    assert apart(backbone, moved, some_pixels(384)) > 1e-2  # negative control


# --- what is said, and what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "said"), [
    ("BLIP_Retrieval", ["1  learned temperature 0.0321, which the checkpoint notes: temp", "optimizer_state_dict"]),
    ("state_dict", ["1  learned temperature 0.0298, which the checkpoint notes: tau", "earlier stage: blip.temp"]),
    ("model", [": image_queue", "head that no score reads: itm_head.weight", "text_decoder."]),
])  # fmt: skip
def test_the_account_gives_reasons(
    imports: Imports, capsys: pytest.CaptureFixture[str], container: str, said: list[str]
) -> None:
    """The learned temperature with its number, old buffers, and what only a training needs; nothing else."""
    state = published(384, 96, HEAD)
    backbone = imports(contained(state, container))
    told = capsys.readouterr().out
    expected = {"BLIP_Retrieval": 0.0321, "state_dict": 0.0298, "model": 0.05}[container]
    assert backbone.temperature == pytest.approx(expected)  # where temperature: null starts
    for words in (*said, "a buffer of old library versions: "):
        assert words in told
    assert re.search(rf"matched +{len(state)}\b", told) and re.search(r"missing +0\b", told)
    assert re.search(r"unexpected +0\b", told)


@pytest.mark.parametrize(("container", "name"), [
    ("BLIP_Retrieval", "colour.weight"), ("state_dict", "visual_encoder.blocks.0.attn.relative"),
    ("model", "text_encoder.pooler.bias"),
])  # fmt: skip
def test_unknown_names_are_refused(
    imports: Imports, capsys: pytest.CaptureFixture[str], container: str, name: str
) -> None:
    """A name that nobody explains ends the import, whichever part it claims to be of."""
    with pytest.raises(SystemExit):
        imports(contained(published(384, 96, HEAD) | {name: torch.ones(3)}, container))
    assert "1 unexpected, such as blip." in capsys.readouterr().err


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["visual_encoder_m.cls_token", "itm_head.weight", "text_decoder.bias", "image_queue"])
def test_what_only_blips_own_file_has_is_refused_elsewhere(imports: Imports, container: str, name: str) -> None:
    """Composed retrieval's files have no momentum copies, heads, decoders or queues."""
    with pytest.raises(SystemExit):
        imports(contained(published() | {name: torch.ones(3)}, container))


@pytest.mark.parametrize(("name", "said"), [
    ("visual_encoder.pos_embed", "cannot be recognised without embeddings.position_embedding"),
    ("text_encoder.embeddings.word_embeddings.weight", "cannot be recognised without text_encoder.embeddings.word_emb"),
    ("text_proj.weight", "cannot be recognised without text_proj.weight"),
    ("text_encoder.encoder.layer.1.crossattention.self.key.bias", "1 missing, such as blip.text_encoder.encoder"),
])  # fmt: skip
def test_a_missing_tensor_is_named(imports: Imports, capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    """Whether the architecture needs it, or only the model."""
    del (state := published())[name]
    with pytest.raises(SystemExit):
        imports(contained(state, "BLIP_Retrieval"))
    assert said in capsys.readouterr().err


def test_other_files_are_refused(imports: Imports, capsys: pytest.CaptureFixture[str]) -> None:
    """No such container, another model's names in it, and shapes that are no tower's."""
    for content, said in (
        ({"CLIP": published()}, "neither BLIP_Retrieval nor state_dict nor model"),
        ({"state_dict": {"clip.visual.proj": torch.ones(3)}}, "no name in state_dict begins with blip.visual_encoder."),
        ({"BLIP_Retrieval": published() | {"visual_encoder.pos_embed": torch.ones(3)}}, "by the shapes"),
        ({"BLIP_Retrieval": published() | {"text_proj.weight": torch.tensor(1.0)}}, "by these shapes"),
        ({"model": published(64, 30)}, "images of 384 pixels are not filled by patches of 30"),
        (contained(published(), "state_dict") | {"config": {}}, "beside state_dict there is 'config'"),
    ):
        with pytest.raises(SystemExit):
            imports(content)
        assert said in (told := capsys.readouterr().err), told


def test_no_tokenizer_for_a_backbone_without_one(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--tokenizer is one line where it means nothing."""
    torch.save({"CLIP": {}}, tmp_path / "published.pt")
    arguments = ["--backbone", "clip4cir", str(tmp_path / "published.pt"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["spn4cir-import", *arguments, "--tokenizer", str(words)])
    with pytest.raises(SystemExit):
        import_command()
    assert "backbone clip4cir has no option tokenizer" in capsys.readouterr().err


# --- negative controls ------------------------------------------------------------------------------------------------


def test_without_the_mask_the_vectors_differ(checkpoint: Path) -> None:
    """Negative control: padding that is attended to moves the queries of all but the longest text."""
    state, pixels = published(), some_pixels()
    backbone = load_model(checkpoint).double()
    tokens = backbone.tokenize(TEXTS)
    with torch.no_grad():
        reference, wanted, _ = query_and_target(double(state), pixels)
        masked = backbone.compose(reference, tokens).query
        found = backbone.compose(reference, tokens | {"mask": torch.ones_like(tokens["mask"])}).query
    assert float((masked - wanted).abs().max()) <= 1e-10
    moved = (found - wanted).abs().amax(1)
    assert float(moved[[0, 2, 3]].min()) > 1e-3 and float(moved[1]) <= 1e-10


@pytest.mark.parametrize(("part", "key", "value"), [
    ("text_config", "num_attention_heads", 8), ("vision_config", "layer_norm_eps", 1e-5),
    ("vision_config", "num_attention_heads", 4), ("text_config", "layer_norm_eps", 1e-5),
])  # fmt: skip
def test_each_trap_of_the_config_differs(checkpoint: Path, part: str, key: str, value: float) -> None:
    """Negative control: weights fit in every name and shape under the library's defaults, and give other vectors."""
    right = load_model(checkpoint).options["config"]
    backbone = load_model(checkpoint, {"config": {**right, part: {**right[part], key: value}}})
    assert apart(backbone.double(), published(), some_pixels()) > 1e-7


@pytest.mark.parametrize("name", [
    "visual_encoder.cls_token", "visual_encoder.blocks.1.norm1.weight", "visual_encoder.blocks.0.attn.qkv.bias",
    "visual_encoder.blocks.1.mlp.fc2.bias", "visual_encoder.norm.bias", "vision_proj.bias",
    "text_encoder.encoder.layer.1.crossattention.self.value.weight", "text_encoder.embeddings.LayerNorm.bias",
    "text_encoder.encoder.layer.0.attention.self.query.bias", "text_encoder.encoder.layer.0.output.LayerNorm.weight",
    "text_encoder.embeddings.position_embeddings.weight", "text_proj.weight",
])  # fmt: skip
def test_one_changed_tensor_differs(checkpoint: Path, name: str) -> None:
    """Negative control: whichever tensor another one stands in for, the vectors show it."""
    state = published()
    changed = state | {name: state[name].flip(-1)}
    assert apart(load_model(checkpoint), changed, some_pixels()) > 1e-3


def test_the_note_rebuilds_it(checkpoint: Path) -> None:
    """The checkpoint needs neither the hub nor the folder of words: it has its own tokenizer and architecture."""
    backbone = load_model(checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["model.json", "model.safetensors", "tokenizer"]
    options = json.loads((checkpoint / "model.json").read_text())["options"]
    assert options["model"] is None and options["config"]["text_config"]["vocab_size"] == len(WORDS) + 2
    assert options == backbone.options
