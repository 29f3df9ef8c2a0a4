"""Step 1: find images whose pixels are equal; the first of each class stands for all.

examples:
  python data_gen/deduplicate.py --dataset emoji
  python data_gen/deduplicate.py --dataset catalogue --data-root FOLDER
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spn4cir.data_gen.given import known_captions
from spn4cir.data_gen.steps import GenerateConfig, first_process, is_done, mark_done, run_step
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.files import Row, read_jsonl, write_jsonl
from spn4cir.provenance import folder_of, read_provenance
from spn4cir.types import ImageRef, Triplet

if TYPE_CHECKING:
    from spn4cir.identity import Inspected


@first_process
def deduplicate(config: GenerateConfig, dataset: Dataset) -> None:
    """Write images.jsonl: one row per candidate, with its pixel hash and canonical image.

    Images that are missing or do not decode are left out, and listed in images.failed.jsonl. Raises ``InputError`` if
    fewer than two different images are left, or the output folder is another source's, or the dataset's own.
    """
    from spn4cir.identity import canonical_ids, inspect_images

    source, ids = _source(config, dataset), _candidates(config, dataset)
    images = {image_id: dataset.image(image_id) for image_id in ids}
    _check_output(config, dataset, source, images.values())
    _note_images(config, dataset)
    described = known_captions(config, dataset, ids).keys() if config.without_caption == "skip" else None
    out, failed_file = config.file("images.jsonl"), config.file("images.failed.jsonl")
    made_by = _made_by(images, described)
    if is_done(out, made_by):
        print(f"deduplicate: {out} is done")
        return
    inspected = inspect_images(images, config.file("images.cache.jsonl"))
    failed = [{"image_id": i, "reason": _reason(one, str(images[i]))} for i, one in inspected.items() if one.problem]
    failed_file.unlink(missing_ok=True)
    if failed:
        write_jsonl(failed_file, failed)
    canonical = canonical_ids({i: one.pixels for i, one in inspected.items() if not one.problem})
    canonical, bare = _with_captions(canonical, described)
    if bare and not canonical:
        raise InputError(f"{dataset.name}: none of {bare} images has a caption: leave --without-caption skip out")
    unique, listed = len(set(canonical.values())), f": see {failed_file}" if failed else ""
    if not canonical:
        such = f"{images[failed[0]['image_id']]}, which {failed[0]['reason']}"
        raise InputError(f"{dataset.name}: none of {len(ids)} images can be used, such as {such}{listed}")
    if unique < 2:
        only = f"{len(canonical)} images are" if len(canonical) > 1 else "1 image is"
        raise InputError(f"{dataset.name}: {only} left, of 1 picture, which cannot be paired with another{listed}")
    rows = ({"image_id": i, "pixels": inspected[i].pixels, "canonical": first} for i, first in canonical.items())
    write_jsonl(out, rows)
    mark_done(out, made_by, source=source, images=len(canonical), unique=unique, failed=len(failed))
    left_out = f", {len(failed)} left out{listed}" if failed else ""
    left_out += f", {bare} without a caption left out" if bare else ""
    print(f"deduplicate: {len(canonical)} images, {unique} unique{left_out} → {out}")


def _reason(inspected: "Inspected", image: str) -> str:
    detail = inspected.detail.replace(image, Path(image).name)
    return "is missing" if inspected.problem == "missing" else f"does not decode: {detail}"


def _candidates(config: GenerateConfig, dataset: Dataset) -> list[str]:
    ids = dataset.training_images()
    if config.candidates == "named":
        named = {i for triplet in _annotated("candidates: named", dataset) for i in triplet.image_ids}
        ids = [image_id for image_id in ids if image_id in named]
    if not ids:
        raise InputError(f"{dataset.name} has no images to make triplets of")
    return ids


def _annotated(setting: str, dataset: Dataset) -> Sequence[Triplet]:
    if triplets := dataset.triplets():
        return triplets
    raise InputError(f"{setting} needs annotated triplets, and {dataset.name} has none: give all")


def _source(config: GenerateConfig, dataset: Dataset) -> Row:
    """What the images are of: the dataset's name and root; of several tables in one folder, which one."""
    if dataset.root is None:
        return {"dataset": dataset.name}
    given = Path(config.data_root or dataset.root)
    place = given if given.is_file() and given.stem != dataset.name else dataset.root
    return {"dataset": dataset.name, "root": str(place.resolve())}


