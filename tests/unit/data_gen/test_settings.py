"""Settings of the four steps."""

from pathlib import Path
from typing import Any

import pytest

from data_gen.settings import PRESETS, GenerateConfig
from spn4cir.config import parse
from spn4cir.errors import InputError


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("triplets_*.yaml")), ids=lambda p: p.stem)
def test_presets_parse(preset: Path) -> None:
    """Each preset of a dataset is valid, and is of the dataset that its name says."""
    assert parse(GenerateConfig, preset, []).dataset == preset.stem.removeprefix("triplets_")


@pytest.mark.parametrize(("key", "value"), [
    ("window", [0, 5]), ("window", [0.5, 3]), ("window", [-0.1, 0.5]), ("window", [5, 5]),
    ("window", [5, 1]), ("window", [1]), ("window", [1, 2, 3]), ("words", 0), ("max_new_tokens", 0), ("templates", []),
    ("caption_batch_size", 0), ("pairs_per_image", -1), ("pairs", 0), ("max_caption_count", 0), ("retries", -1),
    ("requests", 0), ("requests_per_minute", 0), ("timeout", 0), ("max_tokens", 0),
])  # fmt: skip
def test_values_that_cannot_be_meant(key: str, value: Any) -> None:
    """Each is refused with its name."""
    with pytest.raises(InputError, match=key):
        GenerateConfig(**{key: value})


@pytest.mark.parametrize("where", ["file", "option"])
def test_unknown_templates(tmp_path: Path, where: str) -> None:
    """A template that is none is refused before anything is captioned, from a file too."""
    path = tmp_path / "c.yaml"
    path.write_text("templates: [differnce]" if where == "file" else "")
    with pytest.raises(InputError, match="templates"):
        parse(GenerateConfig, path, [] if where == "file" else ["--templates", "[differnce]"])


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files go below ``output``, which is made, or below the dataset's folder."""
    config = GenerateConfig(output=str(tmp_path / "new" / "deep"))
    assert config.file("x.jsonl") == tmp_path / "new" / "deep" / "x.jsonl"
    assert (tmp_path / "new" / "deep").is_dir()
    assert GenerateConfig(dataset="d").folder == Path("data/d/generated")
