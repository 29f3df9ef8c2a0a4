"""Settings: YAML, then options."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from spn4cir.config import TrainConfig, find_config, parse, recipes_folder, write_yaml
from spn4cir.config_groups import AdamWConfig, BankConfig
from spn4cir.errors import InputError


def settings(tmp_path: Path, yaml: str = "", *argv: str) -> TrainConfig:
    """Parse a default file of this content with these options."""
    path = tmp_path / "default.yaml"
    path.write_text(yaml, encoding="utf-8")
    return parse(TrainConfig, path, argv)


def refused(tmp_path: Path, yaml: str = "", *argv: str) -> str:
    """The message of the InputError, which is one line."""
    with pytest.raises(InputError) as error:
        settings(tmp_path, yaml, *argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults(tmp_path: Path) -> None:
    """An empty file and no option give the defaults."""
    assert settings(tmp_path) == TrainConfig()


def test_unknown_key_names_file_and_suggests(tmp_path: Path) -> None:
    """A typo in a file is an error that names file and key and proposes the right one."""
    message = refused(tmp_path, "bach_size: 3")
    assert str(tmp_path / "default.yaml") in message
    assert "'bach_size'" in message and "'batch_size'" in message


def test_unknown_key_without_a_near_one(tmp_path: Path) -> None:
    """Nothing is proposed where nothing is near; a key need not be a text."""
    assert "did you mean" not in refused(tmp_path, "xyzzy: 3")
    assert "unknown key 1" in refused(tmp_path, "1: 2")


@pytest.mark.parametrize(("yaml", "told"), [
    ("annotated: 300", "'annotated' is now called 'max_annotated'"),
    ("negatives: {above: 0.9}", "'negatives.above' is now called 'negatives.max_similarity'"),
    ("beta2: 0.98", "'beta2' is now called 'adamw.beta2'"),
    ("eps: 1.0e-8", "'eps' is now called 'adamw.eps'"),
    ("schedule: drops", "'schedule: drops' is now called 'schedule: multistep'"),
])  # fmt: skip
def test_a_renamed_setting(tmp_path: Path, yaml: str, told: str) -> None:
    """An old word in a file is an error that says the new one."""
    assert refused(tmp_path, yaml) == f"config file {tmp_path / 'default.yaml'}: {told}"


@pytest.mark.parametrize(("old", "new"), [
    ("--annotated", "--max_annotated"), ("--negatives.above", "--negatives.max_similarity"),
])  # fmt: skip
def test_a_renamed_option(tmp_path: Path, old: str, new: str) -> None:
    """As in a file."""
    for argv in ([old, "3"], [f"{old}=3"]):
        assert refused(tmp_path, "", *argv) == f"option {old} is now called {new}"


def test_a_recipe_that_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the time before folders is an error that says the new one; the new one is found outside a checkout."""
    monkeypatch.chdir(tmp_path)
    old = "recipes/emoji_clip4cir_stage1.yaml"
    said = f"config file {old} is missing: it is recipes/emoji/clip4cir_stage1.yaml now"
    assert refused(tmp_path, "", "--config", old) == said
    assert settings(tmp_path, "", "--config", "recipes/emoji/tgcir_stage1.yaml").backbone == "tgcir"
    packaged = recipes_folder() / "emoji" / "tgcir_stage1.yaml"
    assert find_config("recipes/emoji/tgcir_stage1.yaml") == packaged
    own = tmp_path / "recipes" / "emoji" / "tgcir_stage1.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("backbone: sprc\n")
    assert settings(tmp_path, "", "--config", "recipes/emoji/tgcir_stage1.yaml").backbone == "sprc"


def test_unknown_option(tmp_path: Path) -> None:
    """An unknown option is an error that names it."""
    assert "--bogus" in refused(tmp_path, "", "--bogus", "3")


