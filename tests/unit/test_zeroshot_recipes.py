"""The zero-shot recipes, field by field: the table of what the paper's code does, and where the specification says so.

Each value stands beside its section of the specification. Fields that say how our code works, or where files lie, are
marked as ours. A field that no table names must keep its default, so that nothing departs unnoticed.
"""

import dataclasses
from typing import Any

import pytest

from spn4cir.config import TrainConfig, parse, recipes_folder
from spn4cir.config_groups import AdamWConfig, BankConfig, ComputeConfig, NegativesConfig
from spn4cir.data_gen.sample_images import SampleConfig
from spn4cir.data_gen.steps import GenerateConfig

OURS = "ours"
Table = dict[str, tuple[Any, str]]  # field → value and source

TRAINING: Table = {
    "backbone": ("clip4cir", "8: the sum model of CLIP"),
    "max_annotated": (0, "8: generated triplets alone"),
    "generated_share": (None, "8: they are the only list"),
    "bank": (BankConfig(images="named", dtype="float32"), "5.2: all fp32; 8: the generated set's own images"),
    "negatives": (NegativesConfig(types=["target"]), "7.1: the target is replaced"),
    "lr": (2e-6, "5.1"),
    "lr_scale": ({}, "5.1: one learning rate"),
    "schedule": ("constant", "5.1"),
    "warmup_steps": (0, "5.1"),
    "weight_decay": (0.01, "5.1: as CLIP4CIR"),
    "adamw": (AdamWConfig(beta2=0.999, eps=1e-7, max_grad_norm=None), "5.1: as CLIP4CIR, no clipping"),
    "learn_temperature": (False, "5.1"),
    "dropout": (False, "5.1: module mode eval"),
    "mixed_precision": ("fp16", "5.1"),
    "workers": (4, "5.1"),
    "seed": (42, "5.1"),
    "eval_every": (1, "5.1: validate every epoch"),
    "holdout": (None, "8: the best epoch on the labelled val split"),
    "select_by": (None, "5.1: the protocol's own metrics, (R@10 + R@50) / 2 and (Rs@1 + R@5) / 2"),
}
STAGES: dict[int, Table] = {
    1: {
        "backbone_options": (
            {"model": "ViT-L-14-quickgelu", "pretrained": "openai", "rgb_last": True},
            "8: the public ViT-L/14; 12: pictures that are not RGB",
        ),
        "batch_size": (48, "5.1 and 8"),
        "epochs": (10, "5.1 and 8"),
        "temperature": (0.01, "5.1 and 8"),
        "compute": (ComputeConfig(checkpoint=True), "8: activation checkpointing"),
    },
    2: {
        "backbone_options": ({"rgb_last": True}, "8: those of stage 1"),
        "init": (None, "8: from stage 1; the newest run, or --init"),
        "batch_size": (128, "5.1 and 8"),
        "epochs": (5, "5.1 and 8"),
        "temperature": (0.02, "5.1 and 8"),
        "compute": (ComputeConfig(), "8"),
    },
}  # fmt: skip
DATASETS: dict[str, Table] = {
    "fashioniq": {
        "dataset": ("fashioniq", "8"),
        "protocol": ("fashioniq/original-noref", "8: evaluation removes the reference"),
        "generated": ("captions/cap.extend_zs.train.json", "1.5"),
    },
    "cirr": {
        "dataset": ("cirr", "8"),
        "protocol": ("cirr/val", "8"),
        "generated": ("captions/cap.rc2.train.extend_zs.json", "1.5"),
    },
}
TRIPLETS: Table = {
    "backbone": ("clip4cir", "8"),
    "window": (None, "3.3: uniform random"),
    "pool": ("all", "3.3: FashionIQ pools its categories"),
    "references": ("all", "3.3"),
    "pairs_per_image": (1, "3.3"),
    "pairs": (None, "3.3: all"),
    "captioner": ("llava-hf/llava-1.5-7b-hf", "3.2: an unreleased LLaVA, so ours"),
    "prompt": ("please briefly describe the image in {words} words", "3.2"),
    "words": (10, "3.2 and 3.3"),
    "templates": (["instead", "unlike"], "3.3: ids 0 and 1; 3.4"),
    "max_new_tokens": (40, "3.2 allows 1,024, and captions of 10 words run to some 15 words, so ours"),
    "rewriter": (None, "3.5: not used for the main results"),
    "tokenizer": ("clip", "3.4"),
    "max_tokens": (77, "3.4"),
    "max_image_similarity": (None, "3.3: no filter"),
    "max_caption_similarity": (None, "3.3: no filter"),
    "max_caption_count": (None, "3.3: no filter"),
    "seed": (42, "3.3"),
}
FASHIONIQ_TEXT: Table = {"templates": (["target"], "3.3: id 2")}
PRESETS: dict[str, Table] = {
    "fashioniq_zeroshot": FASHIONIQ_TEXT | {
        "dataset": ("fashioniq", "3.3"),
        "candidates": ("named", "3.3: all 25,136 names that triplets use"),
        "prompt": ("please briefly describe the {category} in {words} words", "3.2"),
        "words": (5, "3.2 and 3.3"),
        "output": ("data/fashioniq/zeroshot", OURS),
        "recipe": ("fashioniq/clip4cir_zeroshot_stage1.yaml", OURS),
    },
    "cirr_zeroshot": {
        "dataset": ("cirr", "3.3"),
        "candidates": ("named", "12: images that triplets name, not all of the split file"),
        "all_templates": (True, "12: the published files hold both texts"),
        "output": ("data/cirr/zeroshot", OURS),
        "recipe": ("cirr/clip4cir_zeroshot_stage1.yaml", OURS),
    },
    "outofdomain_fashioniq": FASHIONIQ_TEXT | {
        "dataset": ("catalogue", OURS),
        "candidates": ("all", "3.3: all of the parts"),
        "output": ("data/outofdomain/fashioniq", OURS),
        "recipe": ("fashioniq/clip4cir_zeroshot_stage1.yaml", OURS),
    },
    "outofdomain_cirr": {
        "dataset": ("catalogue", OURS),
        "candidates": ("all", "3.3: all of the parts"),
        "all_templates": (True, "12: the published files hold both texts"),
        "output": ("data/outofdomain/cirr", OURS),
        "recipe": ("cirr/clip4cir_zeroshot_stage1.yaml", OURS),
    },
}  # fmt: skip


