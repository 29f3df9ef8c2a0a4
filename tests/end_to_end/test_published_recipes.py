"""Recipes of the published datasets: what they set and say is what is published, written down here a second time."""

import dataclasses
import functools
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_backbones import COMPOSED

from spn4cir.backbones import BACKBONES
from spn4cir.config import TrainConfig, parse
from spn4cir.config_groups import AdamWConfig, BankConfig, ComputeConfig
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.datasets.cirr import CIRR
from spn4cir.datasets.fashioniq import FashionIQ
from spn4cir.results import primary_names

RECIPES = Path(__file__).parents[2] / "recipes"
FASHIONIQ = {  # SPN paper, table 2, means over the categories: R@10, R@50, Rmean; the row itself, then +SPN
    "tgcir": ("39.81 63.06 51.44", "41.43 64.50 52.97"),
    "clip4cir": ("42.52 65.60 54.06", "44.48 66.88 55.68"),
    "blip4cir": ("46.31 68.93 57.62", "46.98 69.63 58.30"),
    "sprc": ("54.92 74.97 64.85", "56.37 76.45 66.41"),
}
CIRR_TEST = {  # SPN paper, table 3: R@1, R@5, R@10, R@50, Rs@1, Rs@2, Rs@3, Rmean; the row itself, then +SPN
    "tgcir": ("45.23 78.34 87.13 97.30 72.84 89.25 95.13 75.59", "47.28 79.13 87.98 97.54 75.40 89.78 95.21 77.27"),
    "clip4cir": ("42.80 75.88 86.26 97.64 70.00 87.45 94.99 72.94", "45.33 78.07 87.61 98.17 73.93 89.28 95.61 76.00"),
    "blip4cir": ("44.77 76.55 86.41 97.18 74.99 89.90 95.59 75.77", "46.43 77.64 87.01 97.06 75.74 90.07 95.83 76.69"),
    "sprc": ("51.96 82.12 89.74 97.69 80.65 92.31 96.60 81.39", "55.06 83.83 90.87 98.29 81.54 92.65 97.04 82.69"),
}
SEVEN = ["R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"]
METRICS = {"fashioniq": ["R@10", "R@50", "Rmean"], "cirr": [*SEVEN, "Rmean"]}
ROW = {"tgcir": "TG-CIR", "clip4cir": "CLIP4CIR", "blip4cir": "BLIP4CIR", "sprc": "SPRC"}
GENERATED = {"fashioniq": "captions/cap.extend_{}.train.json", "cirr": "captions/cap.rc2.train.extend_{}.json"}
GENERATOR = {"tgcir": "tgcir", "clip4cir": "clip", "blip4cir": "blip", "sprc": "blip2"}
STEPS = {  # of stage 2 with generated positives: on FashionIQ, and at most on CIRR
    "clip4cir": ("About 355", "At most 528"), "tgcir": ("About 590", "At most 880"),
    "blip4cir": ("About 1,640", "At most 1,056"), "sprc": ("About 2,250", "At most 4,230"),
}  # fmt: skip

