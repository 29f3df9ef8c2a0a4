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
from pathlib import Path

from spn4cir.config import recipes_folder
from spn4cir.data_gen.caption import caption_images, check_captioner
from spn4cir.data_gen.deduplicate import deduplicate
from spn4cir.data_gen.match_pairs import match_pairs
from spn4cir.data_gen.sheet import list_facts, write_sheet, write_window
from spn4cir.data_gen.steps import GenerateConfig, run_step
from spn4cir.data_gen.texts import Rewriter, TokenCounter
from spn4cir.data_gen.write_text import describe_drops, read_summary, write_triplets
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import Row, stream_jsonl

MANY = 0.75  # of the pairs
FEW = 256  # triplets that do not fill two of the usual batches


def make_triplets(config: GenerateConfig, dataset: Dataset) -> None:
    """All four steps, pictures to look at, and a summary."""
    check_settings(config, dataset)
    for step in (deduplicate, match_pairs, caption_images, write_triplets, write_window, write_sheet):
        step(config, dataset)
    if Processes().first:
        print_summary(config, dataset)
        print(f"\nnext: {suggest_training(config, dataset)}")


def check_settings(config: GenerateConfig, dataset: Dataset) -> None:
    """Raise ``InputError`` at once for what would stop a late step, unless that is done already."""
    recipes = recipes_folder()
    if config.recipe and not (recipes / config.recipe).is_file():
        raise InputError(f"recipe {config.recipe} is not in {recipes}")
    check_captioner(config, dataset)
    if not config.file("triplets.done.json").is_file():
        TokenCounter(config.tokenizer)
        if rewriter := Rewriter.of(config):
            rewriter.engine.look()


def print_summary(config: GenerateConfig, dataset: Dataset) -> None:
    """Print the counts, the drop reasons, eight examples, and where the pictures are."""
    summary = read_summary(config)
    print("\nsummary: " + ", ".join(f"{name} {value}" for name, value in list_facts(summary)))
    print(f"dropped: {describe_drops(summary['dropped']) or 'none'}")
    if summary["dropped"].get("difference has nothing to say", 0) > MANY * summary["counts"]["pairs"]:
        print("most pairs of captions share no word, so no change can be named: try --templates '[instead]'")
    print("\nfor example:")
    for row in pick_rows(config.file("triplets.jsonl"), summary["counts"]["triplets"], 8):
        print(f"  {row['captions'][0]}  +  «{row['modification']}»  →  {row['captions'][1]}")
    files = [config.file(name) for name in ("triplets.json", "triplets.parquet", "sheet.html", "sheet.png")]
    print(f"\n{dataset.name}: " + ", ".join(str(path) for path in files if path.is_file()))


def pick_rows(path: Path, total: int, count: int) -> list[Row]:
    """Rows from all over a file."""
    step = max(1, total // count)
    return [row for number, row in enumerate(stream_jsonl(path)) if number % step == 0][:count]


def suggest_training(config: GenerateConfig, dataset: Dataset) -> str:
    """What to type to train on them: the preset's recipe, or the dataset's for generated triplets, or stage 1."""
    usual = f"{config.dataset}/{config.backbone}_stage2_generated.yaml"
    recipe = config.recipe or (usual if (recipes_folder() / usual).is_file() else None)
    stage = 2 if recipe and "_stage2" in recipe else 1
    words = ["accelerate", "launch", f"recipes/stage{stage}.py"]
    words += (
        ["--config", f"recipes/{recipe}"] if recipe else ["--dataset", config.dataset, "--backbone", config.backbone]
    )
    if config.data_root and (recipe is None or recipe.startswith(f"{config.dataset}/")):
        words += ["--data-root", config.data_root]  # another dataset's recipe has its own
    words += ["--generated", str(config.file("triplets.json"))]
    triplets = read_summary(config)["counts"]["triplets"]
    if triplets < FEW and not dataset.has_triplets:
        words += ["--batch-size", str(max(2, triplets // 4))]  # the usual one would not be filled
    return shlex.join(words)


def main() -> None:
    """Run ``make_triplets`` from the command line."""
    run_step(make_triplets, __doc__)


if __name__ == "__main__":
    main()
