"""Stage 2 on a GPU at real sizes: a step against the model's own, and the loss against dense cross-entropy.

Models have random weights and the shapes of the published ones: CLIP4CIR with RN50x4 and ViT-L/14, BLIP4CIR with BLIP
base, SPRC with BLIP-2's Q-Former over tokens of ViT-g. References come from the bank, so vision towers do not run; the
two of BLIP have one layer. Their vocabularies are made up, of the published number of entries. The bank is of float16
on the device, as large as three quarters of what is free. The model's own step is ``compose`` forward, backward and the
optimiser's step; float32 throughout, but for the bank.

examples:
  python -m benchmarks.device                            # where there is a CUDA device
  python -m benchmarks.device --json benchmarks/results/device.json
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Row, bound, command, distance, in_turns, report, row, share
from benchmarks.step import TEMPERATURE, TEXTS, bank_of
from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.batches import TripletBatch
from spn4cir.errors import InputError, run_command
from spn4cir.losses import info_nce
from spn4cir.objective import BankCandidates, Objective
from spn4cir.types import ImageFeatures

BATCH, ROUNDS, NEAR = 256, 5, 1e-3
COUNTS = (20_000, 25_136, 100_000, 1_000_000, 10_000_000)
HELD = 25_136
"""The number of candidates at which a step is held against its bound, with the first model."""
BERT_WORDS = 30_522
VIT_G = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 1, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224,
}  # fmt: skip
Q_FORMER = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "encoder_hidden_size": 1408, "cross_attention_frequency": 2, "max_position_embeddings": 512,
    "use_qformer_text_input": True, "vocab_size": BERT_WORDS + 1,
}  # fmt: skip


class Model(NamedTuple):
    """A model by its backbone's name and options; references (L, D), targets (K, E); words of its tokenizer, if any."""

    name: str
    backbone: str
    options: dict[str, Any]
    reference: tuple[int, int]
    target: tuple[int, int]
    words: int = 0


MODELS = (
    Model("CLIP RN50x4", "clip4cir", {"model": "RN50x4-quickgelu"}, (1, 640), (1, 640)),
    Model("CLIP ViT-L/14", "clip4cir", {"model": "ViT-L-14-quickgelu"}, (1, 768), (1, 768)),
    Model(
        "BLIP base", "blip4cir", {"model": None, "config": {"vision_config": {"num_hidden_layers": 1}}},
        (577, 768), (1, 256), BERT_WORDS,
    ),
    Model(
        "BLIP-2 ViT-g", "sprc",
        {
            "model": None,
            "config": {
                "vision_config": VIT_G, "qformer_config": Q_FORMER,
                "num_query_tokens": 32, "image_text_hidden_size": 256,
            },
        },
        (257, 1408), (32, 256), BERT_WORDS,
    ),
)  # fmt: skip


def build(model: Model) -> Backbone:
    """With random weights, ready for stage 2."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        options = dict(model.options)
        if model.words:
            words = dict.fromkeys(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(TEXTS).split()))
            filled = [*words, *(f"[unused{n}]" for n in range(model.words - len(words)))]
            (Path(folder) / "vocab.txt").write_text("\n".join(filled[: model.words]) + "\n")
            options["tokenizer"] = folder
        backbone = build_backbone(model.backbone, **options)
    backbone.freeze_image_side()
    return backbone.train()


class Steps:
    """Steps of stage 2 with any number of candidates, and of the model alone.

    Args:
        model: what to build.
        batch: queries.
        device: where.
    """

    def __init__(self, model: Model, batch: int, device: str):
        self.device = torch.device(device)
        self.backbone = build(model).to(self.device)
        tokens = self.backbone.tokenize([TEXTS[n % len(TEXTS)] for n in range(batch)])
        reference = torch.randn(batch, *model.reference)
        rows = torch.arange(batch)
        features = ImageFeatures(reference, reference[:, :0])
        self.batch = TripletBatch(tokens, rows, rows[:, None], rows[:, None], features=features).to(self.device)
        self.fixed = torch.randn(batch, model.target[1], device=self.device)
        self.query = F.normalize(torch.randn(batch, model.target[1], device=self.device), dim=-1).requires_grad_()
        trained = [value for value in self.backbone.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self.objective: Objective | None = None
        self.bank = torch.empty(0)

    def hold(self, count: int, target: tuple[int, int]) -> None:
        """From here on so many candidates count."""
        bank = bank_of(count, *target, device=str(self.device), dtype=torch.float16)
        self.bank = bank.target
        self.objective = Objective(self.backbone, TEMPERATURE, candidates=BankCandidates(bank))

    def drop(self) -> None:
        """Give the candidates' memory back."""
        self.objective, self.bank = None, torch.empty(0)

    def stage2(self) -> None:
        """A step as in training."""
        assert self.objective is not None
        self._step(self.objective(self.batch))

    def alone(self) -> None:
        """A step of the model without candidates."""
        assert self.batch.features is not None
        query = self.backbone.compose(self.batch.features.reference, self.batch.tokens).query
        self._step((query * self.fixed).sum())

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def loss(self) -> tuple[Tensor, Tensor]:
        """The loss of given queries, and their gradient."""
        value = info_nce(self.query, self.bank, self.batch.target, TEMPERATURE)
        return value.detach(), torch.autograd.grad(value, self.query)[0]

    def dense(self) -> tuple[Tensor, Tensor]:
        """The same from all scores at once."""
        scores = (self.query @ self.bank.flatten(0, 1).float().T).view(len(self.query), *self.bank.shape[:2]).amax(2)
        value = F.cross_entropy(scores / TEMPERATURE, self.batch.target[:, 0])
        return value.detach(), torch.autograd.grad(value, self.query)[0]