COMMON: dict[str, Any] = {
    "bank": BankConfig(images="named"), "max_annotated": None, "generated": None, "generated_share": None, "init": None,
    "max_steps": None, "warmup_steps": 0, "holdout": None, "eval_every": 1, "seed": 42, "mixed_precision": "fp16",
    "workers": 4, "schedule": "constant", "schedule_options": {}, "lr_scale": {}, "backbone_options": {},
    "weight_decay": 0.01, "adamw": AdamWConfig(), "learn_temperature": False, "dropout": False,
}  # fmt: skip
HALF = {"bank": BankConfig(images="named", dtype="float16")}  # of the references that do not fit into memory
STAGE_1: dict[str, dict[str, Any]] = {
    "clip4cir": {
        "backbone_options": {"model": "RN50x4-quickgelu", "pretrained": "openai"},
        "batch_size": 128, "epochs": 100, "lr": 2e-6, "temperature": 0.01,
    },
    "tgcir": {  # the scale of the logits, 10, is learned as temperature 0.1: d(1/t) = -dt / t², hence its own pace
        "batch_size": 64, "epochs": 30, "lr": 1e-4, "lr_scale": {"clip": 0.1, "temperature": 0.01},
        "schedule": "multistep", "schedule_options": {"epochs": [4, 9], "factor": 0.1},  # before epochs 5 and 10
        "adamw": AdamWConfig(eps=1e-8),
        "temperature": 0.1, "learn_temperature": True,
    },
    "blip4cir": {  # the epsilon is that of torch's AdamW
        "backbone_options": {"model": "Salesforce/blip-itm-base-coco"},  # --init takes what theirs starts from
        "batch_size": 512, "lr": 2e-5, "weight_decay": 0.05, "adamw": AdamWConfig(eps=1e-8), "schedule": "cosine",
        "temperature": None, "learn_temperature": True, "dropout": True,
    },
    "sprc": {
        "batch_size": 128, "weight_decay": 0.05, "adamw": AdamWConfig(beta2=0.98), "schedule": "onecycle",
        "temperature": None, "learn_temperature": True, "dropout": True,
    },
}  # fmt: skip
CLIP_B16 = {"model": "ViT-B-16-quickgelu", "pretrained": "openai", "ortho": 0.1}
BLIP2 = {"model": "Salesforce/blip2-itm-vit-g", "tokenizer": "bert-base-uncased"}
STAGE_1_OF: dict[tuple[str, str], dict[str, Any]] = {
    ("fashioniq", "clip4cir"): {},
    ("cirr", "clip4cir"): {},
    ("fashioniq", "tgcir"): {"backbone_options": CLIP_B16 | {"ckd": 10.0, "kl": 0.5, "kl_temperature": 0.1}},
    ("cirr", "tgcir"): {"backbone_options": CLIP_B16 | {"ckd": 1.0, "kl": 0.1, "kl_temperature": 0.05}},
    ("fashioniq", "blip4cir"): {"epochs": 20, "schedule_options": {"epochs": 20}},
    ("cirr", "blip4cir"): {"epochs": 40, "schedule_options": {"epochs": 10}},
    ("fashioniq", "sprc"): {
        "backbone_options": BLIP2 | {"rtc": 1.0, "align": 1.0}, "epochs": 30, "lr": 2e-5,
        "schedule_options": {"epochs": 30, "warmup": 1.5 / 30, "start": 1 / 100},
    },
    ("cirr", "sprc"): {  # 1/25 is where torch's OneCycleLR starts if it is not told
        "backbone_options": BLIP2 | {"rtc": 0.4, "align": 0.4}, "epochs": 50, "lr": 1e-5,
        "schedule_options": {"epochs": 80, "warmup": 1 / 50, "start": 1 / 25},
    },
}  # fmt: skip
SECOND_SPRC = {
    "weight_decay": 0.05,
    "adamw": AdamWConfig(beta2=0.98),
    "learn_temperature": True,
    "dropout": True,
    **HALF,
}
SECOND_BLIP = {"learn_temperature": True, **HALF}
STAGE_2_OF: dict[tuple[str, str], dict[str, Any]] = {
    ("fashioniq", "clip4cir"): {"batch_size": 256, "epochs": 3, "lr": 2e-5, "temperature": 0.02},
    ("cirr", "clip4cir"): {"batch_size": 256, "epochs": 3, "lr": 2e-5, "temperature": 0.02},
    ("fashioniq", "tgcir"): {"batch_size": 256, "epochs": 5, "lr": 2e-5, "temperature": 0.02},
    ("cirr", "tgcir"): {"batch_size": 256, "epochs": 5, "lr": 2e-5, "temperature": 0.01},
    ("fashioniq", "blip4cir"): {"batch_size": 128, "epochs": 10, "lr": 5e-6, "temperature": 0.03, **SECOND_BLIP},
    ("cirr", "blip4cir"): {"batch_size": 128, "epochs": 3, "lr": 6e-6, "temperature": 0.02, **SECOND_BLIP},
    ("fashioniq", "sprc"): {"batch_size": 32, "epochs": 3, "lr": 1e-5, "temperature": 0.05, **SECOND_SPRC},
    ("cirr", "sprc"): {"batch_size": 32, "epochs": 3, "lr": 1e-5, "temperature": 0.05, **SECOND_SPRC},
}
SELECTION = {  # metrics whose mean selects: all of stage 2, and stage 1 where its authors do otherwise
    "fashioniq": {"R@10", "R@50"}, "cirr": {"R@5", "Rs@1"},
    "fashioniq/tgcir_stage1": {"R@10"}, "cirr/tgcir_stage1": {*SEVEN}, "cirr/sprc_stage1": {*SEVEN},
    "cirr/clip4cir_stage1": {*SEVEN}, "cirr/clip4cir_stage1_generated": {*SEVEN}, "cirr/clip4cir_combiner": {*SEVEN},
}  # fmt: skip


