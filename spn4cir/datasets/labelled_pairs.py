"""Images and texts that belong together, with a class each: retrieval of one kind by the other, in unseen classes.

Source of the protocols: Xu et al., "Modal-adversarial semantic learning network for extendable cross-modal retrieval",
ICMR 2018, where classes of the test set are not in the training set.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from spn4cir.dataset import Check, Dataset, ImageRole
from spn4cir.datasets.class_labels import read_labelled
from spn4cir.datasets.emoji_names import find_emoji, load_names, parse_attributes
from spn4cir.datasets.given_features import GIVEN, GivenFeatures
from spn4cir.datasets.pair_splits import Pair, PairSource, split_pairs
from spn4cir.datasets.rows import HUB
from spn4cir.datasets.tables import find_table
from spn4cir.errors import InputError
from spn4cir.files import short
from spn4cir.types import Benchmark, ImageRef, Measure, Query, Triplet, recall_measures

EVALUATED = ("val", "test")
KINDS = ("unseen", "seen", "generalised")
TO_TEXT, TO_IMAGE = "image to text", "text to image"
FEWEST_EMOJI = 4  # of a concept


class LabelledPairs(Dataset):
    """Pairs of an image and a text, with a class each; half of the classes are seen in training, half are unseen.

    The root is a table with an image, a text and a label in each row; a folder that holds such a table called
    ``pairs`` or ``labelled``; or a folder of given features, which holds ``images.npy``, ``texts.npy`` and
    ``labels.txt``. docs/datasets.md lists all forms. Without a root, the pairs are the embedded emoji and their names,
    and classes are the concepts that ``labelled`` has too, those of at least four emoji.

    Protocols of each split are called ``-unseen`` (the default), ``-seen`` and ``-generalised``. Each has both
    directions: images find texts, and texts find images; metrics are the mean over both.

    Raises ``InputError`` if files are missing or damaged, or there are too few classes to split.
    """

    name = "labelled_pairs"

    def __init__(self, root: str | None = None):
        source = self._read_embedded() if root is None else self._read_source(root)
        self._source = source
        pairs, self._notes = split_pairs(source.pairs, root or "the embedded emoji")
        self._notes = [*source.notes, *self._notes]
        self._pairs = {pair.image_id: pair for pair in pairs}
        seen = {pair.label for pair in pairs if pair.split == "train"}
        self.seen_classes = tuple(sorted(seen))
        self.protocols = {  # type: ignore[misc]
            split: tuple(f"{self.name}/{split}-{kind}" for kind in KINDS if self._queries(split, kind))
            for split in EVALUATED
            if any(pair.split == split for pair in pairs)
        }

    @staticmethod
    def _read_embedded() -> PairSource:
        names = load_names()
        known = set(names.values())
        concepts = {i: parse_attributes(name, known)["concept"] for i, name in names.items()}
        counts = Counter(concepts.values())
        pairs = [Pair(i, names[i], concept) for i, concept in concepts.items() if counts[concept] >= FEWEST_EMOJI]
        notes = [f"no data root: the embedded emoji and their names; concepts of at least {FEWEST_EMOJI} are classes"]
        return PairSource(pairs, find_emoji, notes=notes)

    def _read_source(self, root: str) -> PairSource:
        """Sets the root."""
        place = Path(root)
        if not root.startswith(HUB):
            self.root = place if place.is_dir() else place.parent
            if place.is_dir() and any((place / name).is_file() for name in GIVEN):
                return GivenFeatures(place).source()
        table = find_table(place, "pairs") if place.is_dir() else None
        read = read_labelled(str(table or root))
        for image in read.images:
            if not image.label or not read.captions.get(image.image_id):
                lacks = "text" if image.label else "label"
                raise InputError(f"{table or root}: {short(image.image_id)} has no {lacks}: a pair needs both")
        texts = [read.captions[image.image_id] for image in read.images]
        pairs = [
            Pair(image.image_id, first, image.label, image.split, tuple(further))
            for image, (first, *further) in zip(read.images, texts, strict=True)
        ]
        several = sum(len(pair.further) > 0 for pair in pairs)
        what = f"{several} images have several texts: training draws one each time, evaluation takes the first"
        return PairSource(pairs, read.find, notes=[*read.notes, *[what] * bool(several)])

    def find_image(self, image_id: str) -> ImageRef:
        """The image of a pair. Raises ``InputError`` for an unknown id."""
        if image_id not in self._pairs:
            raise InputError(f"{self.name}: unknown image id {short(image_id)}")
        return self._source.find(image_id)

    def _of_split(self, split: str) -> list[Pair]:
        return [pair for pair in self._pairs.values() if pair.split == split]

    def _queries(self, split: str, kind: str) -> list[Pair]:
        """Pairs of a split whose image and text are queries."""
        return [pair for pair in self._of_split(split) if (pair.label in self.seen_classes) == (kind == "seen")]

    def list_training_images(self) -> list[str]:
        """Images of the training pairs, all of seen classes."""
        return [pair.image_id for pair in self._of_split("train")]

    def read_triplets(self) -> list[Triplet]:
        """Each training pair: its image as the reference, its texts, its class, and no target."""
        return [Triplet(p.image_id, (), (p.text, *p.further), p.label) for p in self._of_split("train")]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """Both directions of a protocol. Relevant are all items of the query's class.

        ``-unseen`` ranks items of the split's unseen classes, ``-seen`` its items of seen classes; both take their
        queries from there. ``-generalised`` has the queries of ``-unseen`` and ranks all items of the split.
        """
        chosen = self.choose_protocol(split, protocol)
        kind = chosen.rpartition("-")[2]
        asked = self._queries(split, kind)
        ranked = self._of_split(split) if kind == "generalised" else asked
        images, texts = tuple(pair.image_id for pair in ranked), tuple(text_id(pair.image_id) for pair in ranked)
        members = defaultdict[str, list[str]](list)
        for pair in ranked:
            members[pair.label].append(pair.image_id)
        of_class = {label: (tuple(ids), tuple(map(text_id, ids))) for label, ids in members.items()}
        queries = [Query(p.image_id, None, of_class[p.label][1], (TO_TEXT,), texts) for p in asked]
        queries += [Query(None, p.text, of_class[p.label][0], (TO_IMAGE,), images) for p in asked]
        average_precision = Measure("map", len(ranked), "candidates", primary=True)
        return Benchmark(
            chosen, (*images, *texts), tuple(queries), exclude_reference=False,
            measures=(average_precision, *recall_measures(1, 5, 10, over="candidates")),
            texts={text_id(pair.image_id): pair.text for pair in ranked}, macro=(TO_TEXT, TO_IMAGE),
        )  # fmt: skip

    def class_vectors(self) -> Mapping[str, Sequence[float]]:
        """The vector of each class, where the files hold one; else nothing."""
        return self._source.class_vectors

    def category(self, image_id: str) -> str:
        """The class of an image."""
        return self._pairs[image_id].label if image_id in self._pairs else ""

    def caption(self, image_id: str) -> str:
        """The text of an image."""
        return self._pairs[image_id].text if image_id in self._pairs else ""

    def notes(self) -> list[str]:
        """How classes and pairs were split."""
        return [f"{self.name}: {note}" for note in self._notes]

    def checks(self) -> list[Check]:
        """Pairs and classes of each split and kind, and unseen classes that should not be where they are."""
        checks = [Check(note, 1, None, "note") for note in self._notes]
        checks += [Check("train: pairs", len(self._of_split("train"))), Check("seen classes", len(self.seen_classes))]
        unseen = {split: {pair.label for pair in self._queries(split, "unseen")} for split in EVALUATED}
        for split in EVALUATED:
            for kind in ("seen", "unseen"):
                pairs = self._queries(split, kind)
                checks.append(Check(f"{split}, {kind}: pairs", len(pairs)))
                checks.append(Check(f"{split}, {kind}: classes", len({pair.label for pair in pairs})))
        both = sorted(unseen["val"] & unseen["test"])
        return [*checks, Check.listed("unseen classes of both val and test", both)]

    def image_roles(self) -> list[ImageRole]:
        """Images of each split."""
        ids = {split: [pair.image_id for pair in self._of_split(split)] for split in ("train", *EVALUATED)}
        return [ImageRole(f"of {split}", images, split != "test") for split, images in ids.items()]


def text_id(image_id: str) -> str:
    """The gallery id of the text that belongs to an image."""
    return f"text of {image_id}"
