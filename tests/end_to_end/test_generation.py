"""The four steps on a few real images, with the embedded captioner and matcher."""

import json
from pathlib import Path

import pytest

from data_gen.make_triplets import make_triplets
from data_gen.match_pairs import encode
from data_gen.settings import GenerateConfig
from spn4cir.datasets.emoji import Emoji
from spn4cir.datasets.generated import read_generated
from spn4cir.errors import InputError


class Few(Emoji):
    """Ninety training images whose names share words."""

    def training_images(self) -> list[str]:
        return [i for i in super().training_images() if "firefighter" in self.label(i) or "judge" in self.label(i)]


def test_images_become_triplets(tmp_path: Path) -> None:
    """Real captions and real ranks; a second run skips all; the same run elsewhere gives the same bytes."""
    dataset = Few()
    names = {i: dataset.label(i) for i in dataset.training_images()}
    for folder in ("a", "a", "b"):
        make_triplets(GenerateConfig(output=str(tmp_path / folder), window=[1, 6], pairs_per_image=2), dataset)
    first, second = ((tmp_path / folder / "triplets.json").read_bytes() for folder in "ab")
    assert first == second
    triplets, _ = read_generated(tmp_path / "a" / "triplets.json", names)
    assert len(triplets) > len(names) / 2
    rows = [json.loads(line) for line in (tmp_path / "a" / "captions.jsonl").read_text().splitlines()]
    assert sum(row["caption"] == names[row["image_id"]] for row in rows) > 0.75 * len(rows)


def test_a_window_beyond_the_images_stops_before_captioning(tmp_path: Path) -> None:
    """Captioning can take hours; what cannot work is said first."""
    with pytest.raises(InputError, match="reaches beyond"):
        make_triplets(GenerateConfig(output=str(tmp_path), window=[1, 5000]), Few())
    assert not list(tmp_path.glob("captions*"))


def test_a_matcher_without_weights_is_refused() -> None:
    """A model of random weights would rank at random."""
    with pytest.raises(InputError, match="pretrained"):
        encode(GenerateConfig(matcher="ViT-B-32"), Few(), [])
