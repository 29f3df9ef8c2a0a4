"""The one loop, for every objective: step, log, evaluate, save."""

import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from spn4cir import checkpoints
from spn4cir.backbones import check_backbone
from spn4cir.batches import TripletBatch
from spn4cir.config import TrainConfig
from spn4cir.data import load_data
from spn4cir.distributed import all_reduce
from spn4cir.errors import InputError
from spn4cir.evaluate import evaluate
from spn4cir.images import ImageSource
from spn4cir.objective import Objective
from spn4cir.preparation import Training, parameter_groups
from spn4cir.results import primary_names, selection_score
from spn4cir.run import Run
from spn4cir.schedules import SCHEDULES
from spn4cir.stages import CHECKS, STAGES, load_backbone, resolve_temperature


def train(config: TrainConfig, stage: Any) -> Path:
    """Train one stage and return the run folder.

    Stage 1 trains query and target side with the batch's targets as candidates. Stage 2 freezes the image side and
    scores each query against a bank of all candidates.

    Args:
        config: everything that decides the run.
        stage: name of a preparation in ``spn4cir.stages.STAGES``, such as 1 or 2.

    Raises ``InputError`` before anything is written, if data, weights or settings do not fit; later, at the step whose
    loss or gradient is not finite.
    """
    check_backbone(config.backbone)
    if stage not in STAGES:
        raise InputError(f"unknown stage {stage!r}; known: {', '.join(map(str, STAGES))}")
    if stage in CHECKS:
        CHECKS[stage](config)
    run = Run.open(config, stage, start(config))
    data = load_data(config, run.say)
    run.locate(data.dataset)
    backbone = load_backbone(config, stage, run.say, data.dataset).to(run.accelerator.device)
    resolve_temperature(config, backbone, run.say)
    training = STAGES[stage](config, run, data, backbone)
    with run:
        state = fit(training, config, run, config.select_by or primary_names(data.selection))
        if data.selection is not data.reported or training.is_rounded:
            # selected on a hold-out split, or on rounded features; the protocol is reported in full, once
            best = checkpoints.load_model(run.folder).to(run.accelerator.device)
            images = ImageSource(data.dataset.image, best.transform)
            result = evaluate(best, data.reported, images, batch_size=config.eval_batch_size)
            if run.main:
                state["best"]["result"] = result.as_json()
        annotated, generated = data.split_rows()
        run.finish(state, data.selection.name, {"annotated": len(annotated), "generated": len(generated)})
    return run.folder


def fit(training: Training, config: TrainConfig, run: Run, select_by: list[str]) -> dict[str, Any]:
    """Train an objective to the end of the run, and return its progress.

    A run that was stopped goes on from its last state. The mean of the metrics ``select_by`` selects the best one;
    ``patience`` evaluations in a row without a better one end the run early.
    Raises ``InputError`` if a loss or a gradient is not finite; the last saved state stays as it is.
    """
    accelerator, objective, loader = run.accelerator, training.objective, training.loader
    adamw, limit = config.adamw, config.adamw.max_grad_norm
    optimizer = torch.optim.AdamW(parameter_groups(objective, config), config.lr, (0.9, adamw.beta2), adamw.eps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps = min(len(loader) * config.epochs, config.max_steps or sys.maxsize)
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    run.start(config, objective)
    state = run.resume(objective, optimizer, training.bank)
    bar = tqdm(total=steps, initial=state["step"], desc=f"stage {run.stage}", unit="step", disable=not run.main)
    log = StepLog(config, accelerator)
    while state["step"] < steps and run.is_patient(state):
        objective.train(config.dropout)
        for part, batch in enumerate(loader.from_step(state["step"])):
            torch.manual_seed(_seed(config, accelerator, state["step"], part % loader.parts))
            factor = schedule(config, state["step"], steps, len(loader))
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * config.lr * factor
            with accelerator.accumulate(prepared):
                loss = prepared(batch.to(accelerator.device))
                accelerator.backward(loss)
                is_whole = accelerator.sync_gradients
                norm = limit_gradient(accelerator, optimizer, parameters, limit) if is_whole else None
                check_finite(loss, norm, batch, run)
                optimizer.step()
                optimizer.zero_grad()
            log.losses.append(loss.detach())
            if norm is None:
                continue
            objective.after_step()
            state["step"] += 1
            bar.update()
            epoch, inside = divmod(state["step"], len(loader))
            is_last = state["step"] >= steps
            is_saved = is_last or not inside or (config.save_every and state["step"] % config.save_every == 0)
            if not is_saved and state["step"] % config.log_every:
                continue
            row = {"step": state["step"], "epoch": epoch, **log.numbers(objective, config.lr * factor, norm)}
            if is_saved:
                check_parameters(parameters, state["step"], run)
                training.check()
            if is_last or (not inside and config.eval_every and epoch % config.eval_every == 0):
                result = training.evaluate()
                row |= result.metrics
                score = selection_score(result.metrics, select_by)
                objective.backbone.temperature = objective.temperature.item()
                run.keep_best(objective.backbone, result.as_json(), score, state)
                is_last = is_last or not run.is_patient(state)
            if run.main:
                run.log(row, bar)
            if is_saved:
                run.save(objective, optimizer, state)
            accelerator.wait_for_everyone()
            log.restart()
            if is_last:
                break
    bar.close()
    return state


class StepLog:
    """Numbers of the steps since the last line of the log."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.restart()

    def restart(self) -> None:
        """Begin the next line."""
        self.losses: list[Tensor] = []
        self.started = time.monotonic()

    def numbers(self, objective: Objective, lr: float, norm: Tensor) -> dict[str, float]:
        """Loss, learning rate, last gradient norm, the objective's own, throughput, memory; all processes call it."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        steps = len(self.losses) / self.config.compute.accumulate
        return {
            "loss": self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item(),
            "lr": lr,
            "grad_norm": norm.item(),
            **objective.statistics(),
            "items_per_second": steps * self.config.batch_size / seconds,
            **peak_memory(self.accelerator.device),
        }


def limit_gradient(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], limit: float | None
) -> Tensor:
    """The norm of the gradient, a scalar; the gradient is scaled down to ``limit`` where it is larger."""
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimizer)
    held = [(p.grad, hasattr(p, "first_row")) for p in parameters if p.grad is not None]  # or this process's share
    norm = get_total_norm([gradient for gradient, is_share in held if not is_share])
    if shares := [gradient for gradient, is_share in held if is_share]:
        norm = (norm.square() + all_reduce(get_total_norm(shares).square())).sqrt()
    if limit is not None:
        clip_grads_with_norm_(parameters, limit, norm)
    return norm


