"""The candidate loss with its gradients: a pass over blocks of frozen candidates, against all scores at once.

Dense is ``cross_entropy`` of all scores with autograd. With K vectors for each candidate the straightforward way is a
loop over the queries, each scored against the whole bank. Queries and a learned temperature get gradients, which have
to agree; how far each way is from float64 is told. Peaks of memory are measured in processes of their own.

examples:
  python -m benchmarks.loss                              # a minute on two cores
  python -m benchmarks.loss --json benchmarks/results/loss.json
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Row, bound, command, distance, in_child, in_turns, peaks, report, row, share
from spn4cir import streaming
from spn4cir.errors import run_command
from spn4cir.losses import info_nce

TEMPERATURE = 0.02
ROUNDS = 3


class Size(NamedTuple):
    """N candidates of K vectors of width E, B queries."""

    n: int
    k: int
    e: int
    b: int


class Given(NamedTuple):
    """What a loss is computed from."""

    query: Tensor  # (B, E), learns
    candidates: Tensor  # (N, K, E)
    positives: Tensor  # (B,)
    temperature: Tensor  # scalar, learns


SINGLE, SEVERAL = Size(200_000, 1, 256, 128), Size(17_000, 32, 256, 32)
NEAR = 1e-4
"""Relative distance, by norm, at which two ways in float32 agree."""


def given(size: Size, dtype: torch.dtype = torch.float32) -> Given:
    """Random unit vectors; queries lean towards their positives."""
    draw = torch.Generator().manual_seed(0)
    candidates = torch.empty(size.n, size.k, size.e, dtype=dtype)
    for part in torch.split(candidates, 4096):
        part.copy_(F.normalize(torch.randn(part.shape, generator=draw), dim=-1))
    positives = torch.randint(size.n, (size.b,), generator=draw)
    lean = candidates[positives, 0].float() + 4 * torch.randn(size.b, size.e, generator=draw) / size.e**0.5
    query = F.normalize(lean, dim=-1).requires_grad_()
    return Given(query, candidates, positives, torch.tensor(TEMPERATURE, requires_grad=True))


def widened(one: Given) -> Given:
    """The same in float64."""
    query, temperature = (part.detach().double().requires_grad_() for part in (one.query, one.temperature))
    return Given(query, one.candidates.double(), one.positives, temperature)


def ours(one: Given) -> Tensor:
    """In blocks, gradients in the same pass."""
    return info_nce(*one)


def dense(one: Given) -> Tensor:
    """All scores (B, N), or (B, N, K) and their maximum."""
    vectors = one.candidates.to(one.query.dtype).flatten(0, 1)
    scores = (one.query @ vectors.T).view(len(one.query), *one.candidates.shape[:2])
    scores = scores[..., 0] if scores.shape[2] == 1 else scores.amax(2)
    return F.cross_entropy(scores / one.temperature, one.positives)


def loop(one: Given) -> Tensor:
    """One query after the other against all candidates."""
    losses = []
    for query, positive in zip(one.query, one.positives, strict=True):
        scores = (one.candidates.to(query.dtype) @ query).amax(1)  # (N,)
        losses.append(F.cross_entropy(scores / one.temperature, positive))
    return torch.stack(losses).mean()


@contextmanager
def without_attention() -> Iterator[None]:
    """Inside, the loss has no fused attention to use: a plain loop over blocks."""
    kinds = dict(streaming.FUSED)
    streaming.FUSED.clear()
    streaming.fused.cache_clear()
    try:
        yield
    finally:
        streaming.FUSED.update(kinds)
        streaming.fused.cache_clear()


def plain(one: Given) -> Tensor:
    """In blocks, without fused attention."""
    with without_attention():
        return info_nce(*one)


WAYS: dict[str, Callable[[Given], Tensor]] = {"ours": ours, "plain": plain, "dense": dense, "loop": loop}


def gradients(way: str, one: Given) -> dict[str, Tensor]:
    """The loss, and the gradients of queries and temperature."""
    loss = WAYS[way](one)
    query, temperature = torch.autograd.grad(loss, (one.query, one.temperature))
    return {"loss": loss.detach(), "query": query, "temperature": temperature}


def prepare(size: Size, dtype: torch.dtype, ways: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """The tasks of some ways."""
    one = given(size, dtype)
    return {way: partial(gradients, way, one) for way in ways}


def compare(size: Size, dtype: torch.dtype, ways: tuple[str, ...], rounds: int) -> dict[str, dict[str, Any]]:
    """``{"seconds": {way: …}, "error": {way: {part: …}}}``; asserts that all ways agree with the last one."""
    one = given(size, dtype)
    found = {way: gradients(way, one) for way in ways}
    for way in ways[:-1]:
        apart = {part: distance(value, found[ways[-1]][part]) for part, value in found[way].items()}
        assert max(apart.values()) < NEAR, f"{way} differs from {ways[-1]}: {apart}"
    wide = widened(one._replace(candidates=one.candidates.float()))
    exact = gradients("ours" if size.k > 1 else "dense", wide)  # float64 of (B, N, K) is large
    error = {
        way: {part: float(f"{distance(value, exact[part]):.2g}") for part, value in parts.items()}
        for way, parts in found.items()
    }
    del wide, exact
    seconds = in_turns({way: partial(gradients, way, one) for way in ways}, rounds)
    return {"seconds": seconds, "error": error}


def single(size: Size, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """One vector for each candidate; and how far each way is from float64."""
    name = f"candidate loss with gradients, N = {size.n:,}, E = {size.e}, B = {size.b}"
    full = in_child(compare, size, torch.float32, ("ours", "plain", "dense"), rounds)
    half = in_child(compare, size, torch.float16, ("ours", "dense"), rounds)
    memory = peaks(prepare, size, torch.float32, ("ours", "plain", "dense"))
    halves = peaks(prepare, size, torch.float16, ("ours", "dense"))
    took = full["seconds"]
    rows = [
        row(
            name, "dense cross-entropy with autograd", (took["ours"], took["dense"]), (memory["ours"], memory["dense"]),
            (
                bound("time", share(took["ours"], took["dense"]), most=0.8),
                bound("memory", share(memory["ours"], memory["dense"]), most=0.1),
            ),
        ),
        row("the same without fused attention", "the same", (took["plain"], took["dense"]),
            (memory["plain"], memory["dense"])),
        row("the same of a float16 bank", "the same, widened", (half["seconds"]["ours"], half["seconds"]["dense"]),
            (halves["ours"], halves["dense"])),
    ]  # fmt: skip
    return rows, {"float32": full["error"], "float16 bank": half["error"]}


def several(size: Size, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """K vectors for each candidate, of which the nearest counts; and how far each way is from float64."""
    found = in_child(compare, size, torch.float32, ("ours", "dense", "loop"), rounds)
    memory = peaks(prepare, size, torch.float32, ("ours", "dense", "loop"))
    took, tensor = found["seconds"], 4 * size.b * size.n * size.k / 2**20  # MB of the dense tensor itself
    name = f"maximum similarity, N = {size.n:,}, K = {size.k}, E = {size.e}, B = {size.b}"
    rows = [
        row(name, "a loop over queries", (took["ours"], took["loop"]), (memory["ours"], memory["loop"]),
            (bound("times as fast", share(took["loop"], took["ours"]), least=10),)),
        row("the same", f"dense (B, N, K), itself {tensor:.0f} MB", (took["ours"], took["dense"]),
            (memory["ours"], memory["dense"]),
            (bound("memory to that tensor", share(memory["ours"], tensor), most=0.25),)),
    ]  # fmt: skip
    return rows, found["error"]


def suite(one: Size = SINGLE, many: Size = SEVERAL, rounds: int = ROUNDS) -> dict[str, Any]:
    """All measurements; asserts that all ways agree."""
    rows, error = single(one, rounds)
    others, apart = several(many, rounds)
    what = f"loss and gradients of queries and temperature, frozen candidates; medians of {rounds} rounds in turns"
    errors = {**error, "maximum similarity": apart}
    return report("loss", what, [*rows, *others], **{"relative distance from float64, by norm": errors})


if __name__ == "__main__":
    run_command(lambda: command("loss", __doc__, suite))
