"""The words of the project."""

import pytest

from spn4cir.errors import InputError
from spn4cir.types import Benchmark, Query


def benchmark(gallery: tuple[str, ...], *queries: Query) -> Benchmark:
    return Benchmark("x/val", gallery, queries, exclude_reference=True, ks=(1,))


def test_a_benchmark_whose_images_are_all_in_the_gallery() -> None:
    """What is whole is accepted."""
    query = Query("a", "red", ("b",), candidates=("a", "b"))
    assert benchmark(("a", "b"), query).queries == (query,)


@pytest.mark.parametrize("query", [
    Query("z", "red", ("b",)), Query("a", "red", ("b", "z")), Query("a", "red", ("b",), candidates=("a", "b", "z")),
])  # fmt: skip
def test_images_outside_the_gallery_are_named(query: Query) -> None:
    """Reference, targets and subset must be in the gallery; the message names protocol, query and image."""
    with pytest.raises(InputError, match="x/val: query 1 names 'z'"):
        benchmark(("a", "b"), Query("a", "red", ("b",)), query)


def test_a_gallery_that_names_an_image_twice() -> None:
    """A twin would cost each query a place."""
    with pytest.raises(InputError, match="twice"):
        benchmark(("a", "b", "a"))


def test_queries_whose_targets_are_hidden() -> None:
    """A test split may not tell its targets: such a benchmark can still be composed and searched."""
    assert benchmark(("a", "b"), Query("a", "red", ())).queries[0].targets == ()
