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

from data_gen.caption import caption, look_ahead
from data_gen.deduplicate import deduplicate
from data_gen.match_pairs import match_pairs
from data_gen.processes import Processes
from data_gen.report import summarise
from data_gen.settings import PRESETS, GenerateConfig, command
from data_gen.sheet import write_sheet
from data_gen.window_report import write_window
from data_gen.write_text import write_text
from spn4cir.types import Dataset


def make_triplets(config: GenerateConfig, dataset: Dataset) -> None:
    """All four steps, pictures to look at, and a summary."""
    look_ahead(config, dataset)
    for step in (deduplicate, match_pairs, caption, write_text, write_window, write_sheet):
        step(config, dataset)
    if Processes().first:
        summarise(config, dataset)
        print(f"\nnext: {next_command(config)}")


def next_command(config: GenerateConfig) -> str:
    """What to type to train on the triplets: the paper's recipe for generated ones, or else stage 1."""
    made = f"--generated {shlex.quote(str(config.file('triplets.json')))}"
    root = f" --data-root {shlex.quote(config.data_root)}" if config.data_root else ""
    recipe = PRESETS / f"{config.dataset}_{config.backbone}_stage2_generated.yaml"
    if recipe.is_file():
        return f"accelerate launch recipes/stage2.py --config recipes/{recipe.name}{root} {made}"
    return f"accelerate launch recipes/stage1.py --dataset {config.dataset} --backbone {config.backbone}{root} {made}"


if __name__ == "__main__":
    command(make_triplets, __doc__)
