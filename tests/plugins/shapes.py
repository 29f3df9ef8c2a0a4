"""A toy dataset: references outside the gallery, own candidates, queries of one part, several targets."""

import io
from typing import ClassVar

from PIL import Image

from spn4cir.dataset import Dataset
from spn4cir.types import Benchmark, ImageRef, Measure, Query, Triplet, recall_measures

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}
NAMES = [f"{colour} {number}" for colour in COLOURS for number in range(6)]


class Shapes(Dataset):
    """Pictures of one colour with a block, held as bytes; the crop of each is its middle."""

    name = "shapes"
    protocols: ClassVar = {"val": ("shapes/val",)}

    def __init__(self, root: str | None = None):
        self.root = None

    def find_image(self, image_id: str) -> ImageRef:
        def read() -> bytes:
            colour, number = image_id.split()
            picture = Image.new("RGB", (48, 48), COLOURS[colour])
            picture.paste((9 * int(number), 40, 40), (8, 8, 16, 16))
            file = io.BytesIO()
            picture.save(file, "PNG")
            return file.getvalue()

        return ImageRef(read, (4, 4, 44, 44), f"shapes, {image_id}")

    def list_training_images(self) -> list[str]:
        return NAMES[:20]

    def read_triplets(self) -> list[Triplet]:
        both = [Triplet(NAMES[n], (NAMES[n + 6], NAMES[n + 7]), (f"number {n}", "another colour")) for n in range(8)]
        text = [Triplet(None, (NAMES[n],), (NAMES[n],), label=NAMES[n].split()[0]) for n in range(8)]
        image = [Triplet(NAMES[n], (NAMES[n + 1],), (), negatives=(NAMES[19 - n],)) for n in range(8)]
        return [*both, *text, *image]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        gallery = tuple(NAMES[6:])
        queries = (
            Query("red 0", "make it green", ("green 0", "green 1"), ("colour", "both"), gallery[:8]),
            Query(None, "blue", ("blue 2",), ("text",), gallery[4:12]),
            Query("green 3", None, ("green 4",), ("image",), gallery[:10]),
            Query("white 1", "in blue", ("blue 1", "blue 3", "blue 5"), ("colour",), gallery[2:]),
        )
        measures = (
            *recall_measures(1, 3, over="candidates", primary=(1,)), Measure("map", 5), Measure("mmp", 2),
        )  # fmt: skip
        return Benchmark(self.choose_protocol(split, protocol), gallery, queries, True, measures)
