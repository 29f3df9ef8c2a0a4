"""Step 3: caption the images with a multimodal LLM, here or on a server.

examples:
  python data_gen/caption.py --dataset emoji
  python data_gen/caption.py --dataset emoji --captioner llava-hf/llava-1.5-7b-hf --words 8
  python data_gen/caption.py --dataset emoji --captioner NAME --endpoint http://host:8000/v1 --requests 64
  ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 data_gen/caption.py --dataset emoji
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spn4cir.data_gen.ask import Answer, Engine, Question, Reply, ask
from spn4cir.data_gen.deduplicate import canonical_images
from spn4cir.data_gen.engines import engine_of
from spn4cir.data_gen.steps import GenerateConfig, digest, is_done, mark_done, run_step
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import Row, read_json, read_jsonl, short, write_jsonl, write_text

GIVEN = "given"  # the model of a caption that nobody had to make
REFUSAL = re.compile(
    r"\W*((i.?m|i am|we.?re|we are) (so |very |really )?(sorry|unable|not able)\b|sorry\b"
    r"|(my apologies|i apologi[sz]e)\b"
    r"|as an? (ai|artificial|(large )?language)\b|i (can ?not|can.?t|could ?n.?t|do not|don.?t)\b"
    r"|unfortunately,? (i|there)\b|there is no image\b)",
    re.IGNORECASE,
)
QUOTES = ('""', "''", "“”", "‘’", "«»", "``")


def caption_images(config: GenerateConfig, dataset: Dataset) -> None:
    """Write captions.jsonl, a row for each image in the dataset's order, and captions.failed.jsonl.

    Captions of earlier runs by the same model and prompt and of the same pixels are kept, those that no image needs now
    in captions.kept.jsonl. An image whose answer could not be read is asked about again by the next run.

    Raises ``InputError`` for a prompt, a model or a file that cannot work; what was answered before stays.
    """
    out, failed, processes = config.file("captions.jsonl"), config.file("captions.failed.jsonl"), Processes()
    ids = wanted_images(config)
    given = given_captions(config, dataset, ids)
    engine = engine_of(config.captioner, config.endpoint, config, images=True, max_new_tokens=config.max_new_tokens)
    job = _Job(config, dataset, engine, [i for i in ids if i not in given])
    made_by = job.made_by(given)
    if is_done(out, made_by) and not _unread(failed):
        processes.say(f"caption: {out} is done")
        return
    if job.ids:
        engine.look()
    asked, plan = job.plan(out, made_by, processes)
    if given:
        source = config.captions or "the dataset"
        processes.say(f"caption: {len(given)} captions are from {source}, {len(job.ids)} images are left")
    if len(asked) < len(job.ids):
        processes.say(f"caption: {len(job.ids) - len(asked)} captions are kept, {len(asked)} images are left")
    finish = partial(job.finish, out=out, made_by=made_by, given=given)
    ask(out, [job.question(i) for i in asked], engine, partial(check_caption, config.words), config, finish)
    if processes.first:
        plan.unlink(missing_ok=True)


def check_captioner(config: GenerateConfig, dataset: Dataset) -> None:
    """Raise ``InputError`` for a prompt, or for a model that is needed, that cannot work."""
    read_captioner_prompt(config)
    if config.captions:
        read_captions(dataset.file(config.captions))
    there = config.captions or config.file("captions.jsonl").is_file()
    if not there and not all(tidy(dataset.caption(i)) for i in dataset.training_images()):
        engine_of(config.captioner, config.endpoint, config, images=True, max_new_tokens=config.max_new_tokens).look()


def wanted_images(config: GenerateConfig) -> list[str]:
    """Unique images, or those of a pair, in the dataset's order. Raises ``InputError`` for pairs of other images."""
    ids = canonical_images(config)
    if config.caption_images == "all":
        return ids
    pairs = config.file("pairs.jsonl")
    if not pairs.is_file():
        raise InputError(f"{pairs} is missing: run match_pairs.py before, or caption all with --caption-images all")
    named = {row[role] for row in read_jsonl(pairs) for role in ("reference", "target")}
    if unknown := named.difference(ids):
        raise InputError(f"{pairs} names {short(min(unknown))}, which images.jsonl lacks: run match_pairs.py again")
    if not named:
        raise InputError(f"{pairs} names no image to caption: widen the window of match_pairs.py")
    return [i for i in ids if i in named]


