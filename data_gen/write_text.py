"""Step 4: turn the captions of a pair into a modification text.

examples:
  python data_gen/write_text.py --dataset emoji --templates '[difference]'
  python data_gen/write_text.py --dataset emoji --templates '[instead, unlike]'
"""

import json
import random
import re
from collections import Counter

from data_gen.files import digest, is_done, mark_done, read_jsonl, write_jsonl
from data_gen.settings import GenerateConfig, command
from spn4cir.files import write_text as write_file
from spn4cir.types import Dataset, Triplet


def difference(reference: str, target: str, draw: random.Random) -> str:
    """What changes: the words that only the target's caption has, or, if it has none, what is gone.

    Captions without a common word have no difference worth naming: the text would be the whole target caption, and a
    model could learn from it to ignore the reference.

    Args:
        reference: caption of the reference image.
        target: caption of the target image.
        draw: picks among several phrasings.

    Returns:
        The text; empty if the captions hold the same words, or no word in common.
    """
    before, after = (re.findall(r"[^\s,.;:!?]+", text) for text in (reference, target))
    low_before, low_after = ({word.lower() for word in words} for words in (before, after))
    if not low_before & low_after:
        return ""
    new = " ".join(word for word in after if word.lower() not in low_before)
    gone = " ".join(word for word in before if word.lower() not in low_after)
    if new and gone:
        return draw.choice([new, f"but {new}", f"make it {new}", f"{new} instead of {gone}"])
    if new:
        return draw.choice([new, f"but {new}", f"make it {new}", f"with {new}"])
    return f"without {gone}" if gone else ""


def compose_text(template: str, reference: str, target: str, draw: random.Random) -> str:
    """A modification text by template: the paper's ``instead`` (0), ``unlike`` (1), ``target`` (2), or ``difference``.

    Returns:
        The text; empty if the template has nothing to say.
    """
    if template == "difference":
        return difference(reference, target, draw)
    forms = {"instead": "{1} instead of {0}", "unlike": "Unlike {0}, I want {1}", "target": "{1}"}
    return forms[template].format(reference, target)


def write_text(config: GenerateConfig, dataset: Dataset) -> None:
    """Write triplets.json in the published shape, and triplets.jsonl with what each came from."""
    from spn4cir.datasets.generated import entry_writer

    out, pairs, captions = (config.file(name) for name in ("triplets.json", "pairs.jsonl", "captions.jsonl"))
    settings = {"templates": list(config.templates), "seed": config.seed}
    made_by = digest({"step": "write", **settings}, pairs, captions)
    if is_done(out, made_by) and config.file("triplets.jsonl").is_file():
        print(f"write: {out} is done")
        return
    caption = {row["image_id"]: row["caption"] for row in read_jsonl(captions)}
    rows, entries, dropped, entry = [], [], Counter[str](), entry_writer(dataset, config.folder)
    for pair in read_jsonl(pairs):
        texts = caption.get(pair["reference"]), caption.get(pair["target"])
        if texts[0] is None or texts[1] is None:
            dropped["an image has no caption"] += 1
            continue
        draw = random.Random(f"{config.seed}/{pair['reference']}/{pair['target']}")
        template = draw.choice(config.templates)
        text = compose_text(template, texts[0], texts[1], draw).strip()
        if texts[0].lower() == texts[1].lower():
            dropped["the two captions are equal"] += 1
        elif not text:
            dropped[f"{template} has nothing to say"] += 1
        else:
            rows.append({**pair, "modification": text, "template": template, "captions": texts})
            entries.append(entry(Triplet(pair["reference"], pair["target"], (text,)), (texts[0], texts[1])))
    write_jsonl(config.file("triplets.jsonl"), rows)
    write_file(out, json.dumps(entries, ensure_ascii=False, indent=0) + "\n")
    mark_done(out, made_by, **settings, triplets=len(rows), dropped=dict(dropped))
    reasons = ", ".join(f"{count} since {reason}" for reason, count in dropped.items()) or "none"
    print(f"write: {len(rows)} triplets, dropped: {reasons} → {out}")


if __name__ == "__main__":
    command(write_text, __doc__)
