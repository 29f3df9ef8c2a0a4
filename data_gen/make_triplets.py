"""Make triplets from images alone: deduplicate, caption, match pairs, write the text; what is done is skipped.

examples:
  python data_gen/make_triplets.py --dataset emoji
  python data_gen/make_triplets.py --dataset emoji --templates '[instead, unlike]' --output data/emoji/other
"""

from data_gen.caption import caption
from data_gen.deduplicate import canonical_images, deduplicate
from data_gen.files import read_jsonl
from data_gen.match_pairs import check_window, match_pairs
from data_gen.settings import GenerateConfig, command
from data_gen.write_text import write_text
from spn4cir.config import TrainConfig
from spn4cir.types import Dataset


def make_triplets(config: GenerateConfig, dataset: Dataset) -> None:
    """All four steps."""
    deduplicate(config, dataset)
    check_window(config, len(canonical_images(config)))  # before hours of captioning
    for step in (caption, match_pairs, write_text):
        step(config, dataset)
    rows = read_jsonl(config.file("triplets.jsonl"))
    print("\nfor example:")
    for row in rows[:: max(1, len(rows) // 8)][:8]:
        print(f"  {row['captions'][0]}  +  «{row['modification']}»  →  {row['captions'][1]}")
    made, root = (
        f"--generated {config.file('triplets.json')}",
        f" --data-root {config.data_root}" * bool(config.data_root),
    )
    other = f"--config recipes/{config.dataset}_{TrainConfig.backbone}_stage2_generated.yaml{root} {made}"
    small = config.dataset == GenerateConfig.dataset
    print(f"\nnext: accelerate launch recipes/stage2.py {f'{made} --generated-share 0.25' if small else other}")


if __name__ == "__main__":
    command(make_triplets, __doc__)
