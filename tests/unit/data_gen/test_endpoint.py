"""Captions through a server, and through one that misbehaves."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faulty_server import FaultyServer
from PIL import Image

from spn4cir.data_gen.ask import Question, Try
from spn4cir.data_gen.caption import caption_images
from spn4cir.data_gen.endpoint import KEY, Endpoint, chat_address, make_data_url
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.files import read_jsonl, write_jsonl
from spn4cir.images import open_image
from spn4cir.types import ImageRef

IDS = [f"i{n}" for n in range(12)]
SECRET = "sk-secret-123"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr("spn4cir.data_gen.endpoint.FIRST_PAUSE", 0.01)
    monkeypatch.delenv(KEY, raising=False)
    one = FaultyServer()
    yield one
    one.close()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve images of one colour each."""
    folder = tmp_path_factory.mktemp("images")
    for n, i in enumerate(IDS):
        Image.new("RGB", (2, 2), (n, 0, 0)).save(folder / f"{i}.png")
    no = lambda i: ""  # noqa: E731
    return cast(
        Dataset, SimpleNamespace(name="x", image=lambda i: ImageRef(folder / f"{i}.png"), category=no, captions=no)
    )


def config_of(folder: Path, server: FaultyServer | str, **settings: Any) -> GenerateConfig:
    address = server if isinstance(server, str) else server.address
    base = {"endpoint": address, "captioner": "tiny", "caption_images": "all", "requests": 4, "timeout": 5}
    config = GenerateConfig(output=str(folder), **{**base, **settings})  # type: ignore[arg-type]
    write_jsonl(config.file("images.jsonl"), [{"image_id": i, "pixels": i, "canonical": i} for i in IDS])
    return config


def captions(config: GenerateConfig) -> dict[str, str]:
    return {row["image_id"]: row["caption"] for row in read_jsonl(config.file("captions.jsonl"))}


GOOD = {i: f"a plain picture of {n}-0-0" for n, i in enumerate(IDS)}


def test_captions_of_a_server(tmp_path: Path, server: FaultyServer, dataset: Dataset) -> None:
    """One request an image, so many at once and no more, greedy, with the prompt and the image."""
    server.slow = 0.05
    config = config_of(tmp_path, server)
    caption_images(config, dataset)
    assert captions(config) == GOOD and len(server.requests) == 12 and 2 <= server.most <= 4
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions" and request["model"] == "tiny"
        assert request["temperature"] == 0 and request["max_tokens"] == 40
        (message,) = request["messages"]
        assert message["content"][1] == {"type": "text", "text": "please briefly describe the image in 10 words"}
    rows = read_jsonl(config.file("captions.jsonl"))
    assert {(row["model"], len(row["prompt"]), len(row["made_by"])) for row in rows} == {("tiny", 8, 16)}
    assert not list(tmp_path.glob("*partial*")) and not list(tmp_path.glob("*plan*"))


