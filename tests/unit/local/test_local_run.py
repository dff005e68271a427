"""What a local run keeps of the steps' output."""

from pathlib import Path

from spectraqlora_pipelines.local.run import _Lines


def test_a_refusal_is_remembered_however_much_is_written_after_it(tmp_path: Path) -> None:
    heard: list[str] = []
    with _Lines(tmp_path / "run.log", heard.append) as lines:
        lines.write("    error: data.max_length: '8': expected a length that leaves rows\n")
        lines.write("another step goes on\n" * 500)
        assert lines.refusal == "data.max_length: '8': expected a length that leaves rows"
    assert len(heard) == 501
