"""Verbs run in the process, in an empty folder; what several tests look at is made once."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import Result

from cli.cli_cases import SHORT, TINY, invoke

Run = Callable[..., Result]


def blank_page(records: Sequence[object], path: Path, **_options: object) -> list[Path]:
    path.write_text(f"{len(records)} records", encoding="utf-8")
    return [path]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs a verb; only the session's runs and the verb 'report' draw real pages."""
    for module in ("training", "plan_run", "demo_run"):
        monkeypatch.setattr(f"gradrank.cli.{module}.write_report", blank_page)
    monkeypatch.chdir(tmp_path)
    return invoke


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plan."""
    out = tmp_path_factory.mktemp("cli") / "plan"
    result = invoke("plan", *TINY, "--batches", 4, "--budget", 1500, "--out", out)
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, planned: Path) -> Path:
    """The folder of a finished run of that plan."""
    out = tmp_path_factory.mktemp("cli") / "run"
    result = invoke(
        "train",
        "--plan",
        planned / "plan.json",
        "--config",
        planned / "config.yaml",
        *SHORT,
        "--out",
        out,
    )
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a demo, and what it printed."""
    out = tmp_path_factory.mktemp("cli") / "demo"
    args = ("demo", *TINY, "--batches", 4, *SHORT, "--out", out, "--json")
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    return out, result
