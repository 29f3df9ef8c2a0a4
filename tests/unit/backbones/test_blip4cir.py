"""BLIP4CIR: texts, architecture, what trains in which stage, dropout, and what is said where something is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_blip import WORDS
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval

from spn4cir.backbones import blip4cir, build_backbone, shared_vision
from spn4cir.backbones.blip4cir import BLIP4CIR, complete_config
from spn4cir.backbones.shared_blip import BERT, load_bert_tokenizer
from spn4cir.checkpoints import load_model, save_model
from spn4cir.errors import InputError
from spn4cir.importers.vision_tower import rename_vision_tower, resize_positions
from spn4cir.in_batch import InBatch
from spn4cir.losses import info_nce

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"patch_size": 16, "image_size": 32}
TEXT = {"vocab_size": len(WORDS) + 2, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 3, "max_position_embeddings": 12}
CONFIG: dict[str, Any] = {"image_text_hidden_size": 24, "vision_config": VISION, "text_config": TEXT}
TEXTS = ["is red", "has longer sleeves and is a blue", "", "blue"]
Makes = Callable[..., BLIP4CIR]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of BERT's kind with a few words."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture
def makes(words: Path) -> Makes:
    """``makes(train_vision=True, …)``: a tiny one with random weights, the same ones each time."""

    def call(**options: Any) -> BLIP4CIR:
        torch.manual_seed(3)
        backbone = BLIP4CIR(**{"model": None, "config": CONFIG, "tokenizer": str(words), **options})
        with torch.no_grad():
            for value in backbone.parameters():  # the library's are too small to tell anything
                value.add_(0.2 * torch.randn(value.shape))
        return backbone

    return call


def pixels(count: int = len(TEXTS)) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def library_folder(tmp_path: Path, words: Path) -> Path:
    """A folder as transformers writes it: with the head that nobody reads, in half precision, without dropout."""
    torch.manual_seed(4)
    config = BlipConfig(vision_config=VISION, text_config=TEXT, image_text_hidden_size=24)
    assert config.text_config.hidden_dropout_prob == 0 and config.vision_config.layer_norm_eps == 1e-5
    BlipForImageTextRetrieval(config).half().save_pretrained(tmp_path / "library")
    shutil.copy(words / "vocab.txt", tmp_path / "library")
    return tmp_path / "library"


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_begin_with_enc(makes: Makes) -> None:
    """[ENC], the last id, takes the place of [CLS]; padded to the longest; an empty text is its marks alone."""
    tokens = makes().tokenize(TEXTS)
    assert tokens["ids"].tolist()[0] == [14, 5, 6, 3, 0, 0, 0, 0, 0] and tokens["ids"].tolist()[2][:3] == [14, 3, 0]
    assert tokens["mask"].sum(1).tolist() == [4, 9, 2, 3]
    assert (tokens["ids"] == 0).equal(tokens["mask"] == 0)


def test_long_texts_are_cut(makes: Makes) -> None:
    """At the number of positions, the last mark kept; the model takes what comes of it."""
    backbone = makes()
    tokens = backbone.tokenize(["blue " * 40, "red"])
    assert tokens["ids"].shape == (2, 12) and int(tokens["ids"][0, -1]) == WORDS.index("[SEP]")
    assert backbone.encode_query(pixels(2), tokens).shape == (2, 24)


def test_a_tokenizer_survives_saving(makes: Makes, tmp_path: Path) -> None:
    """The same ids after each round trip, [ENC] last, and no third copy of the marks."""
    backbone = makes()
    wanted = backbone.tokenize(TEXTS)
    for name in ("once", "twice"):
        backbone.save_assets(tmp_path / name)
        folder = tmp_path / name / "tokenizer"
        read = load_bert_tokenizer(folder, len(WORDS) + 2, blip4cir.MARKS)
        assert read.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [13, 14] and len(read) == 15
        backbone = makes(tokenizer=str(folder))
        found = backbone.tokenize(TEXTS)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_padding_changes_nothing(makes: Makes) -> None:
    """A text alone gives what it gives beside a longer one."""
    backbone = makes().double()
    with torch.no_grad():
        reference = backbone.encode_image(pixels().double()).reference
        together = backbone.compose(reference, backbone.tokenize(TEXTS)).query
        for n, text in enumerate(TEXTS):
            alone = backbone.compose(reference[n : n + 1], backbone.tokenize([text])).query
            assert float((alone[0] - together[n]).abs().max()) <= 1e-10
        other = backbone.compose(reference.flip(0), backbone.tokenize(TEXTS)).query
    assert float((other - together).abs().amax(1).min()) > 1e-3  # the reference is looked at


def test_tokenizers_that_do_not_fit(makes: Makes, tmp_path: Path, words: Path) -> None:
    """Another number of words, none at all, and one that puts no mark before a text: a line each."""
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "green"]) + "\n")
    with pytest.raises(InputError, match=r"has 16 entries, and the model has 15$"):
        makes(tokenizer=str(tmp_path))
    with pytest.raises(InputError, match=r"a folder that holds vocab.txt of bert-base-uncased"):
        makes(tokenizer=str(tmp_path / "absent"))
    with pytest.raises(InputError, match=BERT):  # not there without a network, and another vocabulary with one
        makes(tokenizer=None)
    load_bert_tokenizer(words, 15, blip4cir.MARKS).save_pretrained(tmp_path / "plain")
    content = json.loads((tmp_path / "plain" / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "plain" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "plain" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "pad_token": "[PAD]"})
    )
    with pytest.raises(InputError, match="puts a mark before each text"):
        makes(tokenizer=str(tmp_path / "plain"))


# --- architecture -----------------------------------------------------------------------------------------------------


def test_the_published_architecture() -> None:
    """Parameters of the tower, of the text encoder and of both projections, counted without memory; and the traps."""
    config = complete_config({})
    with torch.device("meta"):
        model = blip4cir.Blip(BlipConfig.from_dict(config))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parts["vision_model"] == 86_090_496 and parts["text_encoder"] == 137_258_496
    assert parts["vision_proj"] + parts["text_proj"] == 393_728
    assert set(parts) == {"vision_model", "text_encoder", "vision_proj", "text_proj"}
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_attention_heads, text.vocab_size, text.layer_norm_eps) == (12, 30_524, 1e-12)
    assert (text.hidden_dropout_prob, text.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (vision.layer_norm_eps, vision.image_size, model.config.image_text_hidden_size) == (1e-6, 384, 256)
    assert text.encoder_hidden_size == vision.hidden_size and json.loads(json.dumps(config)) == config


def test_what_a_config_leaves_out_is_as_published(makes: Makes) -> None:
    """Not as the library has it; the width that the text looks at is the tower's; the note holds all of it."""
    found = makes().options["config"]
    assert found["vision_config"]["layer_norm_eps"] == 1e-6 and found["text_config"]["hidden_dropout_prob"] == 0.1
    assert found["text_config"]["encoder_hidden_size"] == 32 and found["image_text_hidden_size"] == 24
    assert makes(config=found).options["config"] == found


