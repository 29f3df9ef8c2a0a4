"""What the page shows, as HTML; every text of the data or of a person is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from spn4cir.app.dialogue import Dialogue, Reference, Turn
from spn4cir.app.served import ServedIndex, title_of
from spn4cir.hidden_characters import show_hidden
from spn4cir.index.searchable import Hit

MOST_TITLE = 120
"""Characters of a title or a text that are shown."""


def escape_text(text: str, most: int = MOST_TITLE) -> str:
    """A text as HTML, cut, invisible characters as codes; the page's templates do not read it either."""
    return _quote(show_hidden(text if len(text) <= most else text[: most - 1] + "…"))


def _quote(text: str) -> str:
    return escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def render_query(dialogue: Dialogue, message: str = "") -> str:
    """The trail, the reference, and pictures to be like or unlike; and what is wrong, if anything is."""
    now = dialogue.now
    trail = "".join(_trail_step(dialogue, n) for n in range(len(dialogue.turns)))
    notice = f'<p class="spn-notice" role="alert">{escape_text(message, 400)}</p>' if message else ""
    buttons = (
        '<button data-action="back" class="spn-button">← Back</button>'
        '<button data-action="restart" class="spn-button">Start over</button>'
    )
    path = f'<nav class="spn-trail" aria-label="Trail">{buttons}<ol>{trail}</ol></nav>' if trail else ""
    return f'{notice}{path}<div class="spn-query">{_reference_card(now)}{_leanings(now)}</div>'


def render_hits(served: ServedIndex, hits: Sequence[Hit], dialogue: Dialogue, heading: str) -> str:
    """Hits as a grid of cards: a click makes one the next reference, two buttons lean towards it or away from it."""
    if not hits:
        empty = "nothing fits: choose other categories" if not dialogue.now.is_empty else "this index holds no image"
        return f'<section class="spn-hits"><h2>{escape_text(heading)}</h2><p>{empty}</p></section>'
    cards = "".join(_card(served, hit, dialogue) for hit in hits)
    return f'<section class="spn-hits"><h2>{escape_text(heading)}</h2><div class="spn-grid">{cards}</div></section>'


def render_start(served: ServedIndex, hits: Sequence[Hit]) -> str:
    """Some images and texts to begin with."""
    titles = [title for hit in hits if (title := hit.columns.get("title"))]
    shown = [escape_text(str(title)) for title in titles[::5][:4]]
    texts = "".join(f'<button data-action="say" data-text="{one}" class="spn-button">{one}</button>' for one in shown)
    said = f'<p class="spn-say">or look for {texts}</p>' if texts else ""
    grid = render_hits(served, hits, Dialogue(), "Pick a picture to begin with")
    return grid.replace("</h2>", f"</h2>{said}", 1)


def _card(served: ServedIndex, hit: Hit, dialogue: Dialogue) -> str:
    title, data = escape_text(title_of(hit)), _data(served.number, hit.id, title_of(hit))
    category = hit.columns.get("category")
    about = f"{title}, {escape_text(str(category))}" if category and str(category) != title_of(hit) else title
    kept = {name: any((one.index, one.id) == (served.number, hit.id) for one in getattr(dialogue.now, name))
            for name in ("more", "less")}  # fmt: skip
    score = f'<span class="spn-score" title="z {hit.z:.2f}">{hit.score:.3f}</span>' if not dialogue.now.is_empty else ""
    signs = (("more", "+"), ("less", "−")) if not dialogue.now.is_empty else ()
    buttons = "".join(
        f'<button data-action="{name}" {data} aria-label="{name} like {title}" '
        f'aria-pressed="{"true" if kept[name] else "false"}">{sign} {name}</button>'
        for name, sign in signs
    )
    lean = f'<div class="spn-lean">{buttons}</div>' if buttons else ""
    return (
        f'<figure class="spn-card"><button class="spn-pick" data-action="pick" {data} title="{about}">'
        f'<img src="{escape(served.address(hit.id))}" alt="{title}" loading="lazy">{score}</button>'
        f"<figcaption><span>{title}</span></figcaption>{lean}</figure>"
    )


def _trail_step(dialogue: Dialogue, number: int) -> str:
    turn, count = dialogue.turns[number], len(dialogue.turns) - 1 - number
    shown = [_thumbnail(one) for one in [*([turn.reference] if turn.reference else []), *turn.more][:2]]
    signs = " ".join(f"{sign}{len(part)}" for sign, part in (("+", turn.more), ("−", turn.less)) if part)
    text = escape_text(turn.text, 40) or ("" if shown else "…")
    current = ' aria-current="step"' if not count else ""
    said = (f"<span>{text}</span>" if text else "") + (f"<b>{signs}</b>" if signs else "")
    return f'<li><button data-action="turn" data-count="{count}"{current}>{"".join(shown)}{said}</button></li>'


def _reference_card(turn: Turn) -> str:
    one = turn.reference
    if one is None:
        hint = "No reference: pick a picture, upload one, or type what to look for."
        return f'<div class="spn-empty">{hint}</div>'
    seen = f"<small>{escape_text(one.seen)}</small>" if one.seen else ""
    return (
        f'<figure class="spn-reference">{_thumbnail(one)}<figcaption>Reference<b>{escape_text(one.title)}</b>{seen}'
        '<button data-action="drop" class="spn-button">Remove</button></figcaption></figure>'
    )


def _leanings(turn: Turn) -> str:
    parts = []
    for name, label, pictures in (("more", "More like", turn.more), ("less", "Less like", turn.less)):
        chips = "".join(
            f'<button data-action="{name}" {_data(one.index, one.id, one.title)} '
            f'title="take out {escape_text(one.title)}">{_thumbnail(one)}<span>×</span></button>'
            for one in pictures
        )
        parts += [f'<div class="spn-chips"><b>{label}</b>{chips}</div>'] if chips else []
    return "".join(parts)


def _thumbnail(one: Reference) -> str:
    return f'<img src="{escape(one.address)}" alt="{escape_text(one.title)}">'


def _data(index: int, image_id: str, title: str) -> str:
    named = f'data-id="{_quote(image_id)}" data-title="{escape_text(title)}"'
    return f'data-index="{index}" {named}'
