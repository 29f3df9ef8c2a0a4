"""What the page's events return, without a browser."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio as gr

from spn4cir.app.desk import Desk
from spn4cir.app.dialogue import Dialogue
from spn4cir.app.limits import Limits
from spn4cir.app.page import _Answer
from spn4cir.app.rest import Uploads
from spn4cir.app.served import open_served


@pytest.fixture(scope="module")
def desk(shop_index: Path) -> Iterator[Desk]:
    limits = Limits()
    served = open_served([str(shop_index)], limits)
    yield Desk(served, limits, Uploads())
    served[0].encoder.close()


def click(action: str, **data: object) -> Any:
    """An event of a button."""
    return SimpleNamespace(_data={"action": action, "index": "0", **data})


def test_a_typed_text_stays(desk: Desk) -> None:
    """A click on a picture does not search by it, and leaves it in the box; a click on a turn replaces it."""
    answer = _Answer(desk, 1)
    picked, _, box, _ = answer.follow(Dialogue(), "but in red", [], 12, click("pick", id="shoes/1.png"))
    assert picked.now.text == "" and box == gr.skip()
    said, _, box, _ = answer.ask(picked, "but in red", [], 12)
    assert len(said.turns) == 1 and said.now.text == box == "but in red"
    again, _, box, _ = answer.follow(said, "but in red", [], 12, click("pick", id="shoes/2.png"))
    assert again.now.text == box == ""  # it has been searched by
    assert answer.follow(again, "typed", [], 12, click("back"))[2] == "but in red"
    assert answer.follow(again, "typed", [], 12, click("restart"))[2] == ""
    assert answer.refine(again, [], 24)[2] == gr.skip()


def test_styles_without_a_name_are_not_shown(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"cluster 2": 0.7, "sketch": 0.2, "photo": 0.1}
    monkeypatch.setattr(type(desk.served[0]), "describe", lambda self, picture: seen)
    token = desk.uploads.put(Image.new("RGB", (9, 9)))
    dialogue = desk.act(Dialogue(), {"action": "upload", "token": token})
    assert dialogue.now.reference and dialogue.now.reference.seen == "sketch 0.20"
