"""An OpenAPI description as one HTML page, which needs no other server and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

EXAMPLE = """curl -F image=@reference.png -F text='but in red' -F k=5 {address}/search"""
STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;"
    "padding:0 1rem}table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{text-align:left;padding:.3rem .8rem .3rem 0;"
    "border-bottom:1px solid #8884;vertical-align:top}pre{background:#8882;padding:.8rem;white-space:pre-wrap}"
    "h2{margin-top:2rem}"
)


def render_reference(schema: Mapping[str, Any], address: str) -> str:
    """A page that describes each operation of an OpenAPI schema: its values, and what it answers."""
    parts = [
        f"<p>{escape(schema['info'].get('description', ''))} The same as a file: "
        "<a href='openapi.json'>openapi.json</a>.</p>",
        f"<pre>{escape(EXAMPLE.format(address=address))}</pre>",
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(_render_operation(schema, f"{method.upper()} {path}", operation))
    title = escape(schema["info"]["title"])
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    body = f"<h1>{title}</h1>{''.join(parts)}<p><a href='./'>The page</a></p>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>"


def _render_operation(schema: Mapping[str, Any], name: str, operation: Mapping[str, Any]) -> str:
    rows = [
        (one["name"], one["in"], _type_of(one.get("schema", {})), one.get("description", ""))
        for one in operation.get("parameters", ())
    ]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        for field, about in _resolve(schema, content["schema"]).get("properties", {}).items():
            rows.append((field, "form", _type_of(about), about.get("description", "")))
    answers = [
        (status, _answer_of(schema, about), about.get("description", ""))
        for status, about in operation["responses"].items()
    ]
    return (
        f"<h2><code>{escape(name)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
        f"{_render_table(('value', 'in', 'type', 'meaning'), rows)}<h3>Answers</h3>"
        f"{_render_table(('status', 'content', 'meaning'), answers)}"
    )


def _render_table(heads: tuple[str, ...], rows: Sequence[Sequence[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{lines}</table>"


def _type_of(about: Mapping[str, Any]) -> str:
    """The type of a value, such as ``list of file``."""
    if "anyOf" in about:
        return " or ".join(_type_of(one) for one in about["anyOf"] if one.get("type") != "null")
    if about.get("type") == "array":
        return f"list of {_type_of(about.get('items', {}))}"
    is_file = about.get("format") == "binary" or "contentMediaType" in about
    return "file" if is_file else str(about.get("type", "any"))


def _resolve(schema: Mapping[str, Any], about: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in about:
        return about
    name = about["$ref"].rpartition("/")[2]
    found: Mapping[str, Any] = schema["components"]["schemas"][name]
    return found


def _answer_of(schema: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The media type and, of JSON, the fields of an answer; of lists those of their items."""
    forms = []
    for media, content in about.get("content", {}).items():
        fields = _resolve(schema, content.get("schema", {})).get("properties", {})
        named = [
            f"{name}: [{', '.join(_resolve(schema, field['items']).get('properties', {}))}]"
            if "$ref" in field.get("items", {})
            else name
            for name, field in fields.items()
        ]
        forms.append(f"{media} {{{', '.join(named)}}}" if named else media)
    return "; ".join(forms)
