"""Settings: dataclasses, filled from a YAML file and then from the command line."""

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from spn4cir.config_groups import AdamWConfig, BankConfig, ClassesConfig, ComputeConfig, NegativesConfig
from spn4cir.errors import InputError
from spn4cir.files import write_text
from spn4cir.schedules import check_options

T = TypeVar("T")

RENAMED = {
    "annotated": "max_annotated", "negatives.above": "negatives.max_similarity", "beta2": "adamw.beta2",
    "eps": "adamw.eps", "schedule: drops": "schedule: multistep", "selection: holdout": "holdout: 0.1",
    "selection: val": "holdout: null", "selection": "holdout",
}  # fmt: skip
"""Old settings and values, and what they are called now."""
SHORT = {"near_duplicates": "negatives.near_duplicates"}  # options that stand for a setting in a group
GROUPS = {
    "bank": BankConfig, "negatives": NegativesConfig, "classes": ClassesConfig, "compute": ComputeConfig,
    "adamw": AdamWConfig,
}  # fmt: skip
STAGE_NAMES = (1, 2, "classes", "crossmodal")
"""Those of ``spn4cir.stages.STAGES``, for commands that do not import torch."""
BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    ("above 0", lambda x: 0 < x < math.inf, "batch_size epochs lr temperature eval_batch_size log_every adamw.eps"),
    ("above 0", lambda x: 0 < x < math.inf, "adamw.max_grad_norm negatives.margin"),
    ("0 or more", lambda x: 0 <= x < math.inf, "warmup_steps eval_every save_every workers weight_decay max_annotated"),
    ("at least 1", lambda x: x >= 1, "patience max_steps bank.limit compute.chunk compute.accumulate classes.centres"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "generated_share adamw.beta2"),
    ("between 0 and 1", lambda x: 0 < x < 1, "holdout negatives.max_similarity"),
]
"""What the number of a setting must be, unless it is null."""


