"""Queries of several threads are encoded together, with the results of one at a time."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from spn4cir.app.batching import BatchedEncoder
from spn4cir.app.limits import Refused
from spn4cir.errors import InputError
from spn4cir.index.query_parts import QueryParts, split_query
from spn4cir.model import load


class Slow:
    """Embeds a text as its length, when it is let go; keeps the sizes of its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.go = threading.Event()

    def __call__(self, images: Sequence[Any], texts: Sequence[str | None]) -> Tensor:
        self.go.wait(10)
        self.calls.append(len(texts))
        if any(text == "bad" for text in texts):
            raise InputError("a bad text")
        return torch.tensor([[1.0, len(text or "")] for text in texts])


def text(words: str) -> QueryParts:
    return QueryParts([None], [words], [1.0])


def expected(words: str) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor([1.0, len(words)]), dim=0)


def test_what_waits_is_one_batch() -> None:
    """The first runs alone, the others meanwhile become one call; each gets its own result."""
    slow = Slow()
    encoder = BatchedEncoder(slow, 32, 64)
    words = ["w" * n for n in range(1, 12)]
    futures = [encoder.submit(text(one)) for one in words]
    slow.go.set()
    for one, future in zip(words, futures, strict=True):
        assert torch.allclose(future.result(10), expected(one))
    encoder.close()
    assert sum(slow.calls) == 11 and len(slow.calls) <= 2 and sum(encoder.sizes.values()) == len(slow.calls)


@pytest.mark.parametrize(("batch_size", "most"), [(1, 1), (4, 4)])
def test_batches_are_no_larger_than_told(batch_size: int, most: int) -> None:
    slow = Slow()
    encoder = BatchedEncoder(slow, batch_size, 64)
    futures = [encoder.submit(text("abc")) for _ in range(9)]
    slow.go.set()
    assert all(torch.allclose(future.result(10), expected("abc")) for future in futures)
    encoder.close()
    assert max(slow.calls) == most


def test_a_bad_query_fails_alone() -> None:
    slow = Slow()
    encoder = BatchedEncoder(slow)
    futures = [encoder.submit(text(words)) for words in ("first", "good", "bad", "fine")]
    slow.go.set()
    with pytest.raises(InputError, match="a bad text"):
        futures[2].result(10)
    assert [torch.allclose(futures[n].result(10), expected(("first", "good", "bad", "fine")[n])) for n in (0, 1, 3)]
    with pytest.raises(InputError, match="cancel each other"):
        encoder.submit(QueryParts([None, None], ["aa", "aa"], [1.0, -1.0])).result(10)
    assert torch.allclose(encoder.submit(text("after")).result(10), expected("after"))
    encoder.close()


def test_a_full_queue_refuses() -> None:
    """With status 503; what waits is answered all the same, but for what a client has given up."""
    slow = Slow()
    encoder = BatchedEncoder(slow, 2, 3)
    futures: list[Future[Tensor]] = []
    with pytest.raises(Refused, match="3 queries wait already") as error:
        for _ in range(10):
            futures.append(encoder.submit(text("abc")))
    assert error.value.status == 503 and 3 <= len(futures) <= 5
    assert futures[-1].cancel()
    slow.go.set()
    assert all(torch.allclose(future.result(10), expected("abc")) for future in futures[:-1])
    encoder.close()


def test_results_are_those_of_one_at_a_time() -> None:
    """By the embedded model: pictures, texts, both, several with weights, negatives."""
    model = load()
    red, blue = Image.new("RGB", (50, 40), "red"), Image.new("RGB", (30, 60), "blue")
    queries = [
        split_query(*given, lambda picture: picture)
        for given in (
            (red, None, None, None), (None, "a heart", None, None), (blue, "in red", None, None),
            ([red, (blue, 0.5)], ["one", ("two", 2.0)], None, "green"), (red, "smaller", blue, None),
        )
    ]  # fmt: skip
    encoder = BatchedEncoder(model.embed_queries)
    futures = [encoder.submit(one) for one in queries * 3]
    for one, future in zip(queries * 3, futures, strict=True):
        assert torch.allclose(future.result(30), one.combine(model.embed_queries(one.images, one.texts)), atol=1e-5)
    encoder.close()
    assert max(encoder.sizes) > 1
    assert not torch.allclose(futures[0].result(), futures[1].result(), atol=1e-2)
