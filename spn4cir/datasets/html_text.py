"""HTML, as shops export descriptions, as plain text."""

import re
from html import unescape
from html.parser import HTMLParser

HIDDEN = frozenset({"script", "style", "head", "template"})  # elements whose content nobody sees
INLINE = frozenset({"a", "abbr", "b", "em", "font", "i", "mark", "s", "small", "span", "strong", "sub", "sup", "u"})
_TAG = re.compile(r"</[a-z][a-z0-9]*\s*>|<(?:br|hr|p|li|ul|div|img)(?:\s[^<>]*)?/?>|<!--", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,30});", re.IGNORECASE)


def strip_html(text: str) -> str:
    """Return the words that a browser would show, blocks apart by a space; a text without HTML as it stands.

    A text is HTML if it closes an element, or holds a line break, paragraph, list or picture: ``a <b> shape`` is none.
    """
    if "<" in text and _TAG.search(text):
        parser = _Words()
        parser.feed(text)
        parser.close()
        text = "".join(parser.words)
    elif "&" in text and _ENTITY.search(text):
        text = unescape(text)
    return text


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.words, self._hidden = list[str](), 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in HIDDEN
        if tag not in INLINE:
            self.words.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in HIDDEN))
        if tag not in INLINE:
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)
