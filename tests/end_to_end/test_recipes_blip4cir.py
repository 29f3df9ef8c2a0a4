"""Recipes of BLIP4CIR: the constants and figures that are published."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).parent.parent.parent / "recipes"
PUBLISHED: dict[str, dict[str, float]] = {  # the SPN paper, tables 2 and 3, rows BLIP4CIR and BLIP4CIR +SPN
    "fashioniq_blip4cir_stage1": {"R@10": 46.31, "R@50": 68.93, "Rmean": 57.62},
    "fashioniq_blip4cir_stage2": {},
    "fashioniq_blip4cir_stage2_generated": {"R@10": 46.98, "R@50": 69.63, "Rmean": 58.30},
    "cirr_blip4cir_stage1": {
        "R@1": 44.77, "R@5": 76.55, "R@10": 86.41, "R@50": 97.18,
        "Rs@1": 74.99, "Rs@2": 89.90, "Rs@3": 95.59, "Rmean": 75.77,
    },
    "cirr_blip4cir_stage2": {},
    "cirr_blip4cir_stage2_generated": {
        "R@1": 46.43, "R@5": 77.64, "R@10": 87.01, "R@50": 97.06,
        "Rs@1": 75.74, "Rs@2": 90.07, "Rs@3": 95.83, "Rmean": 76.69,
    },
}  # fmt: skip
PROTOCOL = {"fashioniq": ("fashioniq/original", "fashioniq/original"), "cirr": ("cirr/val", "cirr/test1")}
GENERATED = {"fashioniq": "captions/cap.extend_blip.train.json", "cirr": "captions/cap.rc2.train.extend_blip.json"}
COMMON = {
    "backbone": "blip4cir", "candidates": "named", "learn_temperature": True, "mixed_precision": "fp16",
    "eval_batch_size": 32, "workers": 4,
}  # fmt: skip
STAGE_1 = COMMON | {
    "backbone_options": {"model": "Salesforce/blip-itm-base-coco"}, "batch_size": 512, "lr": 2e-5,
    "weight_decay": 0.05, "eps": 1e-8, "temperature": 0.07, "dropout": True, "schedule": "cosine",
}  # fmt: skip
STAGE_2 = COMMON | {
    "batch_size": 128, "weight_decay": 0.01, "bank_dtype": "float16", "bank_references": "stored",
}  # fmt: skip
OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("fashioniq", "stage1"): STAGE_1 | {"epochs": 20, "schedule_options": {"epochs": 20}},
    ("cirr", "stage1"): STAGE_1 | {"epochs": 40, "schedule_options": {"epochs": 10}},
    ("fashioniq", "stage2"): STAGE_2 | {"epochs": 10, "lr": 5e-6, "temperature": 0.03},
    ("cirr", "stage2"): STAGE_2 | {"epochs": 3, "lr": 6e-6, "temperature": 0.02},
}


def test_all_rows_are_there() -> None:
    """Both stages of both datasets, stage 2 with and without generated positives, and the embedded dataset's."""
    found = {path.stem for path in RECIPES.glob("*_blip4cir_*.yaml")}
    assert found == {*PUBLISHED, "emoji_blip4cir_stage1", "emoji_blip4cir_stage2"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_one(name: str) -> None:
    """Every setting that the file makes; the figures of its header and no others, beside the id of their protocol."""
    path = RECIPES / f"{name}.yaml"
    dataset, _, stage, *generated = name.split("_")
    trained, published = PROTOCOL[dataset]
    wanted = OWN[dataset, stage] | {"dataset": dataset, "protocol": trained}
    wanted |= {"generated": GENERATED[dataset]} if generated else {}
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == wanted
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    found = {metric: float(value) for metric, value in re.findall(r"(Rs?@\d+|Rmean) (\d+\.\d+)", text)}
    assert found == PUBLISHED[name] and trained in text
    assert (f"protocol {published}:" in text) == bool(found) != ("No figure of this row is published" in text)
    assert "Unlike theirs" in text