@dataclasses.dataclass
class Row:
    """A recipe: what runs it, figures of its header, their protocol and source, and its settings."""

    stage: int
    figures: dict[str, float]
    protocol: str
    source: str
    settings: dict[str, Any]
    steps: str = ""


def row(dataset: str, backbone: str, stage: int, generated: bool) -> Row:
    """What both tables say of a backbone's stage."""
    numbers: str = {"fashioniq": FASHIONIQ, "cirr": CIRR_TEST}[dataset][backbone][stage - 1]
    figures = dict(zip(METRICS[dataset], map(float, numbers.split()), strict=True)) if generated == (stage == 2) else {}
    ranked = "fashioniq/original-noref" if backbone == "clip4cir" else "fashioniq/original"
    trained, published = {"fashioniq": (ranked, ranked), "cirr": ("cirr/val", "cirr/test1")}[dataset]
    source = f"SPN paper, table {2 if dataset == 'fashioniq' else 3}, row {ROW[backbone]}{' +SPN' * (stage == 2)}"
    own = STAGE_1[backbone] | STAGE_1_OF[dataset, backbone] if stage == 1 else STAGE_2_OF[dataset, backbone]
    settings = COMMON | own | {"dataset": dataset, "backbone": backbone, "protocol": trained}
    if generated:
        settings["generated"] = GENERATED[dataset].format(GENERATOR[backbone])
    steps = STEPS[backbone][dataset == "cirr"] if stage == 2 and generated else ""
    return Row(stage, figures, published, source, settings, steps)


ROWS = {
    f"{dataset}/{backbone}_stage{stage}{'_generated' * generated}": row(dataset, backbone, stage, generated)
    for dataset in METRICS
    for backbone in ROW
    for stage, generated in ((1, False), (1, True), (2, False), (2, True))
    if backbone == "clip4cir" or (stage, generated) != (1, True)  # of the others nobody has trained it
}
COMBINER = STAGE_1["clip4cir"] | {  # Adam is AdamW without decay; the scale of the logits is 100
    "backbone_options": STAGE_1["clip4cir"]["backbone_options"] | {"fusion": "combiner", "train_clip": False},
    "batch_size": 4096, "epochs": 300, "lr": 2e-5, "weight_decay": 0.0, "adamw": AdamWConfig(eps=1e-8), "dropout": True,
}  # fmt: skip
AGAIN = "the released weights, evaluated anew in the first round of a paper on several rounds of retrieval"
for place, numbers in (
    ("fashioniq/original", {"R@10": 43.78, "R@50": 66.93, "Rmean": 55.36}),
    ("cirr/val", {"R@1": 45.37, "R@5": 78.47}),
):
    about = {"dataset": place.partition("/")[0], "backbone": "clip4cir", "protocol": place}
    ROWS[f"{about['dataset']}/clip4cir_combiner"] = Row(1, numbers, place, AGAIN, COMMON | COMBINER | about)
CHECKPOINT = ComputeConfig(checkpoint=True)
for dataset, place in (("fashioniq", "fashioniq/original-noref"), ("cirr", "cirr/val")):
    # CLIP ViT-L/14, the last two rows of the paper's commands: generated triplets alone, no figure in numbers
    about = {"dataset": dataset, "backbone": "clip4cir", "protocol": place, "max_annotated": 0}
    about["generated"] = GENERATED[dataset].format("zs")
    clip = {"backbone_options": {"model": "ViT-L-14-quickgelu", "pretrained": "openai"}}
    for stage, own in (
        (1, clip | {"batch_size": 48, "epochs": 10, "lr": 2e-6, "temperature": 0.01, "compute": CHECKPOINT}),
        (2, {"batch_size": 128, "epochs": 5, "lr": 2e-6, "temperature": 0.02}),
    ):
        ROWS[f"{dataset}/clip4cir_zeroshot_stage{stage}"] = Row(stage, {}, place, "", COMMON | own | about)
# A further recipe of a published dataset is one more entry.


@functools.cache
def read(name: str) -> TrainConfig:
    """The settings that a recipe gives."""
    return parse(TrainConfig, RECIPES / f"{name}.yaml", [])


