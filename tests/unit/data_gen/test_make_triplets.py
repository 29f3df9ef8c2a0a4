"""What the whole says before it begins, and at its end."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from spn4cir.config import TrainConfig, parse, recipes_folder
from spn4cir.data_gen.make_triplets import check_settings, suggest_training
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError


def told(folder: Path, annotated: bool = True, triplets: int = 5000, **settings: Any) -> list[str]:
    """The words of the last line, without the file of triplets."""
    config = GenerateConfig(output=str(folder / "a b"), **settings)
    config.file("summary.json").write_text(json.dumps({"counts": {"triplets": triplets}}))
    words = shlex.split(suggest_training(config, cast(Dataset, SimpleNamespace(has_triplets=annotated))))
    place = words.index("--generated")
    assert words[:2] == ["accelerate", "launch"] and words[place + 1] == str(folder / "a b" / "triplets.json")
    return words[2:place] + words[place + 2 :]


def test_the_next_command(tmp_path: Path) -> None:
    """The recipe for generated triplets, that of the preset, or stage 1; and options that it takes."""
    paper = ["recipes/stage2.py", "--config", "recipes/cirr/tgcir_stage2_generated.yaml", "--data-root", "x y"]
    assert told(tmp_path, dataset="cirr", backbone="tgcir", data_root="x y") == paper
    own = ["recipes/stage1.py", "--config", "FILE", "--dataset", "catalogue", "--backbone", "sprc", "--data-root", "x"]
    assert told(tmp_path, False, dataset="catalogue", backbone="sprc", data_root="x") == own
    few = told(tmp_path, False, 54, dataset="catalogue", data_root="x")
    assert few[-2:] == ["--batch-size", "13"] and parse(
        TrainConfig, recipes_folder() / "catalogue/clip4cir_stage1.yaml", few[-2:]
    )
    recipe = "cirr/clip4cir_zeroshot_stage1.yaml"
    other = told(tmp_path, False, dataset="catalogue", data_root="x", recipe=recipe)
    assert other == ["recipes/stage1.py", "--config", f"recipes/{recipe}"]


@pytest.mark.parametrize("preset", sorted((recipes_folder() / "triplets").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_lead_to_recipes_of_theirs(tmp_path: Path, preset: Path) -> None:
    """Zero-shot triplets to the zero-shot recipe, a backbone's to its own."""
    settings = {name: getattr(parse(GenerateConfig, preset, []), name) for name in ("dataset", "backbone", "recipe")}
    words = told(tmp_path, settings["dataset"] != "catalogue", **settings)
    if "--config" in words:
        recipe = words[words.index("--config") + 1].removeprefix("recipes/")
        dataset = preset.stem.removeprefix("outofdomain_").split("_")[0]
        assert recipe.startswith(f"{dataset}/{settings['backbone']}_")
        zero = "zeroshot" in preset.stem or "outofdomain" in preset.stem
        assert ("zeroshot" in recipe) == zero
    else:
        assert preset.stem == "catalogue"


@pytest.mark.parametrize(("settings", "said"), [
    ({"tokenizer": "no/where"}, "tokenizer 'no/where'"), ({"rewriter": "no/where"}, "model 'no/where'"),
    ({"rewriter": "x", "rewriter_prompt": "/no/file.yaml"}, "rewriter_prompt /no/file.yaml"),
    ({"captioner": "no/where"}, "model 'no/where'"), ({"captions": "/no/file.json"}, "/no/file.json is missing"),
    ({"prompt": "describe"}, "{words}"), ({"recipe": "none.yaml"}, "recipe none.yaml"),
])  # fmt: skip
def test_what_cannot_work_is_said_first(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    """Before the first image is decoded, in one line; not where the work is done."""
    from spn4cir.datasets.emoji import Emoji

    with pytest.raises(InputError) as error:
        check_settings(GenerateConfig(output=str(tmp_path), **settings), Emoji())
    assert said in str(error.value) and "\n" not in str(error.value)
    check_settings(GenerateConfig(output=str(tmp_path)), Emoji())
