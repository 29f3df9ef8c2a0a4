"""Catalogues of icons and photographs: what is kept out of training is asked for, and nothing else."""

import csv
import sys
from pathlib import Path

import pytest
from conftest import draw_picture

from benchmarks import catalogues


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["icons", "photographs"])
def test_what_is_kept_out_is_asked_for(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    names = [f"thing{n}{way}" for n in range(12) for way in ("", "_add", "_delete")] if kind == "icons" else "abcdefgh"
    for name in names:
        draw_picture(source / f"{name}.png", name)
    monkeypatch.setattr(catalogues, "SQUARES", 2)
    monkeypatch.setattr(sys, "argv", ["catalogues", kind, str(source), "--output", str(tmp_path / "out")])
    catalogues.main()
    trained = {row["image"] for row in rows(tmp_path / "out" / "train" / "catalogue.csv")}
    everything = {row["image"]: row["caption"] for row in rows(tmp_path / "out" / "all" / "catalogue.csv")}
    queries = rows(tmp_path / "out" / "all" / "queries.csv")
    assert len(everything) == (36 if kind == "icons" else 8 * 2 * 6) and trained < everything.keys()
    assert {q["target"] for q in queries} | {q["reference"] for q in queries} == everything.keys() - trained
    assert {p.name for p in (tmp_path / "out" / "train").glob("*.*g")} == trained
    for query in queries:
        asked = f" {query['modification'].partition(' instead of ')[0]}"
        assert everything[query["target"]].endswith(asked) and not everything[query["reference"]].endswith(asked)
