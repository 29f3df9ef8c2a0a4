"""Step 4: turn the captions of a pair into a modification text.

examples:
  python data_gen/write_text.py --dataset emoji --templates '[difference]'
  python data_gen/write_text.py --dataset emoji --templates '[instead, unlike]'
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from spn4cir.data_gen.files import Row, digest, is_done, mark_done, stream_jsonl
from spn4cir.data_gen.length import TokenCounter
from spn4cir.data_gen.outputs import KINDS, triplet_files
from spn4cir.data_gen.processes import Processes
from spn4cir.data_gen.report import reasons, write_summary
from spn4cir.data_gen.rewrite import Rewriter
from spn4cir.data_gen.settings import GenerateConfig, command
from spn4cir.errors import InputError
from spn4cir.types import Dataset

FORMS = {"instead": "{1} instead of {0}", "unlike": "Unlike {0}, I want {1}", "target": "{1}"}
"""The paper's templates 0, 1 and 2."""
FILES = (*(f"triplets.{kind}" for kind in KINDS), "summary.json")
CHUNK = 4096  # texts counted at once
ARTICLES = {"a", "an", "the"}  # two captions that share nothing else have nothing in common


def difference(reference: str, target: str, draw: random.Random) -> str:
    """What changes: the words that only the target's caption has, or, if it has none, what is gone.

    Captions without a common word have no difference worth naming: the text would be the whole target caption, and a
    model could learn from it to ignore the reference.

    Args:
        reference: caption of the reference image.
        target: caption of the target image.
        draw: picks among several phrasings.

    Returns:
        The text; empty if the captions hold the same words, or no word in common, articles aside.
    """
    before, after = (_words(text) for text in (reference, target))
    low_before, low_after = ({word.lower() for word in words} for words in (before, after))
    if not (low_before & low_after) - ARTICLES:
        return ""
    if not (low_before ^ low_after) - ARTICLES:
        return ""
    new = " ".join(word for word in after if word.lower() not in low_before)
    gone = " ".join(word for word in before if word.lower() not in low_after)
    if new and gone:
        return draw.choice([new, f"but {new}", f"make it {new}", f"{new} instead of {gone}"])
    if new:
        return draw.choice([new, f"but {new}", f"make it {new}", f"with {new}"])
    return f"without {gone}" if gone else ""


def compose_text(template: str, reference: str, target: str, draw: random.Random) -> str:
    """A modification text by template: the paper's ``instead`` (0), ``unlike`` (1), ``target`` (2), or ``difference``.

    Returns:
        The text; empty if the template has nothing to say.
    """
    if template == "difference":
        return difference(reference, target, draw)
    return FORMS[template].format(reference, target)


def caption_similarity(one: str, other: str) -> float:
    """How many of the words of two captions they share, from 0 to 1; case and punctuation aside (Jaccard)."""
    a, b = ({word.lower() for word in _words(text)} for text in (one, other))
    return len(a & b) / len(a | b) if a or b else 1.0


def _words(text: str) -> list[str]:
    """Words of a text without the punctuation around them; what is inside, as in 3.5 or St. Bernard's, stays."""
    return [word for part in text.split() if (word := part.strip(",.;:!?"))]


class Captions:
    """The captions of all images, and which of them occur too often.

    Args:
        config: settings; its folder holds captions.jsonl.

    Raises:
        InputError: if that is missing, or a row of it is none.
    """

    def __init__(self, config: GenerateConfig):
        path = config.file("captions.jsonl")
        self.text: dict[str, str] = {}
        self._model: str | None = None
        self._others: dict[str, str | None] = {}  # images whose caption came from another model than the first's
        for number, row in enumerate(stream_jsonl(path), 1):
            try:
                self.text[row["image_id"]] = row["caption"]
            except KeyError as error:
                raise InputError(f"{path}, line {number}: there is no {error}") from None
            if number == 1:
                self._model = row.get("model")
            elif row.get("model") != self._model:
                self._others[row["image_id"]] = row.get("model")
        limit = config.max_caption_count
        counted = Counter(_normal(text) for text in self.text.values()) if limit else Counter[str]()
        self._frequent = {text for text, count in counted.items() if limit and count > limit}

    def model(self, image_id: str) -> str | None:
        """What wrote the caption of an image."""
        return self._others.get(image_id, self._model)

    def too_often(self, text: str) -> bool:
        """Whether more images than ``max_caption_count`` have this caption."""
        return bool(self._frequent) and _normal(text) in self._frequent


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


