"""Stored vectors: each image encoded once, in one file on disk, by one or several processes, resumed after a kill."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.files import Journal, digest, is_done, mark_done
from data_gen.matchers import Matcher
from data_gen.processes import Processes
from data_gen.settings import GenerateConfig
from spn4cir.errors import InputError
from spn4cir.types import Dataset

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Vectors = np.memmap[Any, Any]

THREADS = 16


def vectors_made_by(config: GenerateConfig, ids: Sequence[str], matcher: Mapping[str, Any]) -> str:
    """What stored vectors depend on: images, their pixels and order, encoder, and how many are encoded at once.

    Nothing of windows, pools or draws is in it, so that trying another of them encodes nothing again.

    Args:
        config: of the step.
        ids: images, in order.
        matcher: what ``matchers.identify`` tells.
    """
    about = {"step": "vectors", "ids": list(ids), "matcher": dict(matcher), "at_once": config.match_batch_size}
    return digest(about, config.file("images.jsonl"))


def encode_all(
    config: GenerateConfig, dataset: Dataset, ids: Sequence[str], matcher: Matcher, processes: Processes, made_by: str
) -> "Vectors":
    """(N, E) unit vectors of all images in float32, on disk in ``vectors.{made_by}.npy``, as a memory map.

    A block of ``match_batch_size`` images is the unit of work and of commit: it belongs to one process, and is noted
    after its rows are on the disk. Vectors of other matchers stay where they are: they took long, and are found again
    by name when someone goes back to them.

    Args:
        config: of the step.
        dataset: knows where images lie.
        ids: N images, in order.
        matcher: moved to this process's device.
        processes: who shares the work.
        made_by: what ``vectors_made_by`` gives.

    Raises:
        InputError: if an image is missing or its vector is not of unit norm, or the disk or the device has no room.
    """
    out = config.file(f"vectors.{made_by}.npy")
    processes.wait()  # nobody looks while another one already writes
    stored = _open(out, len(ids)) if is_done(out, made_by) else None
    processes.wait()
    if stored is not None:
        return stored
    _check_device(matcher, processes)
    partial, noted = out.with_suffix(".partial.npy"), out.with_name("vectors.npy")
    if processes.first and _open(partial, len(ids)) is None:
        _allocate(partial, made_by, (len(ids), _width(dataset, ids, matcher)))
    processes.wait()
    journal = Journal(noted, made_by, processes)
    blocks = range(-(-len(ids) // config.match_batch_size))
    own = [n for n in blocks if n % processes.count == processes.index and n not in journal]
    _encode(config, dataset, ids, matcher, (own, partial, journal, processes))
    journal.close()
    processes.wait()
    if processes.first:
        journal = Journal(noted, made_by, Processes.alone())
    return stored
