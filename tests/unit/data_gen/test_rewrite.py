"""An LLM rewrites the texts: its prompt, the checks of its answers, and what becomes of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from conftest import stand_in
from tiny_backbones import EMBEDDED

from spn4cir.config import recipes_folder
from spn4cir.data_gen.ask import Answer, Question, Try
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.data_gen.texts import Prompt, TokenCounter, check_rewriting, load_prompt, sentence
from spn4cir.data_gen.write_text import write_triplets
from spn4cir.datasets.generated import read_generated
from spn4cir.errors import InputError
from spn4cir.files import read_jsonl, write_jsonl
from spn4cir.types import ImageRef

NOBODY = stand_in(lambda i: ImageRef(Path(i)))
PROMPT = Prompt(Path("p.yaml"), "rewrite", (("a red cat", "make the cat red"), ("two dogs", "show two dogs")))
CAPTIONS = {"a": "red apple", "b": "green apple", "c": "small tree", "d": "two dogs"}
PAIRS = [("a", "b"), ("c", "b"), ("a", "c"), ("b", "d")]


class Fake:
    """An engine that says what a function makes of the question and the turn.

    Args:
        say: the function.
    """

    block, workers = 2, 1

    def __init__(self, say: Callable[[str, int], str]):
        self.say, self.about = say, {"model": "fake"}
        self.asked: list[tuple[str, int]] = []
        self.chats: list[list[dict[str, str]]] = []

    def look(self) -> None:
        pass

    def lengths(self, questions: Sequence[Question]) -> list[int] | None:
        return [len(question.key) for question in questions]

    def answer(self, questions: Sequence[Question], turn: Try) -> list[Answer]:
        self.asked += [(question.key, turn.number) for question in questions]
        self.chats += [question.chat for question in questions]
        return [Answer(self.say(question.key, turn.number)) for question in questions]

    def close(self) -> None:
        pass


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, say: Callable[[str, int], str], **settings: Any
) -> tuple[GenerateConfig, Fake]:
    """Texts of four pairs, rewritten by a fake."""
    config = GenerateConfig(output=str(folder), rewriter="fake", **{"templates": ["target"], **settings})
    write_jsonl(config.file("captions.jsonl"), [{"image_id": i, "caption": c} for i, c in CAPTIONS.items()])
    rows = [{"reference": r, "target": t, "rank": 1, "similarity": 0.5} for r, t in PAIRS]
    write_jsonl(config.file("pairs.jsonl"), rows)
    fake = Fake(say)
    monkeypatch.setattr("spn4cir.data_gen.texts.engine_of", lambda *_, **__: fake)
    write_triplets(config, NOBODY)
    return config, fake


def test_rewritten_texts_take_the_place_of_the_template_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every file; a text that two pairs share is asked about once; source, model and prompt are noted."""
    config, fake = run(tmp_path, monkeypatch, lambda source, _: f"Target: I want {source}")
    assert sorted(fake.asked) == [("green apple", 0), ("small tree", 0), ("two dogs", 0)]
    rewrites = read_jsonl(config.file("rewrites.jsonl"))
    assert [(row["reference"], row["target"]) for row in rewrites] == PAIRS
    assert rewrites[0]["source"] == "green apple" and rewrites[0]["rewritten"] == "I want green apple"
    assert {row["model"] for row in rewrites} == {"fake"} and len(rewrites[0]["prompt"]) == 8
    rows = read_jsonl(config.file("triplets.jsonl"))
    assert [row["modification"] for row in rows] == [f"I want {CAPTIONS[target]}" for _, target in PAIRS]
    assert [row["template_text"] for row in rows] == [CAPTIONS[target] for _, target in PAIRS]
    entries = json.loads(config.file("triplets.json").read_text())
    assert entries[0]["captions"] == ["I want green apple"] and entries[0]["llm_caption"] == "I want green apple"
    triplets, _ = read_generated(config.file("triplets.json"), "abcd")
    assert triplets[3].texts == ("I want two dogs",)
    import pandas

    table = pandas.read_parquet(config.file("triplets.parquet"))
    assert table["modifications"][3].tolist() == ["I want two dogs"] and set(table["rewriter"]) == {"fake"}
    assert rows[0]["tokens"] == TokenCounter("clip")(["I want green apple"])[0]


