"""The words of the project."""

from dataclasses import replace

import pytest

from spn4cir.errors import InputError
from spn4cir.types import Benchmark, Measure, Query, recall_measures


def benchmark(gallery: tuple[str, ...], *queries: Query) -> Benchmark:
    return Benchmark("x/val", gallery, queries, exclude_reference=True, measures=recall_measures(1))


def test_a_benchmark_whose_images_are_all_in_the_gallery() -> None:
    """What is whole is accepted."""
    query = Query("a", "red", ("b",), candidates=("a", "b"))
    assert benchmark(("a", "b"), query).queries == (query,)


@pytest.mark.parametrize("query", [
    Query("a", "red", ("b", "z")), Query("a", "red", ("b",), candidates=("a", "b", "z")),
])  # fmt: skip
def test_images_outside_the_gallery_are_named(query: Query) -> None:
    """Targets and candidates must be in the gallery; the message names protocol, query and image."""
    with pytest.raises(InputError, match="x/val: query 1 names 'z'"):
        benchmark(("a", "b"), Query("a", "red", ("b",)), query)


def test_a_gallery_that_names_an_image_twice() -> None:
    """A twin would cost each query a place."""
    with pytest.raises(InputError, match="twice"):
        benchmark(("a", "b", "a"))


def test_queries_whose_targets_are_hidden() -> None:
    """A test split may not tell its targets: such a benchmark can still be composed and searched."""
    assert benchmark(("a", "b"), Query("a", "red", ())).queries[0].targets == ()


def test_a_reference_outside_the_gallery() -> None:
    """It is encoded beside the gallery, once, and never ranked."""
    found = benchmark(("a", "b"), Query("z", "red", ("b",)), Query("z", "blue", ("a",)), Query(None, "red", ("a",)))
    assert found.outside_references == ("z",) and found.image_ids == ("a", "b", "z")


@pytest.mark.parametrize(("query", "told"), [
    (Query(None, None, ("b",)), "neither a reference nor a text"),
    (Query("a", "red", ("b",), candidates=("a",)), "the target 'b', which its candidates lack"),
    (Query("b", "red", ("b",)), "no target but its reference 'b'"),
])  # fmt: skip
def test_queries_that_cannot_be_answered(query: Query, told: str) -> None:
    """The message names protocol, query and what is wrong."""
    with pytest.raises(InputError, match=f"x/val: query 0 .*{told}"):
        benchmark(("a", "b"), query)


def test_texts_and_measures_of_a_benchmark() -> None:
    """A text that is no item, no measure, one measure twice: refused; texts are no images."""
    whole = benchmark(("a", "b"), Query("a", "red", ("b",)))
    with pytest.raises(InputError, match="the text 'c' is not in the gallery"):
        replace(whole, texts={"c": "a cat"})
    for measures in ((), recall_measures(1, 1)):
        with pytest.raises(InputError, match="needs measures, and each once"):
            replace(whole, measures=measures)
    assert replace(whole, texts={"b": "a boat"}).image_ids == ("a",)


def test_tags_that_no_query_has() -> None:
    """A mean over them does not exist."""
    whole = benchmark(("a", "b"), Query("a", "red", ("b",), ("colour",)))
    assert replace(whole, macro=("colour", "shape")).missing_tags == ["shape"] and not whole.missing_tags


def test_primary_measures() -> None:
    """Those that are named, over what is named."""
    assert recall_measures(1, 5, primary=(5,), over="subset") == (
        Measure("recall", 1, "subset"), Measure("recall", 5, "subset", primary=True),
    )  # fmt: skip


@pytest.mark.parametrize(("query", "told"), [
    (Query("s", None, ("a",)), "query 0 has the text 's' as its reference"),
    (Query("a", "x", ("b", "b")), "query 0 names a target twice"),
    (Query("a", "x", ("b",), (), ("a", "b", "b")), "query 0 names a candidate twice"),
    (Query("a", "x", ("b",), "red"), "query 0 has tags that are no tuple"),  # type: ignore[arg-type]
    (Query(None, None, ("b",)), "query 0 has neither a reference nor a text"),
])  # fmt: skip
def test_queries_without_a_meaning(query: Query, told: str) -> None:
    """They would be ranked as something else, without a word."""
    with pytest.raises(InputError, match=told):
        Benchmark("x/val", ("a", "b", "c", "s"), (query,), False, recall_measures(1), {"s": "a text"})


def test_a_measure_over_candidates_needs_them() -> None:
    """Of each query."""
    queries = (Query("a", "x", ("b",), (), ("a", "b")), Query("a", "x", ("b",)))
    for over in ("candidates", "subset"):
        with pytest.raises(InputError, match="query 1 has no candidates, and a measure is over them"):
            Benchmark("x/val", ("a", "b"), queries, False, (Measure("recall", 1, over),))  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [("recall", 1.5), ("recall", 0), ("recall", 1, "galery")])
def test_measures_without_a_meaning(given: tuple[object, ...]) -> None:
    """A cut-off between ranks, or something that is not ranked."""
    with pytest.raises(InputError, match=r"from the first rank on|over gallery, candidates or subset"):
        Measure(*given)  # type: ignore[arg-type]