@dataclasses.dataclass
class TrainConfig:
    """Everything that decides a training run. ``null`` in YAML means "not set".

    Args:
        dataset: name of a dataset.
        data_root: where its files lie; null looks in SPN4CIR_DATA, then in data/<dataset>.
        protocol: id that evaluation follows, such as fashioniq/original-noref; null takes the dataset's default.
        holdout: fraction of the annotated triplets to hold out and select the best checkpoint on; null selects on the
            val split, which is also reported.
        patience: stop after so many evaluations without a better score; null trains to the end.
        select_by: metrics whose mean selects, such as [R@1, R@10]; null takes the protocol's.
        backbone: name of a backbone.
        backbone_options: its own options, such as {model: RN50x4-quickgelu, pretrained: openai}.
        init: a run or checkpoint folder to start from; stage 2 takes the newest stage 1 run if not set.
        max_annotated: use only the first n annotated triplets; null uses all.
        generated: file of triplets to add, as it stands or below the dataset's root; "auto": of spn4cir-triplets.
        generated_share: share of each batch that is generated; null concatenates both lists.
        bank: stage 2's candidates.
        negatives: what counts as a negative.
        classes: centres of stage "classes".
        terms: weights of further losses by name, such as {correlation: 0.1}; spn4cir/terms.py lists them.
        batch_size: triplets in one optimiser step, over all processes.
        epochs: passes over the annotated triplets (over all where generated_share is null).
        max_steps: stop after so many optimiser steps; null for no bound.
        lr: peak learning rate of AdamW.
        lr_scale: factors of it for parameters whose name contains a text, such as {clip: 0.1}.
        schedule: "constant"; "cosine" down to zero; "multistep", by a factor at certain epochs; or "onecycle".
        schedule_options: its own options, such as {epochs: [5, 10], factor: 0.1}; spn4cir/schedules.py explains them.
        warmup_steps: linear warm-up before it.
        weight_decay: for matrices; vectors, biases and the temperature are exempt.
        adamw: the optimiser's further settings.
        temperature: what scores are divided by; null takes the value that the starting weights hold, such as imported
            ones, or 0.07 where they hold none. The run's config.yaml states it as a number.
        learn_temperature: train it, from that value on, clamped to [0.005, 0.5].
        dropout: switch the model's dropout on while it trains; frozen parts never have it.
        mixed_precision: "no", "bf16" or "fp16".
        compute: memory and speed of a step.
        eval_every: evaluate on the val split after so many epochs; 0 only at the end.
        log_every: write loss, learning rate, gradient norm and throughput to metrics.jsonl after so many steps.
        save_every: also save after so many steps inside an epoch; 0 saves after each epoch.
        eval_batch_size: images encoded at once in evaluation and for the bank.
        keep_pixels: keep decoded images in memory; for small datasets.
        workers: data-loading processes.
        seed: of everything.
        output: run folder; null makes runs/<dataset>/<backbone>/<stage>-<time>, for images of your own with a folder of
            their catalogue before the backbone.
        resume: a run folder to continue.
        trackers: names that accelerate knows, such as [tensorboard]; metrics.jsonl is always written.
    """

    dataset: str = "emoji"
    data_root: str | None = None
    protocol: str | None = None
    holdout: float | None = None
    patience: int | None = None
    select_by: list[str] | None = None
    backbone: str = "clip4cir"
    backbone_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    init: str | None = None
    max_annotated: int | None = None
    generated: str | None = None
    generated_share: float | None = None
    bank: BankConfig = dataclasses.field(default_factory=BankConfig)
    negatives: NegativesConfig = dataclasses.field(default_factory=NegativesConfig)
    classes: ClassesConfig = dataclasses.field(default_factory=ClassesConfig)
    terms: dict[str, float] = dataclasses.field(default_factory=dict)
    batch_size: int = 128
    epochs: int = 10
    max_steps: int | None = None
    lr: float = 1e-4
    lr_scale: dict[str, float] = dataclasses.field(default_factory=dict)
    schedule: Literal["constant", "cosine", "multistep", "onecycle"] = "constant"
    schedule_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    warmup_steps: int = 0
    weight_decay: float = 0.01
    adamw: AdamWConfig = dataclasses.field(default_factory=AdamWConfig)
    temperature: float | None = 0.02
    learn_temperature: bool = False
    dropout: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    eval_every: int = 1
    log_every: int = 10
    save_every: int = 0
    eval_batch_size: int = 256
    keep_pixels: bool = False
    workers: int = 0
    seed: int = 42
    output: str | None = None
    resume: str | None = None
    trackers: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        for name, kind in GROUPS.items():
            if isinstance(getattr(self, name), dict):  # as a file or the parser gives it
                setattr(self, name, kind(**getattr(self, name)))
        for bound, holds, names in BOUNDS:
            for name in names.split():
                value = attrgetter(name)(self)
                if value is not None and not holds(value):
                    raise InputError(f"{name} must be {bound}, got {value}")
        if self.patience and not self.eval_every:
            raise InputError("patience counts evaluations, and eval_every 0 evaluates only at the end")
        if self.generated_share and not self.generated:
            raise InputError(f"generated_share {self.generated_share} needs generated: a file of triplets, or auto")
        check_options(self.schedule, self.schedule_options)
        for part, factor in self.lr_scale.items():
            if not 0 < factor < math.inf:
                raise InputError(f"lr_scale: the factor of {part} must be above 0, got {factor}")
        if self.batch_size % self.compute.accumulate:
            raise InputError(f"batch_size {self.batch_size} does not divide into {self.compute.accumulate} parts")


def recipes_folder() -> Path:
    """The folder of the recipes in the installed package."""
    return Path(__file__).parent / "recipes"


def training_command(stage: int | str) -> str:
    """The command that trains a stage: the script of a checkout in the working folder, or the package's own."""
    script = f"recipes/stage{stage}.py"
    return f"accelerate launch {script}" if Path(script).is_file() else f"spn4cir-train --stage {stage}"


