"""What processes exchange, and the gradients that come back."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from spn4cir.distributed import (
    all_gather_rows,
    all_reduce,
    cpu_count,
    gather_with_gradient,
    process_rank,
    world_size,
)

LOCAL, WEIGHTS = torch.arange(12.0).view(2, 3, 2), torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))


def exchange(rank: int) -> dict[str, Tensor]:
    """What one of two processes sends and gets, of rows that do not lie one behind the other in memory."""
    local = LOCAL[rank].T.contiguous().T.requires_grad_()
    gathered = gather_with_gradient(local)
    (gathered * WEIGHTS[rank]).sum().backward()
    assert local.grad is not None and (process_rank(), world_size()) == (rank, 2)
    found = {"gathered": gathered, "gradient": local.grad.contiguous(), "rows": all_gather_rows(local)}
    found |= {"sum": all_reduce(local), "max": all_reduce(local, "MAX"), "integers": gather_with_gradient(local.int())}
    assert [name for name, value in found.items() if value.requires_grad] == ["gathered"]
    return found


def test_two_processes(tmp_path: Path) -> None:
    """Rows in rank order on both; the gradient of a process's rows is the sum of what both want of them."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [subprocess.Popen([sys.executable, __file__, tmp_path, str(n)], env=environment) for n in (0, 1)]
    assert [process.wait(120) for process in started] == [0, 0]
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        rows = LOCAL.flatten(0, 1)
        assert all(torch.equal(found[name], rows) for name in ("gathered", "rows", "integers"))
        assert torch.equal(found["sum"], LOCAL.sum(0)) and torch.equal(found["max"], LOCAL.amax(0))
        assert torch.equal(found["gradient"], WEIGHTS.sum(0)[3 * rank : 3 * rank + 3])
        assert not torch.equal(found["gradient"], WEIGHTS[rank][3 * rank : 3 * rank + 3])  # negative control


def test_one_process_exchanges_nothing() -> None:
    """Its rows are the tensor itself, gradient and all."""
    local = torch.ones(3, requires_grad=True)
    assert (process_rank(), world_size()) == (0, 1)
    assert gather_with_gradient(local) is local and all_gather_rows(local) is local


def test_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those it may use, where the system tells; else those of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert cpu_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_count() == 1


if __name__ == "__main__":
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=2, timeout=timedelta(seconds=100))
    save_file(exchange(number), folder / f"{number}.safetensors")
    dist.destroy_process_group()
