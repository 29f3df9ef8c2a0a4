"""The page of a report as one string."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spn4cir.comparison import Difference, format_p
from spn4cir.evaluate import COMPOSED
from spn4cir.intervals import bootstrap_interval
from spn4cir.query_values import is_lower_better
from spn4cir.report.charts import MAP_KS, RECALL_KS, curve, draw_curves
from spn4cir.report.escaping import escape, script_json
from spn4cir.results import Result
from spn4cir.shortcuts import FIRST, LABELS, ONE_PART, REQUIRED, SHORTCUT, UNRESOLVED, main_ranks
from spn4cir.summary import MACRO, MetricRow

GENERATOR = '<meta name="generator" content="spn4cir-eval --report">'  # marks a page as ours, near its beginning
MEANINGS = {
    REQUIRED: f"a target is among the first {FIRST} by image and text together, and by neither alone",
    SHORTCUT: f"a target is among the first {FIRST} by the image alone or by the text alone",
    UNRESOLVED: f"no target is among the first {FIRST}",
    ONE_PART: "the query has only an image, or only a text",
}


def build_report(
    results: Mapping[str, Result],
    rows: Mapping[str, Sequence[MetricRow]],
    labels: Sequence[str],
    differences: Mapping[str, Sequence[Difference]],
    content: Mapping[str, Any],
    paths: Sequence[str],
) -> str:
    """The whole page. Arguments are what ``write_report`` computed, by short name; ``paths`` are the full names.

    All of them are escaped here.
    """
    here = Path(__file__).parent
    script, style = (here.joinpath(name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    first = next(iter(results.values()))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    sections = [
        _header(first, dict(zip(results, paths, strict=True))),
        _section("Metrics", _metrics(rows), "In percent, each with its 95 % interval over queries."),
        _comparisons(differences),
        _section("Image, text and both", _modalities(rows, labels), _modality_note(len(results))),
        _section("Curves", _curves(results), "Logarithmic axis. Hover over a curve for its values."),
        _section("By tag", _by_tag(rows), "Composed queries; the most frequent tag first."),
        f"<section><h2>Queries</h2>{_list_frame(content)}</section>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{GENERATOR}"
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(first.protocol)}: evaluation</title><style>{style}</style></head>'
        f"<body><main>{''.join(sections)}</main>"
        f'<script type="application/json" id="content">{script_json(content)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{body}{said}</section>" if body else ""


def _header(first: Result, models: Mapping[str, str]) -> str:
    benchmark = first.benchmark
    assert benchmark is not None
    reference = "the reference is not ranked" if benchmark.exclude_reference else "the reference is ranked too"
    facts = [
        f"{first.count:,} queries",
        f"gallery of {len(benchmark.gallery):,} items",
        reference,
        *([f"{first.skipped:,} images skipped"] if first.skipped else []),
        f"data {first.data}",
    ]
    named = "".join(
        f"<li><bdi>{escape(model)}</bdi>{'' if path == model else f'<small><bdi>{escape(path)}</bdi></small>'}</li>"
        for model, path in models.items()
    )
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<header><h1>{escape(first.protocol)}</h1><ul class="facts">{listed}</ul><ol>{named}</ol></header>'


def _table(head: Iterable[object], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already, under head cells that are text; the first cell of a row names it."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(row: MetricRow) -> str:
    return f"{row.value:.1f}<small>{row.low:.1f} – {row.high:.1f}</small>"


def _metrics(rows: Mapping[str, Sequence[MetricRow]]) -> str:
    """Metrics of all queries by model; below, those of wrong answers and needs, with the number of queries or needs."""
    by_model = {
        model: {row.metric: row for row in found if not row.tag and row.mode == COMPOSED}
        for model, found in rows.items()
    }
    further = [name for name in next(iter(by_model.values())) if not _is_plain(name) and not name.startswith(MACRO)]
    if not further:
        return _by_row("model", by_model)
    lines = []
    for name in further:
        note = "<small>lower is better</small>" if is_lower_better(name) else ""
        found = [of_model[name] for of_model in by_model.values()]
        lines.append([escape(name) + note, *map(_cell, found), f"{found[0].queries:,}"])
    table = _table(["", *by_model, "queries, or needs"], lines)
    return f"{_by_row('model', by_model)}<h3>Wrong answers, and phrasings of one need</h3>{table}"


def _is_plain(name: str) -> bool:
    return " " not in name and not is_lower_better(name)


def _by_row(title: str, found: Mapping[str, Mapping[str, MetricRow]]) -> str:
    """A row for each name, such as a model, with the metrics as columns; another row for the mean over tags."""
    names = [name for name in next(iter(found.values())) if _is_plain(name)]
    lines = []
    for label, metrics in found.items():
        lines.append([f"<bdi>{escape(label)}</bdi>", *(_cell(metrics[name]) for name in names)])
        if any(name.startswith(MACRO) for name in metrics):
            macro = [_cell(metrics[MACRO + name]) if MACRO + name in metrics else "" for name in names]
            lines.append([f"<bdi>{escape(label)}</bdi><small>mean over tags</small>", *macro])
    return _table([title, *names], lines)


def _comparisons(differences: Mapping[str, Sequence[Difference]]) -> str:
    note = (
        "Other model minus first model, in points. p: paired test on the same queries (McNemar's exact test where "
        "values are 0 or 1, else random signs). Holm: p corrected for all rows of all comparisons; 0.05 or more is "
        "called noise."
    )
    parts = []
    for model, found in differences.items():
        lines = [
            [
                escape(row.metric), f'<b class="{row.verdict}">{row.verdict}</b>',
                f"{row.difference:+.1f}<small>{row.low:+.1f} to {row.high:+.1f}</small>",
                f"{row.base:.1f}", f"{row.value:.1f}", escape(format_p(row.p)), escape(format_p(row.adjusted)),
            ]
            for row in found
        ]  # fmt: skip
        head = ("metric", "", "difference", "first", "other", "p", "p (Holm)")
        parts.append(f"<h3><bdi>{escape(model)}</bdi></h3>{_table(head, lines)}")
    return _section("Comparison with the first model", "".join(parts), note)


def _modalities(rows: Mapping[str, Sequence[MetricRow]], labels: Sequence[str]) -> str:
    """Metrics by mode side by side, a table for each model, and the share of each label as bars."""
    table = ""
    for model, found in rows.items():
        modes: dict[str, dict[str, MetricRow]] = {}
        for row in found:
            if not row.tag:
                modes.setdefault(row.mode, {})[row.metric] = row
        if f"{COMPOSED}, queries of both" in modes:
            del modes[COMPOSED]
        if len(modes) < 2:
            return ""
        table += _model_title(model, rows) + _by_row("ranked by", modes)
    composed = np.array([label for label in labels if label != ONE_PART])
    if not len(composed):
        return table
    values = np.stack([composed == label for label in LABELS[:3]]).astype(np.float64)
    bars = "".join(
        f'<dt>{escape(label)}<small>{escape(MEANINGS[label])}</small></dt><dd><meter max="100" value="{share:.2f}">'
        f"</meter> {share:.1f} %<small>{100 * low:.1f} – {100 * high:.1f}</small></dd>"
        for label, share, (low, high) in zip(LABELS, 100 * values.mean(1), bootstrap_interval(values), strict=False)
    )
    return f'{table}<h3>Which queries need both</h3><dl class="shares">{bars}</dl>'


def _modality_note(models: int) -> str:
    by = "by any of the models here" if models > 1 else "by this one model"
    return f"Queries that have both parts. Labels as in CIRCUS (arXiv 2605.14787), which has eleven models; here {by}."


def _curves(results: Mapping[str, Result]) -> str:
    """Of several models the composed queries in one pair of figures, then a pair for each model by mode."""
    parts = []
    if len(results) > 1:
        parts.append("<h3>Composed queries</h3>" + _figures({model: (one, COMPOSED) for model, one in results.items()}))
    for model, result in results.items():
        modes = sorted(result.by_mode, key=lambda mode: mode != COMPOSED)
        parts.append(_model_title(model, results) + _figures({mode: (result, mode) for mode in modes}))
    return "".join(parts)


def _figures(lines: Mapping[str, tuple[Result, str]]) -> str:
    """Recall and mAP over k: a line for each name, of a result and a mode."""
    ranks = {name: main_ranks(result, mode) for name, (result, mode) in lines.items()}
    benchmark = next(iter(lines.values()))[0].benchmark
    assert benchmark is not None
    figures = []
    for kind, title, ks in (("recall", "Recall at k", RECALL_KS), ("map", "mAP at k", MAP_KS)):
        kept = [k for k in ks if k <= max(2, len(benchmark.gallery))]
        figures.append(draw_curves(title, kept, {name: curve(kind, found, kept) for name, found in ranks.items()}))
    return f'<div class="figures">{"".join(figures)}</div>'


def _model_title(model: str, models: Mapping[str, object]) -> str:
    """A heading of a part about one model; empty where there is no other model."""
    return f"<h3><bdi>{escape(model)}</bdi></h3>" if len(models) > 1 else ""


def _by_tag(rows: Mapping[str, Sequence[MetricRow]]) -> str:
    """A table for each model with a line for each tag, the most frequent first."""
    parts = []
    for model, found in rows.items():
        tags: dict[str, dict[str, MetricRow]] = {}
        for row in found:
            if row.tag and row.mode == COMPOSED:
                tags.setdefault(row.tag, {})[row.metric] = row
        if not tags:
            return ""
        names = list(next(iter(tags.values())))
        lines = [
            [f"<bdi>{escape(tag)}</bdi>", f"{of_tag[names[0]].queries:,}", *(_cell(of_tag[name]) for name in names)]
            for tag, of_tag in sorted(tags.items(), key=lambda pair: -pair[1][names[0]].queries)
        ]
        parts.append(_model_title(model, rows) + _table(["tag", "queries", *names], lines))
    return "".join(parts)


def _list_frame(content: Mapping[str, Any]) -> str:
    """The filter and the places that the script fills."""

    def select(name: str, title: str, options: Iterable[tuple[object, str]]) -> str:
        listed = "".join(f'<option value="{escape(value)}">{escape(label)}</option>' for value, label in options)
        return f'<label>{title}<select id="{name}">{listed}</select></label>'

    titles = {"worst": "worst", "changed": "most changed", "wrong": "wrong answer first"}
    shown = [(name, f"{titles[name]} ({len(numbers):,})") for name, numbers in content["lists"].items()]
    tags = [("", "any"), *enumerate(content["tagNames"])]
    models, modes = content["models"], content["modes"]
    ranked = [
        modes[mode] if len(models) == 1 else f"{model + 1}: {modes[mode]} ({models[model]})"  # cut, it differs still
        for model, mode in content["columns"]
    ]
    used = [(n, name) for n, name in enumerate(content["labelNames"]) if n in content["labels"]]
    return (
        f'<form id="filter">{select("list", "Show", [*shown, ("", "all queries")])}'
        '<label>Text, tag, item or need<input id="words" type="search" autocomplete="off"></label>'
        + (select("tag", "Tag", tags) if len(tags) > 1 else "")
        + (select("label", "Solved by", [("", "any"), *used]) if used else "")
        + select("column", "Rank by", enumerate(ranked))
        + '<label>Rank from<input id="from" type="number" min="1" inputmode="numeric"></label>'
        '<label>to<input id="to" type="number" min="1" inputmode="numeric"></label>'
        + select("order", "Order", [("list", "as listed"), ("worst", "worst first"), ("best", "best first")])
        + '</form><p id="count" role="status"></p><div id="queries"></div>'
        '<nav><button id="before" type="button">Previous</button><span id="page"></span>'
        '<button id="after" type="button">Next</button></nav>'
        "<noscript>The list of queries needs JavaScript.</noscript>"
        '<p class="note">Queries of the first lists have pictures. A rank is that of the best target; of '
        "items of equal score the mean rank.</p>"
    )
