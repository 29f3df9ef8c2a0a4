"""What all steps share: their settings and command line, notes of finished files, and journals of unfinished ones."""

import json
import os
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeAlias

from spn4cir import embedded
from spn4cir.config import parse, recipes_folder, take_option
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes
from spn4cir.errors import InputError, run_command
from spn4cir.files import Row, hash_files, locked, write_text
from spn4cir.provenance import folder_of

EMBEDDED = Path(embedded.__file__).parent  # folder of the weights that are part of the package
ROWS = 256  # references compared with all others at once: (ROWS, N) scores are all that is held
STAYS = "stays, and the same command goes on from there"
POSITIVE = (  # settings that are above 0, if they are set
    "words", "max_new_tokens", "caption_batch_size", "match_batch_size", "pairs_per_image", "requests", "timeout",
    "pairs", "max_caption_count", "requests_per_minute", "max_tokens",
)  # fmt: skip


Template: TypeAlias = Literal["difference", "instead", "unlike", "target"]


@dataclass
class GenerateConfig:
    """Everything that decides the generated triplets. ``null`` in YAML means "not set".

    Args:
        dataset: name of a dataset.
        backbone: whose triplets these are: the preset is recipes/triplets/<dataset>_<backbone>.yaml if there is one,
            else recipes/triplets/<dataset>.yaml.
        data_root: where the dataset's files lie; of catalogue, a folder of images or a table of them.
        output: folder for all files; null makes data/<dataset>/generated, or data/<dataset>/<catalogue>/generated for
            images of one's own.
        candidates: images that may occur: "all" of training, or only those "named" by an annotated triplet.
        references: candidates that are paired: "all", or only those that are the reference of an annotated triplet.
        matcher: image encoder that ranks: "embedded"; "unicom:ViT-L/14" (or a file of its weights behind the colon);
            "open_clip:MODEL:TAG"; "timm:MODEL"; "transformers:NAME"; "run:FOLDER" for a checkpoint of ours.
        match_batch_size: images encoded at once.
        window: ranks [lo, hi) from which partners are drawn, 1 being the most similar other image; fractions of the
            others where both are at most 1, such as [0.4, 0.8]; null draws uniformly, without any encoder.
        pool: partners come from "all" candidates, or from those of the same "category".
        pairs_per_image: partners of each reference.
        pairs: keep so many pairs of all, drawn by seed; null keeps all.
        captions: file of existing captions, instead of a captioner: a table or JSON of image and caption.
        caption_images: "paired" captions what occurs in a pair, "all" every candidate.
        without_caption: "ask" the captioner about images that came without one, or "skip" them.
        captioner: "embedded", or a multimodal LLM of transformers by name or folder, or the model's name on endpoint.
        endpoint: address of an OpenAI-compatible server, such as http://host:8000/v1, that runs the captioner.
        prompt: what the captioner is asked; {words} stands for the number of words, {category} for the category.
        prompt_file: a file that holds the prompt instead.
        words: how long a caption should be.
        max_new_tokens: bound of one answer.
        caption_batch_size: images captioned at once.
        templates: how the text is made, one drawn for each pair: "difference", "instead", "unlike" or "target".
        min_shared: "difference" drops a pair whose captions share less than this part of what the target's caption
            tells; frequent words tell little.
        all_templates: give each pair a text by every template, of which training draws one each time it sees the pair.
        rewriter: an LLM that rewrites the text: of transformers by name or folder, or on rewriter_endpoint; null: none.
        rewriter_endpoint: address of an OpenAI-compatible server that runs it.
        rewriter_prompt: a YAML file with instruction and examples; null takes the dataset's or the general one.
        requests: requests under way at an endpoint at any time.
        requests_per_minute: bound on them; null for none.
        timeout: seconds to wait for an answer.
        retries: how often a failed request, or an answer that fails the checks, is asked again.
        tokenizer: counts a text's tokens: "clip", "embedded", or a tokenizer of transformers by name or folder.
        max_tokens: a text of more falls back to the target's caption, and is dropped if that is too long as well.
        max_image_similarity: drop pairs above it.
        max_caption_similarity: drop pairs whose captions share more than this part of their words.
        max_caption_count: drop pairs of an image whose caption occurs more often.
        recipe: of recipes/, that trains on these triplets, for the last line; null takes the dataset's and backbone's.
        seed: of all draws.
    """

    dataset: str = "emoji"
    backbone: str = "clip4cir"
    data_root: str | None = None
    output: str | None = None
    candidates: Literal["all", "named"] = "all"
    references: Literal["all", "annotated"] = "all"
    matcher: str = "embedded"
    match_batch_size: int = 256
    window: list[float] | None = field(default_factory=lambda: [1.0, 20.0])
    pool: Literal["all", "category"] = "all"
    pairs_per_image: int = 4
    pairs: int | None = None
    captions: str | None = None
    caption_images: Literal["paired", "all"] = "paired"
    without_caption: Literal["ask", "skip"] = "ask"
    captioner: str = "embedded"
    endpoint: str | None = None
    prompt: str = "please briefly describe the image in {words} words"
    prompt_file: str | None = None
    words: int = 10
    max_new_tokens: int = 40
    caption_batch_size: int = 64
    templates: list[Template] = field(default_factory=lambda: ["difference"])
    min_shared: float = 0.4
    all_templates: bool = False
    rewriter: str | None = None
    rewriter_endpoint: str | None = None
    rewriter_prompt: str | None = None
    requests: int = 16
    requests_per_minute: float | None = None
    timeout: float = 120.0
    retries: int = 3
    tokenizer: str = "clip"
    max_tokens: int = 77
    max_image_similarity: float | None = None
    max_caption_similarity: float | None = None
    max_caption_count: int | None = None
    recipe: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.prompt_file is None and "{words}" not in self.prompt:
            raise InputError(f"prompt must hold {{words}}, where the number of words goes, got {self.prompt!r}")
        if not 0 <= self.min_shared < 1:
            raise InputError(f"min_shared must be in [0, 1), got {self.min_shared}")
        if self.retries < 0:
            raise InputError(f"retries must be 0 or more, got {self.retries}")
        if self.window is not None:
            window, ordered = self.window, len(self.window) == 2 and self.window[0] < self.window[1]
            ranks = ordered and window[0] >= 1 and not any(x % 1 for x in window)
            if not ranks and not (ordered and self.fractions and window[0] >= 0):
                right = "two ranks lo < hi with lo at least 1, or two fractions from 0 to 1"
                raise InputError(f"window must be {right}, got {window}")
            self.window = window if self.fractions else [int(rank) for rank in window]
        if not self.templates:
            raise InputError("templates must name at least one of difference, instead, unlike, target")

    @property
    def fractions(self) -> bool:
        """Whether the window is given as fractions of the other images."""
        return self.window is not None and max(self.window) <= 1 and min(self.window) < 1

    @property
    def folder(self) -> Path:
        """Where all files of a dataset go."""
        return Path(self.output or f"data/{self.dataset}/generated")

    def file(self, name: str) -> Path:
        """A file of that folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output {self.folder} cannot be made: {error.strerror}") from None
        return self.folder / name


Step: TypeAlias = Callable[[GenerateConfig, Dataset], None]


def first_process(step: Step) -> Step:
    """Let the first process alone do a step, while the others wait."""

    @wraps(step)
    def run(config: GenerateConfig, dataset: Dataset) -> None:
        processes = Processes()
        if processes.first:
            step(config, dataset)
        processes.wait()

    return run


def digest(settings: Mapping[str, Any], *inputs: Path) -> str:
    """Return a short name for settings and the content of input files."""
    for path in inputs:
        if not path.is_file():
            raise InputError(f"{path} is missing: run the step before this one")
    return hash_files(*inputs, prefix=json.dumps(settings, sort_keys=True).encode())[:16]


def is_done(path: Path, made_by: str) -> bool:
    """Whether exactly these settings and inputs made ``path``, and its files are as then; one that is not is told."""
    try:
        note = json.loads(path.with_suffix(".done.json").read_text(encoding="utf-8"))
        files = {path.with_name(name): (stamp["bytes"], stamp["sha256"]) for name, stamp in note["outputs"].items()}
        if note["made_by"] != made_by or path not in files:
            return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # there is no note, or it is damaged or of an older version
    for file, (size, content) in files.items():
        if not file.is_file() or file.stat().st_size != size or hash_files(file) != content:
            Processes().say(f"{file} is not the file that was finished: it is made again")
            return False
    return True


def skip_step(name: str, out: Path, made_by: str) -> bool:
    """Whether a step is done, which is said; no process goes on, and writes, before all have looked."""
    done, processes = is_done(out, made_by), Processes()
    processes.wait()
    if done:
        processes.say(f"{name}: {out} is done")
    return done


def mark_done(path: Path, made_by: str, *others: Path, **about: Any) -> None:
    """Note that ``path``, and the other files of its folder, are finished: their sizes and contents count."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": hash_files(file)} for file in (path, *others)}
    note = {"made_by": made_by, **about, "outputs": files}
    write_text(path.with_suffix(".done.json"), json.dumps(note, indent=1) + "\n")


