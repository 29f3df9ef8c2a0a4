"""Step 1: find images whose pixels are equal; the first of each class stands for all.

examples:
  python data_gen/deduplicate.py --dataset emoji
"""

from pathlib import Path

from data_gen.files import digest, is_done, mark_done, read_jsonl, write_jsonl
from data_gen.settings import GenerateConfig, command
from spn4cir.errors import InputError
from spn4cir.types import Dataset


def deduplicate(config: GenerateConfig, dataset: Dataset) -> None:
    """Write images.jsonl: one row per training image, with its pixel hash and canonical image."""
    from spn4cir.deduplicate import canonical_ids, inspect_images

    out, ids = config.file("images.jsonl"), dataset.training_images()
    made_by = digest({"step": "deduplicate", "ids": ids, "files": [_stamp(dataset.path(i)) for i in ids]})
    if is_done(out, made_by):
        print(f"deduplicate: {out} is done")
        return
    inspected = inspect_images({i: dataset.path(i) for i in ids})
    for image_id, (_, problem, detail) in inspected.items():
        if problem:
            told = "is missing" if problem == "missing" else f"does not decode: {detail}"
            raise InputError(f"image {dataset.path(image_id)} {told}")
    canonical = canonical_ids({i: one.pixels for i, one in inspected.items()})
    rows = [{"image_id": i, "pixels": inspected[i].pixels, "canonical": canonical[i]} for i in ids]
    unique = len(set(canonical.values()))
    write_jsonl(out, rows)
    mark_done(out, made_by, images=len(rows), unique=unique)
    print(f"deduplicate: {len(rows)} images, {unique} unique → {out}")


def _stamp(path: Path) -> list[int]:
    """Size and time of an image file, by which a change is noticed; empty if it is missing."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []


def canonical_images(config: GenerateConfig) -> list[str]:
    """One image of each class, in the dataset's order."""
    return list(dict.fromkeys(row["canonical"] for row in read_jsonl(config.file("images.jsonl"))))


def reference_images(config: GenerateConfig, dataset: Dataset) -> list[str]:
    """Canonical images that act as references, in the dataset's order."""
    ids = canonical_images(config)
    if config.references == "all":
        return ids
    canonical = {row["image_id"]: row["canonical"] for row in read_jsonl(config.file("images.jsonl"))}
    acting = {canonical.get(t.reference) for t in dataset.triplets()}
    return [i for i in ids if i in acting]


if __name__ == "__main__":
    command(deduplicate, __doc__)
