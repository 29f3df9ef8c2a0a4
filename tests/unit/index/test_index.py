"""An index follows its pictures, survives kills, and answers queries as people make them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import draw_picture
from PIL import Image
from tiny_backbones import tiny_backbone
from torch import Tensor
from torch.nn import functional as F

import spn4cir
from benchmarks.made_index import draw_vectors, make_index
from spn4cir import store
from spn4cir.checkpoints import save_model
from spn4cir.errors import InputError
from spn4cir.index import changes, segments, snapshot
from spn4cir.index.local import Index
from spn4cir.model import Model
from spn4cir.selection import Selection
from spn4cir.types import ImageFeatures

COUNT = 30


class Counting(Model):
    """Counts the images that it encodes."""

    encoded = 0

    def features(self, pixels: Tensor) -> ImageFeatures:
        self.encoded += len(pixels)
        return super().features(pixels)


@pytest.fixture
def model(tmp_path: Path) -> Counting:
    return Counting(tiny_backbone("clip4cir", tmp_path), "embedded", device="cpu", batch_size=4)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for n in range(COUNT):
        draw_picture(folder / ("red" if n % 3 else "blue") / f"{n:02d}.png", n)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "saved", tiny_backbone("clip4cir", tmp_path), {})
    return tmp_path / "saved"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (snapshot, segments):
        monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(store, "SECONDS", 0.0)


def digests(path: Path) -> dict[str, str]:
    """Every file of an index by its content."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix != ".lock"  # which a killed process leaves
    }


def vectors_of(index: Index) -> dict[str, Tensor]:
    rows = index.snapshot.rows_of(index.ids)
    return dict(zip(index.ids, index.snapshot.gather(rows), strict=True))


def test_an_index_holds_what_the_model_makes_of_the_pictures(model: Counting, pictures: Path, tmp_path: Path) -> None:
    index = Index.build(model, pictures, tmp_path / "index")
    ids = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))
    assert index.ids == ids and len(index) == COUNT and str(index.changes).startswith("30 added")
    assert index.kinds == {"category": "text"}
    expected = model.embed_images([pictures / image_id for image_id in ids])
    assert torch.allclose(torch.stack(list(vectors_of(index).values())), expected, atol=1e-6)
    again = Index.open(tmp_path / "index", model)
    assert [hit.id for hit in again.search(text="a picture", k=COUNT)] == [
        hit.id for hit in index.search(text="a picture", k=COUNT)
    ]


def test_an_update_encodes_exactly_what_changed(model: Counting, pictures: Path, tmp_path: Path) -> None:
    index = Index.build(model, pictures, tmp_path / "index")
    before, model.encoded = vectors_of(index), 0
    assert str(index.update()) == "0 added, 0 changed, 0 removed, 0 encoded" and model.encoded == 0

    draw_picture(pictures / "blue/00.png", "another")  # changed
    os.utime(pictures / "blue/03.png", ns=(1, 1))  # touched
    draw_picture(pictures / "green/new.png", "new")  # new
    shutil.copy(pictures / "blue/06.png", pictures / "blue/copy.png")  # new, its content is known
    (pictures / "blue/09.png").rename(pictures / "blue/moved.png")  # moved
    (pictures / "red/01.png").unlink()  # gone
    done = index.update()
    assert (done.added, done.changed, done.removed, done.encoded) == (3, 2, 2, 2) and model.encoded == 2
    now = vectors_of(index)
    assert now.keys() == before.keys() - {"blue/09.png", "red/01.png"} | {
        "green/new.png", "blue/copy.png", "blue/moved.png",
    }  # fmt: skip
    assert not torch.allclose(now["blue/00.png"], before["blue/00.png"], atol=1e-3)
    for image_id, other in (("blue/03.png", "blue/03.png"), ("blue/copy.png", "blue/06.png")):
        assert torch.equal(now[image_id], before[other])
    assert torch.equal(now["blue/moved.png"], before["blue/09.png"])
    fresh = Index.build(model, pictures, tmp_path / "fresh")
    for image_id, vectors in vectors_of(fresh).items():
        assert torch.allclose(vectors, now[image_id], atol=1e-6)
    model.encoded = 0
    assert not index.update().encoded and not model.encoded


