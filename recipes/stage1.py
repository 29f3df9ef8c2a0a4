"""Stage 1: train query and target encoder with the targets of the batch as candidates.

examples:
  accelerate launch recipes/stage1.py
  accelerate launch recipes/stage1.py --epochs 3 --lr 5e-4
  accelerate launch recipes/stage1.py --config recipes/emoji/clip4cir_stage1.yaml --max-annotated 300
  accelerate launch recipes/stage1.py --resume runs/emoji/clip4cir/stage1-20260101-120000
"""

from spn4cir.train_cli import train_command

if __name__ == "__main__":
    train_command(1, __doc__)
