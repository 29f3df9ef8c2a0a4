"""Model cards: what they hold, that nothing in the data becomes markup, and that a person's own text stays."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from spn4cir.config import TrainConfig, write_yaml
from spn4cir.errors import InputError
from spn4cir.model_card import CARD, GENERATED, escape_markdown, render_card, write_card
from spn4cir.provenance import Provenance
from spn4cir.run_record import strip_places

RESULT: dict[str, Any] = {
    "stage": 2, "steps": 40, "best_step": 30, "selected_on": "pairs/holdout-0.1", "triplets": {"annotated": 300,
    "generated": 100}, "protocol": "pairs/val", "metrics": {"R@1": 12.3456, "R@10": 50.0}, "tags": {}, "ablation": {},
    "count": 1833, "data": "0123abcd", "is_holdout": False, "skipped": 2, "git": "abc123", "seconds": 61.4,
}  # fmt: skip


def make_run(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    note = {"backbone": "clip4cir", "options": {"model": "RN50-quickgelu", "pretrained": "openai"}, "stage": 2}
    (folder / "model.json").write_text(json.dumps(note))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "result.json").write_text(json.dumps(RESULT))
    write_yaml(TrainConfig(dataset="pairs", **settings), folder / "config.yaml", "stage 2")
    return folder


def test_what_a_card_holds(tmp_path: Path) -> None:
    """Metadata that the hub's client reads, data, metrics, recipe, licences, fingerprints."""
    run = make_run(
        tmp_path / "run", generated_share=0.25, lr=0.003, data_root="/secret/data", init="/secret/runs/stage1-x",
        generated="../secret/made.jsonl", negatives={"near_duplicates": True},
    )  # fmt: skip
    Provenance("pairs", "my | shoes", "/secret/place", 1234, "feedbeef", {}).write(run)
    assert write_card(run) == ""
    text, card = (run / CARD).read_text(), ModelCard.load(run / CARD)
    assert card.data.library_name == "spn4cir" and card.data.datasets is None  # a local word
    assert card.data.metrics == ["R@1", "R@10"] and "license" not in card.data.to_dict()
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in card.data.eval_results] == [
        ("pairs/val", "R@1", 12.35), ("pairs/val", "R@10", 50.0),
    ]  # fmt: skip
    for part in (
        "| annotated triplets trained on | 300 |", "| generated triplets trained on | 100, 25.0 % of all |",
        r"my \| shoes", "1,234",
        "| generated share of each batch | 0.25 |", "Protocol **pairs/val**, 1833 queries; 2 images on a skip list",
        "| 12.35 | 50.00 |", "step 30 of 40, the best on pairs/holdout-0.1", "spn4cir-train --stage 2",
        "--config config.yaml --data-root FOLDER --init RUN --generated FILE`", "which are not beside this card",
        "lr: 0.003", "generated: made.jsonl", "weights of stage1-x", "openai: see the licence of its publisher",
        "feedbeef", "0123abcd", "abc123", hashlib.sha256(b"weights").hexdigest(), "It took 61 s",
    ):  # fmt: skip
        assert part in text, part
    assert "secret" not in text and "data_root" not in text and "max_similarity" not in text
    assert render_card(run) == text


def test_a_card_follows_the_run(tmp_path: Path) -> None:
    """A generated card is written again when the run changes, with results of spn4cir-eval beside it; others stay."""
    run = make_run(tmp_path / "run")
    write_card(run)
    before = (run / CARD).read_text()
    evaluated = {**RESULT, "protocol": "pairs/test", "metrics": {"R@5": 33.0}, "is_holdout": True}
    (run / "test.json").write_text(json.dumps(evaluated))
    (run / "other.json").write_text(json.dumps({"protocol": "x"}))
    (run / "model.safetensors").write_bytes(b"others")
    assert write_card(run) == "" and (run / CARD).read_text() != before
    text = (run / CARD).read_text()
    assert "Protocol **pairs/test**, 1833 queries, over held-out training triplets" in text and "| 33.00 |" in text
    (run / CARD).write_text(text.replace(GENERATED, "") + "mine")
    assert "is your own and stays" in write_card(run) and (run / CARD).read_text().endswith("mine")


def test_a_checkpoint_without_a_run(tmp_path: Path) -> None:
    """Imported and embedded weights have a card, too; a folder without a model has none."""
    folder = make_run(tmp_path / "run")
    for name in ("result.json", "config.yaml"):
        (folder / name).unlink()
    (folder / "model.json").write_text(json.dumps({"backbone": "clip4cir", "options": {"model": "embedded"}}))
    text = render_card(folder)
    assert ModelCard(text).data.license == "mit" and "CC-BY 4.0" in text
    assert "No evaluation is stored" in text and "does not say on which data" in text
    for held in ("[]", '{"backbone": "x"}', "{"):
        (folder / "model.json").write_text(held)
        with pytest.raises(InputError, match=r"model\.json"):
            render_card(folder)
    with pytest.raises(InputError, match="missing"):
        write_card(tmp_path)


EVIL = "a|b\n---\n# x <script>alert(1)</script> [y](javascript:z) `c` ![i](u) ```\n~~~ & *d* _e_ $f$ : '\""


