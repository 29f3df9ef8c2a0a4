"""Models on this machine, the embedded one and tiny ones made here."""

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_backbones import EMBEDDED
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spn4cir.data_gen.ask import Question, Try
from spn4cir.data_gen.engines import Local, _seed, engine_of
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.datasets.emoji import Emoji
from spn4cir.errors import InputError
from spn4cir.types import ImageRef

PROMPT = "please briefly describe the image in 10 words"
GREEDY, DRAWN = Try(0, 42), Try(1, 42)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    emoji = Emoji()
    return [Question(i, PROMPT, emoji.image(i)) for i in emoji.training_images()[:1200:100]]


@pytest.fixture(scope="module")
def embedded() -> Local:
    return Local("embedded", images=True, batch_size=8, max_new_tokens=40)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model of random weights that reads text alone."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "llava")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small, eos_token_id=2, pad_token_id=0)).save_pretrained(
        folder
    )
    return folder


def test_batched_and_one_at_a_time(embedded: Local, questions: list[Question]) -> None:
    """Together, alone and in another order the captions are the same; most are the names."""
    together = embedded.answer(questions, GREEDY)
    assert together == [embedded.answer([question], GREEDY)[0] for question in questions]
    assert together == embedded.answer(questions[::-1], GREEDY)[::-1]
    names = [Emoji().label(question.key) for question in questions]
    assert sum(a.text == name for a, name in zip(together, names, strict=True)) > len(names) / 2
    assert not any(answer.cut or answer.problem for answer in together)


def test_a_cut_answer_says_so(questions: list[Question]) -> None:
    """At two tokens names have no end yet, and those that do, in a batch with them, are not called cut."""
    short = Local("embedded", images=True, batch_size=8, max_new_tokens=2)
    emoji = Emoji()
    joker = Question("1f0cf", PROMPT, emoji.image("1f0cf"))
    answers = short.answer([joker, *questions], GREEDY)
    whole = Local("embedded", images=True, batch_size=8, max_new_tokens=40).answer([joker, *questions], GREEDY)
    assert [a.cut for a in answers] == [len(a.text) < len(b.text) or a.cut for a, b in zip(answers, whole, strict=True)]
    assert any(answer.cut for answer in answers)
    at_five = Local("embedded", images=True, batch_size=8, max_new_tokens=6).answer([joker, *questions], GREEDY)
    assert not at_five[0].cut and at_five[0].text == "joker" and any(answer.cut for answer in at_five)


def test_draws_are_of_the_seed(reader: Path) -> None:
    """Greedy is always the same; a draw is of (seed, try, questions), whatever was drawn before."""
    engine = Local(str(reader), images=False, batch_size=4, max_new_tokens=12)
    asked = [Question("a", "red"), Question("b", "a much longer question than the other one")]
    greedy, drawn = engine.answer(asked, GREEDY), engine.answer(asked, DRAWN)
    before = torch.random.get_rng_state()
    assert engine.answer(asked, DRAWN) == drawn and engine.answer(asked, GREEDY) == greedy
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's chance is moved
    assert drawn != greedy
    assert drawn not in (engine.answer(asked, Try(2, 42)), engine.answer(asked, Try(1, 43)))
    assert len({_seed(asked, DRAWN), _seed(asked[:1], DRAWN), _seed(asked, Try(2, 42)), _seed(asked, Try(1, 7))}) == 4


def test_chats_are_padded_on_the_left(reader: Path) -> None:
    """A short question beside a long one gets the answer that it gets alone; the chat's other messages count."""
    engine = Local(str(reader), images=False, batch_size=4, max_new_tokens=12)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "red"}]
    asked = [Question("a", "red"), Question("b", "a much longer question than the other ones"), Question("c", chat)]
    answers = engine.answer(asked, GREEDY)
    assert answers == [engine.answer([question], GREEDY)[0] for question in asked]
    assert answers[0] != answers[2]
    assert engine.lengths(asked) == [3, 42, 11]


def test_threads_get_their_own_answers(embedded: Local, questions: list[Question]) -> None:
    """Two batches under way at once do not disturb each other."""
    halves = [questions[:6], questions[6:]] * 3
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n, half=half: found.update({n: embedded.answer(half, GREEDY)}))
        for n, half in enumerate(halves)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = embedded.answer(questions, GREEDY)
    assert [found[n] for n in range(6)] == [whole[:6], whole[6:]] * 3


def test_transparent_images_are_white(embedded: Local, tmp_path: Path) -> None:
    """What is behind an image is white, whatever colour its invisible parts have; black is something else."""
    picture = Image.open(str(Emoji().image("1f0cf"))).convert("RGBA")
    dark = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    dark.paste(picture, mask=picture.getchannel("A"))
    dark.save(tmp_path / "dark.png")
    for name in ("white", "black"):
        Image.alpha_composite(Image.new("RGBA", picture.size, name), dark).save(tmp_path / f"{name}.png")
    asked = [Question(n, PROMPT, tmp_path / f"{n}.png") for n in ("dark", "white", "black")]
    with embedded._preparing:
        embedded._load()
        from spn4cir.images import open_image

        pixels = embedded._process(asked, [open_image(q.image) for q in asked if q.image])["pixel_values"]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])


