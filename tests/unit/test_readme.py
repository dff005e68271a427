"""The README's settings reference is the settings' own."""

from pathlib import Path

from spectraqlora.settings import reference


def test_the_readme_lists_every_setting_as_it_is() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    for key, default, meaning in reference():
        assert f"| `{key}` | `{default}` | {meaning} |" in text
