"""The one loop, for both stages: build, step, evaluate, save."""

import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader
from tqdm import tqdm

from spn4cir import bank as banks
from spn4cir import checkpoints
from spn4cir.backbone import Backbone, checkpoint_blocks, compile_blocks
from spn4cir.backbones import INSIDE, build_backbone, check_backbone
from spn4cir.config import ComputeConfig, TrainConfig
from spn4cir.datasets import load_dataset, with_pictures
from spn4cir.datasets.generated import open_generated
from spn4cir.errors import InputError
from spn4cir.evaluate import evaluate, metric_names, selection_score
from spn4cir.identity import PUBLISHED_CLASSES, inspect_images, read_optimized
from spn4cir.images import ImageSource, KnownTargets, TripletCollate, TripletRows, TripletSampler, prefetch
from spn4cir.objective import Objective
from spn4cir.run import Run, named_by
from spn4cir.schedules import SCHEDULES
from spn4cir.types import Benchmark, Dataset, Query, Triplet

SOURCES = {"model", "pretrained", "config", "tokenizer"}
"""Options of a backbone that say where weights and words come from."""


def train(config: TrainConfig, stage: int) -> Path:
    """Train one stage and return the run folder.

    Stage 1 trains query and target side with the batch's targets as candidates. Stage 2 freezes the image side and
    scores each query against a bank of all candidates.

    Args:
        config: everything that decides the run.
        stage: 1 or 2.

    Raises:
        InputError: before anything is written, if data, weights or settings do not fit.
    """
    check_backbone(config.backbone)
    check_stage(config, stage)
    accelerator = start(config)
    run = Run.open(config, stage, accelerator)
    dataset = load_dataset(config.dataset, config.data_root)
    asked = bool(dataset.protocols) or config.selection == "val"  # people's own pictures may come without any query
    benchmark = dataset.benchmark("val", config.protocol) if asked else None
    dataset, triplets, selection_benchmark = load_triplets(config, dataset, benchmark, run.say)
    reported = benchmark or selection_benchmark
    backbone = load_backbone(config, stage, run.say).to(accelerator.device)
    extra: Iterable[str] = ()
    if config.bank.extra:
        dataset = with_pictures(dataset, config.bank.extra)
        extra = dataset.images
    images = ImageSource(dataset.path, backbone.transform, config.keep_pixels)
    candidates = training_images(config, dataset, triplets, extra)
    with accelerator.main_process_first():  # the others find in the cache what the first has decoded
        pixels = hash_pixels(
            dataset, [*candidates, *selection_benchmark.gallery, *reported.gallery], run.say, show=run.main
        )
    hashes = {image_id: pixels[image_id] for image_id in candidates}

    main, side = split_rows(triplets)
    process = (accelerator.process_index, accelerator.num_processes)
    parts = config.compute.accumulate
    sampler = TripletSampler(main, side, config.batch_size, config.generated_share, config.seed, process, parts)
    steps = min(len(sampler) * config.epochs, config.max_steps or sys.maxsize)

    bank = gallery = probe = None
    if stage == 2:
        backbone.freeze_image_side()
    draw = None if config.bank.limit is None else (config.bank.limit, config.seed)
    prepare_compute(backbone, config.compute)
    objective = Objective(backbone, config.temperature, config.learn_temperature, None, config.negatives, draw)
    optimizer = torch.optim.AdamW(parameter_groups(objective, config), config.lr, (0.9, config.beta2), config.eps)
    if stage == 2:
        with accelerator.main_process_first():
            bank = frozen_features(config, backbone, images, hashes)
        if run.main and bank.reference is not None:
            shown = {image_id: pixels[image_id] for image_id in selection_benchmark.gallery}
            held = bank.rows.keys() >= shown.keys()  # of triplets that were put aside
            gallery = bank if held else frozen_features(config, backbone, images, shown)
        probe = banks.FrozenCheck(backbone, images(candidates[0]))
        objective.bank = bank.shard(*process).to(accelerator.device)
        if not objective.bank.resident:
            run.say("the bank does not fit on the device: it is read ahead from disk, at each step")
    identity = bank.rows if bank else banks.assign_rows(hashes)
    references = bank.references if bank and bank.reference is not None else None
    answers = KnownTargets(triplets, identity)
    rows = bank.rows if bank else None
    collate = TripletCollate(backbone.tokenize, identity, images, rows, references, answers)
    loader = DataLoader(
        TripletRows(triplets, config.seed), batch_sampler=sampler, collate_fn=collate, num_workers=config.workers
    )
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    run.start(config, objective)
    state = run.resume(objective, optimizer, bank.fingerprint if bank else None)

    bar = tqdm(total=steps, initial=state["step"], desc=run.title, unit="step", disable=not run.main)
    while state["step"] < steps:
        sampler.epoch, sampler.skip = divmod(state["step"], len(sampler))
        losses: list[torch.Tensor] = []
        backbone.train(config.dropout)
        for part, batch in enumerate(prefetch(loader)):
            place = accelerator.process_index + part % parts * accelerator.num_processes
            torch.manual_seed((config.seed * 1_000_003 + state["step"] * 4096 + place) % 2**63)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * config.lr * schedule(config, state["step"], steps, len(sampler))
            with accelerator.accumulate(prepared):
                loss = prepared(batch.to(accelerator.device), state["step"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            objective.hold_temperature()
            state["step"] += 1
            bar.update()
            if state["step"] >= steps or (config.save_every and state["step"] % config.save_every == 0):
                break
        mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(mean_loss):
            raise InputError(f"the loss is {mean_loss} at step {state['step']}: lower lr, now {config.lr}")
        if probe:
            probe.check(backbone)
        epoch, inside = divmod(state["step"], len(sampler))
        row = {"step": state["step"], "epoch": epoch, "loss": mean_loss, "temperature": objective.temperature.item()}
        due = state["step"] >= steps or (not inside and config.eval_every and epoch % config.eval_every == 0)
        if run.main:
            if due:
                result = evaluate(backbone, selection_benchmark, images, gallery, batch_size=config.eval_batch_size)
                run.keep_best(
                    backbone,
                    result,
                    selection_score(result["metrics"], config.select_by or selection_benchmark.selection),
                    state,
                )
                row |= result["metrics"]
            run.log(row, bar)
            run.save(objective, optimizer, state)
        accelerator.wait_for_everyone()
    bar.close()
    if run.main and (selection_benchmark is not reported or (gallery and config.bank.dtype != "float32")):
        # selected on what was put aside, or on rounded features; reported is the protocol, in full, once
        best = checkpoints.load_model(run.folder).to(accelerator.device)
        state["best"]["result"] = evaluate(best, reported, images, batch_size=config.eval_batch_size)
    run.finish(state, selection_benchmark.name)
    return run.folder


def check_stage(config: TrainConfig, stage: int) -> None:
    """Raises ``InputError`` for settings that the other stage alone would heed."""
    if stage == 2 and config.negatives.types != ["target"]:
        raise InputError(f"negatives.types {config.negatives.types} is for stage 1: a bank holds targets alone")
    for name in ("limit", "extra"):
        if stage == 1 and getattr(config.bank, name) is not None:
            raise InputError(f"bank.{name} is for stage 2: the candidates of stage 1 are the targets of the batch")
    if stage == 1 and config.batch_size // config.compute.accumulate < 2:
        raise InputError(
            f"batch_size {config.batch_size} in {config.compute.accumulate} parts leaves one triplet, without any "
            "negative: raise batch_size, or lower compute.accumulate"
        )


def start(config: TrainConfig) -> Accelerator:
    """Join the processes and seed this one. Raises ``InputError`` for a precision that the device does not have."""
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))  # processes wait while the first one builds a bank
    none = not torch.accelerator.is_available()  # else several processes on a CPU would not find each other
    accelerator = Accelerator(
        cpu=none,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.compute.accumulate,
        kwargs_handlers=[patience],
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would say nothing
        raise InputError("mixed_precision fp16 needs a GPU, and there is none: give --mixed-precision no, or bf16")
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:  # each would train by itself, and nothing would say so
        raise InputError(
            f"{expected} processes were started, and {accelerator.num_processes} found each other: start as many as "
            "there are GPUs, or on CPUs ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N"
        )
    torch.manual_seed(config.seed)
    return accelerator


def prepare_compute(backbone: Backbone, compute: ComputeConfig) -> None:
    """Let the backbone compute as the settings want it. Raises ``InputError`` if it has no blocks for that."""
    backbone.chunk = compute.chunk
    for name, prepare in (("checkpoint", checkpoint_blocks), ("compile", compile_blocks)):
        if getattr(compute, name) and not prepare(backbone):
            raise InputError(f"compute.{name}: {backbone.name} has no blocks that follow each other")


def schedule(config: TrainConfig, step: int, steps: int, epoch: int) -> float:
    """Factor of the learning rate at a step: linear warm-up, then the schedule over what remains.

    Args:
        config: names the schedule.
        step: now.
        steps: of the run.
        epoch: steps of one epoch.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    past = config.warmup_steps
    return SCHEDULES[config.schedule](step - past, max(steps - past, 1), epoch, **config.schedule_options)


def frozen_features(config: TrainConfig, backbone: Backbone, images: ImageSource, hashes: dict[str, str]) -> banks.Bank:
    """The bank of these images as the settings want it."""
    parts = banks.stored_parts(config.bank.dtype, config.bank.references == "stored")
    root = checkpoints.runs_root() / "banks"
    return banks.load_or_build(backbone, images, hashes, root, config.eval_batch_size, parts)


def load_triplets(
    config: TrainConfig, dataset: Dataset, benchmark: Benchmark | None, say: Callable[[str], None]
) -> tuple[Dataset, list[Triplet], Benchmark]:
    """The dataset, with images that only generated triplets name; the triplets; and the benchmark that selects.

    Triplets are the annotated ones, cut to the limit, then the generated ones. What is put aside is annotated where
    anything is.

    Raises:
        InputError: if there are no triplets, or the benchmark lacks a metric to select by.
    """
    for note in dataset.notes():
        say(note)
    for name in config.select_by or ():
        if benchmark and name not in metric_names(benchmark):
            known = ", ".join(metric_names(benchmark))
            raise InputError(f"select_by: {benchmark.name} has no metric {name!r}; known: {known}")
    triplets, generated = dataset.triplets()[: config.max_annotated], list[Triplet]()
    if config.generated:
        folders = [Path("data") / dataset.name / name for name in (f"generated_{config.backbone}", "generated")]
        default = next((folder for folder in folders if folder.is_dir()), folders[-1]) / "triplets.json"
        path = default if config.generated == "auto" else dataset.file(config.generated)
        dataset, generated, notes = open_generated(path, dataset, benchmark.gallery if benchmark else ())
        for note in notes:
            say(note)
    if not triplets and not generated:
        raise InputError(
            f"no triplets to train on: {'raise max_annotated, or ' * dataset.annotated}give generated ones"
        )
    if config.selection == "val":
        assert benchmark is not None
        return dataset, triplets + generated, benchmark
    if triplets:
        triplets, selection_benchmark = split_holdout(config, triplets)
    else:
        generated, selection_benchmark = split_holdout(config, generated)
    lacking = [name for name in config.select_by or () if name not in metric_names(selection_benchmark)]
    if lacking:
        config.select_by = [name for name in config.select_by or () if name not in lacking] or None
        names = ", ".join(config.select_by or selection_benchmark.selection)
        say(f"{selection_benchmark.name} has no {', '.join(lacking)}: selected by {names}")
    return dataset, triplets + generated, selection_benchmark


def split_holdout(config: TrainConfig, triplets: Sequence[Triplet]) -> tuple[list[Triplet], Benchmark]:
    """A fraction of the triplets as a benchmark, and the rest.

    A triplet's own words decide on its side, so that it is the same for all seeds, for both stages, and whatever other
    triplets there are. Of generated triplets, which come in numbers for one target, the target decides, so that none is
    learned from and asked for; and they are ranked over all images that any of them names, where annotated ones are
    ranked over those put aside.
    """
    made = triplets[0].generated
    drawn = {
        n: random.Random(f"holdout/{t.target if made else f'{t.reference}/{t.target}/{t.modifications}'}").random()
        for n, t in enumerate(triplets)
        if t.reference != t.target  # which would not be ranked
    }
    least = min(drawn.values(), default=0.0)
    aside = {n for n, value in drawn.items() if value < config.holdout or value == least}
    if not 0 < len(aside) < len(triplets):
        raise InputError(
            f"selection: holdout puts {len(aside)} of {len(triplets)} {'generated' if made else 'annotated'} triplets "
            f"aside: nothing is left to select on, or to train on; holdout is {config.holdout}"
        )
    asked = [triplets[n] for n in sorted(aside)]
    selection_benchmark = Benchmark(
        name=f"{config.dataset}/holdout-{'generated-' * made}{config.holdout:g}",
        gallery=tuple(dict.fromkeys(i for t in (triplets if made else asked) for i in (t.reference, t.target))),
        queries=tuple(Query(t.reference, t.modifications[0], (t.target,)) for t in asked),
        exclude_reference=True,
        ks=(1, 5, 10, 50),
        selection=("R@10", "R@50"),
    )
    return [t for n, t in enumerate(triplets) if n not in aside], selection_benchmark


def training_images(
    config: TrainConfig, dataset: Dataset, triplets: Sequence[Triplet], extra: Iterable[str] = ()
) -> list[str]:
    """Images of the bank, in a fixed order: those that triplets name, the rest of training, and extra ones."""
    named = [i for t in triplets for i in (t.reference, t.target)]
    rest = dataset.training_images() if config.bank.images == "all" else []
    return list(dict.fromkeys([*named, *rest, *extra]))


def hash_pixels(
    dataset: Dataset, image_ids: Sequence[str], say: Callable[[str], None], show: bool = True
) -> dict[str, str]:
    """Image id → name of its pixels, equal where they are; or where the dataset's ``optimized_images.json`` says so.

    Each image is decoded, unless it was before and has not changed since: a broken one is found before training.

    Raises:
        InputError: naming the first image that is missing or broken, and how to leave such images out.
    """
    paths = {image_id: dataset.path(image_id) for image_id in image_ids}
    found = inspect_images(paths, checkpoints.runs_root() / "pixels" / f"{dataset.name}.jsonl", show=show)
    broken = [image_id for image_id, image in found.items() if image.problem]
    if broken:
        first = found[broken[0]]
        more = f" (and {len(broken) - 1} more: see {dataset.check_command(broken[0])})" if broken[1:] else ""
        what = "is missing" if first.problem == "missing" else f"does not decode: {first.detail}"
        raise InputError(f"image {paths[broken[0]]} {what}{more}")
    published = dataset.root and dataset.root / PUBLISHED_CLASSES
    if not published or not published.is_file():
        return {image_id: image.pixels for image_id, image in found.items()}
    canonical = read_optimized(published)
    say(f"{dataset.name}: {published} says which images are equal")
    first_of = {image_id: canonical.get(image_id, image_id) for image_id in found}
    return {i: found[first].pixels if first in found else f"as {first}" for i, first in first_of.items()}


def split_rows(triplets: Sequence[Triplet]) -> tuple[list[int], list[int]]:
    """Item numbers of annotated and of generated triplets."""
    return (
        [n for n, t in enumerate(triplets) if not t.generated],
        [n for n, t in enumerate(triplets) if t.generated],
    )


def load_backbone(config: TrainConfig, stage: int, say: Callable[[str], None] = print) -> Backbone:
    """The model to start from: ``init``, else for stage 2 the newest stage 1, else a new one from its options.

    Options that differ from those of ``init`` hold, and what only they bring is initialised anew; but those that say
    where weights come from do not, and that is said.
    """
    if inside := config.backbone_options.keys() & set(INSIDE):
        raise InputError(f"backbone {config.backbone}: {inside.pop()} is not for a recipe to set")
    if stage == 1 and not config.init:
        return build_backbone(config.backbone, **config.backbone_options)
    if not config.init:
        run = checkpoints.newest_run(config.dataset, config.backbone, stage=1)
        if run is None:
            where = checkpoints.runs_root() / config.dataset / config.backbone
            raise InputError(
                f"stage 2 starts from a completed stage 1 run, and {where} holds none: "
                f"run accelerate launch recipes/stage1.py{named_by(config)} first, or give --init FOLDER"
            )
        config.init = str(run)
    name, options = checkpoints.read_model(Path(config.init))
    check_backbone(name)
    if name != config.backbone:
        raise InputError(f"{config.init} holds a {name}, and the backbone is {config.backbone}: give --backbone {name}")
    changes = {key: value for key, value in config.backbone_options.items() if options.get(key) != value}
    for key in sorted(SOURCES & changes.keys()):
        say(f"{config.init} is the start: its own {key} holds, and {changes.pop(key)!r} of backbone_options does not")
    return checkpoints.load_model(Path(config.init), changes)


def parameter_groups(objective: Objective, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters by decay, which only matrices have, and by the factor of their learning rate.

    Raises:
        InputError: if a text in ``lr_scale`` is in no trainable parameter's name.
    """
    trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    for text in config.lr_scale:
        if not any(text in name for name in trainable):
            raise InputError(f"lr_scale: no parameter that trains has {text!r} in its name, as {next(iter(trainable))}")
    scale = {n: next((f for text, f in config.lr_scale.items() if text in n), 1.0) for n in trainable}
    return [
        {
            "params": [p for n, p in trainable.items() if (p.ndim > 1) == matrices and scale[n] == factor],
            "weight_decay": config.weight_decay if matrices else 0.0,
            "scale": factor,
        }
        for factor in dict.fromkeys(scale.values())
        for matrices in (True, False)
    ]
