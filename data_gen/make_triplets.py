"""Make triplets from images alone: deduplicate, match pairs, caption, write the text; what is done is skipped.

Pairs come before captions, so that only images that occur in a pair are captioned. A run that was killed goes on with
the same command; several processes share the work.

examples:
  python data_gen/make_triplets.py --dataset emoji
  python data_gen/make_triplets.py --dataset fashioniq --backbone tgcir --endpoint http://127.0.0.1:8000/v1
  python data_gen/make_triplets.py --dataset catalogue --data-root my/pictures --captions my/captions.jsonl
  python data_gen/make_triplets.py --dataset emoji --templates '[instead, unlike]' --output data/emoji/other
  torchrun --nproc_per_node 4 data_gen/make_triplets.py --dataset cirr
"""

import shlex

from spn4cir.data_gen import caption as captions
from spn4cir.data_gen.caption import caption
from spn4cir.data_gen.deduplicate import deduplicate
from spn4cir.data_gen.length import TokenCounter
from spn4cir.data_gen.match_pairs import match_pairs
from spn4cir.data_gen.processes import Processes
from spn4cir.data_gen.report import read_summary, summarise
from spn4cir.data_gen.rewrite import Rewriter
from spn4cir.data_gen.settings import PRESETS, GenerateConfig, command
from spn4cir.data_gen.sheet import write_sheet
from spn4cir.data_gen.window_report import write_window
from spn4cir.data_gen.write_text import write_text
from spn4cir.errors import InputError
from spn4cir.types import Dataset

FEW = 256  # triplets that do not fill two of the usual batches


def make_triplets(config: GenerateConfig, dataset: Dataset) -> None:
    """All four steps, pictures to look at, and a summary."""
    look_ahead(config, dataset)
    for step in (deduplicate, match_pairs, caption, write_text, write_window, write_sheet):
        step(config, dataset)
    if Processes().first:
        summarise(config, dataset)
        print(f"\nnext: {next_command(config, dataset)}")


def look_ahead(config: GenerateConfig, dataset: Dataset) -> None:
    """Raise ``InputError`` at once for what would stop a late step, unless that is done already."""
    if config.recipe and not (PRESETS / config.recipe).is_file():
        raise InputError(f"recipe {config.recipe} is not in {PRESETS}")
    captions.look_ahead(config, dataset)
    if not config.file("triplets.done.json").is_file():
        TokenCounter(config.tokenizer)
        if rewriter := Rewriter.of(config):
            rewriter.engine.look()


def next_command(config: GenerateConfig, dataset: Dataset) -> str:
    """What to type to train on them: the preset's recipe, or the dataset's for generated triplets, or stage 1."""
    usual = f"{config.dataset}/{config.backbone}_stage2_generated.yaml"
    recipe = config.recipe or (usual if (PRESETS / usual).is_file() else None)
    stage = 2 if recipe and "_stage2" in recipe else 1
    words = ["accelerate", "launch", f"recipes/stage{stage}.py"]
    words += (
        ["--config", f"recipes/{recipe}"] if recipe else ["--dataset", config.dataset, "--backbone", config.backbone]
    )
    if config.data_root and (recipe is None or recipe.startswith(f"{config.dataset}/")):
        words += ["--data-root", config.data_root]  # another dataset's recipe has its own
    words += ["--generated", str(config.file("triplets.json"))]
    triplets = read_summary(config)["counts"]["triplets"]
    if triplets < FEW and not dataset.annotated:
        words += ["--batch-size", str(max(2, triplets // 4))]  # the usual one would not be filled
    return shlex.join(words)


def main() -> None:
    """Run ``make_triplets`` from the command line."""
    command(make_triplets, __doc__)


if __name__ == "__main__":
    main()