@pytest.mark.parametrize("argv", [
    ["--batch-size", "3"], ["--batch_size", "3"], ["--batch-size=3"], ["--batch_size=3"],
])  # fmt: skip
def test_dashes_and_underscores(tmp_path: Path, argv: list[str]) -> None:
    """An option may be written either way, with a space or an equals sign."""
    assert settings(tmp_path, "batch_size: 7", *argv).batch_size == 3


def test_nested_options_keep_their_dashes_in_values(tmp_path: Path) -> None:
    """Only the name is rewritten: a value keeps its dashes."""
    config = settings(tmp_path, "", "--backbone-options.model", "RN50x4-quickgelu", "--output=a-b")
    assert config.backbone_options == {"model": "RN50x4-quickgelu"}
    assert config.output == "a-b"


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
@pytest.mark.parametrize("before", [True, False])
def test_config_after_an_option_still_loses(tmp_path: Path, spelling: str, before: bool) -> None:
    """--config wins over the default file and loses to options, in whatever order they stand."""
    other = tmp_path / "other.yaml"
    other.write_text("batch_size: 5\nepochs: 2\n")
    option, given = ["--batch-size", "9"], spelling.format(other).split()
    config = settings(tmp_path, "batch_size: 7\nlr: 3.0", *([*given, *option] if before else [*option, *given]))
    assert (config.batch_size, config.epochs) == (9, 2)
    assert config.lr == TrainConfig().lr  # the default file is replaced, not merged


