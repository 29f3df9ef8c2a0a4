"""The model card of a run: its README.md, with the metadata that the Hugging Face hub reads."""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spn4cir.backbones import BACKBONES
from spn4cir.config import TrainConfig
from spn4cir.errors import InputError
from spn4cir.files import hash_files, read_json, write_text
from spn4cir.provenance import read_provenance
from spn4cir.run_record import (
    has_several_evaluations,
    read_evaluations,
    read_run_result,
    read_run_settings,
    strip_places,
)

CARD = "README.md"
GENERATED = "<!-- spn4cir writes this file again when the run changes: delete this line to keep a text of your own -->"
IMAGES = "This model embeds images, so that similar images have similar embeddings."
KINDS = {
    "classes": "This model embeds images. It was trained on classes of images, by a softmax over class centres.",
    "crossmodal": "This model embeds images and texts in one space, so that each finds the other.",
}
"""What a model of a stage with a name is."""
COMPOSED = (
    "This is a model for composed image retrieval. A query is a reference image, a text that says what should differ, "
    "or both; the model ranks the images of a gallery by their similarity to the query."
)
OWN_PLACES = ("data_root", "init", "output", "resume", "trackers")
"""Settings that say where files lie, or what watches the run: nothing that another machine needs."""
EXAMPLES = {"classes": "classes of images", "crossmodal": "pairs of an image and a text"}
"""What a stage with a name trains on; other stages train on triplets."""
ORIGINS = ("model", "image", "text", "pretrained")
"""Options of backbones that name pretrained weights."""
EMBEDDED_LICENCE = (
    "the small weights that ship with spn4cir, under its MIT licence; they were trained on Twemoji graphics, © "
    "Twitter, Inc and other contributors, CC-BY 4.0, and on names from Unicode CLDR, under the Unicode licence"
)


class CardForm(NamedTuple):
    """What a card says of the form in which a model lies in a folder.

    Attributes:
        library: that reads it, as the hub calls it.
        use: section of Markdown.
        files: whose fingerprints the card gives.
    """

    library: str
    use: str
    files: Sequence[Path]


def write_card(folder: Path) -> str:
    """Write the card of a run or checkpoint folder, unless a person wrote one.

    Returns:
        A line for people if the file is a person's own and stays; else nothing.

    Raises:
        InputError: if the folder holds no model, or the file cannot be written.
    """
    path = folder / CARD
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if before is not None and not is_generated(before):
        return f"{path} is your own and stays as it is: delete it for a generated model card"
    text = render_card(folder)
    if text != before:
        write_text(path, text)
    return ""


def is_generated(text: str) -> bool:
    """Whether a card is not a person's own."""
    return GENERATED in text.splitlines()


def render_card(folder: Path, form: CardForm | None = None) -> str:
    """The card of a run or checkpoint folder as Markdown behind YAML, or that of its export in another form.

    Raises ``InputError`` if the folder holds no model, or a file in it is damaged.
    """
    note = read_json(folder / "model.json", "training or spn4cir-import")
    if not isinstance(note, dict) or not isinstance(note.get("options"), dict):
        raise InputError(f"{folder / 'model.json'} is damaged: it names no backbone and options")
    result = read_run_result(folder)
    evaluations = [result] * bool(result) + read_evaluations(folder)
    settings = read_run_settings(folder)
    about = {"backbone": note.get("backbone"), "stage": result.get("stage", note.get("stage"))}
    form = form or CardForm("spn4cir", write_use(about), [folder / "model.safetensors"])
    stage = f"stage {about['stage']}" if about["stage"] is not None else ""
    name = ", ".join(filter(None, [str(about["backbone"]), str(settings.get("dataset") or ""), stage]))
    metadata = _metadata(name, form.library, {**note, **about}, settings, evaluations)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        *[GENERATED] * (form.library == "spn4cir"),  # an export is not written again
        f"# {escape_markdown(name)}",
        KINDS.get(str(about["stage"]), COMPOSED if _reads_texts(about) else IMAGES),
        "## Use",
        form.use,
        "## Data",
        _describe_data(folder, about["stage"], settings, result),
        "## Results",
        _describe_results(folder, result, evaluations),
        "## Recipe",
        _describe_recipe(about["stage"], settings, result),
        "## Weights and licence",
        _describe_weights(note["options"], bool(settings)),
        "## Fingerprints",
        _describe_fingerprints(folder, form.files, result),
        "## Limits",
        _describe_limits(note["options"], result),
    ]
    return "\n\n".join(parts) + "\n"


