"""Sample images from webdataset shards or a folder into a catalogue, of which triplets for zero-shot training are made.

examples:
  python data_gen/sample_images.py --shards 'cc3m/{00000..00331}.tar' --images 50000
  python data_gen/sample_images.py --shards 'cc3m/*.tar' --images 50000 --seed 7 --output data/cc3m
  python data_gen/sample_images.py --folder photos --list chosen.txt --images 1000 --output data/photos
  python data_gen/make_triplets.py --dataset catalogue --data-root data/cc3m
"""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from spn4cir.config import parse, recipes_folder
from spn4cir.data_gen.answers import tidy
from spn4cir.data_gen.sources import Candidate, Smallest, expand, folder_candidates, shard_candidates
from spn4cir.data_gen.steps import STAYS, mark_done, skip_step
from spn4cir.errors import InputError, run_command
from spn4cir.files import read_json, write_text

SPARE = 1.25  # candidates that are remembered for each image that is wanted, since some will not decode
LARGEST = 256 << 20  # bytes of a picture that is worth looking at


@dataclass
class SampleConfig:
    """What is sampled from where. Either shards or folder.

    Args:
        shards: tar files of the webdataset format, as a pattern of braces and wildcards: 'cc3m/{00000..00331}.tar'.
        folder: a folder of images instead, whatever lies below it.
        list: a text file of paths below that folder, one a line, to sample from these only.
        images: how many; all, if there are fewer.
        seed: which ones. The order of shards and files does not matter, and a smaller sample is part of a larger one.
        captions: whether to keep the caption in the .txt beside a picture, or else in a shard's .json. A captioner is
            not asked about a picture that has one.
        output: folder to fill, which the catalogue dataset opens.
    """

    shards: str | None = None
    folder: str | None = None
    list: str | None = None
    images: int = 50000
    seed: int = 42
    captions: bool = True
    output: str = "data/catalogue"

    def __post_init__(self) -> None:
        if (self.shards is None) == (self.folder is None):
            raise InputError("give either --shards 'PATTERN.tar' or --folder FOLDER")
        if self.list and not self.folder:
            raise InputError("list names paths below a folder: give --folder too")
        if self.images < 1:
            raise InputError(f"images must be at least 1, got {self.images}")


def sample_images(config: SampleConfig) -> None:
    """Fill the output folder: images/, in folders by hash, and catalogue.csv, which is written last.

    Each candidate has a keyed hash of its shard's name and its own, and those with the smallest hashes that decode are
    taken, in that order, bytes as they are. Killed at any time, the same command goes on and ends with the same files.

    Raises ``InputError`` if the sources hold no image, or the folder holds another sample.
    """
    import pandas

    from spn4cir.datasets.catalogue import Catalogue

    out = Path(config.output)
    files = expand(config.shards) if config.shards else [Path(config.folder or "")]
    inner, folder = out.resolve(), files[0].resolve()
    if config.folder and not config.list and inner.is_relative_to(folder):
        raise InputError(f"--output {inner} lies in --folder {folder}, whose pictures it would join: give another")
    made_by = _made_by(config, files)
    table = out / f"{Catalogue.name}.csv"
    if skip_step("sample", table, made_by):
        return
    _claim(out, made_by, config)
    wanted = config.images
    while True:
        chosen, total = _candidates(config, files, int(wanted * SPARE) + 64)
        taken, broken = _take(chosen, out, config.images)
        if len(taken) == config.images or len(chosen) == total:
            break
        wanted *= 2  # so many are broken that the spare ones do not do
    if not taken:
        raise InputError(f"none of {total} images in {config.shards or config.folder} decodes")
    rows = [(name, image_id, ascii(one.name)[1:-1]) for one, name, image_id in taken]
    listed = pandas.DataFrame(rows, columns=["image", "image_id", "source"])
    captions = [tidy(one.caption()) if config.captions else "" for one, _, _ in taken]
    described = sum(map(bool, captions))
    if described:
        listed["caption"] = captions
    write_text(table, listed.to_csv(index=False, lineterminator="\n"))
    mark_done(table, made_by, **asdict(config), taken=len(taken), candidates=total, broken=broken)
    fewer = f", all there are of the {config.images} asked for" if len(taken) < config.images else ""
    told = f", {described} have a caption" if described else ""
    print(f"sample: {len(taken)} of {total} images{fewer}{told}, {broken} broken ones passed over → {table}")
    print(f"next: python data_gen/make_triplets.py --dataset {Catalogue.name} --data-root {shlex.quote(str(out))}")