def check_finite(loss: Tensor, norm: Tensor | None, batch: TripletBatch, run: Run) -> None:
    """Raises ``InputError`` naming the triplets of the batch if the loss or the gradient norm is not finite.

    Under fp16 a gradient may overflow: the scaler skips such steps.
    """
    numbers = [loss.detach()] if norm is None or run.accelerator.scaler is not None else [loss.detach(), norm]
    if all(bool(torch.isfinite(number)) for number in numbers):
        return
    named = "; ".join(batch.triplets[:3]) + (f"; and {len(batch) - 3} more" if len(batch) > 3 else "")
    shown = ", ".join(f"{number.item():.4g}" for number in numbers)
    raise InputError(
        f"step {batch.step + 1}: loss{' and gradient norm' * (len(numbers) > 1)} {shown}: not finite; lower lr, now "
        f"{run.config.lr}, or set adamw.max_grad_norm; {_kept(run)}; triplets of the batch: {named}"
    )


def check_parameters(parameters: Sequence[nn.Parameter], step: int, run: Run) -> None:
    """Raises ``InputError`` if a weight is not finite, so that no such state is saved."""
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise InputError(f"step {step}: weights are not finite: lower lr, now {run.config.lr}; {_kept(run)}")


def _kept(run: Run) -> str:
    saved = run.folder / "last.safetensors"
    return f"{saved} keeps the last saved state" if saved.is_file() else "no state was saved yet"


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest memory in use so far, in MB: of the GPU's tensors, or of this process; empty where it is unknown."""
    if device.type == "cuda":
        return {"peak_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6}
    try:
        import resource
    except ImportError:  # not on this kind of system
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}


def _seed(config: TrainConfig, accelerator: Accelerator, step: int, part: int) -> int:
    """Of what dropout draws: another number for each step, part and process."""
    place = accelerator.process_index + part * accelerator.num_processes
    return int((config.seed * 1_000_003 + step * 4096 + place) % 2**63)


def schedule(config: TrainConfig, step: int, steps: int, epoch: int) -> float:
    """Factor of the learning rate at a step of ``steps``: a linear warm-up, then the schedule over what remains."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    past = config.warmup_steps
    return SCHEDULES[config.schedule](step - past, max(steps - past, 1), epoch, **config.schedule_options)


def start(config: TrainConfig) -> Accelerator:
    """Join the processes and seed this one. Raises ``InputError`` for a precision that the device does not have."""
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))  # processes wait while the first one builds a bank
    none = not torch.accelerator.is_available()  # else several processes on a CPU would not find each other
    precision, parts = config.mixed_precision, config.compute.accumulate
    accelerator = Accelerator(
        cpu=none, mixed_precision=precision, gradient_accumulation_steps=parts, kwargs_handlers=[patience]
    )
    if precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would say nothing
        raise InputError("mixed_precision fp16 needs a GPU, and there is none: give --mixed-precision no, or bf16")
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:  # each would train by itself, and nothing would say so
        raise InputError(
            f"{expected} processes were started, and {accelerator.num_processes} found each other: start as many as "
            "there are GPUs, or on CPUs ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N"
        )
    torch.manual_seed(config.seed)
    return accelerator
