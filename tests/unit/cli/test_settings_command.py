"""The command settings, and how settings come together from file, options and --set."""

from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.settings import reference
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.cli.options import load_settings
from spectraqlora_pipelines.cluster.values import reference as values_reference
from typer.testing import CliRunner


def settings(*arguments: str) -> str:
    done = CliRunner().invoke(app.app, ["settings", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_all_settings_are_listed_or_those_of_a_section_or_one() -> None:
    everything = settings("--markdown")
    assert everything.count("\n") == len(reference()) + 2
    section = settings("train")
    assert "train.learning_rate" in section and "select.rank" not in section and "retrain" not in section
    assert settings("train.learning_rate", "--markdown").count("\n") == 3


def test_a_clusters_keys_are_listed_and_brackets_are_shown() -> None:
    shown = settings("--cluster")
    assert all(key in shown for key, _, _ in values_reference())
    assert "defaults.secrets[].name" in shown


def test_an_unknown_section_is_refused_with_the_known_ones() -> None:
    done = CliRunner().invoke(app.app, ["settings", "trian"])
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith("SECTION: 'trian': expected one of ") and "train" in str(
        done.exception
    )


def test_set_wins_over_options_and_options_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("{seed: 1, rounds: 2, train: {max_steps: 3, batch_size: 4}}")
    loaded = load_settings(config, {"rounds": 5, "train.max_steps": 6, "seed": None}, ["train.max_steps=7"])
    assert (loaded.seed, loaded.rounds, loaded.train.max_steps, loaded.train.batch_size) == (1, 5, 7, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "a readable YAML file"),
        (b"\xff\xfe\x00", "a readable YAML file"),
        (b"a: [", "valid YAML ("),
        (b"- 1", "a YAML mapping of settings"),
    ],
)
def test_a_file_that_is_no_mapping_of_settings_is_refused(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    config = tmp_path / "settings.yaml"
    if content is not None:
        config.write_bytes(content)
    with pytest.raises(InputError) as refused:
        load_settings(config, {}, None)
    assert str(refused.value).startswith("--config: ") and words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_option_of_a_section_that_is_no_mapping_in_the_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("train: 3")
    with pytest.raises(InputError, match=r"^train: '3': expected a mapping of settings"):
        load_settings(config, {"train.max_steps": 4}, None)