def given_captions(config: GenerateConfig, dataset: Dataset, ids: Sequence[str]) -> dict[str, str]:
    """Captions that need not be made: of a file, then of all images; else those that came with the dataset.

    A caption of a duplicate is as good. Raises ``InputError`` if the file cannot be read, or lacks an image.
    """
    rows = read_jsonl(config.file("images.jsonl"))
    path = dataset.file(config.captions) if config.captions else None
    own = {r["image_id"]: tidy(dataset.caption(r["image_id"])) for r in rows} if path is None else read_captions(path)
    known = {image_id: text for image_id, text in own.items() if text}
    named = {r["canonical"]: known[r["image_id"]] for r in reversed(rows) if r["image_id"] in known}
    found = {i: known.get(i, named[i]) for i in ids if i in named}
    if path and (missing := [i for i in ids if i not in found]):
        such = f"{len(missing)} of {len(ids)} images, the first being {short(missing[0])}"
        raise InputError(f"{path} lacks captions of {such}: add them, or leave --captions out")
    return found


def read_captions(path: Path) -> dict[str, str]:
    """Captions by image id, the last of several, of JSON or JSON lines. Raises ``InputError`` for a damaged file."""
    entries = read_json(path) if path.suffix != ".jsonl" else _lines(path)
    found = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        image_id, text = (entry.get("image_id"), entry.get("caption")) if isinstance(entry, dict) else (None, None)
        if not isinstance(image_id, str) or not isinstance(text, str):
            raise InputError(f"{path}, entry {number}: expected an image_id and a caption, got {short(entry)}")
        if text := tidy(text):
            found[image_id] = text
    return found


def _lines(path: Path) -> list[Any]:
    """JSON lines that somebody else wrote: the last need not end."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}") from None


class _Job:
    """What is asked about each image that needs a caption, and what becomes of the answers."""

    def __init__(self, config: GenerateConfig, dataset: Dataset, engine: Engine, ids: Sequence[str]):
        self.config, self.dataset, self.engine, self.ids = config, dataset, engine, ids
        self.template = read_captioner_prompt(config).replace("{words}", str(config.words))
        self.pixels = {row["image_id"]: row["pixels"] for row in read_jsonl(config.file("images.jsonl"))}
        if "{category}" in self.template and (bare := [i for i in ids if not dataset.category(i)]):
            such = f"{len(bare)} images have none, the first being {short(bare[0])}"
            raise InputError(f"the prompt names the {{category}}, but {such}")

    def prompt(self, image_id: str) -> str:
        return self.template.replace("{category}", self.dataset.category(image_id))

    def question(self, image_id: str) -> Question:
        return Question(image_id, self.prompt(image_id), self.dataset.image(image_id), self.pixels[image_id])

    def recipe(self, image_id: str) -> str:
        """A short name for everything that decides an image's caption."""
        own = {"prompt": self.prompt(image_id), "pixels": self.pixels[image_id]}
        return digest({"step": "caption", **self.engine.about, **own})

    def made_by(self, given: dict[str, str]) -> str:
        """A short name for everything that decides the file."""
        total = hashlib.sha256()
        for image_id in self.ids:
            total.update(f"{image_id}\n{self.recipe(image_id)}\n".encode())
        settings = {"seed": self.config.seed, "retries": self.config.retries, "given": given}
        return digest({"step": "caption", "asked": total.hexdigest(), **settings})

    def kept(self, out: Path) -> dict[str, Row]:
        """Rows of earlier runs, perhaps for other pairs, that would be made alike."""
        known = {row["made_by"]: row for row in _earlier(out)}
        return {i: {**known[made], "image_id": i} for i in self.ids if (made := self.recipe(i)) in known}

    def plan(self, out: Path, made_by: str, processes: Processes) -> tuple[list[str], Path]:
        """Images to ask about, and the file that says so: a run that was killed while it wrote plans nothing anew."""
        path = out.with_name(f"{out.stem}.{made_by}.plan.json")
        if processes.first and not path.is_file():
            kept = self.kept(out)
            write_text(path, json.dumps([i for i in self.ids if i not in kept]))
        processes.wait()
        return read_json(path), path

    def finish(self, replies: list[Reply], out: Path, made_by: str, given: dict[str, str]) -> None:
        """Write captions and failures, and tell how many there are. Raises ``InputError`` if there is no caption."""
        failed_file, rows = out.with_name("captions.failed.jsonl"), self.kept(out)
        failed = [r for r in replies if r.problem]
        reasons = Counter(r.problem if r.read else "no readable answer" for r in failed)
        listed = ({"image_id": r.key, "reason": r.problem, "answer": r.text, "read": r.read} for r in failed)
        write_jsonl(failed_file, listed)
        for reply in replies:
            if not reply.problem:
                prompt = hashlib.sha256(self.prompt(reply.key).encode()).hexdigest()[:8]
                made = {"model": self.config.captioner, "prompt": prompt, "made_by": self.recipe(reply.key)}
                rows[reply.key] = {"image_id": reply.key, "caption": reply.text, **made}
        for image_id, text in given.items():
            own: Row = {"model": GIVEN, "prompt": None, "made_by": digest({GIVEN: text})}
            rows[image_id] = {"image_id": image_id, "caption": text, **own}
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        if not rows:
            raise InputError(f"none of {len(replies)} captions passed the checks ({told}): see {failed_file}")
        used = {row["made_by"] for row in rows.values()}
        kept = {row["made_by"]: row for row in _earlier(out) if row["made_by"] not in used}
        kept_file = out.with_name("captions.kept.jsonl")
        if kept:
            write_jsonl(kept_file, kept.values())  # they were paid for, and may be wanted again
        else:
            kept_file.unlink(missing_ok=True)
        write_jsonl(out, (rows[i] for i in canonical_images(self.config) if i in rows))
        about = {**self.engine.about, "prompt": self.template, "words": self.config.words}
        mark_done(out, made_by, failed_file, **about, captions=len(rows), given=len(given), failed=dict(reasons))
        lost = f"; {len(failed)} failed ({told}), listed in {failed_file}" if failed else ""
        again = "; the same command asks again about those without a readable answer" if _unread(failed_file) else ""
        print(f"caption: {len(rows)} captions{lost}{again} → {out}")


