"""Images with a class each: training by class, and retrieval of the other images of a class never seen.

Source of the protocol: the Google Universal Image Embedding challenge, 2022, whose measure is mMP@5.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from spn4cir.dataset import Check, Dataset, ImageRole
from spn4cir.datasets.class_labels import (
    DISTRACTOR,
    SETTINGS,
    LabelledImage,
    LabelledSource,
    LabelSettings,
    limit_classes,
    read_label_settings,
    read_labelled,
    split_images,
)
from spn4cir.datasets.emoji_names import find_emoji, load_names, parse_attributes
from spn4cir.datasets.rows import HUB
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import Benchmark, ImageRef, Measure, Query, Triplet, recall_measures

EVALUATED = ("val", "test")
EMBEDDED = "embedded emoji"
FEWEST_EMOJI = 3  # images of a concept


class Labelled(Dataset):
    """Images with a class each, from folders by class, tables with a column ``label``, or several of them.

    A class is called ``SOURCE/LABEL``, so equal labels of two sources stay apart. The root is a folder, a table,
    ``hf:`` and a hub name, or a file ``labelled.yaml``, which names several sources and limits the images of a class;
    that file is also read where it lies in the folder, or beside the table. docs/datasets.md lists all forms.

    Without a root, the classes are the concepts of the embedded emoji: their names without skin tone, gender, age,
    hair, direction and colour; those with at least three images. No image of a concept of val or test is trained on
    here. The embedded CLIP, however, was trained on all emoji and their names but for the 664 targets of ``emoji/val``
    and ``emoji/test``: these concepts are unseen by what is trained on this dataset, and not by that CLIP.

    Raises ``InputError`` if files are missing or damaged, or there are too few classes to split.
    """

    name = "labelled"

    def __init__(self, root: str | None = None):
        self._notes = list[str]()
        settings, sources = self._read_embedded() if root is None else self._read_sources(root)
        self._places, images = dict[str, tuple[LabelledSource, str]](), list[LabelledImage]()
        for name, source in sources.items():
            prefix = f"{name}/" if name else ""
            kept, notes = limit_classes(source.images, settings)
            self._notes += [f"{name}: {note}" if name else note for note in (*source.notes, *notes)]
            for image in kept:
                image_id = f"{prefix}{image.image_id}"
                self._places[image_id] = source, image.image_id
                images.append(image._replace(image_id=image_id))
        images, notes = split_images(images, root or EMBEDDED)
        self._notes += notes
        self._images = {image.image_id: image for image in images}
        self._benchmarks = {split: self._build_benchmark(split) for split in EVALUATED}
        for split, benchmark in self._benchmarks.items():
            self._notes += self._note_dropped(split, benchmark)
            known = self._group_classes(self._of_split("train")).keys()
            shared = [name for name in self._group_classes(self._of_split(split)) if name in known]
            if shared:
                self._notes.append(f"{split}: {len(shared)} classes are in train too, so they are not unseen")
        self.protocols = {  # type: ignore[misc]
            split: (benchmark.name,) for split, benchmark in self._benchmarks.items() if benchmark.queries
        }

    def _read_embedded(self) -> tuple[LabelSettings, Mapping[str, LabelledSource]]:
        names = load_names()
        known = set(names.values())
        images = [LabelledImage(i, parse_attributes(name, known)["concept"], "emoji") for i, name in names.items()]
        self._notes.append(f"no data root: the {EMBEDDED}, whose classes are concepts")
        return LabelSettings(min_images=FEWEST_EMOJI), {"": LabelledSource(images, find_emoji, names, {})}

    def _read_sources(self, root: str) -> tuple[LabelSettings, Mapping[str, LabelledSource]]:
        """Read ``labelled.yaml``, if there is one, and the sources. Sets the root."""
        place, settings = Path(root), LabelSettings()
        if root.startswith(HUB):
            return settings, {"": read_labelled(root)}
        is_settings = place.suffix.lower() in (".yaml", ".yml")
        self.root = place if place.is_dir() else place.parent
        listed = place if is_settings else self.root / SETTINGS
        if is_settings or listed.is_file():
            settings = read_label_settings(listed)
        if settings.sources and (is_settings or place.is_dir()):
            places = {name: p if p.startswith(HUB) else str(self.root / p) for name, p in settings.sources.items()}
            return settings, {name: read_labelled(where, name) for name, where in places.items()}
        return settings, {"": read_labelled(str(self.root) if is_settings else root)}

    def find_image(self, image_id: str) -> ImageRef:
        """The picture of an image; where it should lie, if it is missing. Raises ``InputError`` for an unknown id."""
        if image_id not in self._places:
            raise InputError(f"{self.name}: unknown image id {short(image_id)}")
        source, own_id = self._places[image_id]
        return source.find(own_id)

    def _of_split(self, split: str) -> list[str]:
        """Images of a split that have a class."""
        return [image.image_id for image in self._images.values() if image.label and image.split == split]

    def _distractors(self, split: str) -> list[str]:
        """Images without a class in the gallery of a split: its own, and those of no split."""
        own = (split, DISTRACTOR, "")
        return [image.image_id for image in self._images.values() if not image.label and image.split in own]

    def list_training_images(self) -> list[str]:
        """The images of train that have a class, in the order of the sources."""
        return self._of_split("train")

    def read_triplets(self) -> list[Triplet]:
        """Each image of train as a query without text and targets, whose positive is its class."""
        return [Triplet(i, (), (), self._images[i].class_name) for i in self._of_split("train")]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """``labelled/val`` or ``labelled/test``: each image of the split finds the others of its class.

        Ranked are the images of the split and the distractors, without the query. Tags are sources. Images that are
        alone in their class are ranked and are no queries. mAP counts to the end of the gallery.
        """
        if split in EVALUATED and split not in self.protocols:
            raise InputError(f"{self.name}: no class of the split {split} has two images: there is no query")
        self.choose_protocol(split, protocol)
        return self._benchmarks[split]

    def _build_benchmark(self, split: str) -> Benchmark:
        members = self._group_classes(self._of_split(split))
        queries = [
            Query(image_id, None, tuple(other for other in ids if other != image_id), (self._images[ids[0]].source,))
            for ids in members.values()
            if len(ids) > 1
            for image_id in ids
        ]
        gallery = (*self._of_split(split), *self._distractors(split))
        measures = (Measure("mmp", 5, primary=True), *recall_measures(1), Measure("map", max(1, len(gallery))))
        return Benchmark(f"{self.name}/{split}", gallery, tuple(queries), exclude_reference=True, measures=measures)

    def _group_classes(self, image_ids: Iterable[str]) -> dict[str, list[str]]:
        found = defaultdict[str, list[str]](list)
        for image_id in image_ids:
            found[self._images[image_id].class_name].append(image_id)
        return found

    def _note_dropped(self, split: str, benchmark: Benchmark) -> list[str]:
        dropped = len(self._of_split(split)) - len(benchmark.queries)
        what = "images are alone in their class, so they are in the gallery and are no queries"
        return [f"{split}: {dropped} {what}"] if dropped else []

    def label(self, image_id: str) -> str:
        """The title, where the source has one; else the id."""
        source, own_id = self._places.get(image_id, (None, ""))
        return (source.titles.get(own_id) if source else "") or image_id

    def category(self, image_id: str) -> str:
        """The class, as ``SOURCE/LABEL``; empty for a distractor."""
        return self._images[image_id].class_name if image_id in self._images else ""

    def caption(self, image_id: str) -> str:
        """The first of ``captions``, or nothing."""
        return next(iter(self.captions(image_id)), "")

    def captions(self, image_id: str) -> tuple[str, ...]:
        """All captions that the source has."""
        source, own_id = self._places.get(image_id, (None, ""))
        return source.captions.get(own_id, ()) if source else ()

    def notes(self) -> list[str]:
        """How classes were limited and split, what was left out, and how many images are no queries."""
        return [f"{self.name}: {note}" for note in self._notes]

    def checks(self) -> list[Check]:
        """Images and classes of each split and source, classes that two splits share, and what the notes say."""
        checks = [Check(note, 1, None, "note") for note in self._notes]
        classes = {split: self._group_classes(self._of_split(split)) for split in ("train", *EVALUATED)}
        for split, members in classes.items():
            images = Counter(self._images[i].source for ids in members.values() for i in ids)
            counts = Counter(self._images[ids[0]].source for ids in members.values())
            for source in sorted(images):
                checks.append(Check(f"{split}, {source}: images", images[source]))
                checks.append(Check(f"{split}, {source}: classes", counts[source]))
        for split, benchmark in self._benchmarks.items():
            checks.append(Check(f"{split}: queries", len(benchmark.queries)))
            checks.append(Check(f"{split}: distractors", len(self._distractors(split))))
            both = sorted(classes["train"].keys() & classes[split].keys())
            checks.append(Check.listed(f"classes of both train and {split}", both))
        unused = [i.image_id for i in self._images.values() if not i.label and i.split == "train"]
        return [*checks, Check.listed("images of train without a label, which nothing uses", unused)]

    def image_roles(self) -> list[ImageRole]:
        """Images of each split, and distractors."""
        roles = [ImageRole(f"of {split}", self._of_split(split), split != "test") for split in ("train", *EVALUATED)]
        distractors = dict.fromkeys(i for split in EVALUATED for i in self._distractors(split))
        return [*roles, ImageRole("distractors", list(distractors), False)]
