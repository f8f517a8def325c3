import subprocess
import sys

import pytest

from gradrank.cli.main import VERBS

HEAVY = ("torch", "numpy", "matplotlib", "rich", "peft", "transformers", "datasets", "yaml")


def loaded_by(*args: str) -> set[str]:
    """Return which heavy libraries a command imports, in a process of its own."""
    code = (
        "import sys\n"
        "from gradrank.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    print('status', end.code)\n"
        f"print('loaded', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )
    *_, last = done.stdout.splitlines()
    return set(last.split()[1:])


@pytest.mark.parametrize("args", [(), ("--help",), ("--version",), ("pln",)])
def test_nothing_heavy_is_loaded_without_a_verb(args: tuple[str, ...]) -> None:
    assert loaded_by(*args) == set()


@pytest.mark.parametrize(
    "args",
    [
        ("train", "--help"),
        ("plan", "--model", "m", "--task", "t", "--method", "grad", "--out", "x"),
        ("plan", "--model", "m", "--task", "t", "--budget", "lots", "--out", "x"),
        ("plan", "--model", "m", "--data", "absent.csv", "--head", "lm", "--out", "x"),
        ("train", "--plan", "absent.json", "--model", "m", "--task", "t", "--out", "x"),
        ("train", "--model", "m", "--task", "t", "--out", "."),
        ("report", "absent"),
        ("methods", "grad"),
    ],
)
def test_simple_mistakes_are_told_before_torch_loads(args: tuple[str, ...]) -> None:
    assert not loaded_by(*args) & {"torch", "matplotlib", "peft", "transformers", "datasets"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_headings_and_examples(run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"gradrank {verb} [OPTIONS]" in result.stdout
    assert f"Examples:\n  gradrank {verb}" in result.stdout
    assert "--json" in result.stdout
    assert "--config FILE" in result.stdout


def test_help_lists_every_verb_and_where_to_start(run) -> None:
    result = run()
    assert result.exit_code == 0
    assert all(f"  {verb} " in result.stdout for verb in VERBS)
    assert "Start here:" in result.stdout
    assert result.stdout.rstrip().count("\n  gradrank ") == 3


def test_defaults_are_shown_in_the_help(run) -> None:
    text = " ".join(run("train", "--help").stdout.split())
    assert "[default: uniform:8]" in text
    assert "[default: gard]" in text


def test_version(run) -> None:
    assert run("--version").stdout == "gradrank 0.1.0\n"