def _earlier(out: Path) -> list[Row]:
    """Rows that a model made in earlier runs, those in use and those put by."""
    files = (file for file in (out, out.with_name("captions.kept.jsonl")) if file.is_file())
    return [row for file in files for row in read_jsonl(file) if row.get("model") != GIVEN and "made_by" in row]


def _unread(failed: Path) -> bool:
    return any(not row.get("read", True) for row in read_jsonl(failed))


def read_captioner_prompt(config: GenerateConfig) -> str:
    """The prompt, or that of the file. Raises ``InputError`` if it does not say where the number of words goes."""
    if config.prompt_file is None:
        return config.prompt
    source = f"prompt_file {config.prompt_file}"
    try:
        prompt = Path(config.prompt_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if "{words}" not in prompt:
        raise InputError(f"{source} must hold {{words}}, where the number of words goes, got {short(prompt)}")
    return prompt


def tidy(text: str) -> str:
    """One line without control characters or halves of letters, and without quotes around it."""
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text).split())
    while len(line) > 1 and line[0] + line[-1] in QUOTES and not {line[0], line[-1]} & set(line[1:-1]):
        line = line[1:-1].strip()
    return line


def check_caption(words: int, question: Question, answer: Answer) -> tuple[str, str | None]:
    """A caption on one line, and what is wrong with it, if anything."""
    text = tidy(answer.text)
    too_long = answer.cut or len(text.split()) > 2 * words + 10  # LLaVA runs to fifteen words where ten are asked for
    return text, fault(text) or ("too long" if too_long else None)


def fault(text: str) -> str | None:
    """What is wrong with the text of any answer, however long: empty, refusal or repetition."""
    if not re.search(r"\w", text):
        return "empty"
    if REFUSAL.match(text):
        return "refusal"
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


if __name__ == "__main__":
    run_step(caption_images, __doc__)
