"""mteb on the sentence-transformers export, without a network: a composed task over embedded emoji."""

import io
from pathlib import Path

import mteb
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SentenceTransformerEncoderWrapper
from PIL import Image
from sentence_transformers import SentenceTransformer

import spn4cir
from spn4cir.datasets import load_dataset
from spn4cir.export.sentence_transformers import export_sentence_transformers
from spn4cir.types import Query

QUERIES = 24


def pictures(ids: list[str]) -> list[Image.Image]:
    """Opaque pictures, as mteb converts what it reads."""
    emoji = load_dataset("emoji")
    sources = [emoji.image(image_id).source for image_id in ids]
    data = [source() if callable(source) else source.read_bytes() for source in sources]
    return [Image.open(io.BytesIO(one)).convert("RGBA").convert("RGB") for one in data]


def embedded_queries() -> tuple[list[Query], list[str]]:
    """Queries with both parts, and a gallery of their references and targets."""
    queries = list(load_dataset("emoji").benchmark("val").queries[:: 1800 // QUERIES])[:QUERIES]
    return queries, list(dict.fromkeys(i for query in queries for i in (str(query.reference), query.targets[0])))


class EmojiIT2IRetrieval(AbsTaskRetrieval):
    """Composed queries whose references stay in the gallery, as in mteb's tasks of this kind."""

    metadata = TaskMetadata(
        name="EmojiIT2IRetrieval",
        description="Find the emoji that a reference and a text describe.",
        reference=None,
        dataset={"path": "local", "revision": "1"},
        type="Any2AnyRetrieval",
        category="it2i",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=None,
        domains=None,
        task_subtypes=["Image Text Retrieval"],
        license=None,
        annotations_creators=None,
        dialect=None,
        modalities=["text", "image"],
        sample_creation=None,
        bibtex_citation=None,
    )

    def load_data(self, num_proc: int | None = None, **_: object) -> None:
        queries, gallery = embedded_queries()
        names = [f"q{n}" for n in range(len(queries))]
        kinds = {"id": Value("string"), "image": ImageFeature()}
        asked = {"id": names, "image": pictures([str(query.reference) for query in queries])}
        asked["text"] = [query.text for query in queries]
        self.dataset = {"default": {"test": {
            "queries": Dataset.from_dict(asked, features=Features({**kinds, "text": Value("string")})),
            "corpus": Dataset.from_dict({"id": gallery, "image": pictures(gallery)}, features=Features(kinds)),
            "relevant_docs": {name: {query.targets[0]: 1} for name, query in zip(names, queries, strict=True)},
            "top_ranked": None,
        }}}  # fmt: skip
        self.data_loaded = True


def test_mteb_agrees_with_our_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mteb's nDCG@10 and recall@1 are those of our own embeddings, ranked here; the references alone give others."""
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    model = spn4cir.load("embedded", device="cpu")
    export_sentence_transformers(model, tmp_path / "exported")
    loaded = SentenceTransformer(str(tmp_path / "exported"), device="cpu", trust_remote_code=True)
    wrapped = SentenceTransformerEncoderWrapper(loaded)
    about = {"modalities": ["image", "text"]}  # mteb takes every SentenceTransformer for one of texts
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=about)
    result = mteb.evaluate(
        wrapped, EmojiIT2IRetrieval(), cache=None, co2_tracker=False, show_progress_bar=False,
        encode_kwargs={"batch_size": 16},
    )  # fmt: skip
    scores = result.task_results[0].scores["test"][0]

    queries, gallery = embedded_queries()
    targets = model.embed_images(pictures(gallery))[:, 0]
    references = pictures([str(query.reference) for query in queries])

    def rank(texts: list[str | None] | None) -> np.ndarray:  # type: ignore[type-arg]
        found = (model.embed_queries(references, texts) @ targets.T).numpy()  # (Q, G)
        rows = [gallery.index(query.targets[0]) for query in queries]
        return 1 + (found > found[np.arange(len(rows)), rows][:, None]).sum(1)

    ranks = rank([query.text for query in queries])
    ndcg = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean()
    assert scores["ndcg_at_10"] == pytest.approx(ndcg, abs=1e-5)
    assert scores["recall_at_1"] == pytest.approx((ranks == 1).mean(), abs=1e-5)
    assert 0 < ndcg < 1 and not np.array_equal(ranks, rank(None))
