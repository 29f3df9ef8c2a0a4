"""Stored vectors: each image encoded once, in one file on disk, by one or several processes, resumed after a kill."""

import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spn4cir.data_gen.matchers import Matcher
from spn4cir.data_gen.steps import GenerateConfig, Journal, digest, is_done, mark_done
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes, cpu_count, own_device
from spn4cir.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from spn4cir.images import ImageSource

    Vectors = np.memmap[Any, Any]

THREADS = 16
"""Images decoded at the same time, where there are so many processors."""
AHEAD = 2
"""Blocks of pixels in memory: the one that is encoded, and the next."""
TOLERANCE = 1e-3
"""How far from one the length of a vector may be."""


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


def stored_vectors(config: GenerateConfig, count: int, made_by: str) -> "Vectors | None":
    """The finished vectors of so many images, as a memory map, or None: so that no matcher need be loaded for them."""
    out = config.file(f"vectors.{made_by}.npy")
    return _open(out, count) if is_done(out, made_by) else None


def encode_all(
    config: GenerateConfig, dataset: Dataset, ids: Sequence[str], matcher: Matcher, processes: Processes, made_by: str
) -> "Vectors":
    """(N, E) unit vectors of all images in float32, on disk in ``vectors.{made_by}.npy``, as a memory map.

    A block of ``match_batch_size`` images is the unit of work and of commit: it belongs to one process, and is noted
    after its rows are on the disk. Vectors of other matchers stay where they are: they took long, and are found again
    by their name when someone goes back to them.

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
    from spn4cir.images import ImageSource

    out = config.file(f"vectors.{made_by}.npy")
    stored = stored_vectors(config, len(ids), made_by)
    processes.wait()  # nobody makes what another one has not looked for
    if stored is not None:
        return stored
    matcher.to(own_device())
    images = ImageSource(dataset.image, matcher.transform)
    partial, noted = config.file(f"vectors.{made_by}.partial.npy"), config.file("vectors.npy")
    if processes.first:
        if out.exists() and not partial.exists():
            os.replace(out, partial)  # complete, but a kill came before the note: the journal says which rows are
        _prepare(partial, noted, made_by, images, (ids, matcher))
    processes.wait()
    journal = Journal(noted, made_by, processes)
    size = config.match_batch_size
    blocks = {n: ids[n * size : (n + 1) * size] for n in range(math.ceil(len(ids) / size))}
    own = {n: block for n, block in blocks.items() if n % processes.count == processes.index and n not in journal}
    with _Rows(partial, len(ids)) as rows:
        for n, found in _encoded(own, images, matcher, processes.first):
            rows.write(n * size, found)
            journal.add(n, [])
    journal.close()
    processes.wait()
    journal = Journal(noted, made_by, processes)  # now with the blocks of all
    assert all(n in journal for n in blocks), "a block of vectors is missing"
    if processes.first:
        os.replace(partial, out)
        mark_done(out, made_by, images=len(ids), matcher=matcher.made_by, vector=matcher.says)
        journal.remove()
    journal.close()
    processes.wait()
    stored = stored_vectors(config, len(ids), made_by)
    assert stored is not None
    return stored


def _open(path: Path, count: int) -> "Vectors | None":
    """A file of so many vectors; None if it is missing, cut off, or of something else."""
    import numpy as np

    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # a tensor of it may be made; the file stays as it is
    except (OSError, ValueError, EOFError):
        return None
    return array if array.ndim == 2 and len(array) == count and array.dtype == np.float32 else None


def _prepare(
    partial: Path, noted: Path, made_by: str, images: "ImageSource", what: tuple[Sequence[str], Matcher]
) -> None:
    """The empty file that all processes write into, unless one is there to go on with; and room for it on the disk."""
    import numpy as np

    ids, matcher = what
    if _open(partial, len(ids)) is None:
        for journal in noted.parent.glob(f"{noted.stem}.{made_by}.*.partial.jsonl"):
            journal.unlink()  # it speaks of rows that are lost
        width = matcher.encode(images.stack(ids[:1])).shape[1]
        beside = partial.with_name(f"{partial.name}.tmp")
        try:
            with beside.open("wb") as file:
                about = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), width)}
                np.lib.format.write_array_header_1_0(file, about)
                file.truncate(file.tell() + 4 * len(ids) * width)
            os.replace(beside, partial)
        except OSError as error:
            raise InputError(f"{partial} cannot be written: {error.strerror}") from None
    about_file = partial.stat()
    needed, free = about_file.st_size - 512 * about_file.st_blocks, shutil.disk_usage(partial.parent).free
    if needed > free:
        raise InputError(
            f"the vectors of {len(ids)} images need {needed / 1e9:.2g} GB in {partial.parent}, and "
            f"{free / 1e9:.2g} GB are free: make room, or set output to a larger disk"
        )


class _Rows:
    """Rows of a partial file, written with plain calls: a full disk is then an error, not the end of the process."""

    def __init__(self, path: Path, count: int):
        array = _open(path, count)
        if array is None:
            raise InputError(f"{path} is damaged: delete it and run the same command again")
        self.path, self._start, self._row = path, array.offset, 4 * array.shape[1]
        self._file = path.open("r+b", buffering=0)

    def write(self, row: int, vectors: "Tensor") -> None:
        """Put (b, E) at a row; they are on the disk when this returns."""
        content = memoryview(vectors.numpy().tobytes())
        try:
            self._file.seek(self._start + row * self._row)
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; what is in it stays, and the same command goes on "
                "from there"
            ) from None

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _encoded(
    blocks: Mapping[int, Sequence[str]], images: "ImageSource", matcher: Matcher, shown: bool
) -> "Iterator[tuple[int, Tensor]]":
    """Blocks of images → their vectors on the CPU, checked, with a bar if it is to be shown."""
    import torch
    from tqdm import tqdm

    with tqdm(total=sum(map(len, blocks.values())), desc="encode", unit="image", disable=not shown) as bar:
        for n, pixels in _pixels(blocks, images):
            try:
                found = matcher.encode(pixels).float().cpu()  # (b, E)
            except torch.cuda.OutOfMemoryError:
                raise InputError(
                    f"{len(pixels)} images at once are too many for the memory of {matcher.device}: lower "
                    "match_batch_size"
                ) from None
            wrong = ((found.norm(dim=1) - 1).abs() <= TOLERANCE).logical_not().nonzero().flatten().tolist()
            if wrong:
                raise InputError(
                    f"image {images.image(blocks[n][wrong[0]])}: its vector by {matcher.made_by['kind']} "
                    f"{matcher.made_by['model']} has the length {found[wrong[0]].norm().item():.3g}, not 1"
                )
            yield n, found
            bar.update(len(found))


def _pixels(blocks: Mapping[int, Sequence[str]], images: "ImageSource") -> "Iterator[tuple[int, Tensor]]":
    """(b, 3, H, W) of each block, images being decoded in threads ahead."""
    import torch

    waiting: deque[tuple[int, list[Future[Tensor]]]] = deque()
    todo = iter(blocks.items())
    share = cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the machine's cores
    pool = ThreadPoolExecutor(max(1, min(THREADS, share)))
    try:
        while True:
            while len(waiting) < AHEAD and (block := next(todo, None)):
                waiting.append((block[0], [pool.submit(images, image_id) for image_id in block[1]]))
            if not waiting:
                return
            n, futures = waiting.popleft()
            found = [future.result() for future in futures]
            del futures
            if len({pixels.shape for pixels in found}) > 1:
                raise InputError(
                    f"images {blocks[n][0]} … {blocks[n][-1]} do not become equally large: this matcher's "
                    "preprocessing states no size"
                )
            stacked = torch.stack(found)
            del found
            yield n, stacked
    finally:
        pool.shutdown(cancel_futures=True)
