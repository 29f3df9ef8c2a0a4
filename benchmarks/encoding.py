"""Images a second through Unicom's published sizes, with random weights: what encoding a dataset costs.

Single precision, as the matcher computes; on a GPU also under float16 autocast, for comparison.

examples:
  python -m benchmarks.encoding
  python -m benchmarks.encoding --device --batch-size 256
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from spn4cir.data_gen.unicom import SIZES, Unicom
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.results import git_commit


def measure(name: str, device: str, batch_size: int, seconds: float) -> dict[str, Any]:
    """Images a second of one size, measured for at least so long after a first batch."""
    model, found = Unicom(name).to(device), dict[str, Any]()
    pixels = torch.randn(batch_size, 3, SIZES[name].image, SIZES[name].image, device=device)
    for precision in ("float32", "float16") if device == "cuda" else ("float32",):
        with torch.inference_mode(), torch.autocast(device, torch.float16, enabled=precision == "float16"):
            model(pixels)
            _finish(device)
            start, batches = time.perf_counter(), 0
            while (taken := time.perf_counter() - start) < seconds or not batches:
                model(pixels)
                _finish(device)
                batches += 1
            taken = time.perf_counter() - start
        found[precision] = round(batches * batch_size / taken, 2)
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": name, "parameters": parameters, "batch": batch_size, "images a second": found}


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", action="store_true", help="on a GPU")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement, at least")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    device = "cuda" if args.device else "cpu"
    report = {
        "benchmark": "encoding",
        "rows": [measure(name, device, args.batch_size, args.seconds) for name in SIZES],
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if args.device else f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "git": git_commit(),
    }
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
