"""The embedded dataset: Twemoji pictures with Unicode names, triplets that change exactly one attribute.

Pictures and names come from two pinned packages; which image belongs to which split, the triplets and the queries ship
in ``spn4cir/embedded/emoji`` (made by ``benchmarks.embedded.make_emoji``). Targets of val and test are disjoint from
the training images; both are ranked over the whole dataset.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from spn4cir.dataset import Dataset
from spn4cir.datasets.emoji_names import find_emoji, load_names, parse_attributes
from spn4cir.errors import InputError
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

FOLDER = Path(__file__).parent.parent / "embedded" / "emoji"


class Emoji(Dataset):
    """The embedded dataset; needs no files but the two packages, so its root is ignored."""

    name = "emoji"
    as_published = True
    protocols: ClassVar = {"val": ("emoji/val",), "test": ("emoji/test",)}

    def __init__(self, root: str | None = None):
        self._images: dict[str, list[str]] = json.loads((FOLDER / "images.json").read_text())
        self._known = {i for ids in self._images.values() for i in ids}

    def find_image(self, image_id: str) -> ImageRef:
        """The PNG of an image. Raises ``InputError`` for an unknown id."""
        if image_id not in self._known:
            raise InputError(f"emoji: unknown image id {image_id!r}")
        return find_emoji(image_id)

    def list_training_images(self) -> list[str]:
        """All images that are no val or test target."""
        return list(self._images["train"])

    def read_triplets(self) -> list[Triplet]:
        """The 2,000 annotated triplets; the first n are a fair sample of them."""
        return [Triplet(r["reference"], (r["target"],), (r["modification"],)) for r in _rows("train")]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """``emoji/val`` or ``emoji/test``: ranked over all images, reference removed, tags are attributes."""
        chosen = self.choose_protocol(split, protocol)
        queries = [
            Query(r["reference"], r["modification"], (r["target"],), (r["attribute"],), tuple(r["subset"]))
            for r in _rows(split)
        ]
        measures = recall_measures(1, 5, 10, 50, primary=(1,)) + recall_measures(1, 2, 3, over="subset")
        return Benchmark(chosen, tuple(sorted(self._known)), tuple(queries), exclude_reference=True, measures=measures)

    def category(self, image_id: str) -> str:
        """The concept: the name without skin tone, gender, age, hair, direction and colour; empty if unknown."""
        names = load_names()
        return parse_attributes(names[image_id], set(names.values()))["concept"] if image_id in names else ""

    def label(self, image_id: str) -> str:
        """The Unicode name."""
        names = load_names()
        if image_id not in names:
            raise InputError(f"emoji: unknown image id {image_id!r}")
        return names[image_id]


def _rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
