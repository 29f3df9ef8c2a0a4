"""The four steps on a few real images, with the embedded captioner and matcher."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spn4cir.data_gen import steps
from spn4cir.data_gen.make_triplets import make_triplets
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.datasets.emoji import Emoji
from spn4cir.datasets.generated import read_generated
from spn4cir.errors import InputError


class Few(Emoji):
    """Ninety training images whose names share words."""

    def list_training_images(self) -> list[str]:
        return [i for i in super().list_training_images() if "firefighter" in self.label(i) or "judge" in self.label(i)]


def test_images_become_triplets(tmp_path: Path) -> None:
    """Real captions and real ranks; a second run skips all; the same run elsewhere gives the same bytes."""
    dataset = Few()
    names = {i: dataset.label(i) for i in dataset.training_images()}
    for folder in ("a", "a", "b"):
        make_triplets(GenerateConfig(output=str(tmp_path / folder), window=[1, 6], pairs_per_image=2), dataset)
    first, second = ((tmp_path / folder / "triplets.json").read_bytes() for folder in "ab")
    assert first == second
    triplets, _ = read_generated(tmp_path / "a" / "triplets.json", names)
    assert len(triplets) > len(names) / 2
    rows = [json.loads(line) for line in (tmp_path / "a" / "captions.jsonl").read_text().splitlines()]
    assert sum(row["caption"] == names[row["image_id"]] for row in rows) > 0.75 * len(rows)


def test_a_window_beyond_the_images_stops_before_captioning(tmp_path: Path) -> None:
    """Captioning can take hours; what cannot work is said first."""
    with pytest.raises(InputError, match="reaches beyond"):
        make_triplets(GenerateConfig(output=str(tmp_path), window=[1, 5000]), Few())
    assert not list(tmp_path.glob("captions*"))


FINAL = ("images.jsonl", "pairs.jsonl", "captions.jsonl", "triplets.jsonl", "triplets.json", "triplets.parquet")
SETTINGS: dict[str, Any] = {"window": [1, 6], "pairs_per_image": 2, "caption_batch_size": 16, "match_batch_size": 16}


def killed_at(write: int, output: Path) -> bool:
    """Run all steps in a process that gets SIGKILL at its n-th write: half of a line is written, or no file renamed."""
    child = multiprocessing.get_context("fork").Process(target=_run_until, args=(write, output))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), child.exitcode
    return child.exitcode != 0


def _run_until(write: int, output: Path) -> None:
    left, replace, add = iter(range(write)), os.replace, steps.Journal.add

    def stop() -> bool:
        return next(left, None) is None

    def dying_replace(*given: Any) -> None:
        if stop():
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*given)

    def dying_add(self: steps.Journal, block: int, rows: Any) -> None:
        if stop():
            with self.path.open("ab") as file:
                file.write(b'{"block": 1, "rows": [{"torn')
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, block, rows)

    os.replace, steps.Journal.add = dying_replace, dying_add  # type: ignore[method-assign]
    make_triplets(GenerateConfig(output=str(output), **SETTINGS), Few())


def test_killed_at_any_write_and_resumed(tmp_path: Path) -> None:
    """Whatever write a kill hits, what the next run leaves is what an uninterrupted one leaves, byte for byte."""
    make_triplets(GenerateConfig(output=str(tmp_path / "whole"), **SETTINGS), Few())
    draw, kills, output = random.Random(0), 0, tmp_path / "killed"
    while killed_at(draw.randrange(12), output):
        kills += 1
        assert kills < 60
    assert kills >= 3
    for name in FINAL:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not [path for path in output.iterdir() if ".partial." in path.name or path.suffix == ".tmp"]
    assert (output / "sheet.png").is_file() and (output / "window.html").is_file()


@pytest.mark.parametrize("name", FINAL)
def test_a_file_that_was_cut_is_made_again(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines are missing, which no reader can notice: the note does, says so, and the result is as before."""
    config = GenerateConfig(output=str(tmp_path), **SETTINGS)
    make_triplets(config, Few())
    before = {final: (tmp_path / final).read_bytes() for final in FINAL}
    half = before[name].splitlines(keepends=True)
    (tmp_path / name).write_bytes(b"".join(half[: len(half) // 2]))
    capsys.readouterr()
    make_triplets(config, Few())
    told = f"{tmp_path / name} is not the file that was finished: it is made again"
    assert capsys.readouterr().out.splitlines().count(told) == 1
    assert {final: (tmp_path / final).read_bytes() for final in FINAL} == before


def test_two_processes_make_the_same_triplets(tmp_path: Path) -> None:
    """From the command line, on a folder of pictures: all steps by two processes, and by one."""
    pictures, few = tmp_path / "pictures", Few()
    pictures.mkdir()
    for image_id in few.training_images()[:40]:
        (pictures / f"{image_id}.png").write_bytes(Path(str(few.image(image_id))).read_bytes())
    options = ["--dataset", "catalogue", "--data-root", str(pictures), "--matcher", "embedded", "--window", "[1,6]"]
    options += ["--captioner", "embedded", "--match-batch-size", "8", "--caption-batch-size", "8"]
    script = str(Path(__file__).parents[2] / "data_gen" / "make_triplets.py")
    for name, many in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2"])):
        command = [sys.executable, *many, script, *options, "--output", str(tmp_path / name)]
        told = subprocess.run(command, env={**os.environ, "ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr[-2000:]
        assert told.stdout.count("next: ") == 1
    for name in FINAL:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
