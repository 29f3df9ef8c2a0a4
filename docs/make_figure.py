"""Draw docs/two-stages.svg: what the two training stages share, and where their candidates come from.

examples:
  python docs/make_figure.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

OUT = Path(__file__).parent / "two-stages.svg"
WIDTH, HEIGHT = 106, 73  # in tenths of an inch
INK, PALE, LINE = "#24292f", "#f6f8fa", "#8c959f"
TRAINED, FROZEN, POSITIVE = ("#fff1e5", "#bc4c00"), ("#ddf4ff", "#0969da"), "#1a7f37"
COLUMNS = (8.75, 25.0, 41.25)  # centres within a panel
BOX = 14.5


def box(
    ax: Axes, x: float, y: float, text: str, colors: tuple[str, str], width: float = BOX, bold: bool = False
) -> None:
    """A box with centred text; (x, y) is its centre, ``colors`` are its face and its edge."""
    shape = FancyBboxPatch(
        (x - width / 2, y - 2.6),
        width,
        5.2,
        boxstyle="round,pad=0,rounding_size=0.8",
        facecolor=colors[0],
        edgecolor=colors[1],
        linewidth=1.3,
    )
    ax.add_patch(shape)
    weight = "bold" if bold else "normal"
    ax.text(x, y, text, ha="center", va="center", fontsize=10.5, color=INK, weight=weight, linespacing=1.25)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from one point to another."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=LINE, linewidth=1.3, **style))


def scores(ax: Axes, left: float, width: float, columns: int, positives: tuple[int, ...]) -> None:
    """A grid of scores: a row is a query, a column is a candidate, the filled cell is the positive."""
    side, top = 2.2, 17.6
    left += (width - side * columns) / 2
    for row, positive in enumerate(positives):
        for column in range(columns):
            face = POSITIVE if column == positive else PALE
            corner = (left + side * column, top - side * (row + 1))
            ax.add_patch(Rectangle(corner, side, side, facecolor=face, edgecolor=LINE, linewidth=0.8))


def panel(ax: Axes, left: float, title: str, subtitle: str) -> tuple[float, float]:
    """Frame and title of a stage, with what both stages share; returns the centres of its image columns."""
    frame = FancyBboxPatch(
        (left, 6.5), 50, 65, boxstyle="round,pad=0,rounding_size=1.2", facecolor="white", edgecolor=LINE
    )
    ax.add_patch(frame)
    ax.text(left + 25, 68.3, title, ha="center", va="center", fontsize=13, color=INK, weight="bold")
    ax.text(left + 25, 64.8, subtitle, ha="center", va="center", fontsize=10.5, color=INK)
    a, b, c = (left + x for x in COLUMNS)
    plain = (PALE, LINE)
    box(ax, a, 59, "modification\ntexts (B)", plain)
    arrow(ax, (a, 56.4), (a, 36.6))
    box(ax, (a + b) / 2, 34, "compose", TRAINED, width=BOX + b - a, bold=True)
    arrow(ax, ((a + b) / 2, 31.4), ((a + b) / 2, 27.6))
    box(ax, (a + b) / 2, 25, "queries (B, E)", plain, width=BOX + b - a)
    return b, c


def draw() -> None:
    """Write the figure."""
    fig = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10), facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.set_axis_off()
    plain = (PALE, LINE)

    b, c = panel(ax, 1.5, "Stage 1", "both sides train; candidates are the batch's targets")
    box(ax, b, 59, "reference\nimages (B)", plain)
    box(ax, c, 59, "target\nimages (B)", plain)
    box(ax, (b + c) / 2, 50.5, "encode_image", TRAINED, width=BOX + c - b, bold=True)
    box(ax, b, 42, "reference\n(B, L, D)", plain)
    box(ax, c, 42, "target\n(B, K, E)", plain)
    box(ax, c, 25, "candidates:\nB targets", plain)
    for x in (b, c):
        arrow(ax, (x, 56.4), (x, 53.1))
        arrow(ax, (x, 47.9), (x, 44.6))
    arrow(ax, (b, 39.4), (b, 36.6))
    arrow(ax, (c, 39.4), (c, 27.6))
    ax.text(
        26.5, 20.0, "scores (B, B): few negatives for each query", ha="center", va="center", fontsize=10.5, color=INK
    )
    scores(ax, 1.5, 50, 4, (0, 1, 2, 3))

    b, c = panel(ax, 54.5, "Stage 2", "the query side trains; candidates are the whole bank")
    wide = BOX + c - b
    box(ax, (b + c) / 2, 59, "training images\n(N with distinct pixels)", plain, width=wide)
    arrow(ax, ((b + c) / 2, 56.4), ((b + c) / 2, 53.1))
    box(ax, (b + c) / 2, 50.5, "encode_image, once  ❄", FROZEN, width=wide, bold=True)
    arrow(ax, (b, 47.9), (b, 44.6))
    arrow(ax, (c, 47.9), (c, 44.6))
    box(ax, b, 42, "bank: reference\n(N, L, D)", FROZEN)
    box(ax, c, 42, "bank: target\n(N, K, E)", FROZEN)
    arrow(ax, (b, 39.4), (b, 36.6))
    ax.text(b + 0.9, 38.0, "B rows", ha="left", va="center", fontsize=9.5, color=INK)
    arrow(ax, (c, 39.4), (c, 27.6))
    ax.text(c + 0.9, 34, "all N\nrows", ha="left", va="center", fontsize=9.5, color=INK)
    box(ax, c, 25, "candidates:\nN rows", plain)
    ax.text(
        79.5, 20.0, "scores (B, N): many negatives for each query", ha="center", va="center", fontsize=10.5, color=INK
    )
    scores(ax, 54.5, 50, 20, (3, 16, 8, 11))

    for x, face, edge, text in (
        (10, *TRAINED, "trained"),
        (26, *FROZEN, "frozen ❄"),
        (41, POSITIVE, POSITIVE, "positive"),
        (57, PALE, LINE, "negative"),
    ):
        ax.add_patch(Rectangle((x, 2.1), 2.2, 2.2, facecolor=face, edgecolor=edge, linewidth=1.2))
        ax.text(x + 3.2, 3.2, text, ha="left", va="center", fontsize=10.5, color=INK)
    ax.text(73, 3.2, "loss of both: info_nce", ha="left", va="center", fontsize=10.5, color=INK)
    fig.savefig(OUT, metadata={"Date": None, "Creator": None})
    plt.close(fig)


if __name__ == "__main__":
    with plt.rc_context({"svg.hashsalt": "two-stages", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        draw()
