"""Step 3: caption the images with a multimodal LLM, here or on a server.

examples:
  python data_gen/caption.py --dataset emoji
  python data_gen/caption.py --dataset emoji --captioner llava-hf/llava-1.5-7b-hf --words 8
  python data_gen/caption.py --dataset emoji --captioner NAME --endpoint http://host:8000/v1 --requests 64
  ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 data_gen/caption.py --dataset emoji
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from spn4cir.data_gen.answers import fault, strip_answer
from spn4cir.data_gen.ask import Answer, Engine, Question, Reply, ask
from spn4cir.data_gen.deduplicate import canonical_images
from spn4cir.data_gen.engines import engine_of
from spn4cir.data_gen.given import check_known, known_captions
from spn4cir.data_gen.steps import GenerateConfig, digest, is_done, mark_done, run_step
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import Row, read_json, read_jsonl, short, write_jsonl, write_text

GIVEN = "given"  # the model of a caption that nobody had to make
Given = Mapping[str, Sequence[str]]  # captions by image


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
    is_skipping = config.without_caption == "skip"
    job = _Job(config, dataset, engine, [i for i in ids if i not in given and not is_skipping])
    made_by = job.made_by(given)
    was_done, unread = is_done(out, made_by), _unread(failed)
    if was_done and not unread:
        processes.say(f"caption: {out} is done")
        return
    if job.ids:
        look_for(engine, len(job.ids), len(ids))
    asked, plan = job.plan(out, made_by, processes)
    if given:
        source = config.captions or "the dataset"
        rest = f"{len(ids) - len(given)} images are left" + " out" * is_skipping
        processes.say(f"caption: {len(given)} captions are from {source}, {rest}")
    if len(asked) < len(job.ids):
        processes.say(f"caption: {len(job.ids) - len(asked)} captions are kept, {len(asked)} images are left")
    finish = partial(job.finish, out=out, made_by=made_by, given=given)
    try:
        questions, check = [job.question(i) for i in asked], partial(check_caption, config.words)
        ask(out, questions, engine, check, config, finish, has_answered=was_done)
    except InputError as error:
        if not was_done or processes.count > 1:  # of several, the others wait inside
            raise
        processes.say(f"caption: {out} is done but for {unread} images, which got no answer again: {error}")
    if processes.first:
        plan.unlink(missing_ok=True)


def check_captioner(config: GenerateConfig, dataset: Dataset) -> None:
    """Raise ``InputError`` for a prompt, or for a model that is needed, that cannot work.

    Before the first step only a dataset without any caption is known to need a model: an image that lacks one may be
    broken, or equal to one that has it. After the first step this is known.
    """
    read_captioner_prompt(config)
    if config.captions and not known_captions(config, dataset, ids := dataset.training_images()):
        check_known(config, dataset, ids, ())
    if config.captions or config.without_caption == "skip" or config.file("captions.jsonl").is_file():
        return
    if config.file("images.jsonl").is_file():
        ids = canonical_images(config)
        lacking = len(ids) - len(given_captions(config, dataset, ids))
    else:
        ids = dataset.training_images()
        lacking = 0 if known_captions(config, dataset, ids) else len(ids)
    if lacking:
        engine = engine_of(config.captioner, config.endpoint, config, images=True, max_new_tokens=config.max_new_tokens)
        look_for(engine, lacking, len(ids))


def look_for(engine: Engine, lacking: int, count: int) -> None:
    """Look whether there is an engine for images that lack a caption. Raises ``InputError`` that says how many do."""
    try:
        engine.look()
    except InputError as error:
        advice = "give --captions FILE, or leave these images out by --without-caption skip"
        raise InputError(f"{lacking:,} of {count:,} images have no caption, and {error}; or {advice}") from None


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


def given_captions(config: GenerateConfig, dataset: Dataset, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Captions that need not be made: of a file, then of all images; else those that came with the dataset.

    Captions of a duplicate are as good. Raises ``InputError`` if the file cannot be read, or lacks an image.
    """
    rows = read_jsonl(config.file("images.jsonl"))
    known = known_captions(config, dataset, [row["image_id"] for row in rows])
    named = {r["canonical"]: known[r["image_id"]] for r in reversed(rows) if r["image_id"] in known}
    found = {i: known.get(i, named[i]) for i in ids if i in named}
    check_known(config, dataset, ids, found)
    return found


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

    def made_by(self, given: Given) -> str:
        """A short name for everything that decides the file."""
        total = hashlib.sha256()
        for image_id in self.ids:
            total.update(f"{image_id}\n{self.recipe(image_id)}\n".encode())
        told = {image_id: _one_or_all(texts) for image_id, texts in given.items()}
        settings = {"seed": self.config.seed, "retries": self.config.retries, "given": told}
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

    def finish(self, replies: list[Reply], out: Path, made_by: str, given: Given) -> None:
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
        for image_id, texts in given.items():
            own: Row = {"model": GIVEN, "prompt": None, "made_by": digest({GIVEN: _one_or_all(texts)})}
            more = {"captions": list(texts)} if len(texts) > 1 else {}
            rows[image_id] = {"image_id": image_id, "caption": texts[0], **more, **own}
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


def _one_or_all(texts: Sequence[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else list(texts)


def _earlier(out: Path) -> list[Row]:
    """Rows that a model made in earlier runs, those in use and those put by."""
    files = (file for file in (out, out.with_name("captions.kept.jsonl")) if file.is_file())
    return [row for file in files for row in read_jsonl(file) if row.get("model") != GIVEN and "made_by" in row]


def _unread(failed: Path) -> int:
    """The number of images that got no readable answer in the run before."""
    return sum(not row.get("read", True) for row in read_jsonl(failed)) if failed.is_file() else 0


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


def check_caption(words: int, question: Question, answer: Answer) -> tuple[str, str | None]:
    """A caption on one line, and what is wrong with it, if anything."""
    text = strip_answer(answer.text)
    if answer.cut and not text:
        return text, "cut off while it thought: raise max_new_tokens, or switch thinking off"
    too_long = answer.cut or len(text.split()) > 2 * words + 10  # LLaVA runs to fifteen words where ten are asked for
    return text, fault(text) or ("too long" if too_long else None)


if __name__ == "__main__":
    run_step(caption_images, __doc__)
