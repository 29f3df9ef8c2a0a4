"""Ask a language model many questions: in blocks that survive a kill, by several processes, each answer checked."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from spn4cir.data_gen.steps import GenerateConfig, Journal, digest
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import ImageRef

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}
FIRST, LATER = 8, 64  # so many unreadable answers in a row, nothing before or something, mean that the engine is broken


@dataclass(frozen=True)
class Question:
    """What a model is asked; ``key`` names the question among all."""

    key: str
    prompt: str | Sequence[Message]  # what a user says, or a whole chat; an image belongs to its last message
    image: ImageRef | None = None
    mark: str = ""  # what else decides the answer, such as the hash of the pixels

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages, without the image."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [dict(message) for message in self.prompt]


class Answer(NamedTuple):
    """What an engine says."""

    text: str
    cut: bool = False  # whether it reached the bound of tokens without an end
    problem: str | None = None  # why there is nothing to read at all, if so; such a question is not asked again


class Reply(NamedTuple):
    """What became of a question: the text, and, where the last try failed, why; ``read``: whether it could be read."""

    key: str
    text: str
    problem: str | None
    read: bool = True


class Try(NamedTuple):
    """Which time a question is asked: 0 is greedy, since that is the best answer; later ones draw, by seed."""

    number: int
    seed: int


class Engine(Protocol):
    """Whatever answers: a model here, or a server; it inherits what it has nothing to do for."""

    about: dict[str, Any]  # everything that decides its answers
    block: int  # how many questions it takes at once, the unit of commit
    workers: int  # how many blocks may be under way at any time

    def look(self) -> None:
        """Raise ``InputError`` if it is known at once that this cannot work."""
        return None

    def lengths(self, questions: Sequence[Question]) -> list[int] | None:
        """How long the input of each question is, in any unit; None if it is all the same to this engine."""
        return None

    def answer(self, questions: Sequence[Question], turn: Try) -> list[Answer]:
        """Answer the questions of a block, or some of them; called from several threads."""

    def probe(self, like: Question) -> bool:
        """Whether a harmless question of the same kind gets an answer, so that refusals are about what is asked."""
        return False

    def close(self) -> None:
        """Nothing more will be asked; an answer that is being waited for may be given up."""
        return None


# an answer's text made tidy, and what is wrong with it, if anything
Check = Callable[[Question, Answer], tuple[str, str | None]]
Finish = Callable[[list[Reply]], None]


def ask(
    out: Path,
    questions: Sequence[Question],
    engine: Engine,
    check: Check,
    config: GenerateConfig,
    finish: Finish,
    has_answered: bool = False,
) -> None:
    """Ask all questions, some perhaps again, and hand over what came of them.

    A block is a function of the whole list of questions, never of what a killed run has left to do, and is committed
    whole: neither a kill nor the number of processes changes an answer. All processes call this; in the first,
    ``finish`` takes all replies in the order of the questions, and writes ``out``, beside which the journal lies.
    ``has_answered`` says that the engine has answered other questions before, so that few failures are about these.

    Raises ``InputError`` if the engine cannot work, or the journal cannot be written; what was committed stays.
    """
    processes, lengths = Processes(), engine.lengths(questions) if questions else None
    # the longest first, so that what is too much for the memory shows at once
    order = sorted(range(len(questions)), key=(lambda n: -lengths[n]) if lengths else (lambda n: n))
    blocks = [order[start : start + engine.block] for start in range(0, len(order), engine.block)]
    made_by = _made_by(questions, engine, config)
    journal = Journal(out, made_by, processes)
    mine = [n for n in range(processes.index, len(blocks), processes.count) if n not in journal]
    work = _Work(journal, engine, questions[:1], not has_answered and not any(n in journal for n in range(len(blocks))))
    try:
        work.run({n: [questions[i] for i in blocks[n]] for n in mine}, partial(settle, engine, check, config))
    finally:
        engine.close()
        journal.close()
    processes.wait()
    merged = Journal(out, made_by, processes)
    if processes.first:
        found = dict(zip(order, merged.rows(), strict=True))
        finish([Reply(**found[n]) for n in range(len(order))])
        merged.remove()
    else:
        merged.close()
    processes.wait()


Block = Sequence[Question]


class _Work:
    """Blocks under way in threads, and committed as they get ready."""

    def __init__(self, journal: Journal, engine: Engine, like: Block, fresh: bool):
        self.journal, self.engine, self.like, self.read_any, self.failed = journal, engine, like, not fresh, 0
        # blocks of which nothing can be read, until one can be, or a probe: if neither comes, the engine is broken, and
        # a million failures would say no more than eight
        self.held: list[tuple[int, list[Reply]]] = []

    def run(self, blocks: Mapping[int, Block], answer: Callable[[Block], list[Reply]]) -> None:
        numbers, waiting = iter(blocks), dict[Future[list[Reply]], int]()
        bar = tqdm(total=sum(map(len, blocks.values())), desc="ask", unit="question", disable=not blocks)
        with bar, ThreadPoolExecutor(self.engine.workers) as pool:
            try:
                while True:
                    for number in islice(numbers, 2 * self.engine.workers - len(waiting)):
                        waiting[pool.submit(answer, blocks[number])] = number
                    if not waiting:
                        break
                    ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for one in sorted(ready, key=waiting.__getitem__):
                        replies = one.result()
                        self._take(waiting.pop(one), replies)
                        bar.set_postfix(failed=self.failed, refresh=False)
                        bar.update(len(replies))
                if self.held and not self.read_any:
                    self._probe()
                self._commit()
            except BaseException:
                self._rescue(waiting)
                raise

    def _take(self, number: int, replies: list[Reply]) -> None:
        self.failed += sum(reply.problem is not None for reply in replies)
        self.held.append((number, replies))
        if any(reply.read for reply in replies):
            self.read_any = True
            self._commit()
        elif sum(len(held) for _, held in self.held) >= (LATER if self.read_any else FIRST):
            self._probe()

    def _commit(self) -> None:
        for number, replies in self.held:
            self.journal.add(number, [reply._asdict() for reply in replies])
        self.held = []

    def _probe(self) -> None:
        """Commit unreadable replies if the engine answers a probe: then the questions are the reason. Else give up."""
        if self.engine.probe(self.like[0]):
            self.read_any = True
            self._commit()
            return
        replies = [reply for _, held in self.held for reply in held]
        told = f"{replies[-1].problem}, for {short(replies[-1].key)}"
        raise InputError(f"{len(replies)} questions in a row got no readable answer; the last: {told}")

    def _rescue(self, waiting: Mapping[Future[list[Reply]], int]) -> None:
        """Commit what can still be had of the blocks under way: an answer may have been paid for."""
        self.engine.close()
        for one in waiting:
            one.cancel()
        for one, number in waiting.items():
            if not one.cancelled() and one.exception() is None and all(reply.read for reply in one.result()):
                with suppress(InputError):  # the one that is being told came first
                    self.journal.add(number, [reply._asdict() for reply in one.result()])


def settle(engine: Engine, check: Check, config: GenerateConfig, questions: Sequence[Question]) -> list[Reply]:
    """Ask the questions of a block; those whose answer fails the check again, ``config.retries`` times at most."""
    replies: dict[str, Reply] = {}
    left = list(questions)
    for number in range(config.retries + 1):
        for question, answer in zip(left, engine.answer(left, Try(number, config.seed)), strict=True):
            text, problem = (answer.text, None) if answer.problem else check(question, answer)
            replies[question.key] = Reply(question.key, text, answer.problem or problem, not answer.problem)
        left = [q for q in left if replies[q.key].problem and replies[q.key].read]
        if not left:
            break
    return [replies[question.key] for question in questions]


def _made_by(questions: Sequence[Question], engine: Engine, config: GenerateConfig) -> str:
    asked = hashlib.sha256()
    for one in questions:
        asked.update(json.dumps([one.key, one.chat, str(one.image or ""), one.mark]).encode())
    settings = {"block": engine.block, "retries": config.retries, "seed": config.seed, "questions": asked.hexdigest()}
    return digest({**engine.about, **settings})
