"""A dialogue with the page: a trail of turns, each with a reference, a text, and pictures to be like or unlike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from PIL import Image

from spn4cir.app.limits import Refused

MOST_TURNS = 20
"""Turns that a session keeps; the oldest are dropped."""


@dataclass(frozen=True)
class Reference:
    """A picture of a query: an image of an index, or an upload.

    Args:
        title: what a person calls it.
        address: of its thumbnail.
        index: number of the index it is of.
        id: in that index; empty for an upload.
        picture: of an upload.
        seen: what the model sees in an upload, such as its style.
    """

    title: str
    address: str
    index: int = 0
    id: str = ""
    picture: Image.Image | None = field(default=None, compare=False, repr=False)
    seen: str = ""


@dataclass(frozen=True)
class Turn:
    """A query of a dialogue."""

    reference: Reference | None = None
    text: str = ""
    more: tuple[Reference, ...] = ()
    less: tuple[Reference, ...] = ()

    def pictures(self) -> Iterator[Reference]:
        """All pictures of the query."""
        yield from ([self.reference] if self.reference else [])
        yield from (*self.more, *self.less)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to look for."""
        return self.reference is None and not self.text and not self.more


@dataclass(frozen=True)
class Dialogue:
    """The turns so far, the last one shown; each action returns the dialogue that follows.

    Example:
        >>> cat = Reference("cat", "/image/cat.png", id="cat.png")
        >>> dialogue = Dialogue().pick(cat).ask("but black")
        >>> len(dialogue.turns), dialogue.now.text, dialogue.back().now.is_empty
        (1, 'but black', True)
    """

    turns: tuple[Turn, ...] = ()

    @property
    def now(self) -> Turn:
        """The turn that is shown."""
        return self.turns[-1] if self.turns else Turn()

    def pick(self, reference: Reference) -> Dialogue:
        """Begin a turn with another reference, and nothing else; pictures to be unlike that wait for one are kept."""
        return self._add(Turn(reference, less=self.now.less if self.now.is_empty else ()))

    def ask(self, text: str) -> Dialogue:
        """Change the text: in a new turn, unless the one that is shown has none yet. Raises ``Refused`` for nothing."""
        turn = replace(self.now, text=text.strip())
        if turn.is_empty:
            raise Refused(422, "pick or upload a picture, or type what to look for")
        if turn == self.now:
            return self
        return Dialogue((*self.turns[:-1], turn)) if self.turns and not self.now.text else self._add(turn)

    def lean(self, reference: Reference, is_more: bool) -> Dialogue:
        """Add a picture to be like, or unlike; one that is there already is taken out again."""
        added, others = (self.now.more, self.now.less) if is_more else (self.now.less, self.now.more)
        kept = tuple(one for one in added if one != reference)
        changed = kept if len(kept) < len(added) else (*added, reference)
        others = tuple(one for one in others if one != reference)
        more, less = (changed, others) if is_more else (others, changed)
        turn = replace(self.now, more=more, less=less)
        if turn.is_empty and len(turn.less) > len(self.now.less):
            raise Refused(422, "pick a picture or type what to look for first: less alone finds nothing")
        return self._add(turn)

    def drop_reference(self) -> Dialogue:
        """Begin a turn without the reference; it may be empty until a picture or a text fills it."""
        return self._add(replace(self.now, reference=None)) if self.now.reference else self

    def back(self, count: int = 1) -> Dialogue:
        """Return to an earlier turn; before the first one, to the beginning."""
        return Dialogue(self.turns[: max(len(self.turns) - max(count, 0), 0)])

    def _add(self, turn: Turn) -> Dialogue:
        before = self.turns[:-1] if self.now.is_empty else self.turns
        return Dialogue((*before, turn)[-MOST_TURNS:])