def header(name: str) -> str:
    """The comment above the settings, as one line."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.removeprefix("#").strip() for line in comment)


def test_every_row_has_a_file() -> None:
    """Of the published datasets these files and no others; of the embedded one both stages; of all backbones."""
    found = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert {name for name in found if name.startswith(("fashioniq/", "cirr/"))} == set(ROWS)
    assert set(ROW) == set(COMPOSED) - {"freestyle"}
    assert {f"emoji/{backbone}_stage{stage}" for backbone in COMPOSED for stage in (1, 2)} <= found


@pytest.mark.parametrize("name", ROWS)
def test_settings_are_the_published_ones(name: str) -> None:
    """Everything that moves a figure; a file sets nothing beyond it but how many images are encoded at once."""
    wanted = ROWS[name].settings
    config = read(name)
    wanted = {**wanted, "backbone_options": wanted["backbone_options"] | {"rgb_last": True}}
    found = {key: getattr(config, key) for key in wanted}
    assert found == wanted
    said = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert said.keys() <= wanted.keys() | {"select_by", "eval_batch_size"}
    assert config.backbone_options.keys() <= {*inspect.signature(BACKBONES[config.backbone]).parameters, "rgb_last"}


@pytest.mark.parametrize("dataset", METRICS)
def test_what_selects(drawn: Path, dataset: str) -> None:
    """The metrics whose mean selects are the authors', by the recipe's word or the protocol's own, which is known."""
    kind = {"fashioniq": FashionIQ, "cirr": CIRR}[dataset]
    for name, wanted in ROWS.items():
        if wanted.settings["dataset"] == dataset:
            benchmark = kind(str(drawn / dataset)).benchmark("val", wanted.settings["protocol"])
            assert {*(read(name).select_by or primary_names(benchmark))} == SELECTION.get(name, SELECTION[dataset]), (
                name
            )


@pytest.mark.parametrize("name", ROWS)
def test_a_header_says_what_is_published(name: str) -> None:
    """The figures of the paper and no others, beside their row and the id of their protocol; or that there are none."""
    wanted, text = ROWS[name], header(name)
    found = {metric: float(value) for metric, value in re.findall(r"(Rs?@\d+|Rmean) (\d+\.\d+)", text)}
    assert found == wanted.figures and wanted.settings["protocol"] in text
    assert bool(found) != ("No figure of this row is published" in text)
    if found:
        assert f"Published, protocol {wanted.protocol}: " in text and f"({wanted.source})" in text
    assert not wanted.steps or f"{wanted.steps} steps." in text


@pytest.mark.parametrize("name", ROWS)
def test_a_header_says_what_differs(name: str) -> None:
    """What the one loop does in another way than the authors' code, and where the weights come from."""
    said = header(name).partition("Unlike theirs: ")[2]
    decays = ROWS[name].settings["weight_decay"] > 0  # in theirs all parameters do
    assert bool(re.search(r"(vectors|norms, biases)[^.]* do not decay", said)) == decays
    assert ("equal targets are not negatives" in said) == (ROWS[name].stage == 1)
    assert re.search("other targets of the same query", said)
    is_learned, is_fashion = ROWS[name].settings["learn_temperature"], name.startswith("fashioniq/")
    assert ("temperature is clamped" in said) == is_learned
    assert ("empty captions are not drawn" in said) == (is_fashion and "zeroshot" not in name)
    assert ("temperature: null" in header(name)) == (ROWS[name].settings["temperature"] is None)
    assert ("Their extraction of the bank cannot run" in said) == ("sprc_stage2" in name)
    assert ("Starts from the newest stage 1 run" in header(name)) == (ROWS[name].stage == 2)


@pytest.mark.parametrize(("dataset", "backbone"), itertools.product(METRICS, [*ROW, "zeroshot"]))
def test_a_header_of_a_preset_says_what_differs(dataset: str, backbone: str) -> None:
    """Pairs that are left out, and what happens to a text that is too long."""
    name = f"triplets/{dataset}_{backbone}"
    text, config = header(name), parse(GenerateConfig, RECIPES / f"{name}.yaml", [])
    said = text.partition("Unlike theirs: ")[2]
    assert "annotated pairs, pairs of equal captions and copies of an image are left out" in said
    assert ("never its own partner" in said) == (config.window is not None)
    assert "77 tokens of CLIP" in said and ("both texts" in said) == config.all_templates
    assert ("32 tokens of BERT, cuts a text where it is read" in said) == (backbone == "sprc")
