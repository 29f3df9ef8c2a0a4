"""The plan for a million images is computed from measured results, and the documentation shows what was computed."""

import json
from pathlib import Path

import pytest

from benchmarks import generation
from benchmarks.generation import plan

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("images", [20_000, 1_000_000])
def test_the_documentation_shows_what_was_measured(images: int) -> None:
    """Each table stands in docs/generation.md as it follows from the files in benchmarks/results."""
    assert plan(images) in (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


def test_costs_follow_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the speed of the captioner is twice its time; matching is quadratic, the other steps are linear."""
    for path in generation.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    slow = json.loads((tmp_path / "captioning_device.json").read_text())
    for row in slow["by batch"].values():
        row["images a second"] /= 2
    (tmp_path / "captioning_device.json").write_text(json.dumps(slow))
    before = hours(plan(1_000_000)), hours(plan(2_000_000))
    monkeypatch.setattr(generation, "RESULTS", tmp_path)
    assert hours(plan(1_000_000))["caption"] == pytest.approx(2 * before[0]["caption"], rel=0.02)
    assert before[1]["match"] == pytest.approx(4 * before[0]["match"], rel=0.05)
    assert before[1]["encode"] == pytest.approx(2 * before[0]["encode"], rel=0.08)  # shown with two digits


def hours(table: str) -> dict[str, float]:
    """Step → its time on the first machine."""
    units = {"s": 1 / 3600, "min": 1 / 60, "h": 1.0, "days": 24.0}
    found: dict[str, float] = {}
    for line in table.splitlines()[2:]:
        step, _, time = (cell.strip() for cell in line.split("|")[1:4])
        value, unit = time.split()
        if step:
            found[step.split(",")[0]] = float(value) * units[unit]
    return found
