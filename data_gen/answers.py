"""Answers of a language model: takes off what surrounds the sentence, and says what is wrong with the rest."""

import re

REFUSAL = re.compile(
    r"\W*((i.?m|i am|we.?re|we are) (so |very |really )?(sorry|unable|not able)\b|sorry\b"
    r"|(my apologies|i apologi[sz]e)\b"
    r"|as an? (ai|artificial|(large )?language)\b|i (can ?not|can.?t|could ?n.?t|do not|don.?t)\b"
    r"|unfortunately,? (i|there)\b|there is no image\b)",
    re.IGNORECASE,
)
QUOTES = ('""', "''", "“”", "‘’", "«»", "``")
THOUGHT = re.compile(r"<(think|thinking|reasoning|thought)>.*?</\1>", re.IGNORECASE | re.DOTALL)
# the end of thoughts whose beginning is in the prompt
CLOSED = re.compile(r".*</(?:think|thinking|reasoning|thought)>", re.IGNORECASE | re.DOTALL)
OPEN = re.compile(r"<(?:think|thinking|reasoning|thought)>.*", re.IGNORECASE | re.DOTALL)
# of headings, quotations, lists and code
MARKERS = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]*|[-*+•][ \t]+|```.*$)", re.MULTILINE)
EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)", re.DOTALL)
LABEL = re.compile(
    r"""[\W_]*(?:
        (?:sure|okay|ok|certainly|of\ course|absolutely|yes)[,.!][^:\n]{0,100}
        | here(?:['’]s|\ is|\ are)\b[^:\n]{0,80}
        | (?:[\w-]+\ ){0,3}(?:caption|description|answer|response|summary|alt[\ -]text)
          (?:\ (?:of|for|in)\ [^:\n]{0,40})?
    )[\W_]*?:[*_`\s]*""",
    re.IGNORECASE | re.VERBOSE,
)
# below a caption
CHATTER = re.compile(r"(?:let me know|i hope|feel free|would you|do you|if you|note\b|please\b|word count)", re.I)
COUNT = re.compile(r"\s*[(\[]\d+ words?[)\]]\.?$", re.IGNORECASE)
LEFT = re.compile(r"</?think|\*\*|```|^\W*(?:caption|description)\W*:", re.IGNORECASE)


def strip_thoughts(text: str) -> str:
    """The answer without what a reasoning model thinks aloud before it; empty if it was cut while it thought."""
    return OPEN.sub("", CLOSED.sub("", THOUGHT.sub("", text)))


def strip_answer(text: str) -> str:
    """The sentence of an answer, on one line: without thoughts, markdown, a label, quotes, and remarks below it.

    Example:
        >>> strip_answer('<think>It is red.</think> **Caption:** "a red shoe."')
        'a red shoe.'
    """
    text = EMPHASIS.sub(r"\2", MARKERS.sub("", strip_thoughts(text)))
    while (label := LABEL.match(text)) and re.search(r"\w", text[label.end() :]):
        text = text[label.end() :]
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if re.search(r"\w", part)]
    kept = paragraphs[:1] + [part for part in paragraphs[1:] if not CHATTER.match(part.lstrip("*_ "))]
    line = tidy(COUNT.sub("", " ".join(kept).strip()))
    is_quoted = line[0:1] + line[-2:-1] in QUOTES and line[-1] in ".!"  # and the full stop is outside
    return tidy(line[:-1]) + line[-1] if is_quoted else line


def tidy(text: str) -> str:
    """One line without control characters or halves of letters, and without quotes around it."""
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text).split())
    while len(line) > 1 and line[0] + line[-1] in QUOTES and not {line[0], line[-1]} & set(line[1:-1]):
        line = line[1:-1].strip()
    return line


def fault(text: str) -> str | None:
    """What is wrong with the text of any answer, however long: empty, refusal, markup or repetition."""
    if not re.search(r"\w", text):
        return "empty"
    if REFUSAL.match(text):
        return "refusal"
    if LEFT.search(text):
        return "markup"
    return "repetition" if repeats(text) else None


def repeats(text: str) -> bool:
    """Whether the same words come again and again: one four times in a row, several three times, or most of them."""
    words = re.findall(r"\w+", text.lower())
    for size in range(1, min(len(words) // 3, 16) + 1):
        times = 4 if size == 1 else 3
        for start in range(len(words) - times * size + 1):
            if words[start : start + times * size] == words[start : start + size] * times:
                return True
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return len(grams) >= 12 and len(set(grams)) < len(grams) / 2
