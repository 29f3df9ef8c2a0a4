"""A bank in two halves on two processes, against the whole bank on one: loss and gradients, and seconds.

The processes talk by gloo and have one thread each, as the one has. Some candidates are left out of some queries' sums,
so that pairs travel too; the bank does not split evenly.

examples:
  python -m benchmarks.processes                         # half a minute on two cores
  python -m benchmarks.processes --json benchmarks/results/processes.json
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import CONTEXT, Row, bound, command, distance, in_child, in_turns, report, row
from spn4cir.errors import run_command
from spn4cir.losses import Shard, info_nce

PROCESSES, ROUNDS, TEMPERATURE = 2, 5, 0.03
SIZES = ((40_001, 1, 256, 64), (4_001, 16, 256, 32))
"""N, K, E, and B of all processes."""
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
FAR = 1e-3
"""Distance at which something is wrong; anything between is a bound that is missed."""
Size = tuple[int, int, int, int]
Case = tuple[Size, torch.dtype]


def given(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries (B, E), candidates (N, K, E), positives (B,), and pairs (2, M) to leave out; the same on each process."""
    n, k, e, b = size
    draw = torch.Generator().manual_seed(0)
    candidates = F.normalize(torch.randn(n, k, e, generator=draw, dtype=torch.float64), dim=-1)
    positives = torch.randint(n, (b,), generator=draw)
    lean = candidates[positives, 0] + 4 * torch.randn(b, e, generator=draw, dtype=torch.float64) / e**0.5
    pairs = torch.stack([torch.arange(b), torch.randint(n, (b,), generator=draw)])
    return F.normalize(lean, dim=-1).to(dtype), candidates.to(dtype), positives, pairs


def shared(rank: int, processes: int, meeting: str, cases: Sequence[Case], rounds: int) -> list[dict[str, Any]]:
    """What one of the processes finds in each case, of its queries and its candidates; of one process, of all."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    found = [_case(rank, processes, case, rounds) for case in cases]
    if processes > 1:
        dist.destroy_process_group()
    return found


def _case(rank: int, processes: int, case: Case, rounds: int) -> dict[str, Any]:
    size, dtype = case
    query, candidates, positives, pairs = given(size, dtype)
    share, part = len(query) // processes, -(-len(candidates) // processes)
    rows = slice(rank * share, (rank + 1) * share)
    query = query[rows].requires_grad_()
    temperature = torch.tensor(TEMPERATURE, dtype=dtype, requires_grad=True)
    ignore = pairs[:, rows] - torch.tensor([[rank * share], [0]])
    held = Shard(candidates[rank * part : (rank + 1) * part], rank * part) if processes > 1 else candidates

    def step() -> list[Tensor]:
        loss = info_nce(query, held, positives[rows], temperature, ignore)
        return [loss.detach(), *torch.autograd.grad(loss, (query, temperature))]

    values = step()
    seconds = in_turns({"step": step}, rounds)["step"]
    names = ("loss", "query", "temperature")
    return {"seconds": seconds, **{name: value.tolist() for name, value in zip(names, values, strict=True)}}


def joined(parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Loss and gradients of all processes, as their mean makes them."""
    found = {
        name: torch.tensor([part[name] for part in parts], dtype=torch.float64) for name in ("loss", "temperature")
    }
    query = torch.cat([torch.tensor(part["query"], dtype=torch.float64) for part in parts]) / len(parts)
    return {**{name: value.mean() for name, value in found.items()}, "query": query}


def compare(case: Case, single: dict[str, Any], parts: list[dict[str, Any]]) -> Row:
    """A row of the table; asserts that two processes find what one finds."""
    one, two = joined([single]), joined(parts)
    apart = {name: float(f"{distance(two[name], one[name]):.2g}") for name in one}
    (n, k, e, b), dtype = case
    kind = str(dtype).removeprefix("torch.")
    assert max(apart.values()) < FAR, f"{kind}: {len(parts)} processes differ from one: {apart}"
    return row(
        f"{len(parts)} processes, N = {n:,}, K = {k}, E = {e}, B = {b}, {kind}",
        "one process, whole bank",
        (max(part["seconds"] for part in parts), single["seconds"]),
        bounds=tuple(bound(f"{name}'s distance", value, most=BOUNDS[dtype]) for name, value in apart.items()),
    )


def suite(sizes: tuple[Size, ...] = SIZES, rounds: int = ROUNDS) -> dict[str, Any]:
    """All measurements."""
    cases = [(size, dtype) for size in sizes for dtype in BOUNDS]
    single = in_child(shared, 0, 1, "", cases, rounds)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(PROCESSES, mp_context=CONTEXT) as pool:
        place = str(Path(folder) / "meeting")
        waiting = [pool.submit(shared, n, PROCESSES, place, cases, rounds) for n in range(PROCESSES)]
        parts = zip(*(one.result() for one in waiting), strict=True)
    rows = [compare(case, one, list(two)) for case, one, two in zip(cases, single, parts, strict=True)]
    what = f"loss, gradients of queries and temperature over gloo; medians of {rounds} rounds, the slower process"
    return report("processes", what, rows)


if __name__ == "__main__":
    run_command(lambda: command("processes", __doc__, suite))