FAULTS = {
    "429": ["status:429"], "429 and wait": ["status:429:0.3"], "500": ["status:500"], "502": ["status:502"],
    "503 twice": ["status:503", "status:503:0.1"], "408": ["status:408"], "time-out": ["slow:3"], "half": ["half"],
    "torn": ["torn"], "dropped": ["drop"], "silent": ["silent"], "no JSON": ["answer:<html>what?</html>"],
    "no choices": ['answer:{"choices": []}'], "an error": ['answer:{"error": "busy"}'], "a list": ["answer:[1]"],
    "null": ['answer:{"choices": [{"message": {"content": null}}]}'], "nothing": ["answer:"],
    "all": ["status:500", "drop", "half", "torn", "status:429"],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_change_nothing(tmp_path: Path, server: FaultyServer, dataset: Dataset, name: str) -> None:
    """Some images meet them; the captions are a faultless server's, and only what failed is sent again, as it was."""
    server.faults = {f"{n}-0-0": FAULTS[name] for n in (1, 5, 6)}
    config = config_of(tmp_path, server, timeout=1 if name == "time-out" else 20, retries=5)
    start = time.monotonic()
    caption_images(config, dataset)
    assert captions(config) == GOOD and read_jsonl(config.file("captions.failed.jsonl")) == []
    assert len(server.requests) == 12 + 3 * len(FAULTS[name])
    assert len({json.dumps(request, sort_keys=True) for request in server.requests}) == 12
    if "wait" in name:
        assert time.monotonic() - start > 0.3


def test_retry_after_holds_all_requests(tmp_path: Path, server: FaultyServer, dataset: Dataset) -> None:
    """The server says for how long it wants no more; a date is as good as a number."""
    server.faults = {"0-0-0": ["status:429:0.5"]}
    caption_images(config_of(tmp_path, server, requests=1), dataset)
    first = server.times[0]
    assert all(t - first > 0.45 for t in server.times[1:]) and len(server.times) == 13


def test_a_crowded_server_is_waited_for(tmp_path: Path, server: FaultyServer, dataset: Dataset) -> None:
    """As long as it answers others, a refusal for crowding is no reason to give up, however often it comes."""
    server.faults = {"0-0-0": ["status:429"] * 6}
    answer, turns = server._answer, {True: threading.Semaphore(1), False: threading.Semaphore(0)}

    def alternate(request: Any, fault: str, colour: str) -> None:
        """Refuse one image and answer another in turn, so that a thread that stalls is not taken for a crowd."""
        refused = colour == "0-0-0"
        turns[refused].acquire(timeout=20)
        answer(request, fault, colour)
        turns[not refused].release(12 if refused and not fault else 1)

    server._answer = alternate  # type: ignore[method-assign]
    config = config_of(tmp_path, server, retries=3, requests=2, timeout=30)
    caption_images(config, dataset)
    assert captions(config) == GOOD and len(server.requests) == 18


def test_requests_per_minute(
    tmp_path: Path, server: FaultyServer, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests start no faster than that, however many may be under way."""
    asked, answer = list[float](), Endpoint.answer
    monkeypatch.setattr(Endpoint, "answer", lambda *given: (asked.append(time.monotonic()), answer(*given))[1])
    caption_images(config_of(tmp_path, server, requests_per_minute=1200), dataset)
    # counted from the first question, not between arrivals: a busy machine makes a request late, and the next one not
    early = [n for n, arrived in enumerate(server.times) if arrived < min(asked) + n * 0.05]
    assert len(server.times) == 12 and not early


@pytest.mark.parametrize(("fault", "reason"), [
    ("status:500", "answers 500: told you so 500"), ("slow:3", "no answer within 1 seconds"), ("half", "dropped"),
    ("answer:what?", "no JSON, or half of it: 'what?'"),
    ('answer:{"choices": [{"message": {"content": null}}]}', "no text"),
])  # fmt: skip
def test_what_fails_for_one_image_is_listed(
    tmp_path: Path, server: FaultyServer, dataset: Dataset, fault: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """After all retries; the others have their captions, and a second run asks about this one alone."""
    server.faults = {"3-0-0": [fault] * 9}
    config = config_of(tmp_path, server, retries=2, timeout=1 if fault == "slow:3" else 20)
    caption_images(config, dataset)
    assert captions(config) == {i: text for i, text in GOOD.items() if i != "i3"}
    assert len(server.requests) == 11 + 3
    (failed,) = read_jsonl(config.file("captions.failed.jsonl"))
    assert failed["image_id"] == "i3" and reason in failed["reason"] and "\n" not in failed["reason"]
    told = capsys.readouterr().out
    assert "11 captions; 1 failed (1 no readable answer)" in told and "asks again" in told
    server.faults = {}
    caption_images(config, dataset)
    assert len(server.requests) == 14 + 1 and captions(config) == GOOD
    caption_images(config, dataset)
    assert len(server.requests) == 15


@pytest.mark.parametrize("code", [400, 413, 415, 422, 451])
@pytest.mark.parametrize("refused", [[3], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_a_refusal_of_a_picture_is_listed(
    tmp_path: Path, server: FaultyServer, dataset: Dataset, code: int, refused: list[int]
) -> None:
    """Without a retry; many in a row are no broken server; a second run asks about these alone, and ends well."""
    server.faults = {f"{n}-0-0": [f"status:{code}"] * 99 for n in refused}
    config = config_of(tmp_path, server, requests=1)
    probes = len(refused) > 1
    for before in (12 - len(refused), 0):
        start = len(server.requests)
        caption_images(config, dataset)
        assert len(server.requests) - start == before + len(refused) + (probes if before else 0)
        assert captions(config) == {i: text for n, (i, text) in enumerate(GOOD.items()) if n not in refused}
        failed = read_jsonl(config.file("captions.failed.jsonl"))
        assert [row["image_id"] for row in failed] == [f"i{n}" for n in refused]
        assert all(f"answers {code}: told you so {code}" in row["reason"] for row in failed)


@pytest.mark.parametrize("fault", ["status:400", "status:413", "status:500"])
def test_a_second_run_where_the_server_is_broken(
    tmp_path: Path, server: FaultyServer, dataset: Dataset, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job was finished but for one image: it stays so, and that is said; also where nobody listens."""
    server.faults = {"3-0-0": [fault] * 99}
    config = config_of(tmp_path, server, retries=1)
    caption_images(config, dataset)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    server.faults, asked = {"*": [fault] * 99}, len(server.requests)
    caption_images(config, dataset)
    assert "11 captions; 1 failed" in capsys.readouterr().out and len(server.requests) - asked <= 2
    config.endpoint = "http://127.0.0.1:9/v1"
    caption_images(config, dataset)
    assert "is done but for 1 images, which got no answer again: http://127.0.0.1:9" in capsys.readouterr().out
    after = {name: (tmp_path / name).read_bytes() for name in before}
    assert after.keys() == before.keys() and after["captions.jsonl"] == before["captions.jsonl"]


@pytest.mark.parametrize("code", [400, 413])
def test_a_server_that_refuses_everything(tmp_path: Path, server: FaultyServer, dataset: Dataset, code: int) -> None:
    """After a handful, in its own words, even about a plain picture."""
    server.faults = {"*": [f"status:{code}"] * 99}
    with pytest.raises(InputError, match=f"8 questions in a row .* answers {code}: told you so"):
        caption_images(config_of(tmp_path, server, requests=1), dataset)
    assert len(server.requests) <= 12


@pytest.mark.parametrize("code", [401, 403, 404, 301, 307])
def test_a_refusal_for_good_stops_at_once(
    tmp_path: Path, server: FaultyServer, dataset: Dataset, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that holds what the server says, but not the key; what was answered stays."""
    monkeypatch.setenv(KEY, SECRET)
    server.faults = {"7-0-0": [f"status:{code}"]}
    config = config_of(tmp_path, server, requests=1)
    with pytest.raises(InputError, match=f"answers {code}: told you so {code}, key Bearer \\*\\*\\*") as error:
        caption_images(config, dataset)
    assert "\n" not in str(error.value) and len(server.requests) == 8
    server.faults = {}
    caption_images(config, dataset)
    assert captions(config) == GOOD and len(server.requests) == 8 + 5


def test_a_key_is_sent_and_not_written(
    tmp_path: Path, server: FaultyServer, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """It comes from the environment, goes to the server, and is in no file and on no terminal."""
    monkeypatch.setenv(KEY, f" {SECRET}\n")
    server.faults = {"3-0-0": ["status:500"] * 9}
    caption_images(config_of(tmp_path, server, retries=1), dataset)
    assert set(server.keys) == {f"Bearer {SECRET}"}
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err
    assert not [path for path in tmp_path.iterdir() if SECRET in path.read_text()]
    assert "***" in (tmp_path / "captions.failed.jsonl").read_text()
    monkeypatch.setenv(KEY, "two\nlines")
    with pytest.raises(InputError, match=KEY) as error:
        caption_images(config_of(tmp_path / "b", server), dataset)
    assert "two" not in str(error.value)


def test_a_server_that_cannot_be_reached(tmp_path: Path, server: FaultyServer, dataset: Dataset) -> None:
    """One line, after retries; what was answered before is there when it is back."""
    server.faults = {"4-0-0": ["drop"]}
    config = config_of(tmp_path, server, requests=1, retries=2)
    handle = server.handle

    def until_five(request: Any) -> None:
        if len(server.requests) == 4:  # this one is dropped, and then nobody listens any more
            server._server.socket.close()
        handle(request)

    server.handle = until_five  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"cannot be reached: .*refused.*; what was answered stays") as error:
        caption_images(config, dataset)
    assert "\n" not in str(error.value)
    (journal,) = tmp_path.glob("*.partial.jsonl")
    assert len(journal.read_text().splitlines()) == 4


@pytest.mark.parametrize("fault", ["answer:<html>", "answer:{}", "status:500", "drop"])
def test_a_server_that_answers_nonsense(tmp_path: Path, server: FaultyServer, dataset: Dataset, fault: str) -> None:
    """Eight questions without one answer: one line, rather than a million failures; nothing is recorded."""
    server.faults = {"*": [fault] * 99}
    config = config_of(tmp_path, server, retries=1)
    with pytest.raises(InputError, match=r"8 questions in a row got no readable answer") as error:
        caption_images(config, dataset)
    assert "\n" not in str(error.value) and not config.file("captions.failed.jsonl").exists()
    server.faults = {}
    caption_images(config, dataset)
    assert captions(config) == GOOD


def test_an_answer_that_fails_its_check_is_drawn_again(tmp_path: Path, server: FaultyServer, dataset: Dataset) -> None:
    """With a temperature, and a seed that is the same whenever it is run."""
    refusal = {"choices": [{"message": {"content": "I'm sorry, but I cannot."}, "finish_reason": "stop"}]}
    server.faults = {"3-0-0": [f"answer:{json.dumps(refusal)}"] * 2}
    caption_images(config_of(tmp_path, server, requests=1), dataset)
    tries = [r for r in server.requests if r["messages"] == server.requests[3]["messages"]]
    assert [r["temperature"] for r in tries] == [0, 0.7, 0.7] and len({r.get("seed") for r in tries}) == 3
    once = Endpoint(server.address, "tiny", config_of(tmp_path / "b", server), 40)
    again = once._request(Question("i3", "p", dataset.image("i3")), Try(1, 42))
    assert again["seed"] == tries[1]["seed"]
    assert again["seed"] != once._request(Question("i4", "p", dataset.image("i3")), Try(1, 42))["seed"]


def test_answers_in_parts_and_thoughts_alone(tmp_path: Path, server: FaultyServer, dataset: Dataset) -> None:
    """Parts are joined; a server that gave thoughts alone says what to change."""
    parts = [{"type": "text", "text": "a red"}, {"type": "text", "text": " hat"}]
    thoughts = {"choices": [{"message": {"content": None, "reasoning_content": "hm"}}]}
    server.faults = {
        "1-0-0": [f"answer:{json.dumps({'choices': [{'message': {'content': parts}}]})}"],
        "2-0-0": [f"answer:{json.dumps(thoughts)}"] * 9,
    }
    config = config_of(tmp_path, server, retries=0)
    caption_images(config, dataset)
    (failed,) = read_jsonl(config.file("captions.failed.jsonl"))
    assert captions(config)["i1"] == "a red hat" and failed["image_id"] == "i2" and "max_new_tokens" in failed["reason"]


def test_an_answer_cut_at_the_bound(tmp_path: Path, server: FaultyServer, dataset: Dataset) -> None:
    """``finish_reason`` says so; it is too long."""
    cut = {"choices": [{"message": {"content": "a picture that"}, "finish_reason": "length"}]}
    server.faults = {"3-0-0": [f"answer:{json.dumps(cut)}"] * 9}
    config = config_of(tmp_path, server, retries=0)
    caption_images(config, dataset)
    assert read_jsonl(config.file("captions.failed.jsonl")) == [
        {"image_id": "i3", "reason": "too long", "answer": "a picture that", "read": True}
    ]


def test_chats_without_images(tmp_path: Path, server: FaultyServer) -> None:
    """Messages go as they are."""
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "rot"}]
    engine = Endpoint(server.address, "tiny", config_of(tmp_path, server), 25)
    (answer,) = engine.answer([Question("k", chat)], Try(0, 1))
    assert answer.text == "a plain picture of rot" and server.requests[0]["messages"] == chat


@pytest.mark.parametrize("given", [
    "http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", " http://h:1/v1/chat/completions ",
])  # fmt: skip
def test_addresses(given: str) -> None:
    """With and without what is always the same."""
    assert chat_address(given) == "http://h:1/v1/chat/completions"


def test_an_address_of_another_shape() -> None:
    """Where there is a path, it is the server's business."""
    assert chat_address("https://h/openai") == "https://h/openai/chat/completions"


@pytest.mark.parametrize("given", ["h:8000", "localhost", "", "ftp://h/v1", "http://", "http://me:secret@h/v1"])
def test_what_is_no_address(given: str) -> None:
    """Refused at once, in a line that holds no password."""
    with pytest.raises(InputError, match="endpoint") as error:
        chat_address(given)
    assert "secret" not in str(error.value)


def test_images_are_flattened_on_white(tmp_path: Path) -> None:
    """What is sent has no transparency, and small images lose nothing; large ones go as JPEG."""
    import base64
    import io

    Image.new("RGBA", (3, 2), (9, 9, 9, 0)).save(tmp_path / "a.png")
    kind, _, content = make_data_url(open_image(tmp_path / "a.png")).partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/png" and picture.mode == "RGB" and picture.getpixel((1, 1)) == (255, 255, 255)
    Image.new("RGB", (1100, 1000), "red").save(tmp_path / "b.png")
    assert make_data_url(open_image(tmp_path / "b.png")).startswith("data:image/jpeg;base64,")


def test_another_address_of_the_same_model(tmp_path: Path, server: FaultyServer, dataset: Dataset) -> None:
    """What was said stays good when the server moves; another model's does not."""
    caption_images(config_of(tmp_path, server), dataset)
    asked = len(server.requests)
    moved = config_of(tmp_path, server)
    moved.endpoint = "http://127.0.0.1:9/v1"  # nobody is there
    caption_images(moved, dataset)
    assert len(server.requests) == asked
    moved.captioner = "another"
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9"):
        caption_images(moved, dataset)
