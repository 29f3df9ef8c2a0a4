"""A toy dataset whose gallery holds texts: a picture is the query, and sentences are ranked."""

from typing import ClassVar

from plugins.shapes import COLOURS, Shapes
from spn4cir.types import Benchmark, Query, recall_measures


class Sentences(Shapes):
    """Which of four sentences describes a picture."""

    name = "sentences"
    protocols: ClassVar = {"val": ("sentences/val",)}

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        texts = {f"s{n}": f"a {colour} picture" for n, colour in enumerate(COLOURS)}
        queries = tuple(Query(f"{colour} 2", None, (f"s{n}",), (colour,)) for n, colour in enumerate(COLOURS))
        chosen = self.choose_protocol(split, protocol)
        return Benchmark(chosen, tuple(texts), queries, False, recall_measures(1, 2, primary=(1,)), texts=texts)