def test_all_texts_of_a_pair_are_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``all_templates`` each text is asked about, and one that fails stays as the template made it."""

    def say(source: str, _: int) -> str:
        return "" if source == "Unlike red apple, I want two dogs" else f"Target: {source} please"

    settings = {"templates": ["target", "unlike"], "all_templates": True, "retries": 0}
    config, fake = run(tmp_path, monkeypatch, say, **settings)
    entries = json.loads(config.file("triplets.json").read_text())
    triplets, _ = read_generated(config.file("triplets.json"), "abcd")
    rows = read_jsonl(config.file("triplets.jsonl"))
    for (reference, target), triplet, entry, row in zip(PAIRS, triplets, entries, rows, strict=True):
        texts = [CAPTIONS[target], f"Unlike {CAPTIONS[reference]}, I want {CAPTIONS[target]}"]
        assert {source for source, _ in fake.asked} >= {*texts}
        expected = [f"{text} please" for text in texts]
        if say(texts[1], 0) == "":
            expected[1] = texts[1]
        assert list(triplet.texts) == entry["captions"] == entry["llm_caption"] == expected
        assert row["template_text"] == texts[0] and row["other_texts"][0]["modification"] == expected[1]
    counts = json.loads(config.file("summary.json").read_text())["counts"]
    assert counts["rewritten"] + counts["not_rewritten"] == counts["texts"] == 2 * len(PAIRS)


def test_bad_answers_are_asked_again_and_then_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's text stays, without ``llm_caption``; how many is counted, and what was said is listed."""

    def say(source: str, turn: int) -> str:
        if source == "two dogs":
            return "I'm sorry, I cannot help with that."
        return "" if turn < 2 and source == "small tree" else f"the {source} please"

    config, fake = run(tmp_path, monkeypatch, say, retries=2)
    assert sum(source == "two dogs" for source, _ in fake.asked) == 3
    assert sum(source == "green apple" for source, _ in fake.asked) == 1
    texts = [row["modification"] for row in read_jsonl(config.file("triplets.jsonl"))]
    assert texts == ["the green apple please", "the green apple please", "the small tree please", "two dogs"]
    assert "llm_caption" not in json.loads(config.file("triplets.json").read_text())[3]
    [failed] = read_jsonl(config.file("rewrites.failed.jsonl"))
    assert (failed["source"], failed["reason"]) == ("two dogs", "refusal")
    counts = json.loads(config.file("summary.json").read_text())["counts"]
    assert (counts["rewritten"], counts["not_rewritten"]) == (3, 1)


def test_done_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritings that are there are used; another prompt, or other texts, are asked about anew."""
    config, _ = run(tmp_path, monkeypatch, lambda source, _: f"the {source}")
    before = config.file("triplets.json").read_bytes()
    _, fake = run(tmp_path, monkeypatch, lambda source, _: "never")
    assert not fake.asked
    config.file("triplets.json").unlink()
    _, fake = run(tmp_path, monkeypatch, lambda source, _: "never")
    assert not fake.asked and config.file("triplets.json").read_bytes() == before
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"instruction": "say it", "examples": [{"source": "x", "target": "y"}]}))
    _, fake = run(tmp_path, monkeypatch, lambda source, _: f"a {source}", rewriter_prompt=str(other))
    assert len(fake.asked) == 3 and config.file("triplets.json").read_bytes() != before


def test_the_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction, five examples as turns, and the text."""
    _, fake = run(tmp_path, monkeypatch, lambda source, _: f"the {source}")
    chat = fake.chats[0]
    assert [message["role"] for message in chat] == ["system", *["user", "assistant"] * 5, "user"]
    assert chat[-1]["content"] in CAPTIONS.values() and chat[0]["content"] == load_prompt(GenerateConfig()).instruction


@pytest.mark.parametrize(("answer", "expected"), [
    ("make it red", "make it red"),
    ("  make it red \n\nThis keeps the meaning.", "make it red"),
    ("Target: make it red", "make it red"),
    ("**Rewritten sentence:** make it red", "make it red"),
    ("Sure! Here is the rewritten sentence:\n\n\"make it red\"", "make it red"),
    ("Sure, here's one: the cat is red", "the cat is red"),
    ("Source: a red cat Target: make it red", "make it red"),
    ("Source: a red cat\nTarget: make it red\nSource: a dog", "make it red"),
    ("a sign that reads: stop", "a sign that reads: stop"),
    ("show the time 10:30", "show the time 10:30"),
    ("- make it red", "make it red"),
    ("", ""), ("\n\n", ""), ("Target:", ""),
])  # fmt: skip
def test_sentence(answer: str, expected: str) -> None:
    """The first line that says something, without a label or quotes; a colon of the sentence's own stays."""
    assert sentence(answer) == expected


@pytest.mark.parametrize(("source", "answer", "cut", "problem"), [
    ("a blue cat", "make the cat blue", False, None),
    ("a blue cat", "a blue cat", False, None),
    ("a blue cat", "", False, "empty"),
    ("a blue cat", "...", False, "empty"),
    ("a blue cat", "I cannot help with that.", False, "refusal"),
    ("a blue cat", "blue blue blue blue blue", False, "repetition"),
    ("a blue cat", "make the cat red", False, "one of the examples"),
    ("a red cat", "make the cat red", False, None),
    ("a blue cat", "make the cat", True, "too long"),
    ("a blue cat", " ".join(f"w{n}" for n in range(17)), False, "too long"),
    (" ".join(["cat dog"] * 9), " ".join(f"word{n}" for n in range(18)), False, "too long"),
])  # fmt: skip
def test_checks(source: str, answer: str, cut: bool, problem: str | None) -> None:
    """What is no sentence, or none about this text, or too long for the backbone, is found."""
    assert (
        check_rewriting(PROMPT, TokenCounter("clip"), 30, Question(source, source), Answer(answer, cut))[1] == problem
    )


