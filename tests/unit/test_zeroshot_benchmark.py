"""The zero-shot benchmark: no target leaks through another maker's pictures, and values of queries give the metrics."""

import numpy as np
import pytest

from benchmarks import zeroshot
from spn4cir.datasets.emoji import Emoji
from spn4cir.errors import InputError
from spn4cir.results import Ranking, Result, compute_metrics


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


def test_nothing_annotated_is_read_for_generated_triplets() -> None:
    assert Emoji().triplets() and not zeroshot.Unannotated().triplets()
    for stage in (1, 2):
        config = zeroshot.settings(stage, 3, None, generated=zeroshot.RESULT)
        assert (config.max_annotated, config.eval_every, config.max_steps, config.seed) == (0, 0, 120, 3)
        few = zeroshot.settings(stage, 3, 7, annotated=100)
        assert (few.max_annotated, few.generated, few.max_steps, few.batch_size) == (100, None, 7, 100)


def test_values_of_queries() -> None:
    """Their means are the metrics; ``query_values`` asserts it too."""
    benchmark = Emoji().benchmark("val")
    chance = np.random.default_rng(0)
    first = {over: chance.integers(1, 30, len(benchmark.queries)) for over in ("gallery", "subset")}
    ranks = {over: np.stack([one, one + chance.integers(0, 2, len(one))], 1)[:, None] for over, one in first.items()}
    metrics, tags = compute_metrics(benchmark, ranks)
    rankings = {over: Ranking(one) for over, one in ranks.items()}
    found = zeroshot.query_values(
        Result("emoji/val", metrics, tags, {}, len(benchmark.queries), "", queries=benchmark.queries, rankings=rankings)
    )
    assert {name: values.mean() for name, values in found.items()} == pytest.approx(
        {name: metrics[name] for name in zeroshot.METRICS}
    )


def test_summary_compares_pairs() -> None:
    """Rows that are not there are passed over; a row without seeds is compared with each seed of the other."""
    names = [f"{split} {metric}" for split in ("val", "test") for metric in zeroshot.METRICS]
    none, one, two = (dict.fromkeys(names, values) for values in ([0.0, 0.0], [100.0, 0.0], [100.0, 100.0]))
    summary = zeroshot.summarise({"none": [none], "generated 1": [one, two]})
    assert summary["rows"]["generated 1"]["test R@1"] == {"mean": 75.0, "sd": 35.36, "seeds": [50.0, 100.0]}
    assert set(summary["differences"]) == {"generated 1 - none"}
    assert summary["differences"]["generated 1 - none"]["val Rs@1"] == {"difference": 75.0, "low": 0.0, "high": 100.0}
    told = zeroshot.markdown(summary)
    assert "| generated triplets, stage 1 | 75.0 ± 35.4 |" in told
    assert "| generated 1 - none | +75.0 [+0.0, +100.0] |" in told