class Texts:
    """Rows with a text for each pair that has one to say, and the count of everything that was left out.

    Args:
        config: settings.
        captions: of all images.
        count: of tokens, for the guard.

    Attributes:
        pairs: pairs seen so far.
        dropped: how many of them were dropped, by reason.
        shortened: texts that were too long, so that the target's caption stands in their place.
    """

    def __init__(self, config: GenerateConfig, captions: Captions, count: TokenCounter):
        self.config, self.captions, self.count = config, captions, count
        self.pairs, self.shortened, self.dropped = 0, 0, Counter[str]()

    def of(self, pairs: Iterable[Row]) -> Iterator[Row]:
        """Rows of pairs, in their order; each holds ``tokens``, how long its text is."""
        stream = iter(pairs)
        while chunk := list(islice(stream, CHUNK)):
            self.pairs += len(chunk)
            yield from self._guarded([row for pair in chunk if (row := self._row(pair))])

    def _row(self, pair: Row) -> Row | None:
        names = pair["reference"], pair["target"]
        one, other = (self.captions.text.get(name) for name in names)
        if one is None or other is None:
            self.dropped["an image has no caption"] += 1
            return None
        draw = random.Random(f"{self.config.seed}/{names[0]}/{names[1]}")
        template = draw.choice(self.config.templates)
        text = compose_text(template, one, other, draw).strip()
        if reason := self._reason(one, other):
            self.dropped[reason] += 1
        elif not text:
            self.dropped[f"{template} has nothing to say"] += 1
        else:
            kept = {key: pair.get(key) for key in ("reference", "target", "rank", "similarity")}
            model = self.captions.model(names[1])
            return {**kept, "modification": text, "template": template, "captions": [one, other], "model": model}
        return None

    def _reason(self, one: str, other: str) -> str | None:
        if one.lower() == other.lower():
            return "the two captions are equal"
        limit = self.config.max_caption_similarity
        if limit is not None and caption_similarity(one, other) > limit:
            return f"the captions share more than {limit} of their words"
        if self.captions.too_often(one) or self.captions.too_often(other):
            return f"a caption occurs more than {self.config.max_caption_count} times"
        return None

    def _guarded(self, rows: list[Row]) -> Iterator[Row]:
        """The paper's guard: the target's caption alone instead of a text that is too long, or else nothing."""
        limit = self.config.max_tokens
        for row, tokens in zip(rows, self.count([row["modification"] for row in rows]), strict=True):
            row["tokens"] = tokens
            if tokens > limit:
                row["modification"] = row["captions"][1].strip()
                row["shortened"], row["template"] = row["template"], "target"
                [row["tokens"]] = self.count([row["modification"]])
            if row["tokens"] > limit or not row["modification"]:
                self.dropped[f"too long: more than {limit} tokens"] += 1
                continue
            self.shortened += "shortened" in row
            yield row


def write_text(config: GenerateConfig, dataset: Dataset) -> None:
    """Write triplets.jsonl with what each came from, triplets.json as published, triplets.parquet, and summary.json.

    Raises:
        InputError: if a file is missing or damaged, or no pair gives a triplet; what was there before stays.
    """
    processes, rewriter = Processes(), Rewriter.of(config)
    out, pairs, captions = (config.file(name) for name in ("triplets.json", "pairs.jsonl", "captions.jsonl"))
    settings = text_settings(config) | ({"rewriter": rewriter.about} if rewriter else {})
    made_by = digest({"step": "write", "dataset": dataset.name, **settings}, pairs, captions)
    done = is_done(out, made_by) and all(config.file(name).is_file() for name in FILES)
    processes.wait()  # all have looked before the first one writes
    if done:
        processes.say(f"write: {out} is done")
        return
    known, count = Captions(config), TokenCounter(config.tokenizer)
    if rewriter:
        rewriter.rewrite(lambda: Texts(config, known, count).of(stream_jsonl(pairs)), count, made_by)
    if processes.first:
        _write(config, dataset, Texts(config, known, count), rewriter, (made_by, settings))
    processes.wait()


def text_settings(config: GenerateConfig) -> dict[str, Any]:
    """What decides the text of a pair whose captions are given, rewriting aside."""
    names = ("templates", "seed", "tokenizer", "max_tokens", "max_caption_similarity", "max_caption_count")
    return {name: getattr(config, name) for name in names}


def _write(
    config: GenerateConfig, dataset: Dataset, texts: Texts, rewriter: Rewriter | None, made: tuple[str, dict[str, Any]]
) -> None:
    from tqdm import tqdm

    out, (made_by, settings) = config.file("triplets.json"), made
    pairs = tqdm(stream_jsonl(config.file("pairs.jsonl")), desc="write", unit="pair", leave=False)
    rows = rewriter.apply(texts.of(pairs), texts.count) if rewriter else texts.of(pairs)
    with triplet_files(config, dataset, made_by) as files:
        for row in rows:
            files.add(row)
        if not files.count:
            told = reasons(texts.dropped) or "there is no pair"
            raise InputError(f"{config.file('pairs.jsonl')} gives no triplet: {told}")
        files.finish()
        out.with_suffix(".done.json").unlink(missing_ok=True)  # it must not speak for what takes the old one's place
    summary = write_summary(config, files, texts, made_by)
    mark_done(out, made_by, **settings, triplets=files.count, dropped=summary["dropped"])
    print(f"write: {files.count} triplets, dropped: {reasons(texts.dropped) or 'none'} → {out}")


if __name__ == "__main__":
    command(write_text, __doc__)