def _made_by(config: SampleConfig, files: Sequence[Path]) -> str:
    """A short name for what is asked of the sources: names and sizes of shards, or each picture's size and time."""
    stamps = [[path.name, path.stat().st_size] for path in files if path.is_file()]
    about = [config.images, config.seed, sorted(stamps), "", config.folder or False, *[False] * (not config.captions)]
    total = hashlib.sha256(json.dumps(about).encode())
    for one in folder_candidates(files[0], config.list) if config.folder else ():
        time = one.source.stat().st_mtime_ns if one.size else 0
        total.update(f"{json.dumps(one.name)} {one.size} {time}\n".encode())
    return total.hexdigest()[:16]


def _claim(out: Path, made_by: str, config: SampleConfig) -> None:
    """Note in the folder which sample it is for. Raises ``InputError`` if it is for another, or cannot be made."""
    note = out / "sample.json"
    if note.is_file():
        before = read_json(note)
        if not isinstance(before, dict) or before.get("made_by") != made_by:
            other = "of other sources or settings, or of sources that have changed since"
            raise InputError(f"{out} holds another sample, {other}: give another --output")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise InputError(f"--output {out} is not empty and holds no sample: give another folder")
    except OSError as error:
        raise InputError(f"--output {out} cannot be made: {error.strerror}") from None
    write_text(note, json.dumps({"made_by": made_by, **asdict(config)}, indent=1) + "\n")


def _candidates(config: SampleConfig, files: Sequence[Path], keep: int) -> tuple[list[Candidate], int]:
    smallest = Smallest(keep)
    for candidate in folder_candidates(files[0], config.list) if config.folder else shard_candidates(files):
        smallest.add(f"{config.seed}/{candidate.name}", candidate)
    if not smallest.total:
        raise InputError(f"{config.shards or config.folder} holds no images")
    return smallest.sorted(), smallest.total


def _take(chosen: Sequence[Candidate], out: Path, images: int) -> tuple[list[tuple[Candidate, str, str]], int]:
    """Copy the first that decode: them with the places of their copies and their ids, and how many were passed over."""
    from tqdm import tqdm

    ids: dict[int, list[str]] = {}  # of those that decode, by number
    waiting, broken = iter(range(len(chosen))), 0
    with tqdm(total=images, desc="sample", unit="image") as bar:
        while batch := list(islice(waiting, images - len(ids))):
            for number in sorted(batch, key=lambda n: (chosen[n].source, chosen[n].start)):  # the disk is read forwards
                if _copy(chosen[number], out):
                    ids[number] = chosen[number].image_ids()
                    bar.update()
                else:
                    broken += 1
    taken, used = [], set[str]()
    for number in sorted(ids):
        image_id = next(i for i in ids[number] if i not in used)
        used.add(image_id)
        taken.append((chosen[number], chosen[number].copy_name, image_id))
    return taken, broken


def _copy(one: Candidate, out: Path) -> bool:
    """Put a picture in its place, bytes as they are; False if it does not decode, and nothing is left then."""
    from spn4cir.images import decode

    place = out / one.copy_name
    beside = place.with_name(place.name + ".tmp")
    try:
        if _is_copy(place, one):
            return True
        place.unlink(missing_ok=True)
        if not 0 < one.size <= LARGEST:
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        with one.open() as source, beside.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    except FileNotFoundError:
        return False  # listed, but not there
    except OSError as error:
        beside.unlink(missing_ok=True)
        told = f"{place} cannot be written, or {one.source} not read: {error.strerror}"
        raise InputError(f"{told}; what is there {STAYS}") from None
    try:
        decode(beside)
    except Exception:  # foreign bytes in a dozen decoders: whatever one raises, the next candidate is taken
        beside.unlink(missing_ok=True)
        return False
    os.replace(beside, place)
    return True


def _is_copy(place: Path, one: Candidate) -> bool:
    if not place.is_file() or place.stat().st_size != one.size:
        return False
    with one.open() as source:
        return place.read_bytes() == source.read()


if __name__ == "__main__":
    run_command(lambda: sample_images(parse(SampleConfig, recipes_folder() / "sample_images.yaml", text=__doc__ or "")))
