"""Several processes that share the work: which one this is, how many there are, its device, and what they exchange.

torch is imported where it is needed, so that commands that print their options start at once.
"""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=30)  # a process that is done early may wait for hours; without it, ten minutes end the run


class Processes:
    """The ``count`` processes of ``torchrun`` or ``accelerate launch`` (without either one), this one's ``index``."""

    def __init__(self) -> None:
        self.index, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            import torch
            from accelerate import PartialState

            state = PartialState(cpu=on_cpu(), timeout=PATIENCE)  # it does not read ACCELERATE_USE_CPU itself
            assert state.num_processes == self.count, f"{state.num_processes} processes found, {self.count} expected"
            if on_cpu():  # accelerate would wait on a GPU where there is one
                torch.distributed.barrier()
            else:
                state.wait_for_everyone()

    def say(self, text: str) -> None:
        """Print a line once."""
        if self.first:
            print(text, flush=True)


def on_cpu() -> bool:
    """Whether models run on the CPU: there is no CUDA device, or ACCELERATE_USE_CPU wants none."""
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()


def own_device() -> str:
    """The device of this process: one of CUDA for each of a machine's processes; or the CPU."""
    import torch

    if on_cpu():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def cpu_count() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world_size() -> int:
    """Number of processes that train together; 1 before torch.distributed is initialised."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_rank() -> int:
    """Index of this process among those that train together, from 0."""
    from torch import distributed

    return distributed.get_rank() if world_size() > 1 else 0


def all_gather_rows(local: "Tensor") -> "Tensor":
    """(B, …) of each process → (world size · B, …) in rank order, without a gradient; ``local`` if alone."""
    import torch

    if world_size() == 1:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(world_size())]
    torch.distributed.all_gather(parts, local.detach().contiguous())
    return torch.cat(parts)


def gather_shares(local: "Tensor") -> "Tensor":
    """(n, …) of each process, n its own → (all n, …) in rank order, without a gradient."""
    import torch

    if world_size() == 1:
        return local
    sizes = all_gather_rows(torch.tensor([len(local)], device=local.device)).tolist()
    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: len(local)] = local.detach()
    parts = all_gather_rows(padded[None])  # (processes, most, …)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_with_gradient(local: "Tensor") -> "Tensor":
    """As ``all_gather_rows``; each process gets back the gradient of its own rows, summed over all processes."""
    import torch

    if world_size() == 1:
        return local
    rows, first = all_gather_rows(local), process_rank() * len(local)
    gathered: Any = torch.cat([rows[:first], local, rows[first + len(local) :]])  # Any, as its hooks have no types
    if gathered.requires_grad:
        gathered.register_hook(all_reduce)
    return gathered  # type: ignore[no-any-return]


def all_reduce(local: "Tensor", operation: str = "SUM") -> "Tensor":
    """The sum over all processes, or the ``MAX``, without a gradient; ``local`` if alone."""
    import torch

    if world_size() == 1:
        return local
    reduced = local.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(reduced, getattr(torch.distributed.ReduceOp, operation))
    return reduced
