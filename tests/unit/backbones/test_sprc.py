"""SPRC: what trains and what is frozen in each stage, the copies of stage 2, saving, sizes, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import Blip2Config, Blip2ForImageTextRetrieval, PreTrainedTokenizerFast

from spn4cir.backbones import build_backbone
from spn4cir.backbones.sprc import EMBEDDED, SPRC
from spn4cir.batches import TripletBatch
from spn4cir.checkpoints import load_model, save_model
from spn4cir.errors import InputError
from spn4cir.in_batch import InBatch
from spn4cir.losses import info_nce
from spn4cir.objective import Objective

TEXTS = ["make it red", "", "the same with two more, please", "blue"]
PUBLISHED: dict[str, Any] = {
    "vision_config": {},
    "qformer_config": {"vocab_size": 30523, "use_qformer_text_input": True},
}  # the library's defaults are BLIP-2's sizes


def config(**changes: Any) -> dict[str, Any]:
    """The embedded architecture with fewer layers."""
    whole = json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8"))
    whole["vision_config"] |= {"num_hidden_layers": 1, "image_size": 32}
    whole["qformer_config"] |= {"num_hidden_layers": 2, **changes}
    return dict(whole)


@pytest.fixture
def build() -> Callable[..., SPRC]:
    """``build(rtc=0.4, …)``: a small model whose weights are all random, query tokens included."""

    def built(**options: Any) -> SPRC:
        torch.manual_seed(0)
        backbone = build_backbone("sprc", **{"model": None, "config": config(), "tokenizer": str(EMBEDDED), **options})
        assert isinstance(backbone, SPRC)
        torch.nn.init.normal_(backbone.blip2.query_tokens)
        return backbone

    return built


def pixels(count: int = len(TEXTS)) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def gradients(backbone: SPRC) -> tuple[set[str], set[str]]:
    """Names of parameters that have any gradient, and of those whose gradient is nought throughout."""
    found = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return set(found), {name for name, value in found.items() if not value.any()}


def trainable(backbone: SPRC) -> set[str]:
    return {name for name, p in backbone.named_parameters() if p.requires_grad}


def first_step(backbone: SPRC) -> None:
    rows = torch.arange(4)
    batch = TripletBatch(backbone.tokenize(TEXTS), rows + 1, rows[:, None], rows[:, None], pixels=pixels(5))
    Objective(backbone.train(), 0.1, learn_temperature=True)(batch).backward()


def test_stage_1_trains_all_but_the_tower(build: Callable[..., SPRC]) -> None:
    """One step gives every trained parameter a gradient, the prompt included, and a frozen one none."""
    backbone = build()
    first_step(backbone)
    reached, still = gradients(backbone)
    frozen = {name for name, _ in backbone.named_parameters()} - trainable(backbone)
    assert reached == trainable(backbone)
    assert all(name.startswith("blip2.vision_model.e") for name in frozen) and len(frozen) == 16
    assert {"prompt_tokens", "blip2.vision_model.post_layernorm.weight", "blip2.query_tokens"} <= reached
    assert all(name.endswith("attention.key.bias") for name in still)  # attention does not depend on these
    assert not backbone.blip2.vision_model.encoder.training and backbone.blip2.qformer.training


@pytest.mark.parametrize("options", [{"rtc": 0.0}, {"rtc": 0.0, "align": 0.0}, {"align": 0.0}, {"train_vision": True}])
def test_whatever_is_chosen_all_that_trains_is_reached(build: Callable[..., SPRC], options: dict[str, Any]) -> None:
    """A term of weight nought is left out, with the prompt, which nothing else moves."""
    backbone = build(**options)
    first_step(backbone)
    assert gradients(backbone)[0] == trainable(backbone)
    assert ("prompt_tokens" in trainable(backbone)) is bool(options.get("rtc", 1.0))
    assert ("blip2.vision_model.embeddings.class_embedding" in trainable(backbone)) is ("train_vision" in options)


def test_alignment_does_not_move_the_prompt(build: Callable[..., SPRC]) -> None:
    backbone = build(rtc=0.0)
    backbone.prompt_tokens.requires_grad_(True)
    features = backbone.encode_image(pixels())
    composed = backbone.compose(features.reference, backbone.tokenize(TEXTS))
    terms = backbone.extra_losses(composed, features, InBatch(torch.arange(4), 0.1))
    assert terms.keys() == {"align"}
    terms["align"].backward()
    assert backbone.prompt_tokens.grad is None and backbone.blip2.query_tokens.grad.any()


def test_stage_2_trains_the_copies_alone(build: Callable[..., SPRC]) -> None:
    """Exactly the copies train, all of them are reached, and ``encode_image`` stays bit for bit."""
    backbone = build()
    before = backbone.encode_image(pixels())
    backbone.freeze_image_side()
    backbone.train()
    own = {name for name, _ in backbone.named_parameters() if name.startswith("twin.")}
    assert trainable(backbone) == own and own
    assert not any(part in name for name in own for part in ("crossattention", "intermediate_query", "output_query"))
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=0.01, weight_decay=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        query = backbone.compose(before.reference.detach(), backbone.tokenize(TEXTS)).query
        info_nce(query, before.target.detach(), torch.arange(4), 0.1).backward()
        reached, still = gradients(backbone)
        assert reached == own and all(name.endswith("attention.key.bias") for name in still)
        optimizer.step()
    after = backbone.encode_image(pixels())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(
        backbone.twin.embeddings.word_embeddings.weight, backbone.blip2.embeddings.word_embeddings.weight
    )


def test_fused_states_have_no_dropout_and_no_graph(build: Callable[..., SPRC]) -> None:
    """In stage 2's train mode the first pass gives the same twice and the second does not; in stage 1 neither does."""
    backbone = build().train()
    reference, tokens = backbone.encode_image(pixels()).reference.detach(), backbone.tokenize(TEXTS)

    def twice() -> tuple[bool, bool]:
        one, two = backbone.compose(reference, tokens), backbone.compose(reference, tokens)
        return torch.equal(one.states["fused"], two.states["fused"]), torch.equal(one.query, two.query)

    assert twice() == (False, False)
    backbone.freeze_image_side()
    assert twice() == (True, False)
    composed = backbone.compose(reference, tokens)
    assert not composed.states["fused"].requires_grad and composed.query.requires_grad
    backbone.eval()
    assert twice() == (True, True)


