"""Text from data as text of a page: escaped, and with every invisible character made visible."""

import html
import json
from typing import Any

from spn4cir.hidden_characters import show_hidden


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
