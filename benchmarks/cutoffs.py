"""What cut-offs can tell: score and z-score of the best hit of sensible and senseless texts over the embedded pictures.

examples:
  python -m benchmarks.cutoffs --json benchmarks/results/cutoffs.json
"""

import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import command, report
from spn4cir.datasets import load_dataset
from spn4cir.index.local import Index
from spn4cir.model import load

COUNT, KEPT = 150, 2.5
SENSELESS = (
    "quarterly tax return", "the meaning of life", "terms and conditions apply", "last Tuesday", "a matter of opinion",
    "kernel panic", "statistical significance", "please hold the line", "supply and demand", "once upon a time",
    "error 404", "lorem ipsum dolor", "the square root of two", "mutual agreement", "nothing in particular",
    "press any key", "frequently asked questions", "a change of heart rate", "inflation target", "to be continued",
)  # fmt: skip
SHOWN = ("red heart", "a red heart", "woman firefighter", "quarterly tax return", "the meaning of life")


def measure(index: Index, texts: Sequence[str]) -> dict[str, Any]:
    """Of the best hit of each text: median, 10 % and 90 % of score and z-score, and the share above some cut-offs."""
    hits = [index.search(text=text, k=1)[0] for text in texts]
    scores, zs = [hit.score for hit in hits], [hit.z for hit in hits]
    kept = [len(index.search(text=text, k=1000, min_z=KEPT)) for text in texts]

    def spread(values: Sequence[float]) -> list[float]:
        tenths = statistics.quantiles(values, n=10)
        return [round(value, 2) for value in (statistics.median(values), tenths[0], tenths[-1])]

    def share(values: Sequence[float], low: float) -> int:
        return round(100 * sum(value >= low for value in values) / len(values))

    return {
        "texts": len(texts),
        "score: median, 10 %, 90 %": spread(scores),
        "z: median, 10 %, 90 %": spread(zs),
        "score >= 0.9, %": share(scores, 0.9),
        "z >= 2.75, %": share(zs, 2.75),
        "z >= 3, %": share(zs, 3.0),
        f"median of hits at z >= {KEPT}": statistics.median(kept),
    }


def suite() -> dict[str, Any]:
    """All texts."""
    dataset = load_dataset("emoji")
    trained = set(dataset.training_images())
    with tempfile.TemporaryDirectory() as folder:
        index = Index.build(load("embedded"), "emoji", Path(folder) / "index")
        draw, ids = random.Random(0), sorted(index.ids)
        known = draw.sample([i for i in ids if i in trained], COUNT)
        other = draw.sample([i for i in ids if i not in trained], COUNT)
        groups = {
            "names of pictures that the model was trained on": measure(index, [dataset.label(i) for i in known]),
            "names of other pictures": measure(index, [dataset.label(i) for i in other]),
            "texts of no picture": measure(index, SENSELESS),
        }
        best = {text: index.search(text=text, k=1)[0] for text in SHOWN}
        shown = {text: [round(hit.score, 2), round(hit.z, 2), hit.columns["title"]] for text, hit in best.items()}
    return report("cutoffs", "best hit of a text over the embedded pictures", [], groups=groups, shown=shown)


if __name__ == "__main__":
    command("cutoffs", __doc__, suite)