def check(config: Any, table: Table) -> None:
    """Every field is what the table says, or else its default."""
    default = dataclasses.asdict(type(config)()) if not isinstance(config, SampleConfig) else {}
    unknown = table.keys() - {field.name for field in dataclasses.fields(config)}
    assert not unknown
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in table:
            wanted, source = table[field.name]
            assert value == wanted, f"{field.name}: section {source} says {wanted!r}, the recipe {value!r}"
        elif default:
            plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            assert plain == default[field.name], f"{field.name} is {value!r}, and no source says so"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_training_recipes(dataset: str, stage: int) -> None:
    config = parse(TrainConfig, recipes_folder() / dataset / f"clip4cir_zeroshot_stage{stage}.yaml", [])
    check(config, TRAINING | STAGES[stage] | DATASETS[dataset])


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = parse(GenerateConfig, recipes_folder() / "triplets" / f"{name}.yaml", [])
    check(config, TRIPLETS | PRESETS[name])


def test_sample() -> None:
    config = parse(SampleConfig, recipes_folder() / "sample_images.yaml", ["--folder", "x"])
    check(config, {"images": (50000, "8: 50k CC3M images in total"), "seed": (42, "3.3"), "shards": (None, OURS)})


@pytest.mark.parametrize("stage", STAGES)
def test_embedded_recipes_use_nothing_annotated(stage: int) -> None:
    """No annotated triplet trains and no annotated query selects; the rest are settings of the supervised recipe."""
    config, supervised = (
        parse(TrainConfig, recipes_folder() / "emoji" / f"clip4cir_{kind}stage{stage}.yaml", [])
        for kind in ("zeroshot_", "")
    )
    assert (config.max_annotated, config.generated, config.holdout) == (0, "auto", 0.1)
    assert config.bank == BankConfig(images="named")
    changed = {"max_annotated", "generated", "holdout", "bank", "epochs", "eval_every", "lr", "temperature"}
    for field in dataclasses.fields(config):
        assert field.name in changed or getattr(config, field.name) == getattr(supervised, field.name)


def test_a_departure_fails() -> None:
    """The control: a changed field of the table, and one that only has its default."""
    recipe = recipes_folder() / "cirr" / "clip4cir_zeroshot_stage1.yaml"
    for options in (["--lr", "3e-6"], ["--max-steps", "7"]):
        with pytest.raises(AssertionError, match=r"section 5\.1 says|no source says so"):
            check(parse(TrainConfig, recipe, options), TRAINING | STAGES[1] | DATASETS["cirr"])
