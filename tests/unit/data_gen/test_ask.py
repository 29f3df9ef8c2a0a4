"""The loop over questions: blocks, kills, processes, retries, and an engine that is broken."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spn4cir.data_gen.ask import FIRST, LATER, Answer, Question, Reply, Try, ask
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.errors import InputError

QUESTIONS = [Question(f"q{n}", f"prompt {n}") for n in range(11)]


class Fake:
    """Its answers depend, as the last bits of a real one do, on all that is asked together; it may be told to die."""

    def __init__(self, block: int = 3, workers: int = 1, lengths: list[int] | None = None):
        self.about: dict[str, Any] = {"model": "fake"}
        self.block, self.workers, self._lengths = block, workers, lengths
        self.seen: list[tuple[int, list[str]]] = []
        self.die_at: int | None = None
        self.bad: dict[str, int] = {}  # how many answers of a question are bad
        self.unreadable: Callable[[str], bool] = lambda key: False
        self.closed = self.probes = 0
        self.is_well = False  # whether it answers a probe

    def look(self) -> None: ...

    def lengths(self, questions: Sequence[Question]) -> list[int] | None:
        return self._lengths

    def answer(self, questions: Sequence[Question], turn: Try) -> list[Answer]:
        if self.die_at is not None and len(self.seen) >= self.die_at:
            raise KeyboardInterrupt
        keys = [question.key for question in questions]
        self.seen.append((turn.number, keys))
        together = hashlib.sha256(repr((keys, turn)).encode()).hexdigest()[:6]
        return [self._one(key, turn, together) for key in keys]

    def _one(self, key: str, turn: Try, together: str) -> Answer:
        if self.unreadable(key):
            return Answer("", problem="nonsense")
        return Answer("bad" if turn.number < self.bad.get(key, 0) else f" ä {key} {together}\n")

    def probe(self, like: Question) -> bool:
        self.probes += 1
        return self.is_well

    def close(self) -> None:
        self.closed += 1


def check(question: Question, answer: Answer) -> tuple[str, str | None]:
    return answer.text.strip(), "bad" if answer.text == "bad" else None


def run(folder: Path, engine: Fake, questions: Sequence[Question] = QUESTIONS, **settings: Any) -> list[Reply]:
    """What ``finish`` is handed."""
    found: list[Reply] = []
    folder.mkdir(exist_ok=True)
    ask(folder / "out.jsonl", questions, engine, check, GenerateConfig(**settings), found.extend)
    assert not list(folder.iterdir()) and engine.closed
    return found


@pytest.fixture
def whole(tmp_path: Path) -> list[Reply]:
    """The replies of a run that nothing interrupted."""
    return run(tmp_path / "whole", Fake())


def test_every_question_is_answered_in_order(whole: list[Reply]) -> None:
    """Each with its own, tidied by the check."""
    assert [reply.key for reply in whole] == [question.key for question in QUESTIONS]
    assert all(reply.text.startswith(f"ä {reply.key}") and reply.problem is None for reply in whole)


def test_no_questions(tmp_path: Path) -> None:
    """Nothing is asked, and an empty list is finished."""
    engine = Fake()
    assert run(tmp_path / "a", engine, []) == [] and engine.seen == []


def kill(folder: Path, engine: Fake, at: int, **settings: Any) -> None:
    engine.die_at = at
    folder.mkdir(exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        ask(folder / "out.jsonl", QUESTIONS, engine, check, GenerateConfig(**settings), lambda replies: None)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_killed_and_resumed(tmp_path: Path, whole: list[Reply], at: int) -> None:
    """Only what is missing is asked, in the same blocks, and the replies are the same."""
    kill(tmp_path / "a", Fake(), at)
    engine = Fake()
    assert run(tmp_path / "a", engine) == whole
    assert [keys for _, keys in engine.seen] == [
        [f"q{n}" for n in range(s, min(s + 3, 11))] for s in range(3 * at, 11, 3)
    ]


@pytest.mark.parametrize("cut", [1, 5, 40, 130, 200])
def test_resumed_from_a_torn_block(tmp_path: Path, whole: list[Reply], cut: int) -> None:
    """A block that was written in part is asked again as a whole."""
    kill(tmp_path / "a", Fake(), 2)
    (journal,) = (tmp_path / "a").iterdir()
    journal.write_bytes(journal.read_bytes()[:-cut])
    engine = Fake()
    assert run(tmp_path / "a", engine) == whole and engine.seen[0][1][0] in ("q3", "q0")


def test_killed_before_the_end_was_written(tmp_path: Path, whole: list[Reply]) -> None:
    """With all blocks committed nothing is asked again."""

    def interrupt(replies: list[Reply]) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "a" / "out.jsonl", QUESTIONS, Fake(), check, GenerateConfig(), interrupt)
    engine = Fake()
    assert run(tmp_path / "a", engine) == whole and engine.seen == []


@pytest.mark.parametrize("change", ["questions", "prompt", "mark", "image", "block", "seed", "retries", "model"])
def test_a_journal_of_something_else_is_not_used(tmp_path: Path, change: str) -> None:
    """Whatever decides an answer is part of the journal's name."""
    kill(tmp_path / "a", Fake(), 2)
    engine = Fake(block=2 if change == "block" else 3)
    if change == "model":
        engine.about = {"model": "other"}
    first = {
        "prompt": Question("q0", "other"), "mark": Question("q0", "prompt 0", mark="x"),
        "image": Question("q0", "prompt 0", Path("x.png")),
    }.get(change, QUESTIONS[0])  # fmt: skip
    questions = [first, *QUESTIONS[1 : 10 if change == "questions" else 11]]
    settings = {"seed": {"seed": 7}, "retries": {"retries": 1}}.get(change, {})
    found: list[Reply] = []
    ask(tmp_path / "a" / "out.jsonl", questions, engine, check, GenerateConfig(**settings), found.extend)  # type: ignore[arg-type]
    assert len(found) == sum(len(keys) for _, keys in engine.seen) == len(questions)
    assert len(list((tmp_path / "a").iterdir())) == 1  # the other journal waits for its own command


