"""Settings of the four steps."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spn4cir.config import parse
from spn4cir.data_gen.processes import Processes
from spn4cir.errors import InputError, run_command
from spn4cir.types import Dataset

PRESETS = Path(__file__).parent.parent / "recipes"
POSITIVE = (
    "words", "max_new_tokens", "caption_batch_size", "match_batch_size", "pairs_per_image", "requests", "timeout",
)  # fmt: skip


@dataclass
class GenerateConfig:
    """Everything that decides the generated triplets. ``null`` in YAML means "not set".

    Args:
        dataset: name of a dataset.
        backbone: whose triplets these are: the preset is recipes/triplets_<dataset>_<backbone>.yaml if there is one,
            else recipes/triplets_<dataset>.yaml.
        data_root: where the dataset's files lie; of catalogue, a folder of images or a table of them.
        output: folder for all files; null makes data/<dataset>/generated.
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
        captions: file of existing captions, instead of a captioner: JSON or JSONL of image_id and caption.
        caption_images: "paired" captions what occurs in a pair, "all" every candidate.
        captioner: "embedded", or a multimodal LLM of transformers by name or folder, or the model's name on endpoint.
        endpoint: address of an OpenAI-compatible server, such as http://host:8000/v1, that runs the captioner.
        prompt: what the captioner is asked; {words} stands for the number of words, {category} for the category.
        prompt_file: a file that holds the prompt instead.
        words: how long a caption should be.
        max_new_tokens: bound of one answer.
        caption_batch_size: images captioned at once.
        templates: how the text is made, one drawn for each pair: "difference", "instead", "unlike" or "target".
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
    captioner: str = "embedded"
    endpoint: str | None = None
    prompt: str = "please briefly describe the image in {words} words"
    prompt_file: str | None = None
    words: int = 10
    max_new_tokens: int = 40
    caption_batch_size: int = 64
    templates: list[Literal["difference", "instead", "unlike", "target"]] = field(
        default_factory=lambda: ["difference"]
    )
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
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("pairs", "max_caption_count", "requests_per_minute", "max_tokens"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.prompt_file is None and "{words}" not in self.prompt:
            raise InputError(f"prompt must hold {{words}}, where the number of words goes, got {self.prompt!r}")
        if self.retries < 0:
            raise InputError(f"retries must be 0 or more, got {self.retries}")
        if self.window is not None:
            self._check_window(self.window)
            self.window = self.window if self.fractions else [int(rank) for rank in self.window]
        if not self.templates:
            raise InputError("templates must name at least one of difference, instead, unlike, target")

    @property
    def fractions(self) -> bool:
        """Whether the window is given as fractions of the other images."""
        window = self.window or [1.0, 1.0]
        return max(window) <= 1 and (min(window) < 1 or any(rank % 1 for rank in window))

    def _check_window(self, window: list[float]) -> None:
        ordered = len(window) == 2 and window[0] < window[1]
        ranks = ordered and window[0] >= 1 and not any(x % 1 for x in window)
        if not ordered or not (ranks or (self.fractions and window[0] >= 0)):
            raise InputError(
                f"window must be two ranks lo < hi with lo at least 1, or two fractions from 0 to 1, got {window}"
            )

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


def command(step: Callable[[GenerateConfig, Dataset], None], text: str | None) -> None:
    """Run one step, or all, from the command line, with the preset of the dataset."""

    def main() -> None:
        argv = sys.argv[1:]
        preset = choose_preset(_given(argv, "dataset") or GenerateConfig.dataset, _given(argv, "backbone"))
        config = parse(GenerateConfig, preset, argv, text or "")
        from spn4cir.datasets import load_dataset

        dataset, processes = load_dataset(config.dataset, config.data_root), Processes()
        for note in dataset.notes():
            processes.say(note)
        with _alone(config) if processes.first else nullcontext():
            step(config, dataset)

    run_command(main)


@contextmanager
def _alone(config: GenerateConfig) -> Iterator[None]:
    """Hold the folder for this run; the system lets go of it even if the run is killed.

    Raises:
        InputError: if another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # not this kind of system
        yield
        return
    with config.file(".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run works in {config.folder}: wait for it, or give --output") from None
        yield


def choose_preset(dataset: str, backbone: str | None = None) -> Path:
    """The preset of a dataset and a backbone; of the dataset; or, where there is none, of the embedded dataset."""
    names = [f"{dataset}_{backbone or GenerateConfig.backbone}", dataset, GenerateConfig.dataset]
    files = [PRESETS / f"triplets_{Path(name).name}.yaml" for name in names]
    return next((file for file in files if file.is_file()), files[-1])


def _given(argv: list[str], option: str) -> str | None:
    """What the command line gives for an option, the last of several."""
    named = [b for a, b in itertools.pairwise(argv) if a == f"--{option}"]
    named += [a.partition("=")[2] for a in argv if a.startswith(f"--{option}=")]
    return named[-1] if named else None
