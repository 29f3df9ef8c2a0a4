"""A step in chunks, with checkpoints, compiled or in parts: the same loss and gradients, for every backbone."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_backbones import TINY, tiny_backbone
from torch import Tensor, nn

from spn4cir import compute as computing
from spn4cir.backbones import build_backbone
from spn4cir.backbones.shared_clip import EMBEDDED
from spn4cir.bank import assign_rows
from spn4cir.batches import TripletBatch, TripletCollate
from spn4cir.checkpoints import read_tensors, save_model
from spn4cir.compute import checkpoint_blocks, gradient_cached
from spn4cir.errors import InputError
from spn4cir.images import ImageSource, open_image, pixel_hash
from spn4cir.objective import Objective
from spn4cir.train import train
from spn4cir.types import Composed, ImageFeatures, Triplet

Found = dict[str, Tensor]
IDS = [f"i{n:02d}" for n in range(9)]
BATCH = [(Triplet(IDS[n], (IDS[n + 1],), ("x",)), f"make it {n} times red and {'so ' * n}round") for n in range(8)]


class Kept:
    """Counts the bytes that a forward pass keeps for the backward pass, without those of parameters."""

    def __init__(self, module: nn.Module):
        self.known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.bytes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.bytes[storage.data_ptr()] = storage.nbytes()
        return tensor


def step(objective: Objective, batch: TripletBatch) -> tuple[Found, int]:
    """Loss and gradients, and what was kept in between."""
    kept = Kept(objective)
    objective.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        loss = objective(batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}, sum(kept.bytes.values())


def apart(one: Found, two: Found) -> float:
    """The largest distance of two of one name, as a share of its norm (or of the largest, where it is nearly zero)."""
    assert one.keys() == two.keys() and len(one) > 10
    floor = 1e-3 * max(float(value.double().norm()) for value in one.values())
    return max(float((one[n].double() - two[n]).norm()) / max(float(one[n].double().norm()), floor) for n in one)


@pytest.fixture(params=TINY)
def stage_1(request: pytest.FixtureRequest, toy: Any, tmp_path: Path) -> tuple[Objective, TripletBatch]:
    """A model in double precision, so that rounding is no matter, and a batch of eight triplets over nine images."""
    backbone = tiny_backbone(request.param, tmp_path)
    identity = assign_rows({i: pixel_hash(open_image(toy.image(i))) for i in IDS})
    batch = TripletCollate(backbone.tokenize, identity, ImageSource(toy.image, backbone.transform))(BATCH)
    assert batch.pixels is not None
    batch.pixels = batch.pixels.double()
    return Objective(backbone, 0.1, learn_temperature=True).double(), batch


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 9])
def test_chunks_are_exact(stage_1: tuple[Objective, TripletBatch], chunk: int) -> None:
    """Each chunk on its own, a ragged last one, one that holds all: loss and all gradients, further terms included."""
    objective, batch = stage_1
    plain, _ = step(objective, batch)
    objective.backbone.chunk = chunk
    assert apart(plain, step(objective, batch)[0]) < 1e-9
    batch.tokens = {name: value.roll(1, 0) for name, value in batch.tokens.items()}  # negative control
    assert apart(plain, step(objective, batch)[0]) > 1e-3


def test_eight_chunks_keep_a_quarter_at_most(toy: Any) -> None:
    """What the forward pass keeps, with what one chunk does in the backward pass, is below a quarter of the whole."""
    backbone, ids = build_backbone("clip4cir"), toy.training_images()[1:]
    images = ImageSource(toy.image, backbone.transform)
    items = [(Triplet(ids[n], (ids[n - 1],), ("x",)), f"make it {n} times red") for n in range(40)]
    batch = TripletCollate(backbone.tokenize, {i: n for n, i in enumerate(ids)}, images)(items)
    objective = Objective(backbone, 0.1)
    plain, whole = step(objective, batch)
    backbone.chunk = 5
    inside: list[int] = []
    checkpoint = computing.checkpoint

    def watched(function: Callable[..., Any], *rows: Tensor, **how: Any) -> Any:
        kept = Kept(objective)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            function(*rows)
        inside.append(sum(kept.bytes.values()))
        return checkpoint(function, *rows, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computing, "checkpoint", watched)
        found, chunked = step(objective, batch)
    assert len(inside) == 16 and chunked + max(inside) <= whole / 4
    assert apart(plain, found) < 1e-4


def test_chunks_draw_their_dropout_once(stage_1: tuple[Objective, TripletBatch]) -> None:
    """The second pass of a chunk draws what the first has drawn: as if nothing were computed twice."""
    objective, batch = stage_1
    objective.backbone.chunk = 3
    objective.backbone.train()
    found = []
    for once in (computing.checkpoint, lambda function, *rows, use_reentrant: function(*rows)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(computing, "checkpoint", once)
            torch.manual_seed(3)
            found.append(step(objective, batch)[0])
    assert apart(*found) < 1e-9


def test_blocks_with_checkpoints_are_exact(stage_1: tuple[Objective, TripletBatch]) -> None:
    """All gradients, in eval mode as in training, and less is kept."""
    objective, batch = stage_1
    plain, kept = step(objective, batch)
    names = list(objective.backbone.state_dict())
    assert checkpoint_blocks(objective.backbone) >= 2
    again, less = step(objective, batch)
    assert apart(plain, again) < 1e-9 and less < 0.8 * kept
    assert list(objective.backbone.state_dict()) == names


def test_blocks_are_found_once() -> None:
    """Lists and sequences of one kind, the outermost of nested ones; no other sequence."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

        def forward(self, x: Tensor, *, times: int = 1) -> Tensor:
            return x + times * self.inner(x)

    mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block(), Block()]), "mixed": mixed})
    assert checkpoint_blocks(model) == 3 and checkpoint_blocks(mixed) == 0
    assert [isinstance(m.forward, partial) for m in model.modules()].count(True) == 3
    x = torch.ones(1, 2, requires_grad=True)
    assert model["blocks"][0](x, times=2).equal(x + 2 * model["blocks"][0].inner(x))  # type: ignore[index, operator]


