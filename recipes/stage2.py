"""Stage 2: freeze the image side and train the query side against a bank of all candidates.

examples:
  accelerate launch recipes/stage2.py
  accelerate launch recipes/stage2.py --init runs/emoji/clip4cir/stage1-20260101-120000
  accelerate launch recipes/stage2.py --generated auto --generated-share 0.5
  accelerate launch recipes/stage2.py --resume runs/emoji/clip4cir/stage2-20260101-123000
"""

from spn4cir.train_cli import train_command

if __name__ == "__main__":
    train_command(2, __doc__)
