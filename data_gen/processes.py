"""Several processes that share the work of a step: which am I, how many are we, and waiting for each other."""

import os
from datetime import timedelta

PATIENCE = timedelta(days=30)  # a process that is done early may wait for hours; without it, ten minutes end the run


class Processes:
    """The processes of ``torchrun`` or ``accelerate launch``; one, without either.

    Attributes:
        index: of this process, from 0.
        count: of all.
    """

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