def test_copies_give_what_the_originals_gave(build: Callable[..., SPRC]) -> None:
    """Before any step bit for bit, in the type that the model has; a second call changes nothing."""
    backbone = build().double()
    reference, tokens = backbone.encode_image(pixels().double()).reference, backbone.tokenize(TEXTS)
    before = backbone.compose(reference, tokens).query
    backbone.untie_text_side()
    twin = backbone.twin
    backbone.untie_text_side()
    assert backbone.twin is twin and backbone.options["separated"] is True
    assert torch.equal(backbone.compose(reference, tokens).query, before)
    with torch.no_grad():
        twin.text_projection.bias += 1
    assert not torch.equal(backbone.compose(reference, tokens).query, before)


@pytest.mark.parametrize("separated", [False, True])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, build: Callable[..., SPRC], separated: bool) -> None:
    """Bit for bit, tokenizer included, without the folder that it was built from."""
    backbone = build(rtc=0.4, separated=separated)
    if separated:
        with torch.no_grad():
            backbone.twin.text_projection.bias += 1
    save_model(tmp_path / "run", backbone, {})
    again = load_model(tmp_path / "run")
    assert isinstance(again, SPRC) and again.options == backbone.options and again.options["separated"] is separated
    assert again.tokenizer.get_vocab() == backbone.tokenizer.get_vocab()
    found = [model.encode_image(pixels()) for model in (backbone, again)]
    assert torch.equal(found[0].target, found[1].target)
    queries = [
        m.compose(f.reference, m.tokenize(TEXTS)).query for m, f in zip((backbone, again), found, strict=True)
    ]  # fmt: skip
    assert torch.equal(*queries)
    assert not again.training


