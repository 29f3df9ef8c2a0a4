"""Whose triplets and runs are: two shops with the same names, one that moves, grows and loses pictures."""

import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import draw_picture

from spn4cir import checkpoints
from spn4cir.data import find_generated
from spn4cir.dataset import Dataset
from spn4cir.datasets import load_dataset
from spn4cir.datasets.generated import open_generated
from spn4cir.errors import InputError
from spn4cir.files import write_text
from spn4cir.provenance import NOTE, SAMPLE, Provenance, folder_of, read_provenance
from spn4cir.types import ImageRef


def shop(root: Path, count: int = 8, seed: str = "", first: int = 0) -> Dataset:
    """A catalogue of pictures called 0.png, 1.png, …; another seed draws others by the same names."""
    for number in range(first, first + count):
        draw_picture(root / f"{number}.png", f"{seed}{number}")
    return opened(root)


def opened(root: Path) -> Dataset:
    return load_dataset("catalogue", str(root))


def of(dataset: Dataset) -> Provenance:
    found = dataset.provenance()
    assert found is not None
    return found


def test_a_catalogue_stays_itself(tmp_path: Path) -> None:
    """Moved, touched, copied, grown by half, without a quarter, with a picture that is gone or is another."""
    own = of(shop(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert of(opened(tmp_path / "b")).digest == own.digest
    os.utime(tmp_path / "a" / "1.png", (1, 1))
    assert of(opened(tmp_path / "a")).digest == own.digest
    assert own.is_same(of(shop(tmp_path / "b", 4, first=8)))
    for name in ("0.png", "1.png"):
        (tmp_path / "a" / name).unlink()
    draw_picture(tmp_path / "a" / "2.png", "another")
    less = of(opened(tmp_path / "a"))
    assert own.is_same(less) and less.is_same(own) and less.digest != own.digest


def test_another_catalogue(tmp_path: Path) -> None:
    """The same names with other contents, also of equal sizes; the same contents by other names."""
    own = of(shop(tmp_path / "a"))
    assert not own.is_same(of(shop(tmp_path / "b", seed="other")))
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(bytes(len((tmp_path / "a" / path.name).read_bytes())))
    assert not own.is_same(of(opened(tmp_path / "b")))
    (tmp_path / "c").mkdir()
    for path in (tmp_path / "a").iterdir():
        shutil.copy(path, tmp_path / "c" / f"x{path.name}")
    assert not own.is_same(of(opened(tmp_path / "c")))


def test_what_is_read_of_many(tmp_path: Path) -> None:
    """The contents of a sample alone; the share that two have in common is estimated well."""
    read: list[str] = []

    def image(image_id: str) -> ImageRef:
        read.append(image_id)
        return ImageRef(lambda: image_id.encode())

    ids = [f"picture {n}" for n in range(20_000)]
    whole = Provenance.of("catalogue", "x", "here", ids, image)
    assert len(read) == SAMPLE and whole.images == len(ids)
    shuffled = random.Random(0).sample(ids, len(ids))
    assert Provenance.of("catalogue", "x", "here", shuffled, image) == whole
    part = Provenance.of("catalogue", "x", "here", ids[:12_000], image)
    assert whole.similarity(part) == pytest.approx(0.6, abs=0.1) == part.similarity(whole)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing one, and a pipe, which is not opened."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("gone", "pipe"):
        assert set(Provenance.of("x", "x", "", ["a"], lambda i, n=name: ImageRef(tmp_path / n)).sample.values()) == {""}  # type: ignore[misc]


def test_a_folder_for_each(tmp_path: Path) -> None:
    """By the catalogue's name; a second one of that name gets its digest too; a moved one is known again."""
    base, one, other = tmp_path / "data", shop(tmp_path / "1/shop"), shop(tmp_path / "2/shop", seed="other")
    assert folder_of(base, None) == base and folder_of(base, of(one)) == base / "shop"
    of(one).write(base / "shop")
    assert folder_of(base, of(other)) == base / f"shop-{of(other).digest[:6]}"
    shutil.move(tmp_path / "1/shop", tmp_path / "moved")
    assert folder_of(base, of(opened(tmp_path / "moved"))) == base / "shop"
    assert read_provenance(base / "shop") == of(one)
    for damage in ("", "[]", "{}", '{"sample": 3}'):
        (base / "shop" / NOTE).write_text(damage)
        assert read_provenance(base / "shop") is None
    odd = shop(tmp_path / "odd näme (2)/")
    (tmp_path / "table.csv").write_text("image\n" + "".join(f"1/{n}\n" for n in range(3)))
    assert folder_of(base, of(odd)).name == "odd_näme_2"
    assert of(opened(tmp_path / "table.csv")).name == f"{tmp_path.name}-table"


@pytest.fixture
def shops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Dataset]:
    """Two with the same names, and triplets of the first, as spn4cir-triplets leaves them."""
    monkeypatch.chdir(tmp_path)
    one, other = shop(tmp_path / "one"), shop(tmp_path / "other", seed="other")
    made = tmp_path / "data/catalogue/one/generated"
    of(one).write(made)
    of(one).write(made.parent)
    entry = '{"reference": "%s", "target": "%s", "reference_name": "%s", "target_name": "%s", "captions": ["x"]}'
    rows = [entry % (f"{n}.png", f"{n + 1}.png", f"{n}.png", f"{n + 1}.png") for n in range(7)]
    write_text(made / "triplets.json", f"[{', '.join(rows)}]")
    return one, other


def test_generated_triplets_of_these_images_alone(shops: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    """``auto`` finds those of the catalogue wherever it lies, and says of another whose there are and what to do."""
    one, other = shops
    made = Path("data/catalogue/one/generated/triplets.json")
    assert find_generated(one, "clip4cir") == made
    with pytest.raises(InputError) as error:
        find_generated(other, "clip4cir")
    told = (
        f"none of other (8 images in {tmp_path}/other), only of one (8 images in {tmp_path}/one); make them with python"
    )
    assert told in str(error.value) and str(error.value).endswith(f"--dataset catalogue --data-root {tmp_path}/other")
    with pytest.raises(
        InputError, match=r"was made from one \(8 .*\), whose \"0\.png\" is another picture than that of other"
    ):
        open_generated(made, other)
    for name in ("3.png", "4.png"):
        (tmp_path / "one" / name).unlink()
    found, triplets, notes = open_generated(made, opened(tmp_path / "one"), may_have_others=False)
    assert len(triplets) == 4 and not found.extra_images
    assert notes == [f'{made}: 3 triplets of images that are gone since, such as "3.png", are left out']


def test_triplets_that_name_no_catalogue(shops: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    """As earlier versions wrote them: by name alone."""
    _, other = shops
    old = tmp_path / "data/catalogue/generated/triplets.json"
    old.parent.mkdir(parents=True)
    shutil.copy("data/catalogue/one/generated/triplets.json", old)
    with pytest.raises(
        InputError, match=r"generated/triplets.json does not say .* give --generated data/catalogue/gen"
    ):
        find_generated(other, "clip4cir")
    assert len(open_generated(old, other)[1]) == 7


def run_of(folder: Path, dataset: Dataset | None) -> Path:
    write_text_in(folder / "result.json")
    if dataset:
        of(dataset).write(folder)
        of(dataset).write(folder.parents[1])
    return folder


def write_text_in(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{}")


def test_the_newest_run_on_these_images(shops: tuple[Dataset, Dataset], runs: Path) -> None:
    """Another catalogue's is never it, and is named; of a dataset that has none, there is none."""
    one, other = shops
    assert checkpoints.find_newest_run(one, None) is None
    run = run_of(runs / "catalogue/one/clip4cir/stage1-1", one)
    assert checkpoints.find_newest_run(one, "clip4cir", stage=1) == run
    with pytest.raises(
        InputError, match=r"holds no run on other \(8 .*\), only runs on one \(8 .*\): train one, or give --init"
    ):
        checkpoints.find_newest_run(other, "clip4cir", stage=1)
    with pytest.raises(InputError, match="--run FOLDER, or --run embedded"):
        checkpoints.find_newest_run(other, None)
    assert checkpoints.find_newest_run(load_dataset("emoji"), None) is None


def test_runs_that_name_no_catalogue(shops: tuple[Dataset, Dataset], runs: Path) -> None:
    """As earlier versions wrote them: usable by name."""
    one, _ = shops
    old = run_of(runs / "catalogue/clip4cir/stage1-1", None)
    with pytest.raises(InputError, match=f"only runs on images that {old} does not name"):
        checkpoints.find_newest_run(one, "clip4cir", stage=1)
    assert "does not say" in checkpoints.check_origin(old, one, True, False)
    with pytest.raises(InputError, match="does not say which images"):
        checkpoints.check_origin(old, one, False, True)


def test_a_run_on_another_catalogue(shops: tuple[Dataset, Dataset], runs: Path) -> None:
    """Evaluated only if a person named both; then it is said."""
    one, other = shops
    run = run_of(runs / "catalogue/one/clip4cir/stage1-1", one)
    assert checkpoints.check_origin(run, one, False, False) == ""
    for named in ((False, False), (False, True), (True, False)):
        with pytest.raises(
            InputError, match=r"was trained on one \(8 .*; this is other \(8 .*: give --run and --data-root"
        ):
            checkpoints.check_origin(run, other, *named)
    assert "was trained on one" in checkpoints.check_origin(run, other, True, True)