def test_longest_first(tmp_path: Path) -> None:
    """Questions of similar lengths share a block; equal ones keep their order; replies are in the questions' order."""
    engine = Fake(lengths=[1, 5, 1, 5, 1, 9, 1, 5, 1, 5, 2])
    replies = run(tmp_path / "a", engine)
    assert [keys for _, keys in engine.seen] == [
        ["q5", "q1", "q3"],
        ["q7", "q9", "q10"],
        ["q0", "q2", "q4"],
        ["q6", "q8"],
    ]
    assert [reply.key for reply in replies] == [question.key for question in QUESTIONS]


def test_bad_answers_are_asked_again(tmp_path: Path) -> None:
    """Only those of a block, with the number of the try; what stays bad keeps its reason."""
    engine = Fake()
    engine.bad = {"q1": 1, "q2": 2, "q4": 9}
    replies = {reply.key: reply for reply in run(tmp_path / "a", engine, retries=2)}
    assert engine.seen[:5] == [
        (0, ["q0", "q1", "q2"]), (1, ["q1", "q2"]), (2, ["q2"]), (0, ["q3", "q4", "q5"]), (1, ["q4"]),
    ]  # fmt: skip
    assert {key for key, reply in replies.items() if reply.problem} == {"q4"}
    assert replies["q4"] == Reply("q4", "bad", "bad") and replies["q2"].text.startswith("ä q2")


def test_retries_survive_a_kill(tmp_path: Path) -> None:
    """Killed among the tries of a block, the block is done again as a whole, with the same draws."""
    first, second = Fake(), Fake()
    first.bad = second.bad = {"q1": 1, "q2": 2, "q4": 9}
    kill(tmp_path / "a", first, 2, retries=2)
    assert first.seen == [(0, ["q0", "q1", "q2"]), (1, ["q1", "q2"])]
    second_whole = Fake()
    second_whole.bad = first.bad
    assert run(tmp_path / "a", second, retries=2) == run(tmp_path / "b", second_whole, retries=2)


@pytest.mark.parametrize("workers", [2, 5])
def test_several_at_once_answer_alike(tmp_path: Path, whole: list[Reply], workers: int) -> None:
    """The order in which blocks get ready changes nothing."""
    engine = Fake(workers=workers)
    answer, gate = engine.answer, threading.Barrier(2)

    def late(questions: Sequence[Question], turn: Try) -> list[Answer]:
        gate.wait(5)  # breaks unless two are under way at once
        return answer(questions, turn)

    engine.answer = late  # type: ignore[method-assign]
    assert run(tmp_path / "a", engine) == whole


