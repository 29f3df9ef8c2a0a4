"""Stage 1: train query and target encoder with the targets of the batch as candidates.

examples:
  accelerate launch recipes/stage1.py
  accelerate launch recipes/stage1.py --epochs 3 --lr 5e-4
  accelerate launch recipes/stage1.py --config recipes/emoji_clip4cir_stage1.yaml --max-annotated 300
  accelerate launch recipes/stage1.py --resume runs/emoji/clip4cir/stage1-20260101-120000
"""

from pathlib import Path

from spn4cir.cli import recipe

if __name__ == "__main__":
    recipe(1, Path(__file__).parent / "emoji_clip4cir_stage1.yaml", __doc__)
