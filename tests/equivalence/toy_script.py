"""What tests run in processes of their own, on the toy dataset.

killed:    toy_script.py killed TOY INIT OUTPUT      a stage 1 run that kills itself before step 5
processes: toy_script.py processes TOY INITS OUTPUT  one step's loss and gradients, then a run, of both stages, from
                                                     each of the folders in INITS, which are named by backbone
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator
from conftest import Toy, toy_config
from torch import Tensor

import spn4cir.train as loop
from spn4cir import bank as banks
from spn4cir.batches import KnownTargets, TripletCollate
from spn4cir.checkpoints import load_model, write_tensors
from spn4cir.config import ComputeConfig, NegativesConfig
from spn4cir.datasets import DATASETS
from spn4cir.images import ImageSource, open_image, pixel_hash
from spn4cir.objective import Objective

# TRAIN[:20] are the targets of triplets 0 to 19 and again of 20 to 39: with four rows a process, equal targets meet
# on different processes; 17 has target TRAIN[0], the twin of TRAIN[1], which is the target of 0.
BATCH = [0, 3, 4, 9, 20, 23, 17, 8]


# Further steps of the first backbone: what negatives there are, and how many are drawn with which seed. Of 40 rows of
# the bank the second process holds the last 20, and no target is among them: so with one drawn it may hold nothing.
OPTIONS: dict[str, tuple[int, NegativesConfig, tuple[int, int] | None]] = {
    "types": (1, NegativesConfig(["target", "query", "text", "reference"]), None),
    "similar": (1, NegativesConfig(["target", "query", "text", "reference"], max_similarity=0.9), None),
    "drawn": (2, NegativesConfig(), (7, 3)),
    "one drawn": (2, NegativesConfig(), (1, 0)),
    "drawn, similar": (2, NegativesConfig(max_similarity=0.9), (7, 3)),
}


def first_step(
    toy: Toy, init: Path, what: int | str, root: Path, rows: list[int], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Loss and gradients of one batch, shared among the processes there are; the mean of all.

    ``what`` is a stage, or one of ``OPTIONS``, or ``chunks``: stage 1 in chunks and with checkpoints.
    """
    stage, negatives, draw = OPTIONS.get(what, (1 if what == "chunks" else what, None, None))  # type: ignore[arg-type]
    accelerator = Accelerator()
    backbone, triplets = load_model(init), toy.triplets()
    hashes = {i: pixel_hash(open_image(toy.path(i))) for i in toy.training_images()}
    images, bank = ImageSource(toy.image, backbone.transform), None
    if stage == 2:
        backbone.freeze_image_side()
        with accelerator.main_process_first():
            bank = banks.load_or_build(backbone, images, {i: hashes[i] for i in toy.training_images()}, root)
        if accelerator.num_processes > 1:
            bank = bank.shard(accelerator.process_index, accelerator.num_processes)
    identity = banks.assign_rows({i: hashes[i] for i in toy.training_images()})
    share = len(rows) // accelerator.num_processes
    own = rows[accelerator.process_index * share :][:share]
    items = [(triplets[n], triplets[n].texts[n % 2]) for n in own]
    references, answers = bank and bank.references, KnownTargets(triplets, identity)
    batch = TripletCollate(backbone.tokenize, identity, images, bank and bank.rows, references, answers)(items)
    if bank is not None:
        bank = replace(bank, target=bank.target.to(dtype))
    batch.pixels, batch.features = (None if x is None else x.to(dtype) for x in (batch.pixels, batch.features))
    objective = Objective(backbone, 0.1, True, bank, negatives, draw).to(dtype)
    if what == "chunks":
        loop.prepare_compute(backbone, ComputeConfig(chunk=3, checkpoint=True))
    prepared = accelerator.prepare(objective)
    loss = prepared(batch)
    accelerator.backward(loss)
    gradients = {n: p.grad.clone() for n, p in objective.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    return {"loss": accelerator.reduce(loss.detach(), "mean"), **gradients}


def runs(toy: Toy, init: Path, output: Path) -> None:
    """A few steps of each stage, in folders ``stage1`` and ``stage2``.

    With its usual eps, AdamW blows up what is only rounding: a gradient of zero becomes a step of +lr or -lr.
    """
    for stage in (1, 2):
        config = toy_config(
            toy.folder, init=str(init), output=str(output / f"stage{stage}"), max_steps=4, eps=1e-2, lr=0.1,
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
        for what in (1, 2, "chunks", *(OPTIONS if init.name == "clip4cir" else ())):
            for dtype in (torch.float32, torch.float64):
                found = first_step(toy, init, what, output / "banks", BATCH, dtype)
                if accelerator.is_main_process:
                    (output / init.name).mkdir(exist_ok=True)
                    name = f"step{what}-{dtype}.safetensors"
                    write_tensors(output / init.name / name, found, {"world": accelerator.num_processes})
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
