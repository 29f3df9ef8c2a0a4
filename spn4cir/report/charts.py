"""Curves as inline SVG."""

from collections.abc import Mapping, Sequence
from math import ceil, log10

import numpy as np

from spn4cir.intervals import Array
from spn4cir.measures import MEASURES, Ranks
from spn4cir.report.escaping import escape

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 460, 260, 40, 34, 10
RECALL_KS = (*range(1, 11), 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)
MAP_KS = (1, 2, 3, 5, 10, 20, 50, 100)


def curve(kind: str, ranks: Ranks, ks: Sequence[int]) -> Array:
    """The mean of a measure over queries at each k, in percent; ranks (Q, P, 2)."""
    return np.array([100 * MEASURES[kind].values(ranks, k).mean() for k in ks])


def draw_curves(title: str, ks: Sequence[int], lines: Mapping[str, Array]) -> str:
    """A figure of one curve for each name, over k on a logarithmic axis, in percent."""
    right, top = WIDTH - EDGE, EDGE
    span = log10(ks[-1]) or 1.0
    highest: int = 20 * max(1, ceil(max(values.max() for values in lines.values()) / 20))

    def x(k: float) -> float:
        return round(LEFT + (right - LEFT) * log10(k) / span, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - top) * value / highest, 1)

    parts = []
    for value in range(0, highest + 1, 20 if highest > 40 else 10):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value}</text>')
    for k in (k for k in (1, 2, 5, 10, 20, 50, 100) if k <= ks[-1]):
        parts.append(f'<text x="{x(k)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{k}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 3}" text-anchor="middle">k</text>')
    for number, (name, values) in enumerate(lines.items()):
        points = " ".join(f"{x(k)},{y(value)}" for k, value in zip(ks, values.tolist(), strict=True))
        label = escape(f"{name}: " + ", ".join(f"{value:.1f} at {k}" for k, value in zip(ks, values, strict=True)))
        parts.append(f'<polyline class="line c{number % 8}" points="{points}"><title>{label}</title></polyline>')
    swatch = '<svg viewBox="0 0 30 4" aria-hidden="true"><line class="line c{}" x1="0" x2="30" y1="2" y2="2"/></svg>'
    keys = "".join(f"<li>{swatch.format(n % 8)}{escape(name)}</li>" for n, name in enumerate(lines))
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure><figcaption>{escape(title)}</figcaption>{svg}<ul class="key">{keys}</ul></figure>'
