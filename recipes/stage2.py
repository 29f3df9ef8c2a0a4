"""Stage 2: freeze the image side and train the query side against a bank of all candidates.

examples:
  accelerate launch recipes/stage2.py
  accelerate launch recipes/stage2.py --init runs/emoji/clip4cir/stage1-20260101-120000
  accelerate launch recipes/stage2.py --generated auto --generated-share 0.5
  accelerate launch recipes/stage2.py --resume runs/emoji/clip4cir/stage2-20260101-123000
"""

from pathlib import Path

from spn4cir.cli import recipe

if __name__ == "__main__":
    recipe(2, Path(__file__).parent / "emoji_clip4cir_stage2.yaml", __doc__)
