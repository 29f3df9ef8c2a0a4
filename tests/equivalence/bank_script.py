"""Banks without models: ``bank_script.py ROOT BLOCKS`` begins one and kills itself before it encodes one more block."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from benchmarks.bank import Counting, Numbered
from spn4cir import bank as banks
from spn4cir import store
from spn4cir.types import ImageFeatures

IDS = [f"i{n:02d}" for n in range(23)]


class Blockwise(Counting):
    """Features depend a little on how many images are encoded at once, as they do where matrices are multiplied."""

    name = "blockwise"

    def __init__(self, blocks: int | None = None, stop: Callable[[], None] | None = None):
        super().__init__()
        self.blocks, self.stop, self.factor = blocks, stop, 1.0

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        if self.blocks == 0 and self.stop:
            self.stop()
        if self.blocks is not None:
            self.blocks -= 1
        factor = self.factor * (1 + len(pixels) / 4096)
        return ImageFeatures(*(part * factor for part in super().encode_image(pixels)))


def build(model: Counting, root: Path, batch_size: int = 5, dtype: str = "float32", ids: list[str] = IDS) -> banks.Bank:
    """The bank of these images."""
    hashes = dict(zip(ids, ids, strict=True))
    return banks.load_or_build(model, Numbered(IDS), hashes, root, batch_size, banks.stored_parts(dtype))


if __name__ == "__main__":
    store.SECONDS = 0
    build(Blockwise(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)), Path(sys.argv[1]))
