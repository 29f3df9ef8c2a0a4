"""What tests run in processes of their own, on the toy dataset.

killed:    toy_script.py killed TOY INIT OUTPUT      a stage 1 run that kills itself before step 5
processes: toy_script.py processes TOY INITS OUTPUT  one step's loss and gradients, then a run, of both stages, and
                                                     evaluations, from each of the folders in INITS, which are named by
                                                     backbone
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator
from conftest import MIXED, Toy, toy_config
from torch import Tensor

import spn4cir.train as loop
from spn4cir import bank as banks
from spn4cir.batches import KnownTargets, TripletCollate
from spn4cir.checkpoints import load_model, write_tensors
from spn4cir.config_groups import ComputeConfig
from spn4cir.datasets import DATASETS
from spn4cir.evaluate import evaluate
from spn4cir.images import ImageSource, open_image, pixel_hash
from spn4cir.objective import BankCandidates, Objective
from spn4cir.stages import prepare_compute
from spn4cir.types import Benchmark, ImageFeatures, Measure, Query, recall_measures

# TRAIN[:20] are the targets of triplets 0 to 19 and again of 20 to 39: with four rows a process, equal targets meet
# on different processes; 17 has target TRAIN[0], the twin of TRAIN[1], which is the target of 0.
BATCH = [0, 3, 4, 9, 20, 23, 17, 8]


# Further steps of the first backbone: the stage, settings of the objective, how many candidates are drawn with which
# seed. Of 40 rows of the bank the second process holds the last 20, and no target is among them: so with one drawn it
# may hold nothing.
TYPES = {"types": ["target", "query", "text", "reference"]}
OPTIONS: dict[str, tuple[int, dict[str, Any], tuple[int | None, int]]] = {
    "types": (1, TYPES, (None, 0)),
    "similar": (1, {**TYPES, "max_similarity": 0.9}, (None, 0)),
    "similar 2": (2, {"max_similarity": 0.9}, (None, 0)),
    "drawn": (2, {}, (7, 3)),
    "one drawn": (2, {}, (1, 0)),
    "drawn, similar": (2, {"max_similarity": 0.9}, (7, 3)),
}
# Steps of all backbones on triplets with several targets, hard negatives, and without a part: each process has queries
# of each kind, and then the first has no text, and other processes have more targets.
ORDERS = {"mixed": [0, 3, 2, 1, 4, 5, 6, 7], "apart": [3, 6, 3, 6, 0, 1, 2, 4]}
MIXED_STEPS: dict[str, tuple[int, bool, tuple[int | None, int]]] = {
    "mixed": (1, False, (None, 0)),
    "mixed chunks": (1, False, (None, 0)),
    "mixed similar": (1, True, (None, 0)),
    "mixed 2": (2, False, (None, 0)),
    "mixed drawn": (2, True, (7, 3)),
    "apart": (1, False, (None, 0)),
    "apart chunks": (1, False, (None, 0)),
    "apart 2": (2, False, (None, 0)),
}
"""Of each step: the stage, whether similar candidates are masked, and what is drawn."""
BOUNDS = {"clip4cir": 0.9, "tgcir": 0.75, "sprc": 0.99}
"""Similarities that a good part of all pairs of images exceeds."""


def rows_of(what: int | str) -> list[int]:
    """The triplets of a step, over all processes."""
    return ORDERS[str(what).split()[0]] if what in MIXED_STEPS else BATCH


def first_step(
    toy: Toy, init: Path, what: int | str, root: Path, rows: list[int], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Loss and gradients of one batch, shared among the processes there are, the mean of all; and the masked share.

    ``what`` is a stage, or one of ``OPTIONS`` and ``MIXED_STEPS``, or ``chunks``: stage 1 in chunks and with
    checkpoints.
    """
    is_mixed = what in MIXED_STEPS
    plain = (1 if what == "chunks" else what, {}, (None, 0))
    stage, settings, draw = OPTIONS.get(what, plain)  # type: ignore[arg-type, call-overload]
    if is_mixed:
        stage, is_bounded, draw = MIXED_STEPS[str(what)]
        settings = {"max_similarity": BOUNDS[init.name] if is_bounded else None}
    accelerator = Accelerator()
    backbone, triplets = load_model(init), MIXED if is_mixed else toy.triplets()
    hashes = {i: pixel_hash(open_image(toy.image(i))) for i in toy.training_images()}
    images, whole, candidates = ImageSource(toy.image, backbone.transform), None, None
    if stage == 2:
        backbone.freeze_image_side()
        with accelerator.main_process_first():
            whole = banks.load_or_build(backbone, images, hashes, root)
        local = whole.shard(accelerator.process_index, accelerator.num_processes)
        candidates = BankCandidates(replace(local, target=local.target.to(dtype)), *draw)
    identity = banks.assign_rows(hashes)
    share = len(rows) // accelerator.num_processes
    own = rows[accelerator.process_index * share :][:share]
    items = [(triplets[n], triplets[n].texts[n % len(triplets[n].texts)] if triplets[n].texts else None) for n in own]
    batch = TripletCollate(backbone.tokenize, identity, images, whole, KnownTargets(triplets, identity))(items)
    batch.pixels = None if batch.pixels is None else batch.pixels.to(dtype)
    batch.features = batch.features and ImageFeatures(*(part.to(dtype) for part in batch.features))
    if is_mixed:
        backbone.extra_losses = lambda *_: {}  # type: ignore[method-assign]
    objective = Objective(backbone, 0.1, True, candidates, **settings).to(dtype)
    if str(what).endswith("chunks"):
        prepare_compute(backbone, ComputeConfig(chunk=3, checkpoint=True))
    prepared = accelerator.prepare(objective)
    loss = prepared(batch)
    accelerator.backward(loss)
    gradients = {n: p.grad.clone() for n, p in objective.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    masked = torch.tensor(objective.statistics()["masked"], dtype=torch.float64)
    return {"loss": accelerator.reduce(loss.detach(), "mean"), "masked": masked, **gradients}


def benchmarks_of(toy: Toy) -> list[Benchmark]:
    """Of the toy dataset: a subset beside the gallery; and own candidates, several targets, queries without a part."""
    val = toy.benchmark("val")
    partial = [
        replace(q, reference=None) if n % 3 == 0 else replace(q, text=None) if n % 3 == 1 else q
        for n, q in enumerate(val.queries)
    ]
    queries = tuple(replace(q, targets=(*q.targets, *q.candidates[2 : 2 + n % 4])) for n, q in enumerate(partial))
    outside = val.queries[1].reference
    kept = tuple(i for i in val.gallery if i != outside)
    queries = tuple(
        replace(q, candidates=tuple(i for i in q.candidates if i != outside), targets=tuple(dict.fromkeys(q.targets)))
        for q in queries if outside not in q.targets
    )  # fmt: skip

    def wrong_answers(query: Query, count: int) -> tuple[str, ...]:
        return tuple(i for i in kept if i not in (query.reference, *query.targets))[count * 3 : count * 4]

    queries = tuple(replace(q, negatives=wrong_answers(q, n % 4)) for n, q in enumerate(queries))
    measures = (*recall_measures(1, 2, over="candidates"), Measure("map", 5))
    return [val, Benchmark("toy/mixed", kept, queries, True, measures)]


def evaluations(toy: Toy, init: Path, output: Path, process: int = 0) -> None:
    """Results of each benchmark, and one row per query: with blocks for all processes, and with one for the first."""
    backbone = load_model(init)
    images = ImageSource(toy.image, backbone.transform)
    for number, benchmark in enumerate(benchmarks_of(toy)):
        for size in (7, 256):
            result = evaluate(backbone, benchmark, images, None, True, size, top=4)
            stem = output / f"result-{number}-{size}-{process}"
            result.write_rows(stem.with_suffix(".jsonl"), "ranks", "top")
            stem.with_suffix(".json").write_text(json.dumps(result.as_json()))


def runs(toy: Toy, init: Path, output: Path) -> None:
    """A few steps of each stage, in folders ``stage1`` and ``stage2``.

    With its usual eps, AdamW blows up what is only rounding: a gradient of zero becomes a step of +lr or -lr. A large
    lr amplifies rounding from step to step.
    """
    for stage in (1, 2):
        config = toy_config(
            toy.folder, init=str(init), output=str(output / f"stage{stage}"), max_steps=4, adamw={"eps": 1e-2}, lr=0.03,
            backbone=init.name,
        )  # fmt: skip
        loop.train(config, stage)


def processes(toy: Toy, inits: Path, output: Path) -> None:
    """Both, for each backbone, in the processes that torchrun started."""
    accelerator = Accelerator()
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"]) == 2, accelerator.num_processes
    assert torch.distributed.get_backend() == "gloo"
    Accelerator.end_training = lambda self: None  # it ends the process group, which the next run here still needs
    for init in sorted(inits.iterdir()):
        (output / init.name).mkdir(exist_ok=True)
        for what in (1, 2, "chunks", *MIXED_STEPS, *(OPTIONS if init.name == "clip4cir" else ())):
            for dtype in (torch.float32, torch.float64):
                found = first_step(toy, init, what, output / "banks", rows_of(what), dtype)
                if accelerator.is_main_process:
                    name = f"step{what}-{dtype}.safetensors"
                    write_tensors(output / init.name / name, found, {"world": accelerator.num_processes})
        evaluations(toy, init, output / init.name, accelerator.process_index)
        runs(toy, init, output / init.name)
    torch.distributed.destroy_process_group()


def killed(toy: Toy, init: Path, output: Path) -> None:
    """A run that dies as by a power cut."""
    schedule = loop.schedule

    def die(config, step, *length):  # type: ignore[no-untyped-def]
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return schedule(config, step, *length)

    loop.schedule = die
    loop.train(toy_config(toy.folder, init=str(init), output=str(output), max_annotated=24, save_every=2), 1)


if __name__ == "__main__":
    DATASETS[Toy.name] = Toy
    what, *folders = sys.argv[1:]
    paths = [Path(folder) for folder in folders]
    {"killed": killed, "processes": processes}[what](Toy(str(paths[0])), *paths[1:])