def test_tables_and_their_columns(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """Columns of a table are filters; a price that changes moves no vector."""
    table = pictures / "catalogue.csv"
    rows = [f"red/{n:02d}.png,{'shoe' if n % 2 else 'hat'},{n}.5,00{n}" for n in range(COUNT) if n % 3]
    table.write_text("\n".join(["image,category,price,sku", *rows]))
    index = Index.build(model, table, tmp_path / "index")
    assert index.kinds == {"category": "text", "price": "number", "sku": "text"}
    hits = index.search(text="x", k=50, where=["category=shoe", "price<10"])
    assert sorted(hit.id for hit in hits) == ["red/01.png", "red/05.png", "red/07.png"]
    assert {hit.columns["sku"] for hit in hits} == {"001", "005", "007"}
    table.write_text(table.read_text().replace("red/05.png,shoe,5.5", "red/05.png,shoe,55"))
    model.encoded = 0
    done = index.update()
    assert (done.changed, done.encoded, model.encoded) == (1, 0, 0)
    assert sorted(hit.id for hit in index.search(text="x", where=["category=shoe", "price<10"])) == [
        "red/01.png", "red/07.png",
    ]  # fmt: skip


def test_images_inside_a_table(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """Pictures that are rows of a Parquet file can be the query, too."""
    import datasets

    files = sorted(pictures.rglob("*.png"))
    data = {"image": [{"bytes": f.read_bytes(), "path": f.name} for f in files], "price": list(range(len(files)))}
    datasets.Dataset.from_dict(
        data, datasets.Features(image=datasets.Image(), price=datasets.Value("int64"))
    ).to_parquet(tmp_path / "table.parquet")
    index = Index.build(model, tmp_path / "table.parquet", tmp_path / "index")
    hit = index.search(index.ids[0], "in red", k=1, where=["price>=1"])[0]
    assert hit.path is None and hit.columns["price"] >= 1
    assert index.search(files[3], k=1)[0].id.endswith(files[3].name)


def test_removed_images_stay_away(model: Counting, pictures: Path, tmp_path: Path) -> None:
    index = Index.build(model, pictures, tmp_path / "index")
    assert str(index.remove(["red/01.png", "blue/00.png"])).startswith("0 added, 0 changed, 2 removed")
    assert len(index) == COUNT - 2 and not index.update().added and "red/01.png" not in index.ids
    assert "red/01.png" not in [hit.id for hit in index.search(text="x", k=100)]
    with pytest.raises(InputError, match=r"1 ids are not in the index, such as 'red/01.png'"):
        index.remove(["red/01.png"])
    before = vectors_of(index)
    index.compact()
    assert len(index.snapshot.head.segments) == 1 and not index.snapshot.head.segments[0].removed
    assert all(torch.equal(vectors, before[image_id]) for image_id, vectors in vectors_of(index).items())
    assert not index.update().added


def test_more_sources(model: Counting, pictures: Path, tmp_path: Path) -> None:
    index = Index.build(model, pictures, tmp_path / "index")
    draw_picture(tmp_path / "more" / "x.png", "x")
    assert index.add(tmp_path / "more").added == 1 and index.ids[-1] == "x.png"
    shutil.copy(tmp_path / "more" / "x.png", tmp_path / "copy.png")
    assert index.search(tmp_path / "copy.png", k=1)[0].path == tmp_path / "more" / "x.png"
    draw_picture(tmp_path / "more" / "y.png", "y")
    assert index.update().added == 1
    with pytest.raises(InputError, match=r"is in .* already: use update"):
        index.add(pictures)
    draw_picture(tmp_path / "other" / "y.png", "z")
    with pytest.raises(InputError, match=r"already holds an image with the id 'y.png'"):
        index.add(tmp_path / "other")


def test_many_changes_are_compacted(
    model: Counting, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MANY_SEGMENTS", 3)
    index = Index.build(model, pictures, tmp_path / "index")
    for n in range(5):
        draw_picture(pictures / f"{n}.png", f"more {n}")
        assert index.update().encoded == 1
        assert len(index.snapshot.head.segments) <= 3
    assert len(index) == COUNT + 5
    assert {folder.name for folder in snapshot.segment_folders(index.path)} == {
        part.key for part in index.snapshot.head.segments
    }


def test_broken_pictures_are_left_out_and_named(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """They are not tried again until their file changes."""
    (pictures / "blue/00.png").write_bytes(b"no picture")
    whole = (pictures / "red/01.png").read_bytes()
    (pictures / "red/01.png").write_bytes(whole[: len(whole) // 2])
    index = Index.build(model, pictures, tmp_path / "index")
    assert len(index) == COUNT - 2 and "2 pictures are left out, such as: image" in str(index.changes)
    assert "blue/00.png" in str(index.changes)
    assert not index.update().changed
    (pictures / "red/01.png").write_bytes(whole)
    assert index.update().added == 1 and len(index) == COUNT - 1
    index.compact()
    assert not index.update().changed and len(index) == COUNT - 1
    assert list(index.snapshot.head.broken) == ["blue/00.png"]
    index.remove(["blue/00.png"])
    assert not index.snapshot.head.broken and not index.update().added and len(index) == COUNT - 1
    index.update(restore=True)
    assert list(index.snapshot.head.broken) == ["blue/00.png"] and len(index) == COUNT - 1
    (pictures / "blue/00.png").unlink()
    assert not index.update().removed and not index.snapshot.head.broken
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no picture decodes, such as image"):
        Index.build(model, pictures, tmp_path / "other")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("point", ["block 2", "tables", "removed rows", "commit", "clean-up"])
@pytest.mark.parametrize("change", ["build", "add", "update"])
def test_killed_changes(model: Counting, pictures: Path, tmp_path: Path, change: str, point: str) -> None:
    """A killed change leaves the old index or the new one; the same command then ends with the same bytes."""
    truth, path = tmp_path / "truth", tmp_path / "index"
    (pictures / "red/02.png").write_bytes(b"no picture")
    if change != "build":
        Index.build(model, pictures, path)
        shutil.copytree(path, truth)
    for n in range(20):
        draw_picture(tmp_path / "more" / f"{n}.png", f"more {n}")
        if change == "update":
            draw_picture(pictures / "red" / f"new{n}.png", f"new {n}")
    if change == "update":
        (pictures / "blue/00.png").unlink()
        draw_picture(pictures / "blue/03.png", "another")
    (tmp_path / "more" / "3.png").write_bytes(b"no picture")

    def run(folder: Path) -> None:
        if change == "build":
            Index.build(model, pictures, folder)
        elif change == "add":
            Index(folder, model).add(tmp_path / "more")
        else:
            Index(folder, model).update()

    before = digests(path) if path.exists() else {}
    old = Index(path).ids if before else []
    run(truth)
    kill_at(point, lambda: run(path))
    if before:
        assert Index(path).ids in (old, Index(truth).ids)
        committed = digests(path)["index.json"] != before["index.json"]
        assert committed == (point == "clean-up")
    if not (change == "build" and point == "clean-up"):
        if not (point == "clean-up" and change == "add"):
            run(path)
        assert digests(path) == digests(truth)


def kill_at(point: str, run: Callable[[], None]) -> None:
    """Run in a child process that kills itself at a point."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        count = 0

        def die(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if point.startswith("block"):
            write = store.EmbeddingStore.write

            def counted(*given: object) -> None:
                nonlocal count
                count += 1
                if count > 2:
                    die()
                write(*given)  # type: ignore[arg-type]

            store.EmbeddingStore.write = counted  # type: ignore[method-assign, assignment]
        elif point == "tables":
            segments._zero_rows = die  # type: ignore[assignment]
        elif point == "removed rows":
            segments.write_removed = die  # type: ignore[assignment]
        elif point == "commit":
            segments.write_head = die
        else:
            snapshot.segment_folders = die  # type: ignore[assignment]
        try:
            run()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, f"nothing was killed at {point}"


def test_an_index_of_another_model_is_refused(model: Counting, pictures: Path, tmp_path: Path) -> None:
    index = Index.build(model, pictures, tmp_path / "index")
    other = tiny_backbone("clip4cir", tmp_path)
    with torch.no_grad():
        next(iter(other.image_state().values())).add_(1)
    stranger = Model(other, "other", device="cpu")
    with pytest.raises(InputError, match="was built with another model, embedded, not other"):
        Index.open(index.path, stranger)
    draw_picture(pictures / "new.png", "new")
    with pytest.raises(InputError, match="was built with another model"):
        changes.update(lambda: stranger, index.path)
    with pytest.raises(InputError, match="the model embedded has changed since"):
        Index.open(index.path).search(text="x")  # the note says embedded, the vectors are of a tiny one


def test_queries_as_people_make_them(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """The query vector is the documented sum, whatever the pictures are given as."""
    index = Index.build(model, pictures, tmp_path / "index")
    a, b = "red/01.png", "blue/03.png"

    def unit(*parts: tuple[float, str | None, str | None]) -> Tensor:
        vectors = [w * model.embed_queries([i and pictures / i], [t])[0] for w, i, t in parts]
        return F.normalize(torch.stack(vectors).sum(0), dim=0)

    cases = [
        (index.embed(a), unit((1, a, None))),
        (index.embed(text="red"), unit((1, None, "red"))),
        (index.embed(pictures / a, "red"), unit((1, a, "red"))),
        (index.embed(Image.open(pictures / a), ["red"]), unit((1, a, "red"))),
        (index.embed([a, b], "red"), unit((0.5, a, "red"), (0.5, b, "red"))),
        (index.embed([(a, 3.0), b], "red"), unit((0.75, a, "red"), (0.25, b, "red"), (1.5, a, None), (0.5, b, None))),
        (index.embed(a, [("red", 2.0)]), unit((1, a, "red"), (1, None, "red"))),
        (index.embed(a, without="red"), unit((1, a, None), (-0.5, None, "red"))),
        (index.embed(a, "red", unlike=(b, 0.25)), unit((1, a, "red"), (-0.25, b, None))),
        (index.embed(index.search(a, k=1)[0]), unit((1, index.search(a, k=1)[0].id, None))),
    ]
    for number, (found, expected) in enumerate(cases):
        assert torch.allclose(found, expected, atol=1e-5), number
    assert not torch.allclose(cases[2][0], cases[6][0], atol=1e-3)  # a weight matters
    ids = [hit.id for hit in index.search([a, b], "red", k=100)]
    assert len(ids) == COUNT - 2 and a not in ids and b not in ids
    assert a not in [hit.id for hit in index.search(pictures / a, k=100)]  # the same file
    shutil.copy(pictures / a, tmp_path / "copy.png")
    assert index.search(tmp_path / "copy.png", k=1)[0].id == a  # a picture from elsewhere leaves nothing out


@pytest.mark.parametrize("name", ["sprc", "blip4cir", "tgcir", "clip4cir combiner"])
def test_every_backbone(name: str, pictures: Path, tmp_path: Path) -> None:
    """Several vectors an image are searched by their best."""
    model = Model(tiny_backbone(name, tmp_path), "tiny", device="cpu")
    index = Index.build(model, pictures, tmp_path / "index")
    query = model.embed_queries([pictures / "red/01.png"], ["in blue"])[0]
    hits = index.search("red/01.png", "in blue", k=5)
    targets = model.embed_images([pictures / image_id for image_id in index.ids])
    scores = dict(zip(index.ids, (targets @ query).amax(1).tolist(), strict=True))
    del scores["red/01.png"]
    assert [hit.id for hit in hits] == sorted(scores, key=scores.__getitem__, reverse=True)[:5]
    assert index.snapshot.head.shape[0] == (4 if name == "sprc" else 1)


def test_half_precision_on_disk(model: Counting, pictures: Path, tmp_path: Path) -> None:
    index = Index.build(model, pictures, tmp_path / "index", dtype="float16")
    whole = Index.build(model, pictures, tmp_path / "whole")
    assert index.snapshot.vectors[0].dtype == "float16"
    found = [[hit.score for hit in one.search(text="x", k=5)] for one in (index, whole)]
    assert found[0] == pytest.approx(found[1], abs=2e-3) and found[0] != found[1]


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_search(
    kind: str,
    model: Counting,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By faiss, with its recall printed; small enough to be exact here, removed images and filters included."""
    pytest.importorskip("faiss")
    from spn4cir.index import approximate

    for module in (approximate, segments):
        monkeypatch.setattr(module, "MIN_APPROXIMATE", 10)
    exact = Index.build(model, pictures, tmp_path / "exact")
    index = Index.build(model, pictures, tmp_path / "index", kind=kind)
    assert f"{kind}: recall@10 1.000" in capsys.readouterr().out
    assert list(index.path.glob(f"*/{kind}.faiss"))
    for one in (exact, index):
        one.remove(["red/01.png"])
    for given in ({}, {"where": ["category=red"]}, {"fold": 0.9}, {"k": 100}):
        found = [one.search("blue/00.png", "x", **given) for one in (exact, Index(index.path, model))]  # type: ignore[arg-type]
        assert [hit.id for hit in found[0]] == [hit.id for hit in found[1]], given
    next(index.path.glob(f"*/{kind}.faiss")).write_bytes(b"damaged")
    with pytest.raises(InputError, match="missing or damaged"):
        Index(index.path, model).search(text="x")


def test_folders_that_are_no_index(model: Counting, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no index"):
        Index.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds other files"):
        Index.build(model, pictures, pictures)
    with pytest.raises(InputError, match=r"nowhere is missing: give a folder"):
        Index.build(model, "nowhere", tmp_path / "index")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        Index.build(model, tmp_path / "empty", tmp_path / "index")
    index = Index.build(model, pictures, tmp_path / "index")
    with pytest.raises(InputError, match="already holds an index"):
        Index.build(model, pictures, tmp_path / "index")
    (index.path / "index.json").write_text('{"format": 9}')
    with pytest.raises(InputError, match="has format 9"):
        Index.open(tmp_path / "index")
    (index.path / "index.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        Index.open(tmp_path / "index")


@pytest.mark.parametrize("file", ["target.npy", "files.parquet", "columns.parquet"])
def test_damaged_segments(model: Counting, pictures: Path, tmp_path: Path, file: str) -> None:
    index = Index.build(model, pictures, tmp_path / "index")
    path = next(index.path.glob(f"*/{file}"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="missing or damaged"):
        Index.open(index.path, model).search(text="x")


def test_progress_bars_can_be_hidden(saved: Path, pictures: Path, tmp_path: Path) -> None:
    """By TQDM_DISABLE, as the page says."""
    script = f"import spn4cir; spn4cir.Index.build(spn4cir.load({str(saved)!r}), {str(pictures)!r}, 'index')"
    for hidden in ({}, {"TQDM_DISABLE": "1"}):
        environment = {**os.environ, **hidden}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0 and (b"image/s" in done.stderr) == (not hidden), done.stderr[-500:]
        shutil.rmtree(tmp_path / "index")


def test_the_package_is_imported_at_once() -> None:
    """``import spn4cir`` loads neither torch nor numpy; its names are imported when they are used."""
    script = "import sys, spn4cir; print(sorted({'torch', 'numpy', 'pandas', 'PIL'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert spn4cir.Index is Index and set(spn4cir.__all__) <= set(dir(spn4cir))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        spn4cir.Nothing  # noqa: B018


def test_an_index_may_become_empty(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """It is searched, updated and compacted all the same, and images come back."""
    index = Index.build(model, pictures, tmp_path / "index")
    index.remove(index.ids)
    for one in (index, Index(index.path, model)):
        assert not len(one) and one.search(text="x") == [] and one.ids == []
    assert not index.update().added and not len(Index(index.path, model))
    index.compact()
    draw_picture(tmp_path / "more" / "x.png", "x")
    assert index.add(tmp_path / "more").added == 1 and [hit.id for hit in index.search(text="x")] == ["x.png"]
    model.encoded = 0
    assert index.update(restore=True).added == COUNT and len(index) == COUNT + 1 and model.encoded == 0


def test_sources_that_go_or_share_ids(
    model: Counting, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.build(model, pictures, tmp_path / "index")
    draw_picture(tmp_path / "more" / "red" / "01.png", "other")
    draw_picture(tmp_path / "more" / "x.png", "x")
    index.remove(["red/01.png"])
    done = index.add(tmp_path / "more")
    assert done.added == 1 and "1 images are left out since they were removed from the index" in str(done)
    draw_picture(tmp_path / "more" / "red" / "02.png", "other")
    done = index.update()
    assert not done.added and "have ids of an earlier source" in str(done) and len(index) == COUNT
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(InputError, match="more is missing"):
        index.update()
    monkeypatch.chdir(tmp_path)  # places are stored as absolute paths
    assert index.remove_source("more").removed == 1 and not index.update().removed
    with pytest.raises(InputError, match="has no source catalogue"):
        index.remove_source("catalogue")
    with pytest.raises(InputError, match=r"has no source nowhere; sources: .*pictures"):
        index.remove_source("nowhere")


def test_a_search_outlives_the_commits_of_others(
    model: Counting, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that was opened, and not yet searched, holds on to its files; wherever the process goes."""
    monkeypatch.chdir(tmp_path)
    writer = Index.build(model, pictures, "index")
    reader = Index(Path("index"), model)
    draw_picture(pictures / "red/01.png", "another")
    writer.update()
    writer.compact()
    monkeypatch.chdir("/")
    assert len(reader.search(text="x", k=COUNT)) == COUNT
    reader.refresh()
    assert len(reader.search(text="x", k=COUNT)) == COUNT


def test_an_open_index_notices_the_commits_of_others(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """Each once; an index that has been removed, or is of another model, is an error until it is back."""
    writer, path = Index.build(model, pictures, tmp_path / "index"), tmp_path / "index"
    reader = Index(path, model)
    assert reader.refresh_if_changed() is False
    writer.remove("red/01.png")
    assert reader.refresh_if_changed() is True and reader.refresh_if_changed() is False
    assert len(reader) == COUNT - 1 and "red" in reader.column_values("category")
    writer.remove([one for one in writer.ids if one.startswith("red/")])
    assert "red" in reader.column_values("category")
    assert reader.refresh_if_changed() is True and "red" not in reader.column_values("category")
    path.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(InputError, match="holds no index"):
            reader.refresh_if_changed()
    (tmp_path / "elsewhere").rename(path)
    assert reader.refresh_if_changed() is False and len(reader) > 0
    snapshot.write_head(path, replace(reader.snapshot.head, fingerprint="0" * 16))
    for _ in range(2):
        with pytest.raises(InputError, match="was built with another model"):
            reader.refresh_if_changed()


def test_a_picture_that_decodes_again_is_encoded(
    model: Counting, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros that stand for a broken picture are never taken over, not even by a copy of its file."""
    opened = segments.open_image

    def fails(image: object, *how: object) -> Image.Image:
        if "01.png" in str(image):
            raise InputError("the codec is missing")
        return opened(image, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(segments, "open_image", fails)
    index = Index.build(model, pictures, tmp_path / "index")
    monkeypatch.setattr(segments, "open_image", opened)
    assert index.snapshot.head.broken == {"red/01.png": "the codec is missing"}
    shutil.copy(pictures / "red/01.png", pictures / "copy.png")
    os.utime(pictures / "red/01.png", ns=(1, 1))
    assert index.update().encoded == 2 and not index.snapshot.head.broken
    vectors = vectors_of(index)
    assert torch.allclose(vectors["copy.png"], model.embed_images([pictures / "red/01.png"])[0], atol=1e-6)


def test_a_picture_that_changes_while_it_is_read(
    model: Counting, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out until the next update, so that no vector is filed under other bytes."""
    hashed = segments.content_hashes

    def slow(images: object) -> list[str]:
        found = hashed(images)  # type: ignore[arg-type]
        draw_picture(pictures / "red/01.png", "another")
        return found

    monkeypatch.setattr(segments, "content_hashes", slow)
    index = Index.build(model, pictures, tmp_path / "index")
    monkeypatch.setattr(segments, "content_hashes", hashed)
    assert "changed while it was read" in str(index.changes) and len(index) == COUNT - 1
    assert index.update().added == 1 and len(index) == COUNT


def test_a_build_does_not_replace_another(
    model: Counting, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is made between the first look and the lock."""
    check = changes.check_kind
    monkeypatch.setattr(changes, "check_kind", lambda kind: None)
    draw_picture(tmp_path / "more" / "x.png", "x")

    def meanwhile(kind: str) -> None:
        monkeypatch.setattr(changes, "check_kind", check)
        Index.build(model, pictures, tmp_path / "index")

    monkeypatch.setattr(changes, "check_kind", meanwhile)
    with pytest.raises(InputError, match="already holds an index"):
        Index.build(model, tmp_path / "more", tmp_path / "index")
    assert len(Index(tmp_path / "index")) == COUNT


def test_filters_on_odd_columns(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """A column without any value, and whole numbers that no float holds."""
    flat = Index.build(model, pictures / "red", tmp_path / "flat")
    assert flat.kinds == {"category": "text"}
    assert not flat.search(text="x", where="category=red") and flat.search(text="x", where="category!=red")
    table = tmp_path / "pictures" / "t.csv"
    table.write_text("image,big\nred/01.png,1152921504606846977\nred/02.png,5\n")
    index = Index.build(model, table, tmp_path / "index")
    import pyarrow as pa

    column = index.snapshot.columns.column_names.index("big")
    large = pa.array([2**60 + 1, 5], pa.int64())
    index.snapshot.__dict__["columns"] = index.snapshot.columns.set_column(column, "big", large)
    index.snapshot.__dict__.pop("kinds", None)
    assert [hit.id for hit in index.search(text="x", where="big>100")] == ["red/01.png"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": ("a.png", "b.png")}, "a tuple is an image or a text with its weight"),
        ({"image": ("a.png", "b.png", "c.png")}, "a tuple is an image or a text with its weight"),
        ({"text": ("red", None)}, "a tuple is an image or a text with its weight"),
        ({"text": ("red", 1e300)}, "weights must be positive numbers below"),
        ({"text": 5}, "a text must say something, got 5"),
        ({"image": 5}, "an image is a file or a decoded picture, got int"),
        ({"image": "x" * 5000}, "is neither an id of the index nor a file"),
        ({"text": "x", "k": 2.5}, "k must be at least 1, a whole number"),
        ({"text": "x", "k": "3"}, "k must be at least 1, a whole number"),
        ({"text": "x", "min_z": float("nan")}, "min_z must be a finite number"),
        ({"text": "x", "where": {"category": None}, "k": 0}, "k must be"),
        ({"text": "x", "where": "nope"}, "filter 'nope': expected COLUMN=VALUE"),
    ],
)
def test_arguments_that_mean_nothing(
    model: Counting, pictures: Path, tmp_path: Path, given: dict[str, object], message: str
) -> None:
    """One line each, whatever the type."""
    index = Index.build(model, pictures, tmp_path / "index")
    with pytest.raises(InputError, match=message) as error:
        index.search(**given)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not index.search(text="x", where=None, k=1)[0].folded  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give a list"):
        model.embed_queries(texts="red heart")
    with pytest.raises(InputError, match="is an engine"):
        Index.build(model, pictures, "qdrant://here/x")


def test_tampered_heads(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """An index that says impossible things of itself is damaged, in one line."""
    index = Index.build(model, pictures, tmp_path / "index")
    head = json.loads((index.path / "index.json").read_text())
    wrong: list[dict[str, object]] = [
        {"shape": [2, 24]}, {"shape": [0, 0]}, {"sources": []}, {"segments": []}, {"segments": head["segments"] * 2},
        {"segments": [{**head["segments"][0], "key": "../../etc"}]},
    ]  # fmt: skip
    for change in wrong:
        (index.path / "index.json").write_text(json.dumps({**head, **change}))
        with pytest.raises(InputError, match="damaged"):
            Index(index.path, model)


def test_a_graph_never_gives_fewer(model: Counting, tmp_path: Path) -> None:
    """Where faiss finds too few, and where many are wanted, all images are scored."""
    pytest.importorskip("faiss")
    vectors = draw_vectors(5000, 1, 24)
    columns = {"n": list(range(5000))}
    exact = Index(make_index(tmp_path / "exact", vectors, columns))
    for kind in ("hnsw", "ivf"):
        index = Index(make_index(tmp_path / kind, vectors, columns, kind=kind), effort=1)
        for number, selection in enumerate((Selection(10), Selection(450), Selection(2000), Selection(50, fold=0.9))):
            query = vectors[7 * number, 0]
            found, truth = (one.search_vector(query, selection) for one in (index, exact))
            assert len(found) == len(truth), (kind, selection)
        assert [hit.id for hit in found] and index._state[1][0] is not None


def test_equal_pictures_fold_at_one(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """Rounding does not keep equal vectors apart."""
    for path in list(pictures.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy {path.name}"))
    index = Index.build(model, pictures, tmp_path / "index")
    hits = index.search(text="x", k=100, fold=1.0)
    assert len(hits) == COUNT and all(len(hit.folded) == 1 for hit in hits)


def test_pictures_that_are_away_and_come_back(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """A disk that is not mounted removes images, however often the index is updated meanwhile."""
    table = tmp_path / "t.csv"
    table.write_text("image_id,image\n" + "".join(f"{n},pictures/red/{n:02d}.png\n" for n in (1, 2, 4)))
    index = Index.build(model, table, tmp_path / "index")
    pictures.rename(tmp_path / "away")
    for _ in range(3):
        index.update()
        assert not len(Index(index.path, model)) and len(index.snapshot.head.broken) == 3
    (tmp_path / "away").rename(pictures)
    model.encoded = 0
    assert index.update().added == 3 and len(index) == 3 and model.encoded == 0
    path = pictures / "red" / "01.png"
    path.chmod(0)
    draw_picture(pictures / "red" / "02.png", "another")
    index.update()
    path.chmod(0o644)
    index.update()
    assert len(index) == 3 and not index.snapshot.head.broken


def test_rows_that_name_another_place(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """A path or a box that has changed is a change, whatever size and time the file has."""
    table = tmp_path / "t.csv"
    rows = "image_id,image,x0,y0,x1,y1\na,pictures/red/01.png,{}\nb,pictures/red/02.png,0,0,40,40\n"
    table.write_text(rows.format("0,0,20,20"))
    index = Index.build(model, table, tmp_path / "index")
    shutil.move(pictures / "red" / "02.png", pictures / "02.png")
    table.write_text(rows.format("20,20,40,40").replace("red/02", "02"))
    done = index.update()
    assert (done.changed, done.encoded) == (2, 1)
    fresh = vectors_of(Index.build(model, table, tmp_path / "fresh"))
    assert all(torch.allclose(vectors, fresh[i], atol=1e-6) for i, vectors in vectors_of(index).items())
    assert {hit.path for hit in index.search(text="x")} == {pictures / "red" / "01.png", pictures / "02.png"}


def test_large_numbers_in_columns(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """Whole numbers that no float holds, empty cells and NaN: searched, filtered, grouped, and noticed when changed."""
    import pyarrow as pa
    from pyarrow import parquet

    names = [f"pictures/red/{n:02d}.png" for n in (1, 2, 4, 5)]
    big = pa.array([2**60, 2**60 + 1, None, 2**60 + 1], pa.int64())
    share = pa.array([float("nan"), 0.0, -0.0, float("nan")])

    def write(column: pa.Array) -> Path:
        parquet.write_table(pa.table({"image": names, "big": column, "share": share}), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    index = Index.build(model, write(big), tmp_path / "index")
    assert index.kinds == {"big": "number", "share": "number"}
    assert len(index.search(text="x", group="big")) == 3 and len(index.search(text="x", group="share")) == 3
    assert len(index.search(text="x", where="share=0")) == 2 and len(index.search(text="x", where="big>5")) == 3
    write(pa.array([2**60 + 1, 2**60 + 1, None, 2**60 + 1], pa.int64()))
    assert index.update().changed == 1 and len(index.search(text="x", group="big")) == 2
    floats = pa.table({"image": ["pictures/blue/00.png"], "big": [0.5]})
    parquet.write_table(floats, tmp_path / "u.parquet")
    index.add(tmp_path / "u.parquet")
    assert len(index.search(text="x", where="big<1")) == 1 and index.compact() and len(index) == 5


def test_texts_that_are_no_unicode(model: Counting, pictures: Path, tmp_path: Path) -> None:
    """What a terminal passes on of other encodings is refused in one line."""
    index = Index.build(model, pictures, tmp_path / "index")
    for call, message in (
        (lambda: index.search("caf\udce9.png"), "neither an id of the index nor a file"),
        (lambda: index.search(text="x", where="category=\udce9"), "is no Unicode"),
        (lambda: index.remove("caf\udce9"), "are not in the index"),
        (lambda: index.search(text="x", where=5), "where is a list of conditions"),  # type: ignore[arg-type]
        (lambda: index.search(text="x", fold="y"), "fold is a similarity"),  # type: ignore[arg-type]
        (lambda: index.search(text="x", group=["category"]), "the index has no column"),  # type: ignore[arg-type]
        (lambda: model.embed_images(pictures), "give a list"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=message):
            call()
