"""The weights that ship with the project."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Blip2ForImageTextRetrieval, BlipForImageTextRetrieval

import spn4cir
from spn4cir.backbones import build_backbone
from spn4cir.backbones.shared_blip import load_bert_tokenizer, load_library
from spn4cir.data_gen.ask import Question, Try
from spn4cir.data_gen.engines import engine_of
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.datasets import load_dataset
from spn4cir.errors import InputError

EMBEDDED = Path(spn4cir.__file__).parent / "embedded"
WEIGHTS = sorted(EMBEDDED.rglob("*.safetensors"))
FUSION = {
    "blip": (BlipForImageTextRetrieval, ("[DEC]", "[ENC]")),
    "blip2": (Blip2ForImageTextRetrieval, ("[DEC]",)),
}


def test_there_are_weights() -> None:
    """All embedded models are there, so the tests below look at something."""
    assert {path.parent.name for path in WEIGHTS} == {"clip", "clip_transformer", "llava", *FUSION}


def test_nothing_pickled_ships() -> None:
    """Weights are safetensors."""
    assert not [p for kind in ("*.pt", "*.pth", "*.bin", "*.ckpt", "*.pkl", "*.npy") for p in EMBEDDED.rglob(kind)]


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.parent.name)
def test_weights_are_small(path: Path) -> None:
    """At most 8 MB a file."""
    assert path.stat().st_size <= 8_000_000


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.parent.name)
def test_quality_says_how_weights_were_made(path: Path) -> None:
    """Beside weights stands quality.json with the command that made them, which names a module that is there."""
    quality = json.loads((path.parent / "quality.json").read_text(encoding="utf-8"))
    python, flag, module, *_ = quality["command"].split()
    assert (python, flag) == ("python", "-m")
    assert (EMBEDDED.parents[1] / Path(*module.split("."))).with_suffix(".py").is_file()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """A config alone would silently give random weights; a checkpoint that fills it later says nothing."""
    folder = tmp_path / "clip"
    shutil.copytree(EMBEDDED / "clip", folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        build_backbone("clip4cir", model=f"local-dir:{folder}")
    build_backbone("clip4cir", model=f"local-dir:{folder}", load_weights=False)


@pytest.mark.parametrize("folder", sorted({path.parent for path in WEIGHTS}), ids=lambda p: p.name)
def test_folders_are_small(folder: Path) -> None:
    """At most 8.2 MB with tokenizer and all, and no file that the package would not ship."""
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 8_200_000
    assert all(p.is_file() for p in folder.iterdir())


@pytest.mark.parametrize("name", FUSION)
def test_fusion_models_are_whole(name: str, tmp_path: Path) -> None:
    """The library's class reads what was written: half-precision weights, none missing, none left over, none empty."""
    kind, _ = FUSION[name]
    loaded = load_library(kind, EMBEDDED / name, None)
    weights = load_file(EMBEDDED / name / "model.safetensors")
    state = loaded.state_dict()
    assert weights.keys() == state.keys()
    assert {value.dtype for value in weights.values()} == {torch.half}
    assert all(torch.equal(value.float(), state[key]) for key, value in weights.items())
    empty = {key for key, value in weights.items() if not value.any()}
    assert empty == {"itm_head.weight", "itm_head.bias"}
    assert sum(p.numel() for p in loaded.parameters()) == json.loads(
        (EMBEDDED / name / "quality.json").read_text(encoding="utf-8")
    )["parameters"] + sum(weights[key].numel() for key in empty)
    shutil.copy(EMBEDDED / name / "config.json", tmp_path)
    with pytest.raises(InputError, match="cannot load"):
        load_library(kind, tmp_path, None)


@pytest.mark.parametrize("name", FUSION)
def test_tokenizers_of_fusion_models_round_trip(name: str) -> None:
    """BERT's marks around lower-cased word pieces, the added ones last; all that a keyboard has is known."""
    kind, added = FUSION[name]
    config = kind.config_class.from_pretrained(EMBEDDED / name)
    size = (config.text_config if name == "blip" else config.qformer_config).vocab_size
    tokenizer = load_bert_tokenizer(EMBEDDED / name, size, added)
    assert len(AutoTokenizer.from_pretrained(EMBEDDED / name)) == size  # nothing had to be appended
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert tokenizer.convert_tokens_to_ids(list(added)) == list(range(size - len(added), size))
    keys = "".join(map(chr, range(32, 127)))
    ids = tokenizer([keys, "Make it a RED heart", ""], padding=True)["input_ids"]
    assert 1 not in ids[0]
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "") == keys.lower().replace(" ", "")
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "make it a red heart"
    assert ids[2][:3] == [2, 3, 0]
    assert 1 in tokenizer("\u4e00")["input_ids"]  # a letter that no name has


def test_the_captioner_names_what_it_was_trained_on() -> None:
    """At least 75 % of a sample exactly, through the code that runs LLaVA-1.5; and fewer of what was held out."""
    dataset, config = load_dataset("emoji"), GenerateConfig()
    captioner = engine_of("embedded", None, config, images=True, max_new_tokens=config.max_new_tokens)
    prompt = config.prompt.replace("{words}", "10")
    held_out = json.loads((EMBEDDED / "llava" / "quality.json").read_text())["held_out_ids"]
    trained = sorted(set(dataset.training_images()) - set(held_out))

    def exact(ids: list[str]) -> float:
        answers = captioner.answer([Question(i, prompt, dataset.image(i)) for i in ids], Try(0, 0))
        return sum(answer.text == dataset.label(i) for answer, i in zip(answers, ids, strict=True)) / len(ids)

    assert exact(random.Random(0).sample(trained, 96)) >= 0.75 > exact(held_out[:96])
