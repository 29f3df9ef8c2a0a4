"""What a backbone that is being built does about pretrained weights."""

from contextvars import ContextVar

READS_WEIGHTS = ContextVar("READS_WEIGHTS", default=True)
"""Whether it reads those of its model; ``build_backbone`` says no where a checkpoint will fill it."""