def test_nothing_in_the_data_is_markup(tmp_path: Path) -> None:
    """A dataset, a protocol, a setting and a catalogue of any letters: front matter, tables and blocks stay whole."""
    run = make_run(tmp_path / "run", backbone_options={"model": EVIL})
    result = {**RESULT, "protocol": EVIL, "metrics": {EVIL: 1.0}, "selected_on": EVIL, "data": EVIL, "git": EVIL}
    (run / "result.json").write_text(json.dumps(result))
    (run / "model.json").write_text(json.dumps({"backbone": EVIL, "options": {"model": EVIL}, "stage": EVIL}))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "dataset": EVIL}))
    Provenance("pairs", EVIL, "", 1, EVIL, {}).write(run)
    write_card(run)
    text = (run / CARD).read_text()
    data = ModelCard(text).data.to_dict()
    assert "datasets" not in data and data["metrics"] == [EVIL] and EVIL in data["tags"]
    body = text.split(GENERATED)[1]
    block = body.index("````yaml")
    outside = body[:block] + body[body.index("````", block + 4) + 4 :]
    assert "<script" not in outside.replace(r"\<script", "") and "](javascript" not in outside.replace(r"\](", "")
    heads = ["Use", "Data", "Results", "Recipe", "Weights and licence", "Fingerprints", "Limits"]
    assert [line[3:] for line in outside.splitlines() if line.startswith("## ")] == heads
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith("| ")]
    assert len(cells) > 8 and set(cells) == {2, 3}  # one metric, or a name and a value


@pytest.mark.parametrize(
    ("backbone", "stage", "query", "trained_on", "task"),
    [
        ("embedding", "classes", '["a.png"])', "classes of images", "image-feature-extraction"),
        ("masln", "crossmodal", 'texts=["a red heart"])', "pairs of an image and a text", "feature-extraction"),
        ("clip4cir", 2, '["a.png"], ["but in red"])', "annotated triplets", "feature-extraction"),
    ],
)
def test_each_kind_of_model(
    tmp_path: Path, backbone: str, stage: object, query: str, trained_on: str, task: str
) -> None:
    """The example, the data and the task of the hub are those of what the stage trains."""
    run = make_run(tmp_path / "run")
    (run / "model.json").write_text(json.dumps({"backbone": backbone, "options": {}, "stage": stage}))
    (run / "result.json").write_text(json.dumps({**RESULT, "stage": stage}))
    text = render_card(run)
    assert f"embed_queries({query}" in text and trained_on in text and f"pipeline_tag: {task}\n" in text
    assert ("triplets" in text.split("## Results")[0]) == (stage == 2) == ("composed-image-retrieval" in text)


def test_one_evaluation_is_not_the_best_of_several(tmp_path: Path) -> None:
    """Held-out generated triplets are called that, too."""
    run = make_run(tmp_path / "run", holdout=0.1)
    result = {**RESULT, "best_step": 40, "selected_on": "pairs/holdout-generated-0.1", "is_holdout": True, "count": 9}
    (run / "result.json").write_text(json.dumps(result))
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 1}\n{"step": 40, "R@1": 1.0}\n')
    text = render_card(run)
    assert "step 40 of 40." in text and "the best on" not in text
    assert "| held-out share of the generated triplets | 0.1 |" in text
    assert "| queries of held-out generated triplets | 9 |" in text
    (run / "metrics.jsonl").write_text('{"step": 20, "R@1": 1.0}\n{"step": 40, "R@1": 1.0}\n')
    assert "step 40 of 40, the best on" in render_card(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", "[1]"),
        ("result.json", json.dumps({**RESULT, "metrics": None})),
        ("result.json", json.dumps({**RESULT, "metrics": {"R@1": "high"}})),
        ("result.json", json.dumps({**RESULT, "protocol": 3})),
        ("result.json", json.dumps({**RESULT, "triplets": [1]})),
        ("stray.json", "{"),
        ("stray.json", json.dumps({"protocol": "x/val", "metrics": {"R@1": None}})),
        ("config.yaml", "[1]"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    """In one line, by its name."""
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(str(run / name))) as raised:
        render_card(run)
    assert "\n" not in str(raised.value)


def test_helpers() -> None:
    """Escapes and places."""
    assert escape_markdown("a|b\n<c>") == r"a\|b \<c\>"
    assert strip_places({"a": "/x/y/z.pt", "b": ["local-dir:/m/clip", "C:\\d\\e"], "c": 3, "d": "owner/name"}) == {
        "a": "z.pt", "b": ["local-dir:clip", "e"], "c": 3, "d": "owner/name",
    }  # fmt: skip
    given = {
        "generated": "../../home/alice/triplets.json", "bank": {"extra": "alice/more"}, "data_root": "alice/data/",
        "model": "owner/name", "image": "hf-hub:timm/vit.b", "text": "runs/alice/x", "pretrained": "alice/weights.pt",
        "tokenizer": "~alice/bert", "protocol": "fashioniq/original-noref", "prompts": ["run:alice/run"],
    }  # fmt: skip
    assert strip_places(given) == {
        **given, "generated": "triplets.json", "bank": {"extra": "more"}, "data_root": "data", "text": "x",
        "pretrained": "weights.pt", "tokenizer": "bert", "prompts": ["run:run"],
    }  # fmt: skip