@pytest.mark.parametrize("path", sorted((recipes_folder() / "prompts").glob("*.yaml")), ids=lambda p: p.stem)
def test_prompts_that_ship(path: Path) -> None:
    """Each has an instruction and five examples whose targets pass the checks."""
    prompt = load_prompt(GenerateConfig(rewriter_prompt=str(path)))
    assert len(prompt.examples) == 5 and "only" in prompt.instruction
    for source, target in prompt.examples:
        question = Question(source, prompt.chat(source))
        assert check_rewriting(prompt, TokenCounter("clip"), 77, question, Answer(target)) == (target, None)


def test_the_prompt_of_a_dataset(tmp_path: Path) -> None:
    """A dataset may have its own; the general one is there for others; a file that is named is taken."""
    names = {n: load_prompt(GenerateConfig(dataset=n)).path.name for n in ("fashioniq", "cirr", "emoji", "../x")}
    general = "rewrite.yaml"
    assert names == {
        "fashioniq": "rewrite_fashioniq.yaml",
        "cirr": "rewrite_cirr.yaml",
        "emoji": general,
        "../x": general,
    }


GOOD = {"instruction": "say it", "examples": [{"source": "x", "target": "y"}]}


@pytest.mark.parametrize(("content", "told"), [
    ("[a", "is no YAML"),
    ("just words", "must hold the keys instruction and examples"),
    ({"examples": GOOD["examples"]}, "the key instruction must hold a text"),
    ({**GOOD, "instruction": " "}, "the key instruction must hold a text"),
    ({"instruction": "say it"}, "the key examples must hold a list"),
    ({**GOOD, "examples": []}, "the key examples must hold a list"),
    ({**GOOD, "examples": [{"source": "x"}]}, "example 1 needs the texts source and target"),
    ({**GOOD, "examples": [*GOOD["examples"], "x"]}, "example 2 needs the texts source and target"),
    ({**GOOD, "max_new_tokens": 0}, "the key max_new_tokens must be 1 or more"),
    ({**GOOD, "exampels": []}, "the key exampels is unknown"),
])  # fmt: skip
def test_prompt_files_that_cannot_be_meant(tmp_path: Path, content: Any, told: str) -> None:
    """One line that names the file and the key, before anything is asked."""
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(InputError, match=told) as caught:
        load_prompt(GenerateConfig(rewriter_prompt=str(path)))
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)
    path.write_text(yaml.safe_dump(GOOD))
    assert load_prompt(GenerateConfig(rewriter_prompt=str(path))).instruction == "say it"


def test_settings_that_cannot_be_meant(tmp_path: Path) -> None:
    """A prompt file that is missing, or a server without a model's name."""
    for settings, told in (
        ({"rewriter": "x", "rewriter_prompt": str(tmp_path / "none.yaml")}, "none.yaml cannot be read"),
        ({"rewriter_endpoint": "http://localhost:1/v1"}, "rewriter_endpoint needs rewriter"),
        ({"rewriter": str(tmp_path / "no-model")}, "cannot be loaded"),
    ):
        config = GenerateConfig(output=str(tmp_path / "out"), **cast(dict[str, Any], settings))
        write_jsonl(
            config.file("captions.jsonl"), [{"image_id": "a", "caption": "x"}, {"image_id": "b", "caption": "y"}]
        )
        write_jsonl(config.file("pairs.jsonl"), [{"reference": "a", "target": "b"}])
        with pytest.raises(InputError, match=told):
            write_triplets(config, NOBODY)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small layers and random weights, with a tokenizer and a chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "llava")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **marks, **small)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_llama(tmp_path: Path, llama: Path) -> None:
    """A model of transformers, end to end: whatever it says, each pair has a text, and the same one each time."""
    found = []
    for name in ("a", "b"):
        settings: dict[str, Any] = {"rewriter": str(llama), "retries": 1, "templates": ["target"]}
        config = GenerateConfig(output=str(tmp_path / name), **settings)
        write_jsonl(config.file("captions.jsonl"), [{"image_id": i, "caption": c} for i, c in CAPTIONS.items()])
        write_jsonl(config.file("pairs.jsonl"), [{"reference": r, "target": t} for r, t in PAIRS])
        write_triplets(config, NOBODY)
        names = ("triplets.jsonl", "triplets.parquet", "rewrites.jsonl", "rewrites.failed.jsonl")
        found.append([config.file(n).read_bytes() for n in names])
        counts = json.loads(config.file("summary.json").read_text())["counts"]
        assert counts["rewritten"] + counts["not_rewritten"] == counts["triplets"] == 4
        assert counts["rewritten"] == len(read_jsonl(config.file("rewrites.jsonl")))
        assert not list(config.folder.glob("*.partial.jsonl"))
    assert found[0] == found[1]
    heard = {row["answer"] for row in read_jsonl(config.file("rewrites.failed.jsonl"))}
    assert heard or counts["rewritten"]