def query_arguments(about: Mapping[str, Any]) -> str:
    """The arguments of ``embed_queries`` in the example of a card: what a model of that backbone and stage reads."""
    if not _reads_texts(about):
        return '["a.png"]'
    return 'texts=["a red heart"]' if about["stage"] == "crossmodal" else '["a.png"], ["but in red"]'


def _reads_texts(about: Mapping[str, Any]) -> bool:
    """Whether a backbone reads texts, as one that is unknown here is supposed to."""
    kind = BACKBONES.get(str(about.get("backbone")))
    return kind is None or kind.reads_texts


def write_use(about: Mapping[str, Any]) -> str:
    """The section on use of a model that ``spn4cir.load`` reads."""
    return f"""```python
import spn4cir

model = spn4cir.load("OWNER/NAME")  # the hub id of this model, or its folder
gallery = model.embed_images(["a.png", "b.png"])  # (2, K, E)
query = model.embed_queries({query_arguments(about)})  # (1, E)
scores = (query @ gallery.flatten(0, 1).T).view(1, len(gallery), -1).amax(2)  # (1, 2)
```

`spn4cir-index build PICTURES --model OWNER/NAME` and `spn4cir-search` search a folder of pictures."""


def escape_markdown(value: object) -> str:
    """A value as one line of Markdown text, in which no character is markup."""
    return re.sub(r"([\\`*_\[\]<>|~#&$!])", r"\\\1", " ".join(str(value).split()))


def _code(text: str, language: str) -> str:
    """A block of code, whatever the text holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *[[escape_markdown(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metadata(
    name: str,
    library: str,
    note: Mapping[str, Any],
    settings: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the hub reads."""
    reads_images_alone = not _reads_texts(note) or note.get("stage") == "classes"
    is_composed = not reads_images_alone and note.get("stage") not in KINDS
    tags = ["spn4cir", *["composed-image-retrieval"] * is_composed, "image-retrieval", str(note.get("backbone"))]
    task_name = "image-feature-extraction" if reads_images_alone else "feature-extraction"
    found: dict[str, Any] = {"library_name": library, "pipeline_tag": task_name, "tags": tags}
    if not settings and not evaluations and set(_origins(note["options"])) == {"embedded"}:
        found["license"] = "mit"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(settings.get("dataset"))):  # others are words of this package
        found["datasets"] = [str(settings["dataset"])]
    if evaluations:
        found["metrics"] = list(dict.fromkeys(metric for one in evaluations for metric in one.get("metrics", {})))
        task = {"type": task_name, "name": "Image retrieval"}
        results = [
            {
                "task": task,
                "dataset": {"type": str(one["protocol"]).partition("/")[0], "name": str(one["protocol"])},
                "metrics": [
                    {"type": metric, "name": metric, "value": round(v, 2)} for metric, v in one["metrics"].items()
                ],
            }
            for one in evaluations
        ]
        found["model-index"] = [{"name": name, "results": results}]
    return found


