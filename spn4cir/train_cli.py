"""Train --stage 1, where candidates are the targets of the batch; --stage 2, against a bank of all candidates; --stage
classes, images against centres of their classes; or --stage crossmodal, images and texts into one space.

examples:
  spn4cir-train --stage 1
  spn4cir-train --stage 1 --dataset fashioniq --backbone tgcir --data-root FOLDER
  spn4cir-train --stage 2 --init runs/emoji/clip4cir/stage1-20260101-120000
  spn4cir-train --stage 2 --config recipes/fashioniq/tgcir_stage2_generated.yaml
  spn4cir-train --stage classes --classes.margin cosface --classes.centres 3
  spn4cir-train --stage 2 --resume runs/emoji/clip4cir/stage2-20260101-123000
several processes:
  accelerate launch --num_processes 2 -m spn4cir train --stage 2                  # on GPUs
  ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 -m spn4cir train --stage 2     # on CPUs
"""

import os
import sys
from pathlib import Path

from spn4cir.config import STAGE_NAMES, TrainConfig, find_config, parse, recipes_folder, short_name, take_option
from spn4cir.errors import InputError, run_command
from spn4cir.files import read_json


def train_command(stage: int | None = None, text: str | None = __doc__) -> None:
    """Train a stage from the command line, for None that of ``--stage``; ``--help`` shows the text."""

    def main() -> None:
        number, arguments = (stage, sys.argv[1:]) if stage else _read_stage(sys.argv[1:])
        given, arguments = take_option(arguments, "config")
        path = find_config(given) if given else _choose_config(number, arguments)
        config = parse(TrainConfig, path, arguments, text or "")
        if os.environ.get("RANK", "0") == "0":
            print(f"recipe {short_name(path)}", flush=True)
        from spn4cir.train import train

        train(config, number)

    run_command(main)


def _read_stage(argv: list[str]) -> tuple[int | str, list[str]]:
    """The stage, and the other arguments; for ``--help`` alone any stage will do."""
    stage, arguments = take_option(argv, "stage")
    if stage is None and {"-h", "--help"} & {*argv}:
        return 1, arguments
    found = next((name for name in STAGE_NAMES if str(name) == stage), None)
    if found is None:
        known = ", ".join(map(str, STAGE_NAMES))
        raise InputError(f"--stage must be one of {known}, got {stage} (see spn4cir-train --help)")
    return found, arguments


def _choose_config(stage: int | str, arguments: list[str]) -> Path:
    """The settings of the run to resume, or the recipe of the dataset and backbone that the arguments name."""
    names = ("dataset", "backbone", "init", "resume")
    dataset, backbone, init, resume = (take_option(arguments, name)[0] for name in names)
    if resume:
        saved = Path(resume) / "config.yaml"
        if not saved.is_file():
            raise InputError(f"--resume {resume} is no run folder: config.yaml is missing")
        return saved
    note = Path(init or "") / "model.json"
    if init and not backbone and note.is_file():  # a checkpoint knows its backbone
        held = read_json(note)
        named = held.get("backbone") if isinstance(held, dict) else None
        backbone = named if isinstance(named, str) else None
    usual = TrainConfig.dataset, TrainConfig.backbone
    if isinstance(stage, str):  # of its only recipe, or the first
        first = min(recipes_folder().glob(f"*/*_{stage}.yaml"))
        usual = first.parent.name, first.stem.removesuffix(f"_{stage}")
    return find_recipe(dataset or usual[0], backbone or usual[1], stage)


def find_recipe(dataset: str, backbone: str, stage: int | str) -> Path:
    """The packaged recipe of a dataset, a backbone and a stage. Raises ``InputError`` with those that there are."""
    named = f"stage{stage}" if isinstance(stage, int) else stage
    path = recipes_folder() / dataset / f"{backbone}_{named}.yaml"
    if path.is_file():
        return path
    from spn4cir.backbones import check_backbone
    from spn4cir.datasets import DATASETS, load_dataset

    check_backbone(backbone)
    if dataset not in DATASETS:
        load_dataset(dataset)  # raises
    recipes = [file.stem.partition("_") for file in sorted(path.parent.glob("*.yaml"))]
    stages = {name: ", ".join(stage for other, _, stage in recipes if other == name) for name, _, _ in recipes}
    available = ", ".join(f"{name} ({rest})" for name, rest in stages.items()) or "none, give --config FILE"
    pair = f"dataset {dataset!r} with backbone {backbone!r}"
    raise InputError(f"recipes: there is no recipe for {pair}; available: {available}")
