"""Modification texts: made by templates, rewritten by a language model, and how long they are for a tokenizer."""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml

from spn4cir.config import recipes_folder
from spn4cir.data_gen.answers import fault, strip_thoughts, tidy
from spn4cir.data_gen.ask import Answer, Question, Reply, ask
from spn4cir.data_gen.engines import engine_of
from spn4cir.data_gen.steps import EMBEDDED, GenerateConfig, digest, mark_done, skip_step
from spn4cir.errors import InputError
from spn4cir.files import Row, short, stream_jsonl, write_jsonl
from spn4cir.text_tokenizer import load_tokenizer

NAMES = r"(?:target|output|answer|result|rewritten|rewrite|rewriting|revised|sentence|modification|text|caption)"
LABEL = re.compile(
    rf"(?:\b(?:sure|okay|certainly|here)\b[^:]{{0,80}}|\b(?:\w+ )?{NAMES}\b[^:]{{0,30}}):\s*", re.IGNORECASE
)
SOURCE = re.compile(r"\W*(?:source|input|original|instruction)\b[^:]{0,30}:", re.IGNORECASE)
NEW_TOKENS = 50
# the paper's templates 0, 1 and 2
FORMS = {"instead": "{1} instead of {0}", "unlike": "Unlike {0}, I want {1}", "target": "{1}"}
ARTICLES = {"a", "an", "the"}  # captions that differ in nothing else do not differ
FUNCTION_WORDS = ARTICLES | {
    "and", "or", "of", "in", "on", "at", "to", "for", "from", "by", "with", "as", "is", "are", "this", "that", "its",
    "it",
}  # fmt: skip
FEWEST = 100  # captions: among fewer, a word's share says little about how much it tells


class WordWeights:
    """How much a word of a caption tells about its image: ``log(1 + N / n)`` if n of N captions have it.

    Function words, such as articles and prepositions, tell nothing. This is the inverse document frequency of text
    retrieval (Spärck Jones, Journal of Documentation, 1972), with at least ``FEWEST`` for N.
    """

    def __init__(self, captions: Iterable[str] = ()):
        self._total, self._counts = 0, Counter[str]()
        for self._total, caption in enumerate(captions, 1):
            self._counts.update({word.lower() for word in _words(caption)})

    def __call__(self, words: Iterable[str]) -> float:
        """The sum over words in lower case."""
        total = max(self._total, FEWEST)
        told = (word for word in words if word not in FUNCTION_WORDS)
        return sum(math.log(1 + total / max(self._counts[word], 1)) for word in told)


def difference(
    reference: str, target: str, draw: random.Random, weigh: WordWeights | None = None, least: float = 0.0
) -> str:
    """What changes, in a drawn phrasing: the words that only the target's caption has; without any, what is gone.

    The text is empty if the two captions hold the same words, articles aside, or share too few content words: then it
    would be nearly the whole target caption, and a model could learn from it to ignore the reference. Too few are none,
    or less than the part ``least`` of what the words of the target's caption tell, by ``weigh``.
    """
    weigh = weigh or WordWeights()
    before, after = (_words(text) for text in (reference, target))
    low_before, low_after = ({word.lower() for word in words} for words in (before, after))
    shared, told = weigh(low_before & low_after), weigh(low_after)
    if not shared or shared < least * told or not (low_before ^ low_after) - ARTICLES:
        return ""
    new = " ".join(word for word in after if word.lower() not in low_before)
    gone = " ".join(word for word in before if word.lower() not in low_after)
    if not new:
        return f"without {gone}"
    last = f"{new} instead of {gone}" if gone else f"with {new}"
    return draw.choice([new, f"but {new}", f"make it {new}", last])


def compose_text(
    template: str,
    reference: str,
    target: str,
    draw: random.Random,
    weigh: WordWeights | None = None,
    least: float = 0.0,
) -> str:
    """A modification text by a template of ``FORMS`` or by ``difference``; empty if that has nothing to say."""
    if template == "difference":
        return difference(reference, target, draw, weigh, least)
    return FORMS[template].format(reference, target)


def caption_similarity(one: str, other: str) -> float:
    """How many of the words of two captions they share, from 0 to 1; case and punctuation aside (Jaccard)."""
    a, b = ({word.lower() for word in _words(text)} for text in (one, other))
    return len(a & b) / len(a | b) if a or b else 1.0


