"""Text from data as text of a page: escaped, and with every invisible character made visible."""

import html
import json
import re
from typing import Any

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # direction marks, and what has no width
    "\u2028\u2029\ud800-\udfff]"  # line ends of old JavaScript; halves of a pair
)


def show_hidden(text: str) -> str:
    """Replace control characters, direction marks and lone surrogates by their code, such as ``⟨U+202E⟩``.

    Line breaks and tabs become spaces. Joiners stay, since scripts and emoji need them.

    Example:
        >>> show_hidden("a" + chr(0x202E) + "b")
        'a⟨U+202E⟩b'
    """
    return _HIDDEN.sub(lambda found: " " if found[0] in "\t\n\r" else f"⟨U+{ord(found[0]):04X}⟩", text)


def escape(text: object) -> str:
    """Text for HTML, also inside a quoted attribute."""
    return html.escape(show_hidden(str(text)), quote=True)


def script_json(value: Any) -> str:
    """JSON for a script element: nothing in it ends the element or begins a comment.

    Texts in ``value`` are shown as ``show_hidden`` gives them.

    Example:
        >>> script_json(["</script>", float("nan")])
        '["\\\\u003c/script\\\\u003e",null]'
    """
    text = json.dumps(_clean(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return show_hidden(value)
    if isinstance(value, dict):
        return {show_hidden(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return None if value != value or value in (float("inf"), float("-inf")) else value
    return value