def test_what_is_under_way_is_not_lost(tmp_path: Path) -> None:
    """One block fails for good; what another thread gets an answer to meanwhile is committed before that is told."""
    failing, engine = threading.Event(), Fake(block=1, workers=2)
    answer = engine.answer

    def one_fails(questions: Sequence[Question], turn: Try) -> list[Answer]:
        if questions[0].key == "q0":
            failing.set()
            raise InputError("the server refuses")
        failing.wait(5)
        threading.Event().wait(0.1)
        return answer(questions, turn)

    engine.answer = one_fails  # type: ignore[method-assign]
    with pytest.raises(InputError, match="refuses"):
        ask(tmp_path / "out.jsonl", QUESTIONS, engine, check, GenerateConfig(), lambda replies: None)
    assert engine.seen and engine.closed
    again = Fake(block=1)
    ask(tmp_path / "out.jsonl", QUESTIONS, again, check, GenerateConfig(), lambda replies: None)
    assert len(again.seen) == len(QUESTIONS) - len(engine.seen)


def many(n: int) -> list[Question]:
    return [Question(f"q{i}", "p") for i in range(n)]


@pytest.mark.parametrize("questions", [1, 5, 300])
def test_an_engine_that_never_says_anything(tmp_path: Path, questions: int) -> None:
    """After a few questions the run stops in one line, and nothing is committed: mended, all are asked."""
    engine = Fake(block=1)
    engine.unreadable = lambda key: True
    with pytest.raises(InputError, match=r"in a row got no readable answer; the last: nonsense, for \"q\d+\"$"):
        ask(tmp_path / "out.jsonl", many(questions), engine, check, GenerateConfig(), lambda replies: None)
    assert min(questions, FIRST) <= len(engine.seen) <= FIRST + 2
    assert all(number == 0 for number, _ in engine.seen)  # the engine itself asks again, not the loop
    mended = Fake(block=1)
    assert not [r for r in run(tmp_path, mended, many(questions)) if r.problem] and len(mended.seen) == questions


def test_an_engine_that_breaks(tmp_path: Path) -> None:
    """Later, more in a row are needed; what was answered before stays, what was not is asked again."""
    engine = Fake(block=1)
    engine.unreadable = lambda key: int(key[1:]) >= 100
    with pytest.raises(InputError, match=f"{LATER} questions in a row"):
        ask(tmp_path / "out.jsonl", many(300), engine, check, GenerateConfig(), lambda replies: None)
    mended = Fake(block=1)
    assert not [r for r in run(tmp_path, mended, many(300)) if r.problem]
    assert len(mended.seen) == 200


@pytest.mark.parametrize("questions", [1, 40, 300])
def test_an_engine_that_refuses_these_questions_alone(tmp_path: Path, questions: int) -> None:
    """It answers a probe, so they are the reason: all are results, also of a run that asks about nothing else."""
    engine = Fake(block=1)
    engine.is_well, engine.unreadable = True, lambda key: True
    replies = run(tmp_path, engine, many(questions))
    assert len(replies) == questions and not any(reply.read for reply in replies)
    assert 1 <= engine.probes <= 1 + questions // LATER


def test_a_few_unreadable_answers_are_told(tmp_path: Path) -> None:
    """An engine that answers others: its failures are results like others, at the end of the list too."""
    engine = Fake(block=1)
    engine.unreadable = lambda key: int(key[1:]) % 7 == 3 or key == "q39"
    replies = run(tmp_path, engine, many(40))
    assert [r.key for r in replies if r.problem] == ["q3", "q10", "q17", "q24", "q31", "q38", "q39"]
    assert all(r.problem == "nonsense" and not r.read for r in replies if r.problem)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Fake]]]:
    """Runs the loop in several threads that act as processes."""

    def go(count: int, folder: Path, found: list[Reply]) -> list[Fake]:
        gate, own, engines = threading.Barrier(count), threading.local(), [Fake(workers=2) for _ in range(count)]
        monkeypatch.setattr(
            "spn4cir.data_gen.ask.Processes",
            lambda: SimpleNamespace(index=own.index, count=count, first=own.index == 0, wait=lambda: gate.wait(10)),
        )

        def one(index: int) -> None:
            own.index = index
            ask(folder / "out.jsonl", QUESTIONS, engines[index], check, GenerateConfig(), found.extend)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return engines

    return go  # type: ignore[return-value]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_several_processes(tmp_path: Path, whole: list[Reply], processes: Any, count: int) -> None:
    """Each does its share, one of them finishes, the replies are those of one process; a killed one's work counts."""
    found: list[Reply] = []
    (tmp_path / "a").mkdir()
    kill(tmp_path / "a", Fake(), 1)
    engines = processes(count, tmp_path / "a", found)
    assert found == whole and not list((tmp_path / "a").iterdir())
    shares = [sorted(keys[0] for _, keys in engine.seen) for engine in engines]
    blocks = ["q0", "q3", "q6", "q9"]
    assert shares == [sorted(k for k in blocks[i::count] if k != "q0") for i in range(count)]