@pytest.mark.parametrize(("config", "said"), [
    ({**CONFIG, "colour": 1}, "config of blip4cir has no 'colour'"),
    ({**CONFIG, "text_config": {**TEXT, "heads": 3}}, "config of blip4cir has no 'heads'"),
    ({**CONFIG, "vision_config": {**VISION, "num_attention_heads": 5}}, "cannot load Blip"),
    (None, "needs a model, or the config of one"),
])  # fmt: skip
def test_configs_that_are_none(makes: Makes, config: dict[str, Any] | None, said: str) -> None:
    """An unknown entry, numbers that do not divide, nothing at all."""
    with pytest.raises(InputError, match=said):
        makes(config=config)


def test_a_folder_of_the_library(library_folder: Path) -> None:
    """Its weights in float32, without the head; dropout and epsilon as BLIP was trained, which such files leave out."""
    backbone = BLIP4CIR(model=str(library_folder))
    whole = BlipForImageTextRetrieval.from_pretrained(library_folder, dtype=torch.float32).state_dict()
    own = backbone.blip.state_dict()
    assert whole.keys() - own.keys() == {"itm_head.weight", "itm_head.bias"} and not own.keys() - whole.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, whole[name]) for name, value in own.items())
    config = backbone.options["config"]
    assert config["text_config"]["attention_probs_dropout_prob"] == 0.1
    assert config["vision_config"]["layer_norm_eps"] == 1e-6
    assert backbone.blip.vision_model.post_layernorm.eps == 1e-6
    backbone.blip.save_pretrained(library_folder)  # as the embedded one is written
    assert BLIP4CIR(model=str(library_folder)).blip.state_dict().keys() == own.keys()