def _check_output(config: GenerateConfig, dataset: Dataset, source: Row, images: Iterable[ImageRef]) -> None:
    """Raise ``InputError`` where files of ours would join the dataset's, or replace those of another source."""
    folder, out = config.folder, config.folder.resolve()
    if dataset.root is not None:
        root = dataset.root.resolve()
        below = out.is_relative_to(root) and f"{dataset.root / out.relative_to(root)}/"
        if out == root or (below and any(str(image).startswith(below) for image in images)):
            raise InputError(f"output {folder} holds files of {dataset.name} itself: name another --output")
    own, made_from = dataset.provenance(), read_provenance(folder)
    if own and made_from:
        if not own.is_same(made_from):
            told = f"holds the triplets of {made_from}, and this is {own}"
            raise InputError(f"output {folder} {told}: give another with --output, or delete it")
        return
    try:
        before = json.loads((out / "images.done.json").read_text(encoding="utf-8"))["source"]
        told = " of ".join([before["dataset"], *([before["root"]] if "root" in before else [])])
    except (OSError, ValueError, KeyError, TypeError):
        return  # no note, or one that does not tell
    if before != source:
        raise InputError(f"output {folder} holds the triplets of {told}: give another with --output, or delete it")


def _note_images(config: GenerateConfig, dataset: Dataset) -> None:
    """Note whose images the files of the output folder are made from; of one of ours also in the catalogue's folder."""
    if own := dataset.provenance():
        own.write(config.folder)
        if config.folder.parent == folder_of(Path(f"data/{config.dataset}"), own):
            own.write(config.folder.parent)


def _with_captions(canonical: dict[str, str], described: Collection[str] | None) -> tuple[dict[str, str], int]:
    """Images of which one with equal pixels has a caption, and how many others there are; all of them for None."""
    if described is None:
        return canonical, 0
    known = {first for image_id, first in canonical.items() if image_id in described}
    kept = {image_id: first for image_id, first in canonical.items() if first in known}
    return kept, len(canonical) - len(kept)


def _made_by(images: dict[str, ImageRef], described: Collection[str] | None) -> str:
    """A short name for ids and their files' sizes and times, by which a change is noticed."""
    from spn4cir.identity import MADE_BY

    total = hashlib.sha256(f"deduplicate {MADE_BY}".encode())
    for image_id, image in images.items():
        try:
            told = image.path.stat() if image.path else None
            stamp = f"{told.st_size} {told.st_mtime_ns}" if told else str(image)
            stamp += f"{image.box or ''}"
        except OSError:
            stamp = "missing"
        total.update(f"{json.dumps(image_id)} {stamp}\n".encode())
    if described is not None:
        total.update(json.dumps(sorted(images.keys() & described)).encode())
    return total.hexdigest()[:16]


def canonical_images(config: GenerateConfig) -> list[str]:
    """One image of each class, in the dataset's order."""
    return list(dict.fromkeys(row["canonical"] for row in read_jsonl(config.file("images.jsonl"))))


def reference_images(config: GenerateConfig, dataset: Dataset) -> list[str]:
    """Canonical images that act as reference, in the dataset's order. Raises ``InputError`` if there are none."""
    rows = read_jsonl(config.file("images.jsonl"))
    wanted = {row["image_id"] for row in rows}
    if config.references == "annotated":
        wanted &= {triplet.reference for triplet in _annotated("references: annotated", dataset)}
        if not wanted:
            raise InputError(f"references: annotated: no reference of {dataset.name}'s triplets is among the images")
    chosen = {row["canonical"] for row in rows if row["image_id"] in wanted}
    return [i for i in dict.fromkeys(row["canonical"] for row in rows) if i in chosen]


if __name__ == "__main__":
    run_step(deduplicate, __doc__)
