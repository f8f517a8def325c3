import io
import json
import sys
import warnings

import pytest

from gradrank.cli.console import Console


def test_json_mode_keeps_stdout_for_one_object(capsys) -> None:
    console = Console(as_json=True)
    with console.working():
        print("a library prints")  # noqa: T201
        console.say("note")
        console.show("a table")
    console.result({"loss": float("nan"), "runs": [1, (2.5, float("inf"))]})
    told = capsys.readouterr()
    assert json.loads(told.out) == {"loss": None, "runs": [1, [2.5, None]]}
    assert told.out.count("\n") == 1
    assert "a library prints" in told.err
    assert "note" in told.err


def test_text_mode_prints_no_json_and_takes_markup_literally(capsys) -> None:
    console = Console()
    console.show("[bold]rank[/bold] :smile:")
    console.result({"a": 1})
    assert capsys.readouterr().out == "[bold]rank[/bold] :smile:\n"


@pytest.mark.filterwarnings("default")
def test_quiet_says_nothing_but_warnings(capsys) -> None:
    console = Console(quiet=True)
    console.say("note")
    with console.progress("work") as report:
        report(1, 2, "")
    with console.working():
        warnings.warn("rank 0\neverywhere", UserWarning, stacklevel=1)
        warnings.warn("old name", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: rank 0 everywhere\n"


@pytest.mark.parametrize(("total", "most"), [(3, 3), (40, 11), (1000, 11)])
def test_progress_elsewhere_is_a_line_about_every_tenth(capsys, total, most) -> None:
    with Console().progress("work") as report:
        for done in range(1, total + 1):
            report(done, total, "loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) <= most
    assert lines[-1].startswith(f"work: {total}/{total} (100%, loss 1.0")


def test_progress_on_a_terminal_is_a_bar(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Console().progress("work") as report:
        for done in range(1, 4):
            report(done, 3, f"loss {done}.0")
    assert "work" in screen.getvalue()
    assert "3/3" in screen.getvalue()
    assert "loss 3.0" in screen.getvalue()