def _words(text: str) -> list[str]:
    """Words of a text without the punctuation around them; what is inside, as in 3.5 or St. Bernard's, stays."""
    return [word for part in text.split() if (word := part.strip(",.;:!?"))]


class TokenCounter:
    """Counts tokens, marks included, as a backbone's ``tokenize`` would make them before it cuts.

    A backbone that leaves punctuation out of its texts reads fewer tokens than are counted here, never more.
    ``tokenizer`` is ``clip``, that of OpenAI's CLIP; ``embedded``, that of the embedded CLIP; or one of transformers by
    name or folder, which may hold ``vocab.txt`` alone.
    """

    def __init__(self, tokenizer: str):
        self._clean: Any = None
        if tokenizer not in ("clip", "embedded"):
            self._library = load_tokenizer(tokenizer, "give clip, embedded, or a folder of a tokenizer")
            return
        own = _of_clip(tokenizer)
        self._clean, self._library = own.clean_fn, getattr(own, "tokenizer", None)
        self._tokens_of_word = lru_cache(1 << 20)(lambda word: len(own.encode(word)))

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """Texts → their numbers of tokens."""
        if self._clean:
            texts = [" ".join(text.split()) if _is_plain(text) else self._clean(text) for text in texts]
        if self._library is None:  # no token of CLIP's reaches over a space
            return [2 + sum(self._tokens_of_word(word) for word in text.lower().split()) for text in texts]
        if not texts:
            return []
        found = self._library(list(texts), truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]


@lru_cache(2)  # the large one takes a second to read
def _of_clip(tokenizer: str) -> Any:
    import open_clip

    return open_clip.get_tokenizer("ViT-L-14" if tokenizer == "clip" else f"local-dir:{EMBEDDED / 'clip'}")


def _is_plain(text: str) -> bool:
    """Whether nothing in it can be a broken encoding or an HTML entity, the search for which takes most of the time."""
    return text.isascii() and text.isprintable() and "&" not in text


@dataclass(frozen=True)
class Prompt:
    """What a rewriter is told: an instruction, and examples of a source and what people would say."""

    path: Path
    instruction: str
    examples: tuple[tuple[str, str], ...]
    max_new_tokens: int = NEW_TOKENS

    @property
    def name(self) -> str:
        """A digest of its content."""
        return digest({"instruction": self.instruction, "examples": self.examples})[:8]

    def chat(self, source: str) -> list[dict[str, str]]:
        """The messages that ask for a rewriting."""
        said = [{"role": "system", "content": self.instruction}]
        for given, wanted in self.examples:
            said += [{"role": "user", "content": given}, {"role": "assistant", "content": wanted}]
        return [*said, {"role": "user", "content": source}]


def load_prompt(config: GenerateConfig) -> Prompt:
    """Read the file that is named; or that of the dataset, recipes/prompts/rewrite_<dataset>.yaml; or rewrite.yaml.

    Raises ``InputError`` naming the file and the key that is missing or wrong.
    """
    prompts = recipes_folder() / "prompts"
    own = prompts / f"rewrite_{Path(config.dataset).name}.yaml"
    path = Path(config.rewriter_prompt or (own if own.is_file() else prompts / "rewrite.yaml"))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"rewriter_prompt {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"rewriter_prompt {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"rewriter_prompt {path} must hold the keys instruction and examples, got {short(content)}")
    if unknown := set(content) - {"instruction", "examples", "max_new_tokens"}:
        raise InputError(f"rewriter_prompt {path}: the key {min(map(str, unknown))} is unknown")
    instruction, tokens = content.get("instruction"), content.get("max_new_tokens", NEW_TOKENS)
    if not isinstance(instruction, str) or not instruction.strip():
        raise InputError(f"rewriter_prompt {path}: the key instruction must hold a text, got {short(instruction)}")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InputError(f"rewriter_prompt {path}: the key max_new_tokens must be 1 or more, got {short(tokens)}")
    return Prompt(path, " ".join(instruction.split()), _examples(path, content.get("examples")), tokens)


def _examples(path: Path, given: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list) or not given:
        raise InputError(f"rewriter_prompt {path}: the key examples must hold a list of source and target")
    roles = ("source", "target")
    found: list[Any] = [[one.get(role) for role in roles] if isinstance(one, dict) else [None] for one in given]
    for number, pair in enumerate(found, 1):
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise InputError(f"rewriter_prompt {path}: example {number} needs the texts source and target")
    return tuple((source.strip(), target.strip()) for source, target in found)