def _describe_data(folder: Path, stage: object, settings: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if not settings:
        return "This folder does not say on which data the model was trained."
    rows: list[tuple[str, object]] = [("dataset", settings["dataset"])]
    if catalogue := read_provenance(folder):
        rows += [("collection of images", catalogue.name), ("images of the collection", f"{catalogue.images:,}")]
    if counts := result.get("triplets"):
        total = counts["annotated"] + counts["generated"]
        share = f"{100 * counts['generated'] / total:.1f} % of all" if counts["generated"] else ""
        if str(stage) in EXAMPLES:
            rows += [(f"trained on {EXAMPLES[str(stage)]}", f"{total:,}")]
        else:
            rows += [("annotated triplets trained on", f"{counts['annotated']:,}")]
            rows += [("generated triplets trained on", f"{counts['generated']:,}{share and f', {share}'}")]
    if settings.get("generated_share"):
        rows.append(("generated share of each batch", settings["generated_share"]))
    if settings.get("holdout"):
        kind = "generated" if "holdout-generated" in str(result.get("selected_on")) else "annotated"
        rows.append((f"held-out share of the {kind} triplets", settings["holdout"]))
        if result.get("is_holdout"):
            rows.append((f"queries of held-out {kind} triplets", result.get("count", "?")))
    return _table(("", ""), rows)


def _describe_results(folder: Path, result: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "No evaluation is stored beside this model."
    blocks = []
    for one in evaluations:
        kind = ", over held-out training triplets" if one.get("is_holdout") else ""
        skipped = f"; {one['skipped']} images on a skip list are left out" if one.get("skipped") else ""
        protocol, count = escape_markdown(one["protocol"]), one.get("count", "?")
        head = f"Protocol **{protocol}**, {count} queries{kind}{skipped}; in percent."
        names = [escape_markdown(name) for name in one["metrics"]]
        blocks.append(f"{head}\n\n{_table(names, [[f'{value:.2f}' for value in one['metrics'].values()]])}")
    if result.get("selected_on"):
        how = f"step {result.get('best_step')} of {result.get('steps')}"
        if has_several_evaluations(folder, result):
            how += f", the best on {escape_markdown(result['selected_on'])}"
        blocks.append(f"The weights are those of {how}. Numbers of different protocols are not comparable.")
    return "\n\n".join(blocks)


def _describe_recipe(stage: object, settings: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if not settings:
        return "The weights were not trained by a run of this folder: there is no recipe."
    changed = _differences(settings, dataclasses.asdict(TrainConfig()))
    command = ["spn4cir-train", "--stage", str(stage), "--config", "config.yaml"]
    needs = []
    if settings["data_root"] or settings["dataset"] != TrainConfig.dataset:  # which ships with the package
        command += ["--data-root", "FOLDER"]
        needs.append("`--data-root` names the folder of the data.")
    if settings["init"]:
        command += ["--init", "RUN"]
        needs.append(f"It started from the weights of {escape_markdown(strip_places(settings['init'], 'init'))}.")
    if settings["generated"] == "auto":
        needs.append("The generated triplets are made by `spn4cir-triplets` first.")
    elif settings["generated"]:
        command += ["--generated", "FILE"]
        file = escape_markdown(strip_places(settings["generated"], "generated"))
        needs.append(f"It needs the generated triplets, {file}, which are not beside this card.")
    took = f"It took {result['seconds']:,.0f} s." if isinstance(result.get("seconds"), int | float) else ""
    told = " ".join(filter(None, ["`config.yaml` is that of the run.", *needs, took]))
    text = f"`{shlex.join(command)}`\n\n{told} Settings that are no defaults:"
    return f"{text}\n\n{_code(yaml.safe_dump(strip_places(changed), sort_keys=False, allow_unicode=True), 'yaml')}"


def _differences(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are no defaults, of a group those in it; and always the dataset and the backbone."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key in ("dataset", "backbone"):
            found[key] = value
        elif key in OWN_PLACES or value == known.get(key):
            continue
        elif isinstance(value, dict) and isinstance(known.get(key), dict) and known[key]:
            found[key] = {name: inner for name, inner in value.items() if inner != known[key].get(name)}
        else:
            found[key] = value
    return found


def _origins(options: Mapping[str, Any]) -> Iterator[str]:
    """Names of pretrained weights among the options of a backbone."""
    for name in ORIGINS:
        if isinstance(options.get(name), str):
            yield str(strip_places(options[name], name))


def _describe_weights(options: Mapping[str, Any], is_trained: bool) -> str:
    origins = list(_origins(options))
    lines = [
        f"- {escape_markdown(name)}: {EMBEDDED_LICENCE}."
        if name == "embedded"
        else f"- {escape_markdown(name)}: see the licence of its publisher; this package does not know it."
        for name in dict.fromkeys(origins)
    ]
    begin = "Training started from these pretrained weights:" if is_trained else "Pretrained weights:"
    known = "\n".join([f"{begin}\n", *lines]) if lines else "No pretrained weights are named."
    return f"{known}\n\nThe code of spn4cir is under the MIT licence."


def _describe_fingerprints(folder: Path, files: Sequence[Path], result: Mapping[str, Any]) -> str:
    rows = [(f"SHA-256 of {path.name}", hash_files(path) if path.is_file() else "missing") for path in files]
    catalogue = read_provenance(folder)
    rows += [("collection of images", catalogue.digest)] if catalogue else []
    rows += [(name, str(result[key])) for name, key in (("benchmark", "data"), ("code", "git")) if result.get(key)]
    return _table(("", ""), rows)


def _describe_limits(options: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    lines = ["- Scores rank images of one gallery; they are no probabilities, and those of two models do not compare."]
    if "embedded" in _origins(options):
        lines.append("- The weights it started from are small and know emoji alone: it serves to try the code.")
    if result.get("is_holdout"):
        lines.append("- The numbers are over held-out training triplets, not over annotated queries.")
    lines.append("- It has the biases of its data and of its pretrained weights, which nobody has measured here.")
    return "\n".join(lines)
