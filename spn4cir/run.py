"""A training run: its folder, its log, its best and its last state."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm import tqdm

from spn4cir import checkpoints
from spn4cir.backbone import Backbone
from spn4cir.config import GROUPS, TrainConfig, recipes_folder, training_command, write_yaml
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.files import locked, write_text
from spn4cir.model_card import write_card
from spn4cir.provenance import Provenance, folder_of, read_provenance
from spn4cir.results import Result, git_commit, metrics_table

FREE_ON_RESUME = {
    "resume", "workers", "trackers", "keep_pixels", "compute.chunk", "compute.checkpoint", "compute.compile",
}  # fmt: skip
"""What may differ from the first start."""
SHOWN = {
    "loss": "loss", "lr": "lr", "temperature": "t", "grad_norm": "norm", "masked": "masked",
    "items_per_second": "items/s", "peak_memory_mb": "MB", "R@1": "R@1", "R@10": "R@10",
}  # fmt: skip
"""What the progress bar shows of a line of the log, and what it calls it there."""


class Run(AbstractContextManager["Run"]):
    """One run folder; only the main process writes. A lock keeps other runs out while it is open (``with run:``)."""

    def __init__(self, folder: Path, stage: Any, accelerator: Accelerator):
        self.folder, self.stage, self.accelerator = folder, stage, accelerator
        self.main = accelerator.is_main_process
        self.started = time.time()
        self.config = TrainConfig()
        self.provenance: Provenance | None = None
        self.is_default = False
        self._open = ExitStack()

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @classmethod
    def open(cls, config: TrainConfig, stage: Any, accelerator: Accelerator) -> "Run":
        """Name the folder, or take that of ``config.resume``; nothing is written yet.

        Raises ``InputError`` if the folder holds another run, or none that these settings continue.
        """
        if config.resume:
            run = cls(Path(config.resume), stage, accelerator)
            run._check(config)
        else:
            named = f"stage{stage}" if isinstance(stage, int) else stage
            name = f"{named}-{time.strftime('%Y%m%d-%H%M%S')}"
            default = checkpoints.runs_root() / config.dataset / config.backbone / name
            run = cls(Path(config.output or default), stage, accelerator)
            run.is_default = not config.output
            if config.output:  # else another folder is made where this one is taken
                run._check_unused()
        there = next(p for p in [run.folder, *run.folder.absolute().parents] if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"the run folder {run.folder} cannot be made: {there} is no folder, or not writable")
        try:
            accelerator.log_with = filter_trackers(list(config.trackers), str(run.folder))
        except ValueError as error:
            raise InputError(f"trackers: {error}") from None
        if len(accelerator.log_with) < len(config.trackers):
            raise InputError(f"trackers: of {config.trackers} not all are installed; pip install what is missing")
        return run

    def locate(self, dataset: Dataset) -> None:
        """Take a folder of the dataset's catalogue, for a dataset of one's own, unless the settings name a folder.

        Raises ``InputError`` if the run to resume was trained on another catalogue.
        """
        self.provenance = dataset.provenance()
        base, before = checkpoints.runs_root() / dataset.name, read_provenance(self.folder)
        if self.provenance is None:
            return
        if before and not self.provenance.is_same(before):
            raise InputError(f"--resume {self.folder} was trained on {before}, and this is {self.provenance}")
        if self.is_default:
            self.folder = folder_of(base, self.provenance) / self.folder.relative_to(base)

    def say(self, line: str) -> None:
        """Print a line, once."""
        if self.main:
            print(line, flush=True)

    def start(self, config: TrainConfig, module: nn.Module) -> None:
        """Make the folder, save the settings, start the trackers. Raises ``InputError`` if the folder is in use."""
        self.config = config
        if self.main:
            if not config.resume and not config.output:
                self.folder = _make_folder(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            busy = f"{self.folder} is in use: another process trains in it"
            self._open.enter_context(locked(self.folder / "run.lock", busy=busy))
            if not config.resume:
                self._check_unused()
                write_yaml(config, self.folder / "config.yaml", f"stage {self.stage}")
            if self.provenance:
                self.provenance.write(self.folder)
                if self.is_default:
                    self.provenance.write(self.folder.parents[1])
        folder = [str(self.folder)]
        broadcast_object_list(folder)
        self.folder = Path(folder[0])
        self.accelerator.project_configuration.set_directories(folder[0])
        if self.main:
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            total = sum(p.numel() for p in module.parameters())
            again = f"--stage {self.stage} " * isinstance(self.stage, str) + f"--resume {self.folder}"
            print(f"stage {self.stage}: {trained:,} of {total:,} parameters train; if stopped, {again}")
        if config.trackers:
            flat = {name: str(value) for name, value in dataclasses.asdict(config).items()}
            self.accelerator.init_trackers("spn4cir", flat)

    def _check_unused(self) -> None:
        """Raises ``InputError`` if the folder holds a run that only ``--resume`` may continue."""
        for name in ("config.yaml", "last.safetensors"):
            if (self.folder / name).exists():
                raise InputError(f"{self.folder} already holds a run: give --resume {self.folder}, or another --output")

    def _check(self, config: TrainConfig) -> None:
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise InputError(f"{self.folder} is no run folder: config.yaml is missing")
        if (self.folder / "result.json").is_file():
            raise InputError(f"{self.folder} is complete: there is nothing to resume")
        text, last = path.read_text(encoding="utf-8"), self.folder / "last.safetensors"
        noted = re.match(r"# stage (\w+)\n", text)
        stage = noted[1] if noted else self.stage
        if last.is_file():
            stage = checkpoints.read_note(last)["progress"]["stage"]
        if str(stage) != str(self.stage):
            raise InputError(f"{self.folder} is a stage {stage} run: resume it as stage {stage}")
        for name, then, now in changes(yaml.safe_load(text), config):
            if name not in FREE_ON_RESUME:
                raise InputError(f"--resume {self.folder} continues the same run, but {name} was {then!r}, now {now!r}")

    def resume(self, module: nn.Module, optimizer: torch.optim.Optimizer, bank: str | None = None) -> dict[str, Any]:
        """Progress so far; puts back weights and optimiser. Raises ``InputError`` if the bank's fingerprint differs."""
        path = self.folder / "last.safetensors"
        state: dict[str, Any] = {"stage": self.stage, "step": 0, "best": None, "bank": bank}
        if self.config.resume and path.is_file():
            if checkpoints.read_note(path)["progress"].get("bank") != bank:
                raise InputError(f"{self.folder} was trained against another bank: its images or its init have changed")
            state = checkpoints.load_progress(path, module, optimizer)
            if self.accelerator.scaler is not None and "scaler" in state:
                self.accelerator.scaler.load_state_dict(state.pop("scaler"))
        if self.main:
            self._cut_log(state["step"])
        return state

    def _cut_log(self, step: int) -> None:
        """Drop what was logged after the state that is continued from, and a torn last line."""
        path = self.folder / "metrics.jsonl"
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))

    def log(self, row: dict[str, Any], bar: "tqdm[Any]") -> None:
        """Append a line to metrics.jsonl, and send it to the trackers."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        bar.set_postfix({SHOWN[name]: f"{value:.3g}" for name, value in row.items() if name in SHOWN})

    def keep_best(self, backbone: Backbone, result: dict[str, Any], score: float, state: dict[str, Any]) -> None:
        """Save the model if it is the best so far, and count the evaluations since; all processes call this."""
        state["waited"] = state.get("waited", 0) + 1
        if state["best"] is None or score > state["best"]["score"]:
            state["best"], state["waited"] = {"score": score, "step": state["step"], "result": result}, 0
            if self.main:
                checkpoints.save_model(self.folder, backbone, {"stage": self.stage, "step": state["step"]})

    def is_patient(self, state: dict[str, Any]) -> bool:
        """Whether fewer than ``patience`` evaluations in a row brought no better score."""
        return self.config.patience is None or state.get("waited", 0) < self.config.patience

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write what a resume needs."""
        scaler = self.accelerator.scaler  # of the gradients, under fp16
        progress = state if scaler is None else {**state, "scaler": scaler.state_dict()}
        checkpoints.save_progress(self.folder / "last.safetensors", module, optimizer, progress)

    def finish(self, state: dict[str, Any], selected_on: str, triplets: dict[str, int]) -> None:
        """Mark the run as complete and write its model card; print its metrics and the next command.

        Args:
            state: progress, with the best evaluation.
            selected_on: id of the benchmark that selected the best state.
            triplets: number of ``annotated`` and of ``generated`` triplets.
        """
        if self.main:
            best = state["best"]
            stopped = "the end of its epochs or max_steps" if self.is_patient(state) else "patience"
            steps = {"steps": state["step"], "best_step": best["step"], "selected_on": selected_on}
            steps["stopped_by"] = stopped
            seconds = round(time.time() - self.started, 1)  # since the start or the last resume
            note = {"stage": self.stage, **steps, "triplets": triplets, **best["result"], "git": git_commit()}
            note["seconds"] = seconds
            write_text(self.folder / "result.json", json.dumps(note, indent=1) + "\n")
            if kept := write_card(self.folder):
                print(kept)
            result = Result.from_json(best["result"])
            chosen = f"stage {self.stage}: step {best['step']} of {state['step']}, the best on {selected_on}"
            if result.is_holdout:
                chosen += ": held-out triplets, no annotated queries"
            elif selected_on == result.protocol:
                chosen += ": selected on what it reports, as published figures are"
            else:
                chosen += ", held-out training triplets; reported once on"
            print(f"\n{chosen}\n{metrics_table(result)}")
            first = "queries of your own, where this says; " if result.is_holdout and self.stage == 2 else ""
            print(f"\nsaved in {self.folder}\nnext: {first}{self._next()}", flush=True)
        self.accelerator.end_training()

    def _next(self) -> str:
        """What a person is likely to do next, with the data of this run."""
        if self.stage != 1:
            has_parts = " --ablate" * isinstance(self.stage, int)  # stages with names train no composed queries
            return f"spn4cir-eval --run {shlex.quote(str(self.folder))}{has_parts}"
        aside = f" --holdout {self.config.holdout:g}" if self.config.holdout else ""
        data = options_of(self.config, "max_annotated", "generated", "generated_share")
        recipe = f"{self.config.dataset}/{self.config.backbone}_zeroshot_stage2.yaml"  # the usual one has another rate
        is_zeroshot = self.config.max_annotated == 0 and (recipes_folder() / recipe).is_file()
        command = training_command(2) + f" --config recipes/{recipe}" * is_zeroshot
        return f"{command}{options_of(self.config)}{aside} --init {shlex.quote(str(self.folder))}{data}"