def draw_free(places: range, taken: Collection[int], name: str, count: int, seed: int) -> list[int]:
    """Draw up to ``count`` places that are not taken, in ascending order; each name has a draw of its own."""
    taken = sorted(place for place in taken if place in places)
    free = len(places) - len(taken)
    drawn = [places.start + n for n in sorted(random.Random(f"{seed}/{name}").sample(range(free), min(count, free)))]
    for place in taken:
        drawn = [n + (place <= n) for n in drawn]
    return drawn


class Journal:
    """Blocks of rows as they get ready, in files that survive a kill: a block is whole, or it is done again.

    Each process appends to a file of its own beside ``out``, one line a block, and knows the blocks of all files that
    are there, of which it holds only the places in memory. Journals of another ``made_by`` are not touched.

    Raises ``InputError`` where a file cannot be written; what was written before stays.
    """

    def __init__(self, out: Path, made_by: str, processes: Processes):
        self._pattern = f"{out.stem}.{made_by}.*.partial.jsonl"
        self._folder, self._places = out.parent, dict[int, tuple[Path, int]]()
        self.path = out.with_name(self._pattern.replace("*", str(processes.index)))
        cut_torn(self.path)
        processes.wait()  # nobody reads what another one still cuts
        for path in sorted(out.parent.glob(self._pattern)):
            self._scan(path)
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from None
        processes.wait()  # nobody writes what another one still scans

    def _scan(self, path: Path) -> None:
        place = 0
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError):  # of a damaged line
                    if line.endswith(b"\n") and isinstance(block := json.loads(line)["block"], int):
                        self._places[block] = (path, place)
                place += len(line)

    def __contains__(self, block: int) -> bool:
        return block in self._places

    def add(self, block: int, rows: Sequence[Row]) -> None:
        """Append a block; it is on its way to the disk when this returns."""
        place, written = self._file.seek(0, os.SEEK_END), 0
        line = json.dumps({"block": block, "rows": list(rows)}, ensure_ascii=False).encode() + b"\n"
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(place)
            raise InputError(f"{self.path} cannot be written: {error.strerror}; what is in it {STAYS}") from None
        self._places[block] = (self.path, place)

    def close(self) -> None:
        """Close this process's file."""
        self._file.close()

    def rows(self) -> Iterator[Row]:
        """All rows by block, of other processes too if the journal was opened after they closed theirs."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _ in self._places.values()}}
            for block in sorted(self._places):
                path, place = self._places[block]
                files[path].seek(place)
                yield from json.loads(files[path].readline())["rows"]

    def remove(self) -> None:
        """Remove all files of this journal: their rows are elsewhere now."""
        self.close()
        for path in self._folder.glob(self._pattern):
            path.unlink(missing_ok=True)


def cut_torn(path: Path) -> None:
    """Cut off what follows the last newline of a file, if it is there."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def run_step(step: Step, text: str | None) -> None:
    """Run one step, or all, from the command line; ``text`` is for ``--help``: a sentence, a blank line, examples."""

    def main() -> None:
        argv = sys.argv[1:]
        config = parse(GenerateConfig, find_preset(argv), argv, text or "")
        from spn4cir.datasets import load_dataset

        dataset, processes = load_dataset(config.dataset, config.data_root), Processes()
        place_output(config, dataset)
        for note in dataset.notes():
            processes.say(note)
        busy = f"another run works in {config.folder}: wait for it, or give --output"
        with locked(config.file(".lock"), busy) if processes.first else nullcontext():
            step(config, dataset)

    run_command(main)


