"""The page, in Gradio: text box, filters and the HTML parts, mounted on the service."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False", GRADIO_MCP_SERVER="False")

import gradio as gr
from fastapi import FastAPI

from spn4cir.app.desk import COUNTS, Desk
from spn4cir.app.dialogue import Dialogue
from spn4cir.app.limits import Gate, Limits, too_many_bytes
from spn4cir.app.looks import ACTIONS, SKETCH_PART, STYLE, UPLOAD, UPLOAD_PART
from spn4cir.app.markup import escape_text, render_query
from spn4cir.app.rest import Uploads, build_service
from spn4cir.app.served import ServedIndex
from spn4cir.errors import InputError
from spn4cir.model import MAX_TEXT

REPLACE_TEXT = ("back", "turn", "restart", "say")
"""Clicks that put the text of their turn in the box, whatever is typed there."""
SESSIONS, SESSION_SECONDS, MOST_QUEUED = 16, 3600, 128
OPEN = (
    "/search", "/upload", "/docs", "/openapi.json", "/config", "/theme.css", "/favicon.ico", "/robots.txt",
    "/gradio_api/info", "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/startup-events",
    "/gradio_api/reset", "/gradio_api/cancel",
)  # fmt: skip
OPEN_BELOW = ("/image/", "/assets/", "/static/", "/gradio_api/heartbeat/")
"""What is answered: the service, and what the page needs of Gradio; not its routes for files, uploads and proxies."""


def is_open_path(path: str) -> bool:
    """Whether the server answers at a path."""
    return path in ("", "/", *OPEN) or path.startswith(OPEN_BELOW)


def build_app(served: Sequence[ServedIndex], limits: Limits) -> Gate:
    """The page at ``/`` and the service beside it, as one ASGI application."""
    uploads = Uploads()
    service = build_service(served, limits, uploads)
    blocks = build_page(Desk(served, limits, uploads))
    mounted: FastAPI = gr.mount_gradio_app(
        service, blocks, path="/", css=STYLE, theme=_theme(), footer_links=[], run_history=False, show_error=False,
        max_file_size=1, allowed_paths=[], ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
    )  # fmt: skip
    return Gate(mounted, limits, is_open_path)


def build_page(desk: Desk) -> gr.Blocks:
    """The components of the page and their events."""
    served, start = desk.served, Dialogue()
    upload = UPLOAD.replace("MOST_BYTES", str(desk.limits.upload_bytes)).replace(
        "TOO_LARGE", too_many_bytes(desk.limits)
    )
    has_sketch = any(one.describes for one in served)
    blocks: gr.Blocks
    with gr.Blocks(title="spn4cir", analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as blocks:
        dialogue = gr.State(start, time_to_live=SESSION_SECONDS)
        gr.HTML(_heading(served), apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                query = gr.HTML(render_query(start), js_on_load=ACTIONS, apply_default_css=False, elem_id="query")
                with gr.Row(equal_height=True):
                    text = gr.Textbox(
                        label="Change", show_label=False, container=False, max_length=MAX_TEXT, scale=5, min_width=180,
                        placeholder="how it should differ, such as: but in red", elem_id="text",
                    )  # fmt: skip
                    button = gr.Button("Search", variant="primary", scale=1, min_width=100, elem_id="search")
            with gr.Column(scale=2, min_width=300):
                files = gr.HTML(
                    UPLOAD_PART + (SKETCH_PART if has_sketch else ""),
                    js_on_load=upload,
                    apply_default_css=False,
                    elem_id="upload",
                )
                with gr.Accordion("Filters", open=False):
                    values = desk.categories
                    categories = gr.Dropdown(
                        values, label="Category", multiselect=True, visible=bool(values), elem_id="category"
                    )
                    count = gr.Radio(list(COUNTS), value=COUNTS[0], label="Results", elem_id="count")
        with gr.Row(equal_height=False):
            first = desk.results(start, [], COUNTS[0])
            results = []
            for one, value in zip(served, first, strict=True):
                with gr.Column(min_width=300):
                    results.append(
                        gr.HTML(value, js_on_load=ACTIONS, apply_default_css=False, elem_id=f"results-{one.number}")
                    )
        shown = [dialogue, query, text, *results]
        answer = _Answer(desk, len(results))
        settings: dict[str, Any] = {"outputs": shown, "show_progress": "hidden", "api_visibility": "private"}
        for part in (query, files, *results):
            part.click(answer.follow, [dialogue, text, categories, count], **settings)
        for listen in (text.submit, button.click):
            listen(answer.ask, [dialogue, text, categories, count], **settings)
        for change in (categories.input, count.input):
            change(answer.refine, [dialogue, categories, count], **settings)
    blocks.queue(max_size=MOST_QUEUED, default_concurrency_limit=SESSIONS, api_open=False)
    return blocks


class _Answer:
    """What the events of the page return: the dialogue, its HTML, the text box, and the results of each index."""

    def __init__(self, desk: Desk, indexes: int):
        self.desk, self.indexes = desk, indexes

    def follow(
        self, dialogue: Dialogue, text: str, categories: list[str], count: int, event: gr.EventData
    ) -> list[Any]:
        """The answer to a click on a part of the page; a text that is typed and not searched by yet stays."""
        clicked = event._data or {}
        is_pending = (text or "").strip() not in ("", dialogue.now.text) and clicked.get("action") not in REPLACE_TEXT
        return self._show(dialogue, lambda: self.desk.act(dialogue, clicked), categories, count, is_pending)

    def ask(self, dialogue: Dialogue, text: str, categories: list[str], count: int) -> list[Any]:
        """The answer to a text."""
        return self._show(dialogue, lambda: dialogue.ask(text or ""), categories, count)

    def refine(self, dialogue: Dialogue, categories: list[str], count: int) -> list[Any]:
        """The same turn with other filters; the text box stays."""
        return self._show(dialogue, lambda: dialogue, categories, count, is_pending=True)

    def _show(
        self,
        before: Dialogue,
        change: Callable[[], Dialogue],
        categories: list[str],
        count: int,
        is_pending: bool = False,
    ) -> list[Any]:
        try:
            dialogue = change()
            results = self.desk.results(dialogue, categories or [], count)
            text = gr.skip() if is_pending else dialogue.now.text
            return [dialogue, render_query(dialogue), text, *results]
        except InputError as error:
            message = str(error)
        except Exception:  # whatever it is, the page goes on, and the terminal has it
            traceback.print_exc()
            message = "the server failed: its terminal says why"
        return [before, render_query(before, message), *(gr.skip() for _ in range(1 + self.indexes))]


def _heading(served: Sequence[ServedIndex]) -> str:
    names = [escape_text(f"{one.name} ({len(one.index):,} images)") for one in served]
    if len(served) > 1:  # on a phone the results of the second are far below
        names = [f'<a href="#results-{one.number}">{name}</a>' for one, name in zip(served, names, strict=True)]
    return (
        '<div class="spn-head"><h1>Find a picture by a picture and a change</h1>'
        f'<p>{" and ".join(names)} · <a href="docs">REST service</a></p></div>'
    )


def _theme() -> Any:
    """Fonts of the system alone: no server is asked for one."""
    fonts, mono = ("system-ui", "-apple-system", "Segoe UI", "sans-serif"), ("ui-monospace", "monospace")
    return gr.themes.Base(font=fonts, font_mono=mono, primary_hue="blue", neutral_hue="slate")