def test_lengths(embedded: Local, questions: list[Question], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One prompt and a fixed number of image tokens: all the same. Prompts that vary: their letters. Image tokens that
    vary: the areas, from the files' heads."""
    assert embedded.lengths(questions) is None
    other = Question("x", PROMPT + " please", questions[0].image)
    assert embedded.lengths([questions[0], other]) == [len(PROMPT), len(PROMPT) + 7]
    varying = Local("embedded", images=True, batch_size=8, max_new_tokens=4)
    monkeypatch.setattr(
        varying, "_process", lambda q, p: {"input_ids": torch.zeros(1, p[0].width * p[0].height // 1000)}
    )
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    asked = [
        questions[0],
        Question("a", PROMPT, ImageRef(tmp_path / "a.png")),
        Question("b", PROMPT, ImageRef(tmp_path / "b.png")),
    ]
    assert varying.lengths(asked) == [72 * 72, 600, 0]


@pytest.mark.parametrize("name", ["no-such/model", "folder", "no_such_model"])
@pytest.mark.parametrize("images", [True, False])
def test_an_unknown_model(tmp_path: Path, name: str, images: bool) -> None:
    """One line that names it and where to get one: at a first look, and when it is loaded."""
    name = str(tmp_path / "none") if name == "folder" else name
    engine = Local(name, images=images, batch_size=1, max_new_tokens=1)
    for go in (engine.look, lambda: engine.lengths([Question("a", "b")])):
        with pytest.raises(
            InputError, match=f"model '{name}' cannot be loaded: name a folder .* or one of the hub"
        ) as error:
            go()
        assert "\n" not in str(error.value)


def broken(folder: Path, what: str) -> None:
    """A copy of the embedded model that lacks something."""
    shutil.copytree(EMBEDDED / "llava", folder)
    if what == "chat template":
        (folder / "chat_template.jinja").unlink()
    elif what == "weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors[next(name for name in tensors if "mlp.up_proj" in name)]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        (folder / what).write_bytes(b"{")


@pytest.mark.parametrize(("what", "told"), [
    ("chat template", "has no chat template"), ("weights", r"lacks weights, such as .*mlp\.up_proj"),
    ("config.json", "cannot be loaded"), ("tokenizer.json", "cannot be loaded"),
    ("model.safetensors", "cannot be loaded"),
])  # fmt: skip
def test_a_broken_model(tmp_path: Path, questions: list[Question], what: str, told: str) -> None:
    """Said in one line; random weights never answer."""
    broken(tmp_path / "model", what)
    with pytest.raises(InputError, match=told) as error:
        Local(str(tmp_path / "model"), images=True, batch_size=1, max_new_tokens=2).answer(questions[:1], GREEDY)
    assert "\n" not in str(error.value)


def test_a_model_that_sees_nothing(reader: Path, questions: list[Question]) -> None:
    """A model for text alone is no captioner."""
    with pytest.raises(InputError, match="cannot be loaded"):
        Local(str(reader), images=True, batch_size=1, max_new_tokens=2).answer(questions[:1], GREEDY)


def test_what_identifies_answers(tmp_path: Path, reader: Path) -> None:
    """Weights, files of a folder, precision and the bound; where the folder lies does not matter."""

    def about(model: str, tokens: int = 5) -> dict[str, Any]:
        return Local(model, images=True, batch_size=3, max_new_tokens=tokens).about

    shutil.copytree(EMBEDDED / "llava", tmp_path / "llava")
    assert about("embedded") == about(str(tmp_path / "llava")) == about("embedded")
    assert about("embedded") != about("embedded", 6)
    (tmp_path / "llava" / "chat_template.jinja").write_text("{{ messages }}")
    assert about("embedded") != about(str(tmp_path / "llava"))
    assert about("embedded") != about(str(reader))
    assert about("org/name") == {**about("org/name"), "model": "org/name", "weights": None, "files": None}


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of a machine has its own, unless told to use the CPU; half precision follows the training's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    engine = Local("embedded", images=True, batch_size=1, max_new_tokens=1)
    assert (engine.device, engine.about["dtype"], engine._dtype()) == ("cuda:1", "half", torch.float16)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name: SimpleNamespace(dtype=torch.bfloat16))
    assert engine._dtype() == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert engine._dtype() == torch.float16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    engine = Local("embedded", images=True, batch_size=1, max_new_tokens=1)
    assert (engine.device, engine._dtype()) == ("cpu", torch.float32)


def test_no_room_for_a_batch(embedded: Local, questions: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
    """What to lower is said."""
    embedded.answer(questions[:1], GREEDY)

    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(embedded._model, "generate", full)
    with pytest.raises(InputError, match="no room for a batch of 8: lower caption_batch_size"):
        embedded.answer(questions, GREEDY)


def test_which_engine(tmp_path: Path) -> None:
    """An endpoint if there is one, else a model here; nothing is loaded yet."""
    config = GenerateConfig(caption_batch_size=5, requests=7)
    here = engine_of("no-such/model", None, config, images=True, max_new_tokens=9)
    there = engine_of("no-such/model", "http://h:1", config, images=True, max_new_tokens=9)
    assert (here.block, there.block, there.workers) == (5, 1, 7)
    assert there.about == {"engine": "server", "model": "no-such/model", "max_new_tokens": 9}