def options_of(config: TrainConfig, *names: str) -> str:
    """Options for settings that are not the default's; without names for dataset, backbone and place of the data."""
    settings = {name: getattr(config, name) for name in names or ("dataset", "backbone", "data_root")}
    changed = {name: value for name, value in settings.items() if value != getattr(TrainConfig, name)}
    return "".join(f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in changed.items())


def changes(before: dict[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Settings that differ from saved ones: dotted name, value then, value now. What was not saved had its default."""
    known = dataclasses.asdict(TrainConfig())
    if before.get("selection") == "val":  # as versions saved it whose holdout had a default
        before = before | {"holdout": None}
    found = []
    for name, now in dataclasses.asdict(config).items():
        then = before.get(name, known[name])
        if name == "temperature" and now is None:
            continue  # the saved number is what null stood for
        if name in GROUPS:
            inner = {key: then.get(key, value) for key, value in known[name].items()}
            found += [(f"{name}.{key}", inner[key], value) for key, value in now.items() if inner[key] != value]
        elif then != now:
            found.append((name, then, now))
    return found


def pending(config: TrainConfig) -> TrainConfig | None:
    """What is left to train of the run in ``config.output``, or None. Raises ``InputError`` if its settings differ."""
    assert config.output is not None
    folder = Path(config.output)
    if not (folder / "config.yaml").is_file():
        return config
    before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if different := [name for name, *_ in changes(before, config) if name != "resume"]:
        raise InputError(f"{folder} was trained with another {', '.join(different)}: delete it, or use another folder")
    return None if (folder / "result.json").is_file() else dataclasses.replace(config, resume=str(folder))


def _make_folder(folder: Path) -> Path:
    """Make a folder that nobody else made: the one that is named, or with a number behind it."""
    for number in itertools.count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            free.mkdir(parents=True)
            return free
    raise AssertionError("unreachable")
