"""Queries of several requests, encoded in one pass of the model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from spn4cir.app.limits import Refused
from spn4cir.index.query_parts import QueryParts

GATHER = 0.003
"""Seconds that a batch waits for more queries if the last one had several; a lone client never waits."""

Embed = Callable[[Sequence[Any], Sequence["str | None"]], Tensor]
Waiting = tuple[QueryParts, "Future[Tensor]"]


class BatchedEncoder:
    """Encodes queries in a thread of its own: all that wait while a batch runs are the next batch.

    Args:
        embed: images and texts → (P, E), such as ``Model.embed_queries``.
        batch_size: queries encoded at once; 1 encodes them one at a time.
        waiting: queries that may wait.

    Attributes:
        sizes: number of batches by their size.
    """

    def __init__(self, embed: Embed, batch_size: int = 32, waiting: int = 128):
        self._embed, self._batch_size = embed, batch_size
        self._queue: queue.Queue[Waiting | None] = queue.Queue(waiting)
        self.sizes: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)
        self._thread.start()

    def submit(self, parts: QueryParts) -> Future[Tensor]:
        """The query (E,), later.

        Raises:
            Refused: if too many queries wait already.
        """
        future: Future[Tensor] = Future()
        try:
            self._queue.put_nowait((parts, future))
        except queue.Full:
            raise Refused(503, f"{self._queue.maxsize} queries wait already: try again in a second") from None
        return future

    def close(self) -> None:
        """Finish what waits, and stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        size = 1
        while (first := self._queue.get()) is not None:
            batch, is_last = self._gather(first, GATHER if size > 1 else 0.0)
            size = len(batch)
            self.sizes[size] = self.sizes.get(size, 0) + 1
            self._answer([one for one in batch if one[1].set_running_or_notify_cancel()])
            if is_last:
                return

    def _gather(self, first: Waiting, seconds: float) -> tuple[list[Waiting], bool]:
        """The queries that wait, and those of the next seconds; and whether nothing comes after them."""
        batch, end = [first], time.monotonic() + seconds
        while len(batch) < self._batch_size:
            try:
                rest = end - time.monotonic()
                one = self._queue.get(timeout=rest) if rest > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if one is None:
                return batch, True
            batch.append(one)
        return batch, False

    def _answer(self, batch: Sequence[Waiting]) -> None:
        if not batch:
            return
        try:
            vectors = self._embed(
                [image for parts, _ in batch for image in parts.images],
                [text for parts, _ in batch for text in parts.texts],
            )
        except Exception as error:  # of one query, which alone is to fail
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for one in batch:
                    self._answer([one])
            return
        start = 0
        for parts, future in batch:
            end = start + len(parts.weights)
            try:
                future.set_result(parts.combine(vectors[start:end]))
            except Exception as error:  # its parts cancel each other out
                future.set_exception(error)
            start = end
