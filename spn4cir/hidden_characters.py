"""Invisible characters of a text from data, made visible for a page."""

import re

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
