"""The optional part of step 4: a language model rewrites each text in the manner of people, shown by a few examples."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from spn4cir.data_gen.ask import Answer, Engine, Question, Reply, ask
from spn4cir.data_gen.caption import fault, tidy
from spn4cir.data_gen.engines import engine_of
from spn4cir.data_gen.files import Row, digest, is_done, mark_done, stream_jsonl, write_jsonl
from spn4cir.data_gen.length import TokenCounter
from spn4cir.data_gen.processes import Processes
from spn4cir.data_gen.settings import PRESETS, GenerateConfig
from spn4cir.errors import InputError
from spn4cir.files import short

NAMES = r"(?:target|output|answer|result|rewritten|rewrite|rewriting|revised|sentence|modification|text|caption)"
LABEL = re.compile(
    rf"(?:\b(?:sure|okay|certainly|here)\b[^:]{{0,80}}|\b(?:\w+ )?{NAMES}\b[^:]{{0,30}}):\s*", re.IGNORECASE
)
SOURCE = re.compile(r"\W*(?:source|input|original|instruction)\b[^:]{0,30}:", re.IGNORECASE)
NEW_TOKENS = 50


@dataclass(frozen=True)
class Prompt:
    """What a rewriter is told: an instruction, and examples of a source and what people would say.

    Args:
        path: the file it came from.
        instruction: how to rewrite.
        examples: pairs of source and target.
        max_new_tokens: bound of an answer.
    """

    path: Path
    instruction: str
    examples: tuple[tuple[str, str], ...]
    max_new_tokens: int = NEW_TOKENS

    @property
    def name(self) -> str:
        """A short name for its content."""
        return digest({"instruction": self.instruction, "examples": self.examples})[:8]

    def chat(self, source: str) -> list[dict[str, str]]:
        """The messages that ask for a rewriting."""
        said = [{"role": "system", "content": self.instruction}]
        for given, wanted in self.examples:
            said += [{"role": "user", "content": given}, {"role": "assistant", "content": wanted}]
        return [*said, {"role": "user", "content": source}]


def read_prompt(config: GenerateConfig) -> Prompt:
    """The file that is named; or that of the dataset, recipes/rewrite_<dataset>.yaml; or recipes/rewrite.yaml.

    Raises:
        InputError: naming the file and the key that is missing or wrong.
    """
    own = PRESETS / f"rewrite_{Path(config.dataset).name}.yaml"
    path = Path(config.rewriter_prompt or (own if own.is_file() else PRESETS / "rewrite.yaml"))
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
    found = []
    for number, one in enumerate(given, 1):
        source, target = (one.get("source"), one.get("target")) if isinstance(one, dict) else (None, None)
        if not (isinstance(source, str) and isinstance(target, str) and source.strip() and target.strip()):
            raise InputError(f"rewriter_prompt {path}: example {number} needs the texts source and target")
        found.append((source.strip(), target.strip()))
    return tuple(found)


class Rewriter:
    """A model, its prompt, and the checks of its answers.

    Args:
        config: names the rewriter.

    Raises:
        InputError: for a prompt file or a setting that cannot work.
    """

    def __init__(self, config: GenerateConfig):
        if not config.rewriter:
            raise InputError("rewriter_endpoint needs rewriter, the model's name on that server")
        self.config, self.prompt, self.out = config, read_prompt(config), config.file("rewrites.jsonl")
        self.engine: Engine = engine_of(
            config.rewriter,
            config.rewriter_endpoint,
            config,
            images=False,
            max_new_tokens=self.prompt.max_new_tokens,
        )
        self.about = {**self.engine.about, "prompt": self.prompt.name, "retries": config.retries}

    @classmethod
    def of(cls, config: GenerateConfig) -> "Rewriter | None":
        """The rewriter that is set, if one is."""
        return cls(config) if config.rewriter or config.rewriter_endpoint else None

    def rewrite(self, rows: Callable[[], Iterable[Row]], count: TokenCounter, made_by: str) -> None:
        """Write rewrites.jsonl, unless it is done: a row for each triplet whose text a good answer replaces.

        A text that several pairs share is asked about once. What fails the checks is listed in rewrites.failed.jsonl.
        All processes call this.

        Args:
            rows: gives the triplets, anew each time.
            count: of tokens, for the bound.
            made_by: digest of what made the triplets and of this rewriter.

        Raises:
            InputError: if the model cannot work, or a file cannot be written.
        """
        done, processes = is_done(self.out, made_by), Processes()
        processes.wait()
        if done:
            processes.say(f"rewrite: {self.out} is done")
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
        write_jsonl(
            self.out,
            (
                {key: row[key] for key in ("reference", "target")}
                | {"source": row["modification"], "rewritten": good[row["modification"]], **made}
                for row in rows()
                if row["modification"] in good
            ),
        )
        mark_done(self.out, made_by, **self.about, texts=len(replies), failed=len(failed))
        told = f"; {len(failed)} keep the template's text, listed in {lost}" if failed else ""
        print(f"rewrite: {len(good)} of {len(replies)} texts{told} → {self.out}")

    def apply(self, rows: Iterable[Row], count: TokenCounter) -> Iterable[Row]:
        """The same triplets, with the rewritten text in the template's place, where there is one."""
        known = {row["source"]: row["rewritten"] for row in stream_jsonl(self.out)}
        for row in rows:
            text = known.get(row["modification"])
            if text is None:
                yield row
                continue
            made = {"template_text": row["modification"], "llm_caption": text, "rewriter": self.engine.about["model"]}
            yield {**row, **made, "modification": text, "tokens": count([text])[0]}


def check_rewriting(
    prompt: Prompt, count: TokenCounter, limit: int, question: Question, answer: Answer
) -> tuple[str, str | None]:
    """A rewriting on one line, and what is wrong with it, if anything."""
    text, source = sentence(answer.text), question.key
    shown = {said.lower() for pair in prompt.examples for said in pair}
    if found := fault(text):
        return text, found
    if text.lower() in shown and source.lower() not in shown:
        return text, "one of the examples"
    if answer.cut or len(text.split()) > 2 * len(source.split()) + 10 or count([text])[0] > limit:
        return text, "too long"
    return text, None


def sentence(answer: str) -> str:
    """The first line that says something, without a label such as "Target:" that the model may have put before it.

    The paper keeps what follows the last colon of all; here a colon that belongs to the sentence stays.
    """
    for line in answer.strip().splitlines():
        labels = list(LABEL.finditer(line))
        if labels and (not line[: labels[0].start()].strip(" *#>-\"'") or SOURCE.match(line)):
            line = line[labels[-1].end() :]
        elif SOURCE.match(line):
            continue
        if text := tidy(line.strip(" *#>\t").lstrip("- ")):
            return text
    return ""
