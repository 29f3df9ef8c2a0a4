"""Write the report of an evaluation: a page, and beside it the metrics as CSV and the result as JSON."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from spn4cir.comparison import Difference
from spn4cir.errors import InputError
from spn4cir.files import write_text
from spn4cir.images import is_vector, open_image
from spn4cir.report.content import query_content, short_names
from spn4cir.report.document import GENERATOR, build_report
from spn4cir.results import Result
from spn4cir.shortcuts import label_queries
from spn4cir.summary import MetricRow, metric_rows
from spn4cir.types import ImageRef

SIDE = 96  # pixels of a thumbnail's longer side


def write_report(
    folder: Path,
    results: Mapping[str, Result],
    find_image: Callable[[str], ImageRef | Path],
    differences: Mapping[str, Sequence[Difference]] | None = None,
    describe: Callable[[str], str] = str,
    shown: int = 60,
    rows: Mapping[str, Sequence[MetricRow]] | None = None,
) -> Path:
    """Write ``index.html`` of evaluations into a folder, which is made.

    Args:
        folder: where the page lies; it needs no other file.
        results: model to evaluation, of the same benchmark, by ``evaluate(..., ablate=True, top=6)``. The page names a
            model by the last folders of its path, and shows the path once.
        find_image: image id to the image.
        differences: what ``compare_results`` returned, if there are several models.
        describe: image id to a title.
        shown: at most so many of the worst queries, the most changed ones, and those whose first item is a named wrong
            answer are shown with pictures.
        rows: what ``metric_rows`` returned of each model, where it is known already.

    Raises:
        InputError: if an image does not decode, or an evaluation lacks the ablation or the first items.

    Example:
        >>> from spn4cir.report import write_report  # doctest: +SKIP
        >>> write_report(Path("report"), {"mine": result}, dataset.image)  # doctest: +SKIP
    """
    first = next(iter(results.values()))
    if any(not result.by_mode or not all(one.top for one in result.rankings.values()) for result in results.values()):
        raise InputError(f"{first.protocol}: a report needs an evaluation with ablate, and with top above 0")
    assert first.benchmark is not None
    labels = label_queries(list(results.values()))
    names = short_names(list(results))
    named = {names[model]: result for model, result in results.items()}
    content, items = query_content(named, labels, shown, describe)
    texts = first.benchmark.texts
    pictures = {number: thumbnail(find_image(item)) for item, number in items.items() if item not in texts}
    content["pictures"] = {number: picture for number, picture in pictures.items() if picture}
    content["texts"] = {number: texts[item] for item, number in items.items() if item in texts}
    found = {names[model]: rows[model] if rows else metric_rows(result) for model, result in results.items()}
    changes = {names[model]: change for model, change in (differences or {}).items()}
    path = folder / "index.html"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, build_report(named, found, labels, changes, content, list(names)))
    return path


def is_report(folder: Path) -> bool:
    """Whether a folder holds a page that ``write_report`` wrote: its head names the generator."""
    path = folder / "index.html"
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(2_000)


def thumbnail(image: ImageRef | Path) -> str:
    """A small JPEG as a data URI; empty for features, which have no picture."""
    if is_vector(image):
        return ""
    picture = open_image(image).convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()
