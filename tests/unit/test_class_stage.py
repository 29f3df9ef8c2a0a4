"""Stage ``classes``: what it refuses, how batches are balanced, and where its settings go."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Toy
from labelled_files import PATHS, draw_classes, write_rows

from spn4cir.batches import BalancedSampler, TripletSampler
from spn4cir.class_objective import build_margin
from spn4cir.class_stage import check_classes
from spn4cir.config import STAGE_NAMES, TrainConfig, parse, recipes_folder
from spn4cir.config_groups import BankConfig, ClassesConfig, ComputeConfig, NegativesConfig
from spn4cir.errors import InputError
from spn4cir.margins import MARGINS, AdaCos, ArcFace, DynamicArcFace
from spn4cir.stages import CHECKS, STAGES
from spn4cir.train import train

GROUPS = ["a"] * 50 + ["b"] * 7 + ["c"] * 20


def counts(batch: list[int]) -> Counter[str]:
    return Counter(GROUPS[n] for n in batch)


def test_batches_hold_as_many_of_each_source() -> None:
    """Ten places for three sources; over epochs each example of a source comes as often as any other, or once more."""
    sampler = BalancedSampler(GROUPS, 10, seed=1)
    assert len(sampler) == len(TripletSampler(range(len(GROUPS)), [], 10, None, 1)) == 7
    seen: Counter[int] = Counter()
    for epoch in range(5):
        batches = sampler.batches(epoch)
        assert len(batches) == 7
        for batch in batches:
            assert sorted(counts(batch).values()) == [3, 3, 4]
            seen.update(batch)
    for name in "abc":
        times = [seen[n] for n, group in enumerate(GROUPS) if group == name]
        assert max(times) - min(times) <= 1
    assert sampler.batches(0) == BalancedSampler(GROUPS, 10, seed=1).batches(0)
    assert sampler.batches(0) != sampler.batches(1)
    assert sampler.batches(0) != BalancedSampler(GROUPS, 10, seed=2).batches(0)


def test_processes_share_a_balanced_batch() -> None:
    """Two processes have half of each batch, and together the whole of it."""
    whole = list(BalancedSampler(GROUPS, 10, 1))
    halves = [list(BalancedSampler(GROUPS, 10, 1, (rank, 2))) for rank in (0, 1)]
    assert [one + two for one, two in zip(*halves, strict=True)] == whole


def test_more_sources_than_places() -> None:
    with pytest.raises(InputError, match="a batch of 2 has no room for 3 sources"):
        BalancedSampler(GROUPS, 2, 0)


def test_margins_get_what_the_data_decides() -> None:
    """Scale from the temperature, classes and their sizes from the data, the rest from options."""
    head = build_margin("arcface", {"margin": 0.3}, 0.05, [3, 4])
    assert isinstance(head, ArcFace) and float(head.scale) == pytest.approx(20) and head.margin == 0.3
    dynamic = build_margin("dynamic", {"high": 0.4}, 0.05, [3, 4, 9])
    assert isinstance(dynamic, DynamicArcFace) and float(dynamic.margins[0]) == pytest.approx(0.4)
    ada = build_margin("adacos", {}, 0.05, [1] * 11)
    assert isinstance(ada, AdaCos) and float(ada.scale) == pytest.approx(2**0.5 * torch.tensor(10.0).log().item())


@pytest.mark.parametrize(("name", "options", "match"), [
    ("softmax", {}, "classes.margin cannot be 'softmax'; known: arcface"),
    ("arcface", {"scale": 3}, "arcface has no option 'scale'; known: margin"),
    ("dynamic", {"counts": [1]}, "dynamic has no option 'counts'; known: low, high"),
    ("adacos", {"margin": 0.1}, "adacos has no option 'margin'; known: none"),
    ("arcface", {"margin": -1}, "a margin from 0 to π"),
])  # fmt: skip
def test_margins_that_do_not_exist(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        build_margin(name, options, 0.05, [2, 3, 4])


@pytest.mark.parametrize("changes", [
    {"negatives": NegativesConfig(max_similarity=0.9)}, {"bank": BankConfig(limit=5)}, {"holdout": 0.1},
    {"learn_temperature": True}, {"generated": "auto"}, {"mixed_precision": "fp16"}, {"terms": {"correlation": 1.0}},
])  # fmt: skip
def test_settings_of_other_stages(changes: dict[str, Any]) -> None:
    """Refused, as they would change nothing; fewer digits in the store do."""
    with pytest.raises(InputError):
        check_classes(replace(TrainConfig(), **changes))
    check_classes(TrainConfig(bank=BankConfig(dtype="float16"), classes=ClassesConfig("cosface")))


def test_data_without_labels(toy: Toy, tmp_path: Path) -> None:
    config = TrainConfig(dataset="toy", data_root=str(toy.folder), backbone="embedding", output=str(tmp_path / "run"))
    with pytest.raises(InputError, match="stage classes needs images with labels"):
        train(config, "classes")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"neck": "pool"}, {"neck": "none"}])
def test_nothing_to_train(options: dict[str, Any], tmp_path: Path) -> None:
    """A neck without weights, and no block of the tower."""
    config = TrainConfig(
        dataset="labelled", backbone="embedding", backbone_options=options, output=str(tmp_path / "run")
    )
    with pytest.raises(InputError, match="with a neck or blocks"):
        train(config, "classes")


def test_another_backbone(tmp_path: Path) -> None:
    config = TrainConfig(dataset="labelled", backbone="clip4cir", output=str(tmp_path / "run"))
    with pytest.raises(InputError, match="stage classes trains backbone embedding"):
        train(config, "classes")


@pytest.mark.parametrize("name", MARGINS)
def test_each_margin_by_its_name(name: str) -> None:
    """The recipe's settings and another margin make no sense only where they name options of one."""
    config = parse(TrainConfig, recipes_folder() / "labelled" / "embedding_classes.yaml", ["--classes.margin", name])
    check_classes(config)
    head = build_margin(config.classes.margin, config.classes.options, 1 / 30, [4, 5, 6])
    usual = {"cosface": 0.35, "adaface": 0.4, "adacos": 0.0}.get(name, 0.5)
    assert head.margin == usual


@pytest.mark.parametrize(("name", "parts"), [("arcface", 2), ("dynamic", 2), ("adacos", 1), ("adaface", 1)])
def test_what_follows_a_batch_has_whole_batches(name: str, parts: int) -> None:
    for accumulate in (1, 2):
        config = TrainConfig(classes=ClassesConfig(name), compute=ComputeConfig(accumulate=accumulate))
        if accumulate <= parts:
            check_classes(config)
        else:
            with pytest.raises(InputError, match=f"{name} follows the images of a whole batch"):
                check_classes(config)


def test_an_unknown_margin_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"classes\.margin cannot be 'arc'"):
        check_classes(TrainConfig(classes=ClassesConfig("arc")))


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    rows = [{"img_path": p, "label": label, "split": "train" if label == "c0" else "val"} for p, label in PATHS]
    draw_classes(tmp_path)
    place = write_rows(tmp_path / "one.csv", rows)
    config = TrainConfig(dataset="labelled", data_root=place, backbone="embedding", output=str(tmp_path / "run"))
    with pytest.raises(InputError, match="needs two classes"):
        train(config, "classes")


def test_names_of_stages() -> None:
    """Commands know them without torch."""
    assert set(STAGES) == set(CHECKS) == set(STAGE_NAMES)
    assert len(MARGINS) == 7
