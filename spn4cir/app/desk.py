"""What the page's events do: a click makes the next turn of a dialogue, and a turn makes results."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from spn4cir.app.dialogue import Dialogue, Reference, Turn
from spn4cir.app.limits import Limits, Refused
from spn4cir.app.markup import MOST_TITLE, render_hits, render_start
from spn4cir.app.rest import Uploads
from spn4cir.app.served import CATEGORY, ClientQuery, ServedIndex, encode_thumbnail
from spn4cir.index.searchable import Hit
from spn4cir.selection import Selection

COUNTS = (12, 24, 48, 96)
"""Numbers of results to choose from."""
STARTERS = 24
LIKED = 0.5
"""Weight of a picture to be like, beside a reference of weight 1."""
CLUSTER = re.compile(r"cluster \d+")
"""A style without a name of its own."""
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Desk:
    """What the page's events work with: indexes, limits, and uploads on their way."""

    served: Sequence[ServedIndex]
    limits: Limits
    uploads: Uploads

    @cached_property
    def starters(self) -> list[Hit]:
        """Images to begin with."""
        return self.served[0].sample(STARTERS)

    @cached_property
    def categories(self) -> list[str]:
        """Categories to choose from: those that all indexes have."""
        return sorted(set.intersection(*(set(one.categories()) for one in self.served)))

    def act(self, dialogue: Dialogue, event: Event) -> Dialogue:
        """The dialogue after a click. Raises ``InputError`` for one that cannot be followed."""
        action = event.get("action")
        if action in ("pick", "more", "less"):
            reference = self._member(event)
            return dialogue.pick(reference) if action == "pick" else dialogue.lean(reference, action == "more")
        if action == "say":
            return Dialogue().ask(str(event.get("text", "")))
        if action == "upload":
            return dialogue.pick(self._uploaded(event))
        if action == "problem":
            raise Refused(422, str(event.get("message", "")))
        if action in ("back", "turn"):
            count = str(event.get("count", 1))
            return dialogue.back(int(count) if count.isdecimal() else 1)
        return dialogue.drop_reference() if action == "drop" else Dialogue()

    def results(self, dialogue: Dialogue, categories: Sequence[str], k: int) -> list[str]:
        """The results of each index as HTML. Raises ``InputError`` as a search does."""
        if dialogue.now.is_empty:
            return [render_start(one, self.starters) if not one.number else "" for one in self.served]
        parts = []
        for one in self.served:
            hits = one.search(self._question(one, dialogue.now, categories, k))
            heading = f"{one.name}: {len(hits)} of {len(one.index):,} images"
            parts.append(render_hits(one, hits, dialogue, heading))
        return parts

    def _question(self, one: ServedIndex, turn: Turn, categories: Sequence[str], k: int) -> ClientQuery:
        liked = LIKED if turn.reference else 1.0
        images = [(self._pixels(one, turn.reference), 1.0)] if turn.reference else []
        return ClientQuery(
            [*images, *((self._pixels(one, each), liked) for each in turn.more)],
            [turn.text] if turn.text else [],
            [self._pixels(one, each) for each in turn.less],
            members=[each.id for each in turn.pictures() if each.id],
            selection=Selection(k if k in COUNTS else COUNTS[0]),
            where={CATEGORY: [str(value) for value in categories]} if categories else (),
        )

    def _pixels(self, one: ServedIndex, reference: Reference) -> Tensor:
        """A picture as the model of ``one`` takes it (3, H, W)."""
        if reference.picture:
            return one.index.model.pixels(reference.picture)
        return self.served[reference.index].use_member(reference.id, one.index.model.pixels)

    def _member(self, event: Event) -> Reference:
        """The image of an index that a click names."""
        number, image_id = str(event.get("index", "")), str(event.get("id", ""))
        if not number.isdecimal() or int(number) >= len(self.served):
            raise Refused(422, "this result is of another server: start over")
        one = self.served[int(number)]
        one.thumbnail(image_id)  # raises what is wrong with it
        title = str(event.get("title") or Path(image_id).name)[:MOST_TITLE]
        return Reference(title, one.address(image_id), one.number, image_id)

    def _uploaded(self, event: Event) -> Reference:
        picture = self.uploads.take(str(event.get("token", "")))
        small = base64.b64encode(encode_thumbnail(picture)).decode()
        one = next((each for each in self.served if each.describes), self.served[0])
        named = [(name, w) for name, w in list(one.describe(picture).items())[:2] if not CLUSTER.fullmatch(name)]
        seen = ", ".join(f"{name} {weight:.2f}" for name, weight in named)
        title = str(event.get("title") or "upload")[:MOST_TITLE]
        return Reference(title, f"data:image/webp;base64,{small}", picture=picture, seen=seen)
