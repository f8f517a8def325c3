"""The page for newcomers: its commands are run, in their order, as they stand there."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from docs_cases import ROOT, blocks, commands
from gradrank.cli.main import main


def test_the_first_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shells = [text for language, text in blocks(ROOT / "docs" / "start.md") if language == "sh"]
    lines = [words for text in shells for words in commands(text)]
    assert [words[0] for words in lines][:3] == ["plan", "show", "plan"]
    for words in lines:
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, f"gradrank {' '.join(words)}\n{done.output[-2000:]}"
    for name in ("plan.json", "measurement.safetensors", "report.html", "record.json"):
        assert (tmp_path / "my-plan" / name).is_file()
    assert (tmp_path / "comparison.html").is_file()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