def place_output(config: GenerateConfig, dataset: Dataset) -> None:
    """Put the files of a dataset of one's own into a folder of its catalogue, unless the settings name another."""
    own = dataset.provenance()
    if config.output is None and own is not None:
        config.output = str(folder_of(Path(f"data/{config.dataset}"), own) / "generated")


def find_preset(argv: Sequence[str]) -> Path:
    """Return the preset of the dataset and the backbone that a command line names, and print which one it is.

    Raises ``InputError`` that lists those that exist if there is none, unless ``--config`` or ``--help`` is given.
    """
    folder = recipes_folder() / "triplets"
    dataset = take_option(argv, "dataset")[0] or GenerateConfig.dataset
    backbone = take_option(argv, "backbone")[0] or GenerateConfig.backbone
    files = [folder / f"{Path(name).name}.yaml" for name in (f"{dataset}_{backbone}", dataset)]
    found = next((file for file in files if file.is_file()), None)
    if take_option(argv, "config")[0] or {"-h", "--help"} & {*argv}:
        return found or folder / f"{GenerateConfig.dataset}.yaml"
    if found is None:
        from spn4cir.datasets import DATASETS, load_dataset

        if dataset not in DATASETS:
            load_dataset(dataset)  # raises
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        told = f"there is no preset for dataset {dataset!r} with backbone {backbone!r}"
        raise InputError(f"recipes/triplets: {told}; available: {known}; or give --config FILE")
    Processes().say(f"preset: recipes/triplets/{found.name}")
    return found
