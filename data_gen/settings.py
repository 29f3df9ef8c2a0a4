"""Settings of the four steps."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spn4cir.config import parse
from spn4cir.errors import InputError, run_command
from spn4cir.types import Dataset

PRESETS = Path(__file__).parent.parent / "recipes"


@dataclass
class GenerateConfig:
    """Everything that decides the generated triplets.

    Args:
        dataset: name of a dataset; its preset is recipes/triplets_<dataset>.yaml.
        data_root: where its files lie.
        output: folder for all files; null makes data/<dataset>/generated.
        captioner: "embedded", or a multimodal LLM of transformers by name or folder, such as llava-hf/llava-1.5-7b-hf.
        prompt: what the captioner is asked; {words} stands for the number of words.
        words: how long a caption should be.
        max_new_tokens: bound of one caption.
        caption_batch_size: images captioned at once.
        matcher: "embedded", or an open_clip model and its pretrained tag, such as ViT-L-14-quickgelu:openai.
        window: similarity ranks [lo, hi) from which a partner is drawn, 1 being the most similar other image.
        pairs_per_image: partners of each image.
        templates: how the text is made, one drawn for each pair: "difference", "instead", "unlike" or "target".
        seed: of all draws.
    """

    dataset: str = "emoji"
    data_root: str | None = None
    output: str | None = None
    captioner: str = "embedded"
    prompt: str = "please briefly describe the image in {words} words"
    words: int = 10
    max_new_tokens: int = 40
    caption_batch_size: int = 64
    matcher: str = "embedded"
    window: list[int] = field(default_factory=lambda: [1, 20])
    pairs_per_image: int = 4
    templates: list[Literal["difference", "instead", "unlike", "target"]] = field(
        default_factory=lambda: ["difference"]
    )
    seed: int = 42

    def __post_init__(self) -> None:
        if "{words}" not in self.prompt:
            raise InputError(f"prompt must hold the placeholder {{words}}, got {self.prompt!r}")
        if len(self.window) != 2 or not 1 <= self.window[0] < self.window[1]:
            raise InputError(f"window must be two ranks lo < hi with lo at least 1, got {self.window}")
        for name in ("words", "max_new_tokens", "caption_batch_size", "pairs_per_image"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.templates:
            raise InputError("templates must name at least one of difference, instead, unlike, target")

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
        named = [b for a, b in itertools.pairwise(argv) if a == "--dataset"]
        named += [a.partition("=")[2] for a in argv if a.startswith("--dataset=")]
        own = preset = PRESETS / f"triplets_{Path(named[-1]).name if named else GenerateConfig.dataset}.yaml"
        if not own.is_file():
            preset = PRESETS / f"triplets_{GenerateConfig.dataset}.yaml"
        config = parse(GenerateConfig, preset, argv, text or "")
        from spn4cir.datasets import load_dataset

        dataset = load_dataset(config.dataset, config.data_root)
        if preset != own and not any(a.partition("=")[0] == "--config" for a in argv):
            print(f"{dataset.name} has no preset {own.name}: what is not given is that of {preset.name}")
        step(config, dataset)

    run_command(main)
