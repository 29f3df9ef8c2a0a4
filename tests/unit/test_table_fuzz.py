"""A short run of the fuzz over tables, and that it sees what it looks for."""

from pathlib import Path

import datasets
import pytest

from benchmarks import table_fuzz


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` converts goes into a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_mutated_tables() -> None:
    """No traceback, and no lost row in strict mode; many tables are read, and many are refused."""
    result = table_fuzz.run(300, seed=7)
    assert not result["failures"]
    assert result["counts"]["rows counted"] > 30 and result["counts"]["refused, strict"] > 30


def test_a_lost_row_and_a_traceback_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a failure that names the table."""
    read = table_fuzz.read

    def lose(place: str) -> object:
        found = read(place)
        found.image_rows -= 1
        return found

    monkeypatch.setattr(table_fuzz, "read", lose)
    assert "lines hold an image" in table_fuzz.run(40, seed=7)["failures"][0]
    monkeypatch.setattr(table_fuzz, "read", lambda place: 1 / 0)
    assert len(table_fuzz.run(3, seed=7)["failures"]) == 3