def test_chunks_of_all_kinds_of_results() -> None:
    """Tensors, features, composed queries with and without states and parts; all rows at once are not touched."""
    rows = torch.arange(5.0, requires_grad=True)[:, None]
    for function in (
        lambda x: 2 * x,
        lambda x: ImageFeatures(x + 1, x + 2),
        lambda x: Composed(x, {"a": -x}, (x, 2 * x)),
        lambda x: Composed(x),
    ):
        whole, parts = function(rows), gradient_cached(function, 2, rows)  # type: ignore[no-untyped-call]
        assert type(whole) is type(parts)
        if isinstance(whole, Composed):
            assert whole.states.keys() == parts.states.keys() and (whole.parts is None) == (parts.parts is None)
            pairs = [(whole.query, parts.query), *((v, parts.states[k]) for k, v in whole.states.items())]
            pairs += list(zip(whole.parts or (), parts.parts or (), strict=True))
        else:
            pairs = [(whole, parts)] if isinstance(whole, Tensor) else list(zip(whole, parts, strict=True))
        assert pairs and all(a.equal(b) for a, b in pairs)
        assert gradient_cached(lambda x: x, 5, rows) is rows and gradient_cached(lambda x: x, None, rows) is rows


# --- through the loop -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(configure: Any, tmp_path: Path, runs: Path) -> Iterator[Callable[..., Found]]:
    """``run(stage, **changes)``: the weights after three steps from one and the same model."""
    # not the residual network: the gradient of its key bias is rounding alone, and AdamW makes steps of any gradient
    save_model(tmp_path / "init", build_backbone("clip4cir", model=f"local-dir:{EMBEDDED / 'clip_transformer'}"), {})
    count = iter(range(100))

    def trained(stage: int, **changes: Any) -> Found:
        AcceleratorState._reset_state(reset_partial_state=True)  # else one process has one precision
        settings = {"init": str(tmp_path / "init"), "max_steps": 3, "adamw": {"eps": 1e-2}, "lr": 0.1, "eval_every": 0}
        folder = train(configure(output=str(runs / f"{next(count)}"), **{**settings, **changes}), stage)
        weights = read_tensors(folder / "model.safetensors")[0]
        (line,) = (folder / "metrics.jsonl").read_text().splitlines()
        return weights | {"loss": torch.tensor(json.loads(line)["loss"])}

    yield trained
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("compute", [{"chunk": 3}, {"checkpoint": True}, {"chunk": 3, "checkpoint": True}])
def test_the_loop_computes_the_same(run: Callable[..., Found], stage: int, compute: dict[str, Any]) -> None:
    plain = run(stage)
    assert apart(plain, run(stage, compute=compute)) < 1e-4
    assert apart(plain, run(stage, lr=0.11, compute=compute)) > 1e-3  # negative control


def test_parts_of_a_batch_add_up(run: Callable[..., Found]) -> None:
    """In stage 2 four parts of a batch are the batch; in stage 1 each has candidates of its own."""
    assert apart(run(2), run(2, compute={"accumulate": 4})) < 1e-4
    assert apart(run(1), run(1, compute={"accumulate": 4})) > 1e-3


def test_parts_need_a_batch_that_divides(configure: Any) -> None:
    with pytest.raises(InputError, match="batch_size 8 does not divide into 3 parts"):
        configure(compute={"accumulate": 3})


def test_a_compiled_model_is_the_same(run: Callable[..., Found], monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that train are compiled, with checkpoints too; here for torch's own graph, as making kernels takes
    minutes."""
    compiled: list[str] = []

    def compile_(block: nn.Module, dynamic: bool) -> None:
        compiled.append(type(block).__name__)
        block._compiled_call_impl = torch.compile(block._call_impl, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_)
    sides = []
    for stage, compute in ((1, {"compile": True}), (2, {"compile": True}), (1, {"compile": True, "checkpoint": True})):
        assert apart(run(stage), run(stage, compute=compute)) < 1e-3
        sides.append(len(compiled))
        compiled.clear()
    assert sides[0] > sides[1] > 0 and sides[2] == sides[0]  # in stage 2 the image side is left alone


def test_half_precision_goes_with_all(run: Callable[..., Found]) -> None:
    """bf16 with chunks and checkpoints is as far from single precision as bf16 alone."""
    plain, half = run(1), run(1, mixed_precision="bf16")
    both = run(1, mixed_precision="bf16", compute={"chunk": 4, "checkpoint": True})
    assert apart(plain, half) > 1e-5
    assert apart(half, both) < 2 * apart(plain, half)
