"""Compare evaluations of several models on the same queries: which differences are more than noise."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from spn4cir.errors import InputError
from spn4cir.intervals import holm
from spn4cir.query_values import is_lower_better
from spn4cir.results import Result

LEVEL = 0.05  # of the adjusted p-values


class Difference(NamedTuple):
    """One metric of two models.

    Args:
        metric: its name.
        base, value: percentages of the first and of the other model.
        difference: the other minus the first, in points.
        low, high: its 95 % interval, by resampling queries; of a mean over tags, within each tag.
        p: of the paired test (``spn4cir.intervals.paired_test``).
        adjusted: p after Holm's correction for all metrics of all compared models.
        verdict: ``better`` or ``worse`` than the first model where the adjusted p is below 0.05; else ``noise``.
    """

    metric: str
    base: float
    value: float
    difference: float
    low: float
    high: float
    p: float
    adjusted: float
    verdict: str


def compare_results(base: Result, others: Mapping[str, Result]) -> dict[str, list[Difference]]:
    """Compare each other result with the first one, metric by metric.

    Args:
        base: an evaluation.
        others: model to evaluation, of the same benchmark.

    Returns:
        Model to differences, in the order of the metrics.

    Raises:
        InputError: if a result is of other data, or was read from a file.
    """
    rows: list[tuple[str, Difference]] = []
    for model, other in others.items():
        if other.data != base.data:
            raise InputError(f"{model}: evaluated on other data than the first model ({other.data}, {base.data})")
        for first, second in zip(base.samples(), other.samples(), strict=True):
            change = second._replace(values=second.values - first.values)
            means = zip(first.means(), second.means(), change.means(), change.p_values(), strict=True)
            intervals = change.intervals()
            for name, (before, after, moved, p) in zip(change.names, means, strict=True):
                low, high = intervals[name]
                first_value, value, points = (float(100 * mean) for mean in (before, after, moved))
                row = Difference(name, first_value, value, points, low, high, float(p), 1.0, "noise")
                rows.append((model, row))
    found: dict[str, list[Difference]] = {model: [] for model in others}
    for (model, row), adjusted in zip(rows, holm([row.p for _, row in rows]), strict=True):
        found[model].append(row._replace(adjusted=adjusted, verdict=_verdict(row, adjusted)))
    return found


def _verdict(row: Difference, adjusted: float) -> str:
    if adjusted >= LEVEL:
        return "noise"
    return "better" if (row.difference > 0) != is_lower_better(row.metric) else "worse"


def format_p(value: float) -> str:
    """A p-value with three places; a smaller one as ``<0.001``."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def comparison_table(model: str, differences: Sequence[Difference]) -> str:
    """Differences of one model as text for the terminal."""
    width = max(len("metric"), *(len(row.metric) for row in differences))
    head = f"{'metric':<{width}}   first   other  difference [95 % interval]       p  p (Holm)"
    lines = [f"compared with {model}", head]
    for row in differences:
        interval = f"{row.difference:+7.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        numbers = f"{row.base:8.2f}{row.value:8.2f}  {interval:<27}{format_p(row.p):>7}{format_p(row.adjusted):>10}"
        lines.append(f"{row.metric:<{width}}{numbers}  {row.verdict}")
    return "\n".join(lines)
