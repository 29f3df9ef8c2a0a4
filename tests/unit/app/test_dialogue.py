"""Turns of a dialogue, and the HTML that shows them."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from spn4cir.app.dialogue import MOST_TURNS, Dialogue, Reference, Turn
from spn4cir.app.limits import Refused
from spn4cir.app.markup import escape_text, render_query
from tests.served_index import HOSTILE

CAT, DOG = Reference("cat", "/image/cat", id="cat"), Reference("dog", "/image/dog", id="dog")


def test_a_trail_and_back() -> None:
    """A text joins a picture that was just picked; everything else is a turn of its own."""
    dialogue = Dialogue().pick(CAT).ask(" but black ")
    assert len(dialogue.turns) == 1 and dialogue.now.reference == CAT and dialogue.now.text == "but black"
    further = dialogue.ask("smaller").pick(DOG).lean(CAT, True).lean(CAT, False)
    assert [turn.text for turn in further.turns] == ["but black", "smaller", "", "", ""]
    assert further.now.less == (CAT,) and further.now.more == () and further.turns[-2].more == (CAT,)
    assert further.lean(CAT, False).now.less == ()
    assert further.back() == Dialogue(further.turns[:-1]) and further.back(4) == dialogue
    assert further.back(99) == Dialogue() == dialogue.drop_reference().back(2)
    assert dialogue.ask("but black") == dialogue
    assert list(further.now.pictures()) == [DOG, CAT]


def test_what_cannot_be_looked_for() -> None:
    with pytest.raises(Refused, match="pick or upload a picture"):
        Dialogue().ask("  ")
    with pytest.raises(Refused, match="less alone finds nothing"):
        Dialogue().lean(CAT, False)
    assert Dialogue().drop_reference() == Dialogue()


def test_a_reference_that_is_removed() -> None:
    """Earlier turns stay within reach, and so do pictures to be unlike; the empty turn is filled by the next action."""
    before = Dialogue().pick(CAT).ask("but black").pick(DOG)
    removed = before.drop_reference()
    assert removed.now.is_empty and removed.back() == before and len(removed.turns) == 3
    assert removed.pick(CAT).turns == (*before.turns, Turn(CAT)) and removed.ask("red").back() == before
    unlike = before.lean(CAT, False).drop_reference()
    assert unlike.now == Turn(less=(CAT,)) and "Less like" in render_query(unlike)
    assert unlike.pick(DOG).now == Turn(DOG, less=(CAT,)) and unlike.ask("red").now == Turn(None, "red", (), (CAT,))
    assert unlike.lean(CAT, False).now == Turn()


def test_the_trail_shows_how_many_pictures_it_leans_to() -> None:
    """Beside the text, which is cut where it is long; never within it."""
    shown = render_query(Dialogue().pick(CAT).ask("a" * 60).lean(DOG, True).lean(CAT, False))
    assert f"<span>{'a' * 39}…</span><b>+1 −1</b></button>" in shown


def test_a_dialogue_is_bounded() -> None:
    dialogue = Dialogue()
    for n in range(3 * MOST_TURNS):
        dialogue = dialogue.pick(Reference(str(n), ""))
    assert len(dialogue.turns) == MOST_TURNS and dialogue.now.reference == Reference("59", "")


class Elements(HTMLParser):
    """Tags and attributes of some HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes = set[str](), set[tuple[str, str | None]]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(attrs)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_escaped(text: str) -> None:
    """In titles, texts and messages; neither HTML nor the templates of the page read them."""
    hostile = Reference(text, "/image/x", id=text, seen=text)
    shown = render_query(Dialogue().pick(hostile).lean(hostile, True).ask(text), text)
    read = Elements()
    read.feed(shown)
    assert read.tags <= {"p", "nav", "button", "ol", "li", "img", "span", "div", "figure", "figcaption", "small", "b"}
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert ("data-id", text) in read.attributes and ("alt", text) in read.attributes
    assert not re.search(r"[`{}$]", shown)
    assert escape_text(text, 5).count("…") == 1


def test_invisible_characters_are_codes() -> None:
    """In what is shown, and not in ids, by which the server is asked."""
    title = "a" + chr(0x202E) + "gpj" + chr(7)
    shown = render_query(Dialogue().pick(CAT).lean(Reference(title, "/image/x", id=title), True).ask(title), title)
    assert shown.count("a⟨U+202E⟩gpj⟨U+0007⟩") >= 4 and shown.count(chr(0x202E)) == 1
    assert f'data-id="{title}"' in shown


def test_pictures_do_not_count_when_references_are_compared() -> None:
    """Nor are they shown where a message shows a dialogue."""
    first, second = (Reference("upload", "data:", picture=Image.new("RGB", (2, 2), c)) for c in ("red", "blue"))
    assert first == second and "PIL" not in repr(first)