def settle() -> None:
    """Wait until a GPU has nothing to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_on_device(task: Callable[[], Any]) -> float | None:
    """MB on the GPU beyond what it held; None without one."""
    if not torch.cuda.is_available():
        return None
    settle()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    task()
    settle()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def free(device: str) -> int:
    """Bytes free on a device."""
    if device == "cpu":
        return 2**30
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def measure(model: Model, counts: tuple[int, ...], batch: int, device: str, rounds: int) -> list[Row]:
    """Rows of one model; one that says so where the bank does not fit."""
    steps, rows, (k, e) = Steps(model, batch, device), [], model.target
    for count in counts:
        name = f"{model.name}, {count:,} candidates × {k} × {e}, B = {batch}"
        if 2 * count * k * e > 0.75 * free(device):
            rows.append(row(f"{name}: a float16 bank does not fit", "–"))
            continue
        steps.hold(count, model.target)
        ways = {"stage2": steps.stage2, "alone": steps.alone}
        seconds = in_turns(ways, rounds, settle)
        memory = {way: peak_on_device(task) for way, task in ways.items()}
        pair = seconds["stage2"], seconds["alone"]
        bounds = (bound("time", share(*pair), most=1.15),) if count == HELD and model == MODELS[0] else ()
        rows.append(row(f"stage-2 step, {name}", "the model alone", pair, (memory["stage2"], memory["alone"]), bounds))
        rows.append(against_dense(steps, name, rounds))
        steps.drop()
    return rows


def against_dense(steps: Steps, name: str, rounds: int) -> Row:
    """The loss alone against dense cross-entropy, where that fits; asserts that they agree."""
    (count, k, e), batch = steps.bank.shape, len(steps.query)
    ways: dict[str, Callable[[], Any]] = {"ours": steps.loss}
    if 4 * count * k * (e + 4 * batch) < 0.75 * free(steps.device.type):  # widened, and scores four times
        ways["dense"] = steps.dense
        apart = [distance(one, other) for one, other in zip(steps.loss(), steps.dense(), strict=True)]
        assert max(apart) < NEAR, f"{name}: loss or gradient differ from the dense ones by {apart}"
    seconds = in_turns(ways, rounds, settle)
    memory = {way: peak_on_device(task) for way, task in ways.items()}
    fits = "dense cross-entropy" + ("" if "dense" in ways else ", which does not fit")
    return row(f"loss alone, {name}", fits, (seconds["ours"], seconds.get("dense")),
               (memory["ours"], memory.get("dense")))  # fmt: skip


def suite(
    models: tuple[Model, ...] = MODELS,
    counts: tuple[int, ...] = COUNTS,
    batch: int = BATCH,
    device: str = "cuda",
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """All measurements.

    Raises:
        InputError: without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no GPU: python -m benchmarks.step measures a step on the CPU")
    rows = [one for model in models for one in measure(model, counts, batch, device, rounds)]
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    what = f"AdamW steps, float16 bank; medians of {rounds} rounds in turns; memory on the device"
    return report("device", what, rows, device=gpu)


if __name__ == "__main__":
    run_command(lambda: command("device", __doc__, suite))