def parse(kind: type[T], default: Path, argv: Sequence[str] | None = None, text: str = "") -> T:
    """Settings from ``--config FILE`` (``default`` if not given) and then from options, in whatever order they stand.

    They fill a dataclass. ``argv`` lacks the program's name and is the command line's own for None; ``text`` is for
    ``--help``: a sentence, a blank line, examples.

    Raises ``InputError`` naming the file and the key for an unknown key, or the option for a wrong value.
    """
    from jsonargparse import ArgumentParser

    given, arguments = take_option(sys.argv[1:] if argv is None else argv, "config")
    path, arguments = find_config(given) if given else default, [_spell(argument) for argument in arguments]
    sentence, _, examples = text.partition("\n\n")
    about = {"description": f"{sentence} Settings come from --config FILE, then from options.", "epilog": examples}
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, formatter_class=_Help, **about)
    parser.add_argument("--config", metavar="FILE", default=short_name(default), help="YAML file, or a packaged recipe")
    parser.add_class_arguments(kind)
    values = read_settings(path, kind)
    try:
        parser.parse_object(values)  # a default is not checked, so check first
        parser.set_defaults(values)
        values = parser.parse_args(arguments).as_dict()
    except Exception as error:  # jsonargparse raises several kinds
        raise InputError(f"{path} and options: {' '.join(str(error).split())}") from None
    values.pop("config")
    return kind(**values)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples as they are written, defaults shown."""


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of ``--name VALUE`` or ``--name=VALUE``, the last of several, and the other arguments."""
    value, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        option, equals, given = argument.partition("=")
        if option == f"--{name}":
            value = given if equals else next(arguments, None)
            if not value:
                raise InputError(f"--{name} needs a value")
        else:
            rest.append(argument)
    return value, rest


def _spell(argument: str) -> str:
    """An option as the settings spell it: it may be written with dashes."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument[2:].partition("=")
    option = option.replace("-", "_")
    if option in RENAMED:
        raise InputError(f"option --{option} is now called --{RENAMED[option]}")
    return f"--{SHORT.get(option, option)}{equals}{value}"


def find_config(name: str) -> Path:
    """The file of that name; else, as outside a checkout, the packaged recipe that is called recipes/…"""
    packaged = recipes_folder().parent / name
    return packaged if packaged.is_file() and not Path(name).is_file() else Path(name)


def short_name(path: Path) -> str:
    """The path of a packaged recipe as ``find_config`` takes it, recipes/…; any other path as it stands."""
    return str(path.relative_to(recipes_folder().parent) if path.is_relative_to(recipes_folder()) else path)


def read_settings(path: Path, kind: type[Any]) -> dict[str, Any]:
    """A YAML mapping whose keys are all known. Raises ``InputError`` that names the file and the key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        moved = Path("recipes", *path.name.split("_", 1))  # recipes/emoji_clip4cir_stage1.yaml is of old
        hint = f": it is {moved} now" if find_config(str(moved)).is_file() else ""
        raise InputError(f"config file {path} is missing{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"config file {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must hold keys and values")
    _check_keys(values, kind, path)
    return values


def _check_keys(values: dict[str, Any], kind: Any, path: Path, prefix: str = "") -> None:
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        for old in (f"{prefix}{key}", f"{prefix}{key}: {value}"):
            if old in RENAMED:
                raise InputError(f"config file {path}: {old!r} is now called {RENAMED[old]!r}")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {prefix + near[0]!r}?" if near else ""
            named = repr(prefix + key) if isinstance(key, str) else str(key)
            raise InputError(f"config file {path}: unknown key {named}{hint}")
        if value is None and type(None) not in get_args(known[key].type):
            raise InputError(f"config file {path}: {prefix}{key} cannot be null")
        if isinstance(value, dict) and dataclasses.is_dataclass(known[key].type):
            _check_keys(value, known[key].type, path, f"{prefix}{key}.")


def write_yaml(config: Any, path: Path, title: str = "") -> None:
    """A dataclass as YAML under a comment, so that it can be given back as ``--config``."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_text(path, f"# {title}\n{text}" if title else text)
