"""The zero-shot benchmark: no target leaks through another maker's pictures, and nothing annotated is read."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import zeroshot
from benchmarks.claims import EVERY, PATIENCE, STEPS
from spn4cir.data import load_data
from spn4cir.datasets.emoji import Emoji
from spn4cir.errors import InputError


@pytest.mark.parametrize(("name", "found"), [
    ("1f600.png", "1f600"), ("deep/er/1F600.png", "1f600"), ("emoji_u0023_20e3.png", "23-20e3"),
    ("0023-fe0f-20e3.png", "23-20e3"), ("1f468-200d-2695-fe0f.png", "1f468-200d-2695"), ("a9", "a9"),
])  # fmt: skip
def test_code_points(name: str, found: str) -> None:
    assert zeroshot.code_points(name) == found


@pytest.mark.parametrize("name", ["grinning.png", "1f600 (1).png", "x/.png", "1f600-.png"])
def test_names_without_code_points(name: str) -> None:
    with pytest.raises(InputError, match="not named by its code points"):
        zeroshot.code_points(name)


def test_pictures_of_targets_are_left_out() -> None:
    """All targets of val and of test, and no other picture, whatever the spelling."""
    dataset = Emoji()
    targets = {q.targets[0] for split in ("val", "test") for q in dataset.benchmark(split).queries}
    training = dataset.training_images()
    names = [f"emoji_u{i.replace('-', '_')}.png" for i in (*targets, *training)] + ["1faff.png"]
    kept, left_out = zeroshot.split_pictures(names, dataset)
    assert len(left_out) == len(targets) == 664
    assert len(kept) == len(training) + 1 and "1faff.png" in kept


def test_nothing_annotated_is_read_for_generated_triplets(tmp_path: Path) -> None:
    """Not by matching, not by training, not for selection; the protocol is that of the claims."""
    assert Emoji().triplets() and not zeroshot.Unannotated().triplets()
    pairs = itertools.pairwise(Emoji().training_images()[:400])
    made = [{"candidate": one, "target": other, "captions": ["so"]} for one, other in pairs]
    file = tmp_path / "triplets.json"
    file.write_text(json.dumps(made))
    setting = zeroshot.ZeroShot(3, file, tmp_path)
    first, second = setting.first("stage1", False), setting.second(2, "negatives", False, "stage1")
    for config in (first, second):
        assert (config.max_annotated, config.generated, config.seed) == (0, str(file), 3)
        assert load_data(config, lambda _: None).selection.name.startswith("emoji/holdout-generated-")
        assert config.eval_every == round(EVERY / (len(load_data(config, lambda _: None).triplets) // 128))
    assert (first.patience, first.max_steps, first.schedule) == (PATIENCE, None, "constant")
    assert (second.patience, second.max_steps, second.schedule) == (None, STEPS, "cosine")
    assert second.init == str(tmp_path / "seed3" / "stage1")
