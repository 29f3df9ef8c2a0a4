"""What is taken off an answer, and what is none."""

import pytest

from spn4cir.data_gen.answers import fault, strip_answer
from spn4cir.data_gen.ask import Answer, Question
from spn4cir.data_gen.caption import check_caption

PLAIN = "a red shoe on a white table"


@pytest.mark.parametrize("answer", [
    "{}", "<think>\nIt is a shoe.\n</think>\n\n{}", "I look at it.\n</think>\n{}", "<THINKING>a</THINKING>{}",
    "Caption: {}", "**Caption:** {}", "**Caption**: \"{}\"", "Short description: '{}'",
    "Image caption: {}",
    "Sure! Here is a brief description of the image:\n\n{}", "Here's a caption in 10 words: \"{}\"", "## {}", "> {}",
    "- {}", "**{}**", "*{}*", "`{}`", "```\n{}\n```", "“{}”", "The description of the picture: {}", "Answer: **{}**",
    "{} (7 words)", "{}\n\nLet me know if you need another one!",
    "<think>x</think>Sure, here it is:\n\n**Caption:** “{}”",
])  # fmt: skip
def test_a_caption_and_what_surrounds_it(answer: str) -> None:
    """Thoughts, markdown, labels, quotes and remarks go; the caption stays."""
    text = strip_answer(answer.format(PLAIN))
    assert text == PLAIN and fault(text) is None


@pytest.mark.parametrize(("answer", "expected"), [
    ('"a red shoe".', "a red shoe."), ('**Caption:** "a red shoe."', "a red shoe."),
    ('a sign that says "stop: ahead"', 'a sign that says "stop: ahead"'), ("a 3*4 grid of snake_case words", None),
    ("OK hand sign: yellow", None), ("a clock at 10:30", None), ("two *bold* words", "two bold words"),
    ("Here is a shoe", None), ("5 - 3 apples", None), ("first line\nsecond line", "first line second line"),
    ("one\n\ntwo", "one two"), ("Caption:", "Caption:"),
])  # fmt: skip
def test_what_belongs_to_a_caption_stays(answer: str, expected: str | None) -> None:
    """A colon, a star, a number or quotes inside."""
    assert strip_answer(answer) == (expected or answer)


@pytest.mark.parametrize(("answer", "problem"), [
    ("<think>it is", "empty"), ("<think>a</think>", "empty"), ("a **red shoe", "markup"), ("Caption:", "markup"),
    ("```a", "empty"),
])  # fmt: skip
def test_what_is_asked_again(answer: str, problem: str) -> None:
    """Nothing is left, or signs are."""
    assert fault(strip_answer(answer)) == problem


def test_thoughts_that_were_cut() -> None:
    """The reason says what to change."""
    _, problem = check_caption(10, Question("i", "p"), Answer("<think>Let me look at", cut=True))
    assert problem is not None and "max_new_tokens" in problem
