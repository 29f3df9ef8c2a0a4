"""The benchmark of styles: its tables and intervals, the crops, and the settings of its rows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import styles
from spn4cir.backbones import build_backbone
from spn4cir.errors import InputError

TAGS = ["sketch", "art", "text", "sketch + text"] * 30


def hits(value: float, fused: float) -> styles.Hits:
    """Every query with a number below ``value`` is found first."""
    found = {"R@1": [100.0 * (n / 120 < value) for n in range(120)], "R@5": [100.0] * 120}
    return {"composed": found, "late fusion": {"R@1": [100.0 * fused] * 120, "R@5": [0.0] * 120}, "tags": TAGS}


def test_tables() -> None:
    """Each kind of query, joint ones by both ways, the mean over images; differences in points with intervals."""
    found = {"both": [hits(0.5, 1), hits(0.5, 1)], "static": [hits(0.25, 0), hits(0.25, 0)]}
    rows, compared = styles.table(found), styles.differences(found)
    assert (
        rows["both"]["sketch"]["R@1"]["mean"] == 50 and rows["both"]["sketch + text, late fusion"]["R@1"]["mean"] == 100
    )
    assert rows["both"]["images, mean"]["R@1"] == {"mean": 50, "sd": 0, "seeds": [50, 50]}
    difference, low, high = compared["both - static"]["images, mean"]
    assert list(compared) == ["both - static"] and low < difference < high and difference == pytest.approx(25, abs=3)
    told = styles.markdown(rows, compared)
    assert "| style prompts, both | 50.0 / 100.0 |" in told and "| both - static | +" in told


def test_crops(tmp_path: Path) -> None:
    """The same each time, inside the photograph, and as many of each."""
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(
        tmp_path / "photos" / "a.png"
    )
    for folder in ("one", "two"):
        styles.make_crops(tmp_path / "photos", tmp_path / folder)
    one, two = (sorted((tmp_path / folder).iterdir()) for folder in ("one", "two"))
    assert len(one) == styles.CROPS and [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert Image.open(one[0]).size == (64, 64)
    with pytest.raises(InputError, match="holds no picture"):
        styles.make_crops(tmp_path, tmp_path / "three")


def test_compared_rows_have_equal_parameters() -> None:
    """Style prompts and those that ignore the style, with and without LayerNorms."""
    counts = {
        row: sum(
            p.numel()
            for p in build_backbone("freestyle", load_weights=False, **options).parameters()
            if p.requires_grad
        )
        for row, (_, options) in styles.ROWS.items()
    }
    assert counts["both"] == counts["static"] == counts["shallow"] + counts["deep"]
    assert counts["both+norms"] == counts["static+norms"] == counts["both"] + counts["norms"]