class Rewriter:
    """A model and its prompt. Raises ``InputError`` for a prompt file or a setting that cannot work."""

    def __init__(self, config: GenerateConfig):
        if not config.rewriter:
            raise InputError("rewriter_endpoint needs rewriter, the model's name on that server")
        self.config, self.prompt, self.out = config, load_prompt(config), config.file("rewrites.jsonl")
        model, tokens = config.rewriter, self.prompt.max_new_tokens
        self.engine = engine_of(model, config.rewriter_endpoint, config, images=False, max_new_tokens=tokens)
        self.about = {**self.engine.about, "prompt": self.prompt.name, "retries": config.retries}

    @classmethod
    def of(cls, config: GenerateConfig) -> "Rewriter | None":
        """The rewriter that is set, if one is."""
        return cls(config) if config.rewriter or config.rewriter_endpoint else None

    def rewrite(self, rows: Callable[[], Iterable[Row]], count: TokenCounter, made_by: str) -> None:
        """Write rewrites.jsonl, unless it is done: a row for each triplet whose text a good answer replaces.

        Equal texts are asked about once; what fails the checks is listed in rewrites.failed.jsonl. All processes call
        this. ``rows`` gives the triplets, anew each time. Raises ``InputError`` if the model or a file cannot work.
        """
        if skip_step("rewrite", self.out, made_by):
            return
        self.engine.look()
        sources = dict.fromkeys(row["modification"] for row in rows())
        questions = [Question(source, self.prompt.chat(source)) for source in sources]
        check = partial(check_rewriting, self.prompt, count, self.config.max_tokens)
        ask(self.out, questions, self.engine, check, self.config, partial(self._finish, rows, made_by))

    def _finish(self, rows: Callable[[], Iterable[Row]], made_by: str, replies: list[Reply]) -> None:
        good = {reply.key: reply.text for reply in replies if not reply.problem}
        failed = [{"source": r.key, "reason": r.problem, "answer": r.text} for r in replies if r.problem]
        lost = self.out.with_name("rewrites.failed.jsonl")
        write_jsonl(lost, failed)
        made = {"model": self.engine.about["model"], "prompt": self.prompt.name, "made_by": made_by}
        pairs = ((row["reference"], row["target"], row["modification"]) for row in rows())
        kept = (dict(zip(("reference", "target", "source"), pair, strict=True)) for pair in pairs if pair[2] in good)
        write_jsonl(self.out, ({**row, "rewritten": good[row["source"]], **made} for row in kept))
        mark_done(self.out, made_by, **self.about, texts=len(replies), failed=len(failed))
        told = f"; {len(failed)} keep the template's text, listed in {lost}" if failed else ""
        print(f"rewrite: {len(good)} of {len(replies)} texts{told} → {self.out}")

    def apply(self, rows: Iterable[Row], count: TokenCounter) -> Iterable[Row]:
        """The same triplets, with the rewritten text in the template's place, where there is one."""
        known = {row["source"]: row["rewritten"] for row in stream_jsonl(self.out)}
        for row in rows:
            if text := known.get(row["modification"]):
                made = {"template_text": row["modification"], "llm_caption": text}
                row |= made | {"rewriter": self.engine.about["model"], "modification": text, "tokens": count([text])[0]}
            yield row


def check_rewriting(
    prompt: Prompt, count: TokenCounter, limit: int, question: Question, answer: Answer
) -> tuple[str, str | None]:
    """A rewriting on one line, and what is wrong with it, if anything."""
    text, source, problem = sentence(strip_thoughts(answer.text)), question.key, None
    shown = {said.lower() for pair in prompt.examples for said in pair}
    if text.lower() in shown and source.lower() not in shown:
        problem = "one of the examples"
    elif answer.cut or len(text.split()) > 2 * len(source.split()) + 10 or count([text])[0] > limit:
        problem = "too long"
    return text, fault(text) or problem


def sentence(answer: str) -> str:
    """The first line that says something, without a label such as "Target:" before it."""
    # the paper keeps what follows the last colon of all; here a colon that belongs to the sentence stays
    for line in answer.strip().splitlines():
        labels = list(LABEL.finditer(line))
        if labels and (not line[: labels[0].start()].strip(" *#>-\"'") or SOURCE.match(line)):
            line = line[labels[-1].end() :]
        elif SOURCE.match(line):
            continue
        if text := tidy(line.strip(" *#>\t").lstrip("- ")):
            return text
    return ""