def test_folders_that_hold_none(library_folder: Path, tmp_path: Path) -> None:
    """No config, no weights, weights of another model: one line each."""
    with pytest.raises(InputError, match=r"cannot load BlipConfig .*where there is no network"):
        BLIP4CIR(model=str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        build_backbone("blip4cir", model=str(tmp_path), load_weights=False)
    with pytest.raises(InputError, match=r"mismatched keys|size mismatch|cannot load"):
        BLIP4CIR(model=str(library_folder), config={**CONFIG, "image_text_hidden_size": 12})
    (library_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load Blip"):
        BLIP4CIR(model=str(library_folder))
    build_backbone("blip4cir", model=str(library_folder), load_weights=False)


def test_positions_that_are_no_grid() -> None:
    """A tower whose positions fill no square cannot be resized, and a size that patches do not fill is none."""
    tower = rename_vision_tower({
        "visual_encoder.patch_embed.proj.weight": torch.ones(64, 3, 16, 16),
        "visual_encoder.blocks.0.mlp.fc1.weight": torch.ones(96, 64),
        "visual_encoder.pos_embed": torch.ones(1, 7, 64),
    })  # fmt: skip
    with pytest.raises(InputError, match="6 positions are no square grid"):
        resize_positions(tower, 64)
    with pytest.raises(InputError, match="images of 40 pixels are not filled by patches of 16"):
        resize_positions(tower, 40)


# --- images -----------------------------------------------------------------------------------------------------------


def test_many_images_are_seen_in_parts(makes: Makes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen tower takes a few at a time, so that memory does not grow with the batch; the vectors are the same."""
    backbone = makes().double()
    whole = backbone.encode_image(pixels().double())
    seen: list[int] = []
    backbone.blip.vision_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["pixel_values"])), with_kwargs=True
    )
    monkeypatch.setattr(shared_vision, "IMAGES_IN_ONE_PASS", 3)
    parts = backbone.encode_image(pixels().double())
    assert seen == [3, 1]
    for a, b in zip(parts, whole, strict=True):
        assert float((a - b).abs().max()) <= 1e-10
    assert whole.reference.shape == (4, 5, 32) and whole.target.shape == (4, 1, 24)
    assert float((whole.target.norm(dim=-1) - 1).abs().max()) <= 1e-10


def test_vectors_are_wide_in_mixed_precision(makes: Makes) -> None:
    """Queries and targets are float32 whatever the layers compute in."""
    backbone = makes()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        features = backbone.encode_image(pixels())
        query = backbone.compose(features.reference, backbone.tokenize(TEXTS)).query
    assert query.dtype == features.target.dtype == torch.float32
    assert float((query.norm(dim=-1) - 1).abs().max()) < 1e-5


# --- stages -----------------------------------------------------------------------------------------------------------

IMAGE = ("blip.vision_model.", "blip.vision_proj.")


def stage_1_loss(backbone: BLIP4CIR) -> Tensor:
    features = backbone.encode_image(pixels())
    query = backbone.compose(features.reference, backbone.tokenize(TEXTS)).query
    return InBatch(torch.arange(len(TEXTS)), 0.07)(query, features.target.flip(0))


def stage_2_loss(backbone: BLIP4CIR) -> Tensor:
    with torch.no_grad():
        bank = backbone.encode_image(pixels(9))
    query = backbone.compose(bank.reference[: len(TEXTS)].half().float(), backbone.tokenize(TEXTS)).query
    return info_nce(query, bank.target, torch.tensor([8, 7, 6, 5]), 0.02)


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_trains_gets_a_gradient(makes: Makes, stage: int, train_vision: bool) -> None:
    """Everything that requires one, and nothing else: the tower and its projection only in a stage 1 that wants it.

    A key's bias moves all scores of a query alike, so its gradient is zero but for rounding: it must be there.
    """
    backbone = makes(train_vision=train_vision)
    if stage == 2:
        backbone.freeze_image_side()
    backbone.train()
    (stage_1_loss if stage == 1 else stage_2_loss)(backbone).backward()
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    image = [name for name, _ in backbone.named_parameters() if name.startswith(IMAGE)]
    assert frozen == ([] if train_vision and stage == 1 else image) and image
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert name.endswith("key.bias") or float(parameter.grad.abs().max()) > 1e-7, name


def test_dropout_is_the_texts_alone(makes: Makes) -> None:
    """In train mode queries are random while a frozen tower is not, in eval mode neither is."""
    backbone = makes()
    features, tokens = backbone.encode_image(pixels()), backbone.tokenize(TEXTS)

    def differ() -> tuple[bool, bool]:
        first, second = (backbone.compose(features.reference, tokens).query for _ in range(2))
        again = backbone.encode_image(pixels())
        return not torch.equal(first, second), not all(map(torch.equal, again, features))

    assert not backbone.training and differ() == (False, False)
    backbone.train()
    assert not backbone.blip.vision_model.training and backbone.blip.text_encoder.training
    assert differ() == (True, False)
    assert makes(train_vision=True).train().blip.vision_model.training
    assert backbone.eval().blip.text_encoder.training is False and differ() == (False, False)


def test_a_bank_stays_valid(makes: Makes) -> None:
    """After steps of stage 2 in train mode the image side gives the same bits, and the queries have moved."""
    backbone = makes(train_vision=True)
    backbone.freeze_image_side()
    before, query = backbone.encode_image(pixels()), backbone.encode_query(pixels(), backbone.tokenize(TEXTS))
    backbone.train()
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        stage_2_loss(backbone).backward()
        optimizer.step()
    assert all(map(torch.equal, backbone.encode_image(pixels()), before))
    assert not torch.equal(backbone.eval().encode_query(pixels(), backbone.tokenize(TEXTS)), query)
    assert backbone.image_state().keys() == {n for n in backbone.state_dict() if n.startswith(IMAGE)}


@pytest.mark.parametrize("frozen", [False, True])
def test_saving_gives_back_the_same_bits(makes: Makes, tmp_path: Path, frozen: bool) -> None:
    """Vectors, options and names, of a model of either stage, without the folder that the words came from."""
    backbone = makes(train_vision=True)
    if frozen:
        backbone.freeze_image_side()
    save_model(tmp_path / "run", backbone, {})
    read = load_model(tmp_path / "run")
    assert read.options == backbone.options and json.loads(json.dumps(read.options)) == read.options
    if frozen:
        read.freeze_image_side()  # which encodes fewer images at once, and so may round otherwise
    assert torch.equal(read.encode_target(pixels()), backbone.encode_target(pixels()))
    assert torch.equal(
        read.encode_query(pixels(), read.tokenize(TEXTS)), backbone.encode_query(pixels(), backbone.tokenize(TEXTS))
    )
    note = json.loads((tmp_path / "run" / "model.json").read_text())
    note["options"]["tokenizer"] = str(tmp_path / "gone")
    (tmp_path / "run" / "model.json").write_text(json.dumps(note))
    assert load_model(tmp_path / "run").tokenize(TEXTS)["ids"].equal(backbone.tokenize(TEXTS)["ids"])


def test_it_is_known_by_name(words: Path) -> None:
    """With its options and no others."""
    built = build_backbone("blip4cir", model=None, config=CONFIG, tokenizer=str(words), load_weights=False)
    assert isinstance(built, BLIP4CIR) and not built.training
    with pytest.raises(InputError, match="has no option 'pretrained'"):
        build_backbone("blip4cir", pretrained="openai")