def test_weights_of_a_folder(tmp_path: Path, build: Callable[..., SPRC]) -> None:
    """A folder as transformers writes it, in half precision: its weights in float32, its tokenizer, all but its head.

    Once saved, neither is needed any more; a folder without weights is one line.
    """
    library = Blip2ForImageTextRetrieval(Blip2Config.from_dict(config())).half()
    library.save_pretrained(tmp_path / "folder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, tmp_path / "folder")
    backbone = build(model=str(tmp_path / "folder"), config=None, tokenizer=None)
    state, wanted = backbone.state_dict(), library.state_dict()
    assert {n for n in wanted if f"blip2.{n}" not in state} == {"itm_head.weight", "itm_head.bias"}
    wanted["query_tokens"] = backbone.blip2.query_tokens  # the fixture draws them anew
    shared = [name for name in wanted if not name.startswith("itm_head")]
    assert all(torch.equal(state[f"blip2.{name}"], wanted[name].float()) for name in shared)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert 0.015 < float(backbone.prompt_tokens.detach().std()) < 0.025
    save_model(tmp_path / "run", backbone, {})
    (tmp_path / "folder" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load Blip2ForImageTextRetrieval"):
        build(model=str(tmp_path / "folder"), config=None)
    shutil.rmtree(tmp_path / "folder")
    again = load_model(tmp_path / "run").state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_half_precision_ends_where_scores_begin(build: Callable[..., SPRC]) -> None:
    """Under autocast vectors are float32 of unit norm; a reference that was rounded to half gives nearly the same."""
    backbone = build()
    tokens = backbone.tokenize(TEXTS)
    with torch.no_grad():
        plain = backbone.encode_image(pixels())
        exact = backbone.compose(plain.reference, tokens).query
        rounded = backbone.compose(plain.reference.half().float(), tokens).query
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = backbone.encode_image(pixels())
            query = backbone.compose(features.reference, tokens).query
    for vectors in (features.target, query):
        assert vectors.dtype == torch.float32 and (vectors.norm(dim=-1) - 1).abs().max() <= 1e-6
    assert 0 < float((rounded - exact).abs().max()) <= 1e-2 and float((query - exact).abs().max()) <= 0.1


def linear(out: int, inside: int) -> int:
    return out * inside + out


def test_sizes_are_the_published_ones(tmp_path: Path) -> None:
    """Q-Former 185,660,160 without its language model's head of 622,651; stage 2 trains 109,087,744."""
    inner = Tokenizer(models.WordLevel({f"w{n}": n for n in range(30522)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w1").save_pretrained(tmp_path)
    with torch.device("meta"):
        backbone = SPRC(None, PUBLISHED, str(tmp_path))

    def count(*parts: torch.nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    attention = 4 * linear(768, 768) + 2 * 768
    feed_forward = linear(3072, 768) + linear(768, 3072) + 2 * 768
    crossing = 2 * linear(768, 768) + 2 * linear(768, 1408) + 2 * 768
    words = (30523 + 512) * 768 + 2 * 768
    text = words + 12 * (attention + feed_forward)
    whole = text + 12 * feed_forward + 6 * crossing
    head = linear(768, 768) + 2 * 768 + 30523  # its decoder is the word embedding
    blip2 = backbone.blip2
    assert count(blip2.embeddings, blip2.qformer) == whole == 185_660_160 and whole + head == 186_282_811
    block = 4 * 1408 + 3 * 1408**2 + 2 * 1408 + linear(1408, 1408) + linear(6144, 1408) + linear(1408, 6144)
    tower = 39 * block + 1408 + 257 * 1408 + linear(1408, 3 * 14 * 14)
    keys = 39 * 1408  # a bias of keys that is nought, which the published tower has not
    assert count(blip2.vision_model) == tower + keys + 2 * 1408 and tower == 985_894_528
    backbone.freeze_image_side()
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert trained == text + linear(256, 768) == 109_087_744
    assert whole - text == 76_769_280  # what the copies do without


def test_options_are_small_and_whole(build: Callable[..., SPRC]) -> None:
    """JSON holds them, no language model's configuration is among them, and they rebuild the same names."""
    backbone = build(separated=True, text_length=20)
    told = json.dumps(backbone.options)
    assert len(told) < 1500 and "opt" not in told.lower().replace("option", "")
    again = build_backbone("sprc", load_weights=False, **json.loads(told))
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in backbone.state_dict().items()}
    assert backbone.tokenize(["red " * 40])["text"].shape == (1, 20)


@pytest.mark.parametrize(("options", "message"), [
    ({"config": None}, "needs a model, or the config of one"),
    ({"text_length": 57}, "text_length is 57: it must be 3 to 56"),
    ({"text_length": 2}, "text_length is 2"),
    ({"config": config(use_qformer_text_input=False)}, "its Q-Former reads no text"),
    ({"tokenizer": "no/such"}, "cannot load tokenizer 'no/such'"),
    ({"config": config(vocab_size=99)}, "entries, and the model has 99"),
    ({"model": "no/such", "config": None}, "cannot load Blip2Config 'no/such'"),
])  # fmt: skip
def test_what_cannot_be_built_is_one_line(build: Callable[..., SPRC], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build(**options)
    assert "\n" not in str(caught.value)