@pytest.mark.parametrize("argv", [["--config"], ["--config="]])
def test_config_needs_a_file(tmp_path: Path, argv: list[str]) -> None:
    """--config alone is an error."""
    assert "--config needs a value" in refused(tmp_path, "", *argv)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, broken YAML, and YAML that is no mapping each name the file."""
    absent = str(tmp_path / "absent.yaml")
    assert absent in refused(tmp_path, "", "--config", absent)
    for yaml in ("a: [", "- a", "just words"):
        assert str(tmp_path / "default.yaml") in refused(tmp_path, yaml)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    assert "bytes.yaml" in refused(tmp_path, "", "--config", str(tmp_path / "bytes.yaml"))


def test_resolved_file_parses_back_equal(tmp_path: Path) -> None:
    """What write_yaml wrote gives the same settings, of every kind of value."""
    config = TrainConfig(
        data_root="somewhere/ä b", backbone_options={"model": "RN50", "pretrained": None}, max_annotated=0,
        generated="auto", generated_share=0.25, lr=1e-7, adamw=AdamWConfig(eps=1e-12), temperature=1 / 3,
        learn_temperature=True, max_steps=5, trackers=["tensorboard"], output="123", schedule="cosine",
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    write_yaml(config, path)
    assert parse(TrainConfig, path, []) == config
    assert parse(TrainConfig, tmp_path / "absent", ["--config", str(path)]) == config


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    """``lr: 1e-3`` is a text to YAML, but a number to people."""
    assert settings(tmp_path, "lr: 1e-3").lr == 0.001


@pytest.mark.parametrize(("key", "value"), [
    ("batch_size", "many"), ("batch_size", "1.5"), ("epochs", "true"), ("lr", "fast"), ("schedule", "linear"),
    ("mixed_precision", "fp8"), ("keep_pixels", "3"), ("backbone_options", "3"), ("seed", "null"),
    ("trackers", "tensorboard"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["file", "option"])
def test_wrong_types_are_refused(tmp_path: Path, key: str, value: str, where: str) -> None:
    """A value of the wrong type is refused, and named, whether it stands in a file or is an option."""
    message = refused(tmp_path, f"{key}: {value}") if where == "file" else refused(tmp_path, "", f"--{key}={value}")
    assert key in message


@pytest.mark.parametrize(("key", "value"), [
    ("batch_size", "0"), ("epochs", "-1"), ("lr", "0.0"), ("temperature", "-0.1"), ("eval_batch_size", "0"),
    ("generated_share", "1.0"), ("generated_share", "-0.1"), ("max_annotated", "-1"),
])  # fmt: skip
def test_values_out_of_range_are_refused(tmp_path: Path, key: str, value: str) -> None:
    """A value that cannot be meant is refused with its name and itself."""
    message = refused(tmp_path, f"{key}: {value}")
    assert key in message and value in message


@pytest.mark.parametrize(("key", "value"), [
    ("max_steps", "0"), ("max_steps", "-1"), ("workers", "-1"), ("warmup_steps", "-1"), ("lr", ".nan"),
    ("temperature", ".inf"), ("eval_every", "-1"), ("save_every", "-1"),
])  # fmt: skip
def test_values_that_would_train_wrongly_are_refused(tmp_path: Path, key: str, value: str) -> None:
    """No bound of steps that means none, no negative count, no rate that is no number."""
    assert key in refused(tmp_path, f"{key}: {value}")


def test_annotated_zero_and_share_zero_are_fine(tmp_path: Path) -> None:
    """The edges of the ranges are allowed: nothing annotated, nothing generated in a batch."""
    config = settings(tmp_path, "max_annotated: 0\ngenerated_share: 0.0")
    assert (config.max_annotated, config.generated_share) == (0, 0.0)


def test_settings_are_few() -> None:
    """A person can read them all."""
    assert len(dataclasses.fields(TrainConfig)) <= 41


def test_every_field_is_explained() -> None:
    """Each field stands in the docstring, from which --help is made."""
    text = inspect.getdoc(TrainConfig)  # since Python 3.13 __doc__ itself comes without the common indentation
    assert text
    assert [f.name for f in dataclasses.fields(TrainConfig) if f"\n    {f.name}: " not in text] == []


@pytest.mark.parametrize(("argv", "name", "value"), [
    (["--lr-scale.clip", "0.1", "--lr-scale.text_fc", "2"], "lr_scale", {"clip": 0.1, "text_fc": 2}),
    (["--lr-scale", "{clip: 0.1}"], "lr_scale", {"clip": 0.1}),
    (["--schedule", "multistep", "--schedule-options", "{epochs: [5, 10]}"], "schedule_options", {"epochs": [5, 10]}),
    (["--schedule", "onecycle", "--schedule-options.warmup", "0.02"], "schedule_options", {"warmup": 0.02}),
    (["--bank.references=recompute"], "bank", BankConfig(references="recompute")),
    (["--dropout", "true"], "dropout", True),
])  # fmt: skip
def test_settings_that_hold_names_and_numbers(tmp_path: Path, argv: list[str], name: str, value: object) -> None:
    """Given on the command line or in a file, they are the same settings, and come back from the saved file."""
    config = settings(tmp_path, "", *argv)
    assert getattr(config, name) == value != getattr(TrainConfig(), name)
    write_yaml(config, tmp_path / "saved.yaml")
    assert parse(TrainConfig, tmp_path / "saved.yaml", []) == config


@pytest.mark.parametrize(("yaml", "told"), [
    ("lr_scale: {clip: 0}", "the factor of clip must be above 0, got 0"),
    ("lr_scale: {clip: -0.1}", "clip"), ("lr_scale: {clip: .nan}", "clip"), ("lr_scale: {clip: .inf}", "clip"),
    ("lr_scale: {clip: fast}", "lr_scale"), ("lr_scale: 0.1", "lr_scale"),
    ("lr_scale: null", "lr_scale cannot be null"),
    ("bank: {references: kept}", "bank.references"), ("dropout: 0.1", "dropout"),
    ("bank: {dtype: bfloat16}", "bank.dtype"),
    ("schedule: multistep\nschedule_options: {epochs: 5}", "epochs of multistep cannot be 5"),
    ("schedule: cosine\nschedule_options: {warmup: 0.1}", "schedule cosine has no option 'warmup'; known: epochs"),
    ("beta2: 1.0", "beta2"),
])  # fmt: skip
def test_names_and_numbers_that_cannot_be_meant(tmp_path: Path, yaml: str, told: str) -> None:
    """One line that names the setting."""
    assert told in refused(tmp_path, yaml)
